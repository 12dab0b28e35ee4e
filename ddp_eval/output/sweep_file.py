"""sweep.json in a sweep's directory: which models there are and how each stands, for reports and scripts.

    {"version": 1, "models": [{"name", "model", "revision", "step", "state": "done" | "failed" | "waiting", "reason", "seconds"}]}

Each model's run is in the directory of its name beside it. Several launches may work on one sweep: each writes what it knows over
what the others have written, and what a run directory says itself counts more than either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddp_eval.output import write
from ddp_eval.system.files import read_object, replace_json

SWEEP = "sweep.json"
DONE, FAILED, WAITING = "done", "failed", "waiting"


def read_sweep(directory: Path) -> dict[str, dict[str, Any]]:
    """{name: entry}; {} where there is no such file."""
    models = read_object(directory / SWEEP).get("models")
    entries = [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []
    return {one["name"]: one for one in entries if isinstance(one.get("name"), str) and "state" in one}


def write_sweep(directory: Path, models: Iterable[dict[str, Any]], own: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write what is known of all models, and return their entries. Raises OSError.

    models: entries of all that there are now, in order, as waiting. own: what this launch knows of some, by name.
    """
    before, now = read_sweep(directory), {one["name"]: one for one in models}
    entries = []
    for name in dict.fromkeys([*now, *before]):
        earlier = before.get(name)
        is_settled = earlier is not None and (earlier["state"] != WAITING or name not in now)
        entry = own.get(name) or (earlier if is_settled else now[name])
        assert entry is not None
        if entry["state"] == DONE and entry["seconds"] is None and earlier is not None and earlier["state"] == DONE:
            entry = {**entry, "seconds": earlier.get("seconds")}  # another launch, or an earlier one, has evaluated it
        if entry["state"] == WAITING and os.path.isfile(directory / name / write.MANIFEST):  # by another launch
            entry = {**entry, "state": DONE, "reason": None}
        entries.append(entry)
    replace_json(directory / SWEEP, {"version": 1, "models": entries})
    return entries
