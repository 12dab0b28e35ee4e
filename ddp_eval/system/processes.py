"""Which process is which, and whether it lives: ids are used again, birthdays are not. Linux; None where /proc cannot tell."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def machine() -> str | None:
    """Equal for processes that can see each other: same boot, same process ids. None where that is unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return None


def birth(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot, which no later process of its id shares; None if it is dead."""
    with contextlib.suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
