"""The order and the budget of the parts of scripts/bench_gpu.sh: what is skipped, what is killed, what is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import timed_parts
from timed_parts import Part

SCRIPTS = timed_parts.REPOSITORY / "scripts"


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def run(parts, budget_s, tmp_path):
    """The last state of each part, and all that was handed on, without repeats."""
    kept: list[list[str]] = []

    def keep(found):
        states = [f"{one['part']} {one['state']}" for one in found]
        if states not in kept[-1:]:
            kept.append(states)

    found = timed_parts.run_parts(parts, budget_s, tmp_path / "log", keep)
    return [f"{one['part']} {one['state']}" for one in found], kept


def test_a_part_that_fails_ends_no_other_and_each_is_kept_at_once(tmp_path):
    """Catches a record that is written at the end alone, a stop at the first failure, and a part that runs in vain."""
    parts = [
        Part("first", python("import sys; sys.exit(3)"), 0, 600),
        Part("second", python("print('fine')"), 0, 600),
        Part("third", python(""), 0, 600, missing="no such engine here"),
        Part("fourth", python(""), 0, 600, after="first"),
    ]
    states, kept = run(parts, 600, tmp_path)
    assert states == ["first failed", "second done", "third skipped", "fourth skipped"]
    assert kept[:4] == [["first running"], ["first failed"], ["first failed", "second running"], ["first failed", "second done"]]
    assert "fine" in (tmp_path / "log").read_text()


def test_a_part_without_time_is_skipped_and_a_later_one_that_needs_less_runs(tmp_path):
    """Catches a budget that one long part uses up, and one that ends everything behind the first part that does not fit."""
    parts = [Part("long", python(""), 1000, 2000), Part("short", python(""), 1, 600)]
    assert run(parts, 600, tmp_path)[0] == ["long skipped", "short done"]


def test_later_parts_have_what_they_need(tmp_path, monkeypatch):
    """Catches long parts that take all of the budget, and needs of parts that cannot run which are held back for nothing."""
    given = []

    def run_part(part, timeout_s, *rest):
        given.append(timeout_s)
        return {"part": part.name, "state": "done", "why": ""}

    monkeypatch.setattr(timed_parts, "run_part", run_part)
    parts = [Part("a", [], 10, 500), Part("b", [], 100, 150), Part("c", [], 200, 300, missing="x"), Part("d", [], 60, 500)]
    timed_parts.run_parts(parts, 400, tmp_path / "log", lambda found: None)
    assert given == pytest.approx([240, 150, 400], abs=1), "400 less 160; its own limit; all that is left"
    given.clear()
    timed_parts.run_parts(parts, 105, tmp_path / "log", lambda found: None)
    assert given == pytest.approx([10, 100, 105], abs=1), "time is short: what is worth more has what it needs"


def program_with_child(tmp_path, more):
    """A part that starts a process in a session of its own and notes its id."""
    child = [sys.executable, "-c", "import time; time.sleep(300)"]
    return (
        f"import pathlib, subprocess, sys, time; child = subprocess.Popen({child!r}, start_new_session=True);"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); {more}; time.sleep(300)"
    )


@pytest.mark.timeout(120)
def test_a_part_ends_with_its_time_and_what_it_wrote_is_kept(tmp_path, monkeypatch):
    """Catches a part that holds the device for the next one, processes that it leaves behind, and records that are lost."""
    monkeypatch.setattr(timed_parts, "LOOK_S", 0.02)
    more = (
        f"pathlib.Path({str(tmp_path / 'speed.md')!r}).write_text('one row');"
        f"pathlib.Path({str(tmp_path / 'speed.json')!r}).write_text('[1]')"
    )
    noticed: list[dict[str, Any]] = []
    # Its time is over as soon as its record has been seen, however long that takes.
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * (len(noticed) > 1))
    monkeypatch.setattr(timed_parts, "time", clock)
    part = Part("speed", python(program_with_child(tmp_path, more)), 0, 900, record=tmp_path / "speed")
    found = timed_parts.run_part(part, 900, tmp_path / "log", noticed.append)
    assert (found["state"], found["md"], found["json"]) == ("ended", "one row", [1])
    assert [one.get("md") for one in noticed] == [None, "one row"] and noticed[1]["state"] == "running"
    wait_for_end(int((tmp_path / "pid").read_text()))


@pytest.mark.timeout(120)
def test_a_signal_ends_the_part_and_all_later_ones(tmp_path, monkeypatch):
    """Catches parts that run on, holding the device, when the script is told to stop; and a record that calls them running."""

    def interrupted(process, *rest):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(timed_parts, "wait_for", interrupted)
    parts = [Part("one", python(program_with_child(tmp_path, "pass")), 0, 600), Part("two", python(""), 0, 600)]
    assert run(parts, 600, tmp_path)[0] == ["one interrupted"]
    wait_for_end(int((tmp_path / "pid").read_text()))


def test_commands_in_turn_end_at_the_first_that_fails(tmp_path):
    """Catches a comparison of runs that have failed, and a failure that a later command hides."""
    touch = [python(f"import pathlib; pathlib.Path({str(tmp_path / name)!r}).touch()") for name in "ab"]
    assert subprocess.run(timed_parts.in_turn(touch[0], python("import sys; sys.exit(3)"), touch[1])).returncode == 3
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert subprocess.run(timed_parts.in_turn(*touch)).returncode == 0 and (tmp_path / "b").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel must kill it")
def test_a_part_dies_with_a_script_that_is_killed(tmp_path, several):
    """Catches a part that outlives a machine's own time limit, and holds its device; also the second of several commands."""
    sleeper = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(300)"
    argv = timed_parts.in_turn(python(""), python(sleeper)) if several else python(sleeper)
    script = (
        "import pathlib, sys, timed_parts as t;"
        f"t.run_part(t.Part('x', {argv!r}, 0, 300), 300, pathlib.Path({str(tmp_path / 'log')!r}), print)"
    )
    process = subprocess.Popen(python(script), env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    wait_for_end(int((tmp_path / "pid").read_text()))


@pytest.mark.timeout(120)
def test_rows_of_a_record_that_was_cut_short_are_kept(tmp_path, monkeypatch):
    """Catches rows that were in the record already and are lost with the half of a file that the killed part has left."""
    monkeypatch.setattr(timed_parts, "LOOK_S", 0.02)
    record, seen = tmp_path / "x", tmp_path / "seen"
    program = (
        f"import pathlib, time; write = pathlib.Path({str(record)!r} + '.json').write_text;"
        f"pathlib.Path({str(record)!r} + '.md').write_text('a row'); write('[1]')\n"
        f"while not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.01)\n"
        "write('[1, '); raise SystemExit(1)"
    )

    def notice(one):
        if "md" in one:
            seen.touch()

    found = timed_parts.run_part(Part("x", python(program), 0, 600, record=record), 600, tmp_path / "log", notice)
    assert (found["state"], found["md"], found["json"]) == ("failed", "a row", [1])


@pytest.mark.parametrize(("written", "state"), [("[1", "failed"), ("[1]", "done")])
def test_a_broken_record_fails_its_part_alone(tmp_path, written, state):
    """Catches a file cut short that takes all other parts' records with it, and a part that is done without a record."""
    program = f"import pathlib; [pathlib.Path({str(tmp_path)!r}, 'x.' + kind).write_text({written!r}) for kind in ('md', 'json')]"
    parts = [Part("x", python(program), 0, 600, record=tmp_path / "x"), Part("y", python(""), 0, 600)]
    assert run(parts, 600, tmp_path)[0] == [f"x {state}", "y done"]


def wait_for_end(pid: int) -> None:
    """It ends, or the test does by its time-out. A zombie has ended: its parent is gone, and nobody may have asked for it yet."""
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.02)
