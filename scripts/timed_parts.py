"""Commands within a given time, one after another, most worth first; what bench_gpu.py runs.

A part is a command of its own. It may take what the budget leaves once every later part has what it needs, and at least what it
needs itself. One that fails, hangs or has had its time ends no other: it is killed with all that it has started. What parts came
to is handed on when a part starts, whenever its own record grows, and when it ends: whatever ends the whole loses nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from run_command import descendants  # beside this file

REPOSITORY = Path(__file__).resolve().parent.parent
LOOK_S = 5.0  # between two looks at the record of the part that runs
LAST_LINES = 25  # of a part's output that are kept where it has no record

Found = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """name: of its record. needs_s: left of the budget, or it is skipped. at_most_s: then it is killed.

    record: the path, without .md and .json, that the command writes its own record to. environment: variables of its own.
    missing: why it cannot run here, or "". after: the part without which it cannot run.
    """

    name: str
    argv: Sequence[str]
    needs_s: float
    at_most_s: float
    record: Path | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing: str = ""
    after: str = ""


def run_parts(parts: Sequence[Part], budget_s: float, log: Path, keep: Callable[[Found], None]) -> Found:
    """Run the parts in order within the budget; what each came to. keep: is given that too, as far as it is known."""
    ends = time.monotonic() + budget_s
    found: Found = []
    for index, part in enumerate(parts):
        left_s = ends - time.monotonic()
        later_s = sum(later.needs_s for later in parts[index + 1 :] if not later.missing)
        if why := reason_to_skip(part, left_s, found):
            found.append({"part": part.name, "state": "skipped", "why": why})
        else:
            timeout_s = min(part.at_most_s, left_s, max(part.needs_s, left_s - later_s))
            found.append(run_part(part, timeout_s, log, lambda one: keep([*found, one])))
        print(describe(found[-1]), file=sys.stderr, flush=True)
        keep(found)
        if found[-1]["state"] == "interrupted":
            break
    return found


def reason_to_skip(part: Part, left_s: float, found: Found) -> str:
    if part.missing:
        return part.missing
    if any(one["part"] == part.after and one["state"] != "done" for one in found):
        return f"the part {part.after} is not done"
    return f"{left_s:.0f} s left, it needs {part.needs_s:.0f}" if left_s < part.needs_s else ""


def run_part(part: Part, timeout_s: float, log: Path, notice: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What a part came to: its state, seconds, the end of its output, and its own record, as far as it came.

    notice: is given that when the part starts, and whenever its record has grown.
    """
    started, cpu_before = time.monotonic(), cpu_seconds()
    with log.open("ab") as output:
        output.write(f"\n== {part.name}: {shlex.join(part.argv)}\n".encode())
        output.flush()
        begins = output.tell()

        record: dict[str, Any] = {}  # the last that was whole

        def look(state: str, why: str = "") -> dict[str, Any]:
            record.update(read_record(part))
            seconds = {"seconds": round(time.monotonic() - started, 1), "cpu_s": round(cpu_seconds() - cpu_before, 1)}
            return {
                "part": part.name,
                "state": state,
                "why": why,
                **seconds,
                "last": last_lines(log, begins),
                **record,
            }

        notice(look("running"))
        process = subprocess.Popen(
            part.argv, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=REPOSITORY,
            env={**os.environ, **part.environment}, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            state, why = wait_for(process, timeout_s, part, lambda: notice(look("running")))
        except KeyboardInterrupt:
            state, why = "interrupted", "by a signal"
        finally:
            end_session(process)
        end = look(state, why)
        if state == "done" and part.record and "json" not in end:
            end |= {"state": "failed", "why": "it wrote no record"}
        return end


def wait_for(process: subprocess.Popen[bytes], timeout_s: float, part: Part, grown: Callable[[], None]) -> tuple[str, str]:
    """The state in which a part ends, and why. grown: is called when its record is written."""
    ends, written = time.monotonic() + timeout_s, 0.0
    while True:
        try:
            code = process.wait(max(0.0, min(LOOK_S, ends - time.monotonic())))
            return ("done", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            if time.monotonic() >= ends:
                return "ended", f"after its {timeout_s:.0f} s"
        record = Path(f"{part.record}.json")
        if part.record and record.exists() and record.stat().st_mtime != written:
            written = record.stat().st_mtime
            grown()


def read_record(part: Part) -> dict[str, Any]:
    """{"md", "json"} that the part has written; a file that it is about to write is left out."""
    record: dict[str, Any] = {}
    if part.record:
        with contextlib.suppress(OSError, ValueError):
            record["json"] = json.loads(Path(f"{part.record}.json").read_text())
            record["md"] = Path(f"{part.record}.md").read_text()
    return record


def last_lines(log: Path, begins: int) -> list[str]:
    """The last lines from a byte of the log on, no progress bars. Where this machine keeps its files is of no use to others."""
    with log.open("rb") as file:
        file.seek(begins)
        text = file.read().decode(errors="replace")
    text = text.replace(f"{REPOSITORY}/", "").replace(f"{sys.prefix}/", "")
    return [line for line in text.splitlines() if line.strip() and "%|" not in line][-LAST_LINES:]


def cpu_seconds() -> float:
    """Of all processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_turn(*commands: Sequence[str]) -> list[str]:
    """The command that runs several, one after another, up to the first that fails, and that they die with."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import timed_parts; timed_parts.run_in_turn(json.loads(sys.argv[2]))"
    )
    return [sys.executable, "-c", program, str(Path(__file__).resolve().parent), json.dumps(commands)]


def run_in_turn(commands: Sequence[Sequence[str]]) -> None:
    for argv in commands:
        if code := subprocess.run(argv, preexec_fn=die_with_parent).returncode:
            sys.exit(code if code > 0 else 128 - code)


def die_with_parent() -> None:
    """In a process that is about to be a part: the kernel kills it when this script is killed. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what a part has started and left running, in sessions of its own too: it would hold the device, or its memory."""
    started = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds back is left behind
        process.wait(30)


def describe(one: dict[str, Any]) -> str:
    seconds = f" in {one['seconds']:.0f} s" if "seconds" in one else ""
    return f"{one['part']}: {one['state']}{seconds}{' (' + one['why'] + ')' if one['why'] else ''}"
