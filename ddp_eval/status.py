"""status.json in the run directory: how the run stands, for scripts, since torchrun's own exit code is always 1 when it isn't 0.

    {"state": "running" | "done" | "preempted" | "failed", "reason": one sentence, "time": when}

A run that was killed leaves "running" behind. Light: it is imported before torch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any

STATUS = "status.json"
RUNNING, DONE, PREEMPTED, FAILED = "running", "done", "preempted", "failed"


def write_status(directory: Path, state: str, reason: str) -> None:
    """Raises OSError."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    replace_json(directory / STATUS, {"state": state, "reason": reason, "time": now})


def replace_json(path: Path, value: Any) -> None:
    """Write a small file whole or not at all. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.ddp_eval.tmp")
    try:
        aside.write_text(json.dumps(value) + "\n")
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def note_end(directory: Path, state: str, reason: str, first_hand: bool) -> None:
    """A rank's last word, as far as the disk lets it. What it knows only through others replaces nobody's own word."""
    with contextlib.suppress(OSError):
        if first_hand or read_status(directory).get("state") == RUNNING:
            write_status(directory, state, reason)


def read_status(directory: Path) -> dict[str, str]:
    """{} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((directory / STATUS).read_text())
        if isinstance(found, dict):
            return found
    return {}
