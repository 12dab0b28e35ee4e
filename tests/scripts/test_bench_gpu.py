"""The order and the budget of scripts/bench_gpu.sh: what is skipped, what is ended, what is kept. No part of it computes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import bench_gpu
import pytest
from bench_gpu import Part


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def run(parts, budget_s, tmp_path):
    kept: list[list[str]] = []
    passed = bench_gpu.run_parts(
        parts, budget_s, tmp_path / "log", lambda found: kept.append([f"{one['part']} {one['state']}" for one in found])
    )
    return passed, kept


def test_a_part_that_fails_ends_no_other_and_each_is_kept_at_once(tmp_path):
    """Catches a record that is written at the end alone, and a script that stops at the first failure."""
    parts = [
        Part("first", python("import sys; sys.exit(3)"), 0, 60),
        Part("second", python("print('fine')"), 0, 60),
        Part("third", python(""), 0, 60, missing="no such engine here"),
    ]
    passed, kept = run(parts, 60, tmp_path)
    assert not passed
    assert kept == [["first failed"], ["first failed", "second done"], ["first failed", "second done", "third skipped"]]
    assert "fine" in (tmp_path / "log").read_text()
    assert run(parts[1:], 60, tmp_path)[0]


def test_a_part_without_time_is_skipped_and_a_later_one_that_needs_less_runs(tmp_path):
    """Catches a budget that one long part uses up, and one that ends everything behind the first part that does not fit."""
    parts = [Part("long", python(""), 1000, 2000), Part("short", python(""), 1, 60)]
    assert run(parts, 60, tmp_path) == (True, [["long skipped"], ["long skipped", "short done"]])


@pytest.mark.timeout(120)
def test_a_part_ends_with_its_time_and_what_it_wrote_is_kept(tmp_path):
    """Catches a part that holds the device for the next one, processes that it leaves behind, and records that are lost."""
    child = "import time; time.sleep(300)"
    program = (
        f"import pathlib, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid));"
        f"pathlib.Path({str(tmp_path / 'speed.md')!r}).write_text('one row');"
        f"pathlib.Path({str(tmp_path / 'speed.json')!r}).write_text('[1]'); time.sleep(300)"
    )
    began = time.monotonic()
    found = bench_gpu.run_part(Part("speed", python(program), 0, 5, record=tmp_path / "speed"), 5, tmp_path / "log")
    assert time.monotonic() - began < 60
    assert (found["state"], found["md"], found["json"]) == ("ended", "one row", [1])
    while is_alive(int((tmp_path / "pid").read_text())):  # it was ended with the part, or this test ends by its time-out
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """A zombie is not: its parent is gone, and nobody may have asked for its end yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *flags])
    return bench_gpu.read_arguments()


def test_the_parts_name_what_is_there(monkeypatch, tmp_path):
    """Catches a part whose script, test folder or tasks have moved, which the card would be the first to find."""
    args = arguments(monkeypatch, "--rehearse")
    parts = bench_gpu.make_parts(args, tmp_path)
    for part in parts:
        for word in part.argv:
            assert not word.endswith(".py") or Path(word).exists(), word
    assert (bench_gpu.REPOSITORY / "tests" / "gpu").is_dir() and args.generation_path.is_dir() and args.include_path.is_dir()
    whole = bench_gpu.make_parts(arguments(monkeypatch), tmp_path)
    assert [part.name for part in whole] == [part.name for part in parts]
    assert sum(part.needs_s for part in whole) < 690, "each has a place in the budget, the longest ones cut short"


def test_tasks_of_ones_own_need_their_generation_tasks(monkeypatch, capsys):
    """Catches generation over the tests' tasks beside tasks of another directory."""
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--include_path", "tasks")
    assert "--include_path needs --generation_tasks" in capsys.readouterr().err


def test_the_report_says_what_each_part_came_to():
    """Catches reasons that are lost, and a part's own table that is not in the report."""
    parts = [
        {"part": "tests", "state": "done", "why": "", "seconds": 12.0, "last": ["3 passed"]},
        {"part": "speed", "state": "ended", "why": "after its 9 s", "seconds": 9.0, "last": [], "md": "| a row |", "json": {}},
        {"part": "vllm", "state": "skipped", "why": "vLLM is not installed"},
    ]
    report = {"date": "d", "commit": "c", "command": "x", "hardware": "h", "parts": parts}
    text = bench_gpu.format_report(report)
    assert "| vllm | skipped (vLLM is not installed) |" in text and "| speed | ended in 9 s (after its 9 s) |" in text
    assert "3 passed" in text and "| a row |" in text
