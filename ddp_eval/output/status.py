"""status.json in the run directory: how the run stands, for scripts, since torchrun's own exit code is always 1 when it isn't 0.

    {"state": "running" | "done" | "preempted" | "failed", "reason": one sentence, "time": when, "launch": whose (restart.py)}

A run that was killed leaves "running" behind. Light: it is imported before torch.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_eval.system import launch_id
from ddp_eval.system.files import read_object, replace_json

STATUS = "status.json"
RUNNING, DONE, PREEMPTED, FAILED = "running", "done", "preempted", "failed"


def write_status(directory: Path, state: str, reason: str, still: Callable[[], bool] = lambda: True) -> None:
    """still: asked in the last moment whether to. Raises OSError."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    replace_json(directory / STATUS, {"state": state, "reason": reason, "time": now, "launch": launch_id.launches()}, still)


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
    return read_object(directory / STATUS)
