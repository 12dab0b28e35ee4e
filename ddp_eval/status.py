"""status.json in the run directory: how the run stands, for scripts, since torchrun's own exit code is always 1 when it isn't 0.

    {"state": "running" | "done" | "preempted" | "failed", "reason": one sentence, "time": when, "launch": whose (restart.py)}

A run that was killed leaves "running" behind. Light: it is imported before torch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_eval import restart

STATUS = "status.json"
RUNNING, DONE, PREEMPTED, FAILED = "running", "done", "preempted", "failed"


def write_status(directory: Path, state: str, reason: str, still: Callable[[], bool] = lambda: True) -> None:
    """still: asked in the last moment whether to. Raises OSError."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    replace_json(directory / STATUS, {"state": state, "reason": reason, "time": now, "launch": restart.launches()}, still)


def replace_json(path: Path, value: Any, still: Callable[[], bool] = lambda: True) -> None:
    """Write a small file whole or not at all, and onto the disk, so that a power cut leaves none empty.

    still: asked, when the disk has it, whether to put it in place. Raises OSError.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.ddp_eval.tmp")
    try:
        with open(aside, "w") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if still():
            os.replace(aside, path)
            _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, on file systems that can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note_end(directory: Path, state: str, reason: str, first_hand: bool) -> None:
    """A rank's last word, as far as the disk lets it.

    What it knows only through others replaces nobody's own word, and nothing replaces DONE: a signal on the way out is late.
    """

    def still() -> bool:
        now = read_status(directory).get("state")
        return now != DONE and (first_hand or now == RUNNING)

    with contextlib.suppress(OSError):
        if still():
            write_status(directory, state, reason, still)


def read_status(directory: Path) -> dict[str, Any]:
    """{} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((directory / STATUS).read_text())
        if isinstance(found, dict):
            return found
    return {}
