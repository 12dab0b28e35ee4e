"""sweep.json in a sweep's directory: which models there are and how each stands, for reports and scripts.

    {"version": 1, "models": [{"name", "model", "revision", "step", "state", "reason", "seconds", "logged"}]}

    state     "done", "failed", "waiting", or "gone": its files were removed before it was evaluated
    reason    a sentence, or null
    logged    marks of the trackers that have its results (tasks/trackers.py)

Each model's run is in the directory of its name beside it. Several launches may work on one sweep: each changes the file while it
holds its lock, and adds what it has learned since; what others have written, and what a run directory says itself, stays.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddp_eval.output import write
from ddp_eval.output.lock import LOCK, Lock, LockHeldError, OnWait, not_at_all
from ddp_eval.system import read_back
from ddp_eval.system.files import replace_json

SWEEP = "sweep.json"
DONE, FAILED, WAITING, GONE = "done", "failed", "waiting", "gone"
_NOTHING: dict[str, Any] = {"model": None, "revision": None, "step": None, "reason": None, "seconds": None, "logged": []}
_PATIENCE_S = 60.0  # with a launch that is alive and holds the lock: it writes two small files


def read_sweep(directory: Path) -> list[dict[str, Any]]:
    """The entries of sweep.json, all of their fields there. Raises UserError, naming the file, where it cannot be read."""
    from ddp_eval.output import shapes  # it takes a sixth of a second

    found = read_back.read_json(directory / SWEEP, shapes.SWEEP, directory)
    return [{**_NOTHING, **one} for one in found["models"]]


def read_earlier(directory: Path) -> dict[str, dict[str, Any]]:
    """{name: entry}; {} where there is no sweep.json yet. Raises UserError as `read_sweep`."""
    return {one["name"]: one for one in read_sweep(directory)} if os.path.lexists(directory / SWEEP) else {}


@contextlib.contextmanager
def changing(directory: Path, on_wait: OnWait = not_at_all) -> Iterator[None]:
    """Within the block no other launch changes the sweep's files. on_wait: see `Lock`.

    Raises LockHeldError where another one that is alive keeps the lock for a minute, OSError where the disk refuses.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        lock = Lock(directory / LOCK, lambda: None, on_wait)
        try:
            lock.acquire()
            break
        except LockHeldError:  # by one launch, or by one after the other
            if time.monotonic() > deadline:
                raise
    try:
        yield
    finally:
        lock.release()


def merge(
    directory: Path,
    before: Mapping[str, dict[str, Any]],
    models: Iterable[dict[str, Any]],
    own: Mapping[str, dict[str, Any]],
    news: Collection[str],
) -> list[dict[str, Any]]:
    """What is known of all models.

    before: what sweep.json says. models: entries of all that there are now, in order, as waiting. own: what this launch knows of
    some, by name; news: names of those of which sweep.json does not have it yet.
    """
    now = {one["name"]: one for one in models}
    entries = []
    for name in dict.fromkeys([*now, *before, *own]):
        earlier = before.get(name)
        entry = _choose(earlier, now.get(name), own.get(name), name in news)
        if earlier is not None and entry["state"] == earlier["state"] == DONE and entry["seconds"] is None:
            # Another launch, or an earlier one, has evaluated it.
            logged = sorted({*entry["logged"], *earlier["logged"]})
            entry = {**entry, "seconds": earlier["seconds"], "logged": logged}
        if entry["state"] in (WAITING, GONE) and os.path.isfile(directory / name / write.MANIFEST):  # by another launch
            entry = {**entry, "state": DONE, "reason": None}
        entries.append(entry)
    return entries


def _choose(
    earlier: dict[str, Any] | None, now: dict[str, Any] | None, own: dict[str, Any] | None, is_news: bool
) -> dict[str, Any]:
    """Of one model: what this launch has just learned, else how others have left it, else what it knew before."""
    is_done = earlier is not None and earlier["state"] == DONE
    if own is not None and is_news and not (is_done and own["state"] in (WAITING, GONE)):  # another launch has come to its end
        return own
    if earlier is not None and (now is None or earlier["state"] in (DONE, FAILED)):
        return earlier
    chosen = own or now
    assert chosen is not None, "it is in one of them"
    return chosen


def write_sweep(directory: Path, entries: list[dict[str, Any]]) -> None:
    """To be called while `changing` it. Raises OSError."""
    from ddp_eval.output import shapes

    replace_json(directory / SWEEP, {"version": shapes.SWEEP_VERSION, "models": entries})
