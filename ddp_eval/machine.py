"""What this machine is and has: processor, GPUs, memory. For the manifest, and for choices that must fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still take without swapping, its control groups' limits included (containers, SLURM).

    root: where proc and sys are, for tests.
    """
    return min(_available(root), *_group_rooms(root))


def _available(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group around this process has left; file pages that the kernel can drop count as left."""
    yield _NO_LIMIT
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            mount, limit, usage, dropped = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage, dropped = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        place = mount / path.lstrip("/")  # in a container, where this is not seen, the mount itself is the group
        for group in (place, *place.parents):
            if not group.is_relative_to(mount):
                break
            try:
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group; "max"
                continue
            yield max(0, most - used + int(stat.get(dropped, 0)))


_NO_LIMIT = 2**63
