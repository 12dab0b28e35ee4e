"""Which launch this process belongs to, so that --fresh and --overwrite are obeyed once in it, however often it starts ranks.

A launcher that starts the same command again says so in the environment, but not whether the start before came far enough to
obey. So whoever obeys leaves the launch's identity in the run directory, and a restart looks for its own there. Light.
"""

from __future__ import annotations

import os

from ddp_eval.system.processes import birth, machine

_PARENT = f"process {os.getppid()} {birth(os.getppid())} {machine()}"  # now: one that is killed leaves us to another


def launches() -> dict[str, str]:
    """{"slurm": job, "torchrun": launcher}, as far as there are any; a requeue or an elastic restart changes neither."""
    found = {}
    if job := slurm_job():
        found["slurm"] = job
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # On one node the launcher's own process tells launches apart whose ids are all "none"; several have none in common.
        several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
        found["torchrun"] = f"run {os.environ['TORCHELASTIC_RUN_ID']}" if several else _PARENT
    return found


def slurm_job() -> str | None:
    """This SLURM job, an array's element as ARRAY_ELEMENT: the last element's own id is that of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID")


def is_restart_of(mark: object) -> bool:
    """Whether a launcher has started this command again by itself, and `mark` is what `launches` said at an earlier start."""
    earlier = mark if isinstance(mark, dict) else {}
    mine = launches()
    return any(
        os.environ.get(variable, "0") not in ("", "0") and name in mine and earlier.get(name) == mine[name]
        for name, variable in (("slurm", "SLURM_RESTART_COUNT"), ("torchrun", "TORCHELASTIC_RESTART_COUNT"))
    )
