"""What the machine is said to have, in directories that look like its proc and sys."""

from __future__ import annotations

import pytest

from ddp_eval.system import machine

GIB = 2**30


def write(root, files):
    for name, text in {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   8388608 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def group(path, limit, used, dropped):
    at = f"sys/fs/cgroup/{path}"
    return {f"{at}/memory.max": limit, f"{at}/memory.current": used, f"{at}/memory.stat": f"anon 5\ninactive_file {dropped}\n"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n"}, 8 * GIB),
        ({"proc/self/cgroup": "0::/job\n", **group("job", "max", GIB, 0)}, 8 * GIB),
        (
            {"proc/self/cgroup": "0::/job/step\n", **group("job", 4 * GIB, 3 * GIB, GIB), **group("job/step", "max", 0, 0)},
            2 * GIB,
        ),
        ({"proc/self/cgroup": "0::/unseen/here\n", **group("", 4 * GIB, 3 * GIB, 0)}, GIB),
        ({"proc/self/cgroup": "0::/job\n", **group("job", GIB, 2 * GIB, 0)}, 0),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 4 * GIB,
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 3 * GIB,
                "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB}\n",
            },
            2 * GIB,
        ),
    ],
)
def test_free_memory_ends_at_the_limits_of_control_groups(tmp_path, files, wanted):
    """Catches a container or a job taken for the whole machine, pages of files taken for used, and a limit further up missed."""
    assert machine.free_bytes(write(tmp_path, files)) == wanted


def test_this_machine_has_some():
    """Catches files of this system that are not as they are read."""
    assert 2**20 < machine.free_bytes() < 2**60
