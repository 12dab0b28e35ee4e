"""Where this rank's time and bytes go: phases, collectives, counts. Plain Python; telemetry.py makes sense of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddp_eval.telemetry.timeline import Moments, coarsen

_MOST_MOMENTS = 4096  # of a timeline


class Phases:
    """Seconds of this rank by phase. At any time one phase runs: an inner one stops the clock of the outer, so all add up.

    Only the main thread may use it.
    """

    def __init__(self, name: str = "other", age_s: float = 0.0) -> None:
        """name: what runs now, and has run for `age_s` seconds already."""
        self.began = self._since = time.perf_counter() - age_s
        self.began_unix_s = time.time() - age_s
        self._running = [name]
        self._seconds: dict[str, float] = {}
        # When (seconds since the start) which phase began; of long runs only what a plot can show.
        self.timeline: Moments = [(0.0, name)]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._settle()
        self._running.append(name)
        self._note()
        try:
            yield
        finally:
            self._settle()
            self._running.pop()
            self._note()

    def switch(self, name: str) -> None:
        """From now on the phase that runs has another name."""
        self._settle()
        self._running[-1] = name
        self._note()

    @property
    def seconds(self) -> dict[str, float]:
        """{phase: seconds}, up to now; their sum is `wall_s`."""
        self._settle()
        return dict(self._seconds)

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self.began

    def _settle(self) -> None:
        now = time.perf_counter()
        name = self._running[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _note(self) -> None:
        if self.timeline[-1][1] == self._running[-1]:
            return
        moment = self._since - self.began
        if len(self.timeline) >= _MOST_MOMENTS:
            self.timeline = coarsen(self.timeline, moment, 8 * moment / _MOST_MOMENTS)  # a quarter is left, or less
        if self.timeline[-1][1] != self._running[-1]:
            self.timeline.append((moment, self._running[-1]))


class Meter:
    """All that one rank measures of itself.

    collectives:  {name: {"calls", "seconds", "sent_bytes", "received_bytes"}}: payloads that this rank gives and takes, whatever
                  the algorithm underneath moves.
    counts:       {what: how many}.
    background_s: seconds of work that other threads did meanwhile; in no phase.
    samples:      rows of telemetry.COLUMNS; sampling_s: processor seconds that taking them cost.
    """

    def __init__(self, phase: str = "other", age_s: float = 0.0) -> None:
        self.reset()
        self.phases = Phases(phase, age_s)

    def reset(self) -> None:
        """Start again, for the next run of the same process."""
        self.phases = Phases()
        self.collectives: dict[str, dict[str, float]] = {}
        self.counts: dict[str, int] = {}
        self.background_s: dict[str, float] = {}
        self.samples: list[list[float | None]] = []
        self.sampling_s = 0.0

    def count(self, what: str, amount: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + amount

    @contextlib.contextmanager
    def collective(self, name: str, sent_bytes: int, received_bytes: int) -> Iterator[None]:
        """Time one call of a collective and note its payload."""
        started = time.perf_counter()
        yield
        known = self.collectives.setdefault(name, {"calls": 0, "seconds": 0.0, "sent_bytes": 0, "received_bytes": 0})
        known["calls"] += 1
        known["seconds"] += time.perf_counter() - started
        known["sent_bytes"] += sent_bytes
        known["received_bytes"] += received_bytes

    @contextlib.contextmanager
    def background(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.background_s[name] = time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        return {
            "began_unix_s": self.phases.began_unix_s,
            "wall_s": self.phases.wall_s,
            "phases_s": self.phases.seconds,
            "background_s": self.background_s,
            "timeline": [list(moment) for moment in self.phases.timeline],
            "counts": self.counts,
            "collectives": self.collectives,
            "samples": self.samples,
            "sampling_s": self.sampling_s,
        }


def process_age_s() -> float:
    """Seconds since the operating system started this process; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0
