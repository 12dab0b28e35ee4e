"""A rank's phases over time, with stretches too short to be seen merged: pipelined ranks change phase several times a pack."""

from __future__ import annotations

from collections.abc import Sequence

Moments = list[tuple[float, str]]


def coarsen(timeline: Sequence[tuple[float, str]], end_s: float, least_s: float) -> Moments:
    """The timeline with neighbouring spans shorter than `least_s` as one, of the phase that took most of their time.

    timeline:  when (seconds) which phase began, ascending; the last one goes on until `end_s`.
    Returns at most 2 * (end_s - start) / least_s + 2 moments; longer spans begin within least_s of where they did.

    >>> coarsen([(0, "load"), (5, "wait"), (5.1, "forward"), (5.4, "wait"), (5.5, "forward"), (6.5, "write")], 9, 1)
    [(0, 'load'), (5, 'forward'), (6.5, 'write')]
    """
    found: Moments = []
    merged: dict[str, float] = {}  # seconds by phase of the short spans since `began`
    began = 0.0

    def add(moment: float, phase: str) -> None:
        if not found or found[-1][1] != phase:
            found.append((moment, phase))

    def flush() -> None:
        if merged:
            add(began, max(merged, key=merged.__getitem__))
            merged.clear()

    ends = [*(moment for moment, _ in timeline[1:]), end_s]
    for (start, phase), end in zip(timeline, ends, strict=False):
        if end - start >= least_s:
            flush()
            add(start, phase)
            continue
        if not merged:
            began = start
        merged[phase] = merged.get(phase, 0.0) + end - start
        if end - began >= least_s:
            flush()
    flush()
    return found
