"""What this machine is and has: processor, GPUs, memory, packages, the commit of the code."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def describe_hardware() -> dict[str, Any]:
    """What this process runs on. GPUs are those visible to it; memory in bytes."""
    import torch

    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "usable_cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        hardware["gpus"] = [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]
        hardware["cuda"] = torch.version.cuda
        hardware["gpu_driver"] = _gpu_driver()
    return hardware


def git_commit(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """{"commit": hash, "dirty": whether tracked files differ from it} for the files in directory `path`, or None.

    A directory with no tracked file (a virtual environment inside someone's repository) belongs to no commit. Never raises.
    """
    if _git(path, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(path, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(path, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def describe_commit(path: str | os.PathLike[str]) -> str | None:
    """`git describe --always` in directory `path`, or None."""
    return _git(path, "describe", "--always") or None


def _git(path: str | os.PathLike[str], *arguments: str) -> str | None:
    """Output of a git command in `path`, or None if it fails, hangs, or there is no git."""
    # GIT_DIR and the like, set inside a hook, would point to another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        command = ["git", *arguments]
        finished = subprocess.run(command, cwd=path, env=environment, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.decode("utf-8", "replace").strip()


def cpu_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_driver() -> str | None:
    with contextlib.suppress(OSError):
        return _driver_version(Path("/proc/driver/nvidia/version").read_text())
    return None


def _driver_version(text: str) -> str | None:
    """The version in "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build …"."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    return found[1] if found else None
