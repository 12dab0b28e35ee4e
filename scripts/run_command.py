"""Run a whole command, from start to exit, and measure it from outside: seconds, and the peak memory of its rank 0.

What bench_prepare.py and commands.py share. Memory is read from /proc, so there is none of it where the system is not Linux.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class CommandError(Exception):
    """A command that failed. returncode: as subprocess has it; stderr: all that it printed there."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        super().__init__(f"{' '.join(argv)} returned {returncode}:\n{stderr[-4000:]}")
        self.returncode = returncode
        self.stderr = stderr

    @property
    def is_out_of_memory(self) -> bool:
        text = self.stderr.lower()
        return self.returncode in (-9, 137) or "out of memory" in text or "can't allocate memory" in text


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that has ended well.

    began_unix_s:        when it was started.
    wall_s:              from then to its exit.
    peak_bytes:          the largest resident memory of its rank 0; 0 where the system does not report it.
    workers_peak_bytes:  the largest sum of resident memory of the processes that rank 0 has started; pages that they share count
                         in each.
    """

    began_unix_s: float
    wall_s: float
    peak_bytes: int
    workers_peak_bytes: int
    stdout: str


def run_command(argv: Sequence[str], threads: int, cores: Sequence[int] | None = None, is_launcher: bool = False) -> Finished:
    """Run `argv` with `threads` threads for PyTorch, on `cores` or on all that this process may use.

    is_launcher: the command is torchrun, which starts rank 0 as a process of its own. Raises CommandError if the command fails.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    began_unix_s, started = time.time(), time.perf_counter()
    with pinned(cores):
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **settings}
        )
    with PeakMemory(process.pid, is_launcher) as memory:
        stdout, stderr = process.communicate()
        wall_s = time.perf_counter() - started
    if process.returncode:
        raise CommandError(argv, process.returncode, stderr)
    return Finished(began_unix_s, wall_s, memory.peak_bytes, memory.workers_peak_bytes, stdout)


def usable_cores() -> list[int]:
    """The cores that this process may use; empty where the system does not pin processes to cores."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def pinned(cores: Sequence[int] | None) -> Iterator[None]:
    """Processes that are started meanwhile run on these cores alone."""
    before = usable_cores()
    if not cores or not before:
        yield
        return
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class PeakMemory:
    """A thread that reads the memory of a command's rank 0 while its block runs.

    Rank 0 is the process `pid`, or, where that is a launcher, the one among its children with RANK=0 in its environment. The
    system keeps the peak of a process: only what a process grows by after the last reading is missed.
    """

    def __init__(self, pid: int, is_launcher: bool, interval_s: float = 0.2) -> None:
        self.peak_bytes = self.workers_peak_bytes = 0
        self._find_leader = (lambda: find_rank_0(pid)) if is_launcher else lambda: pid
        self._interval_s = interval_s
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._finished.wait(self._interval_s):
            leader = self._find_leader()
            if leader is None:
                continue
            self.peak_bytes = max(self.peak_bytes, read_memory(leader, "VmHWM"))
            workers = sum(read_memory(pid, "VmRSS") for pid in descendants(leader))
            self.workers_peak_bytes = max(self.workers_peak_bytes, workers)


def find_rank_0(pid: int) -> int | None:
    """The process of rank 0 among those that the launcher `pid` has started; None before and after it lives."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"RANK=0" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
    return None


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # the thread has ended
                found += map(int, (thread / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    direct = children(pid)
    return [*direct, *(one for child in direct for one in descendants(child))]


def read_memory(pid: int, what: str) -> int:
    """Bytes: "VmRSS", resident now, or "VmHWM", the peak so far. 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0
