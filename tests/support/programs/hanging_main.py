"""`python -m ddp_eval` in which FAULT_RANK hangs on the way to its run: FAULT says where. The run itself only waits.

before_join    before it joins the process group, for which the others wait --timeout
import         while it imports what runs
all_reduce     at the end of the node checks, which find nothing
none           nowhere: every rank writes its process id to FAULT_FILE.RANK, if given, speaks for the run in FAULT_OUT, and waits
"""

import importlib.abc
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

from ddp_eval import __main__ as command
from ddp_eval.distributed import collectives, watchdog
from ddp_eval.run import preflight
from ddp_eval.tasks import trackers


def hang(*args: object, **options: object) -> Any:
    time.sleep(600)


def wait(config: Any, world: Any, inspect: Any) -> None:
    if "FAULT_OUT" in os.environ:
        watchdog.set_run_directory(Path(os.environ["FAULT_OUT"]))
        Path(f"{os.environ['FAULT_FILE']}.{world.rank}").write_text(str(os.getpid()))
    watchdog.step(watchdog.WAITING)
    hang()


class HangingImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "ddp_eval.run.runner":
            hang()


if __name__ == "__main__":
    fault = os.environ["FAULT"]
    if fault == "before_join":
        command.MIN_JOIN_S = 1.0
    if fault == "all_reduce":
        preflight.check_if_due = lambda config: preflight.PreflightReport([])
    if fault == "import" and os.environ["RANK"] == os.environ["FAULT_RANK"]:
        sys.modules.pop("ddp_eval.run.runner", None)
        sys.meta_path.insert(0, HangingImport())
    else:
        runner: Any = types.ModuleType("ddp_eval.run.runner")
        runner.run = wait
        sys.modules["ddp_eval.run.runner"] = runner
    if os.environ["RANK"] == os.environ.get("FAULT_RANK"):
        if fault == "before_join":
            trackers.check_installed = hang
        elif fault == "all_reduce":
            collectives.time_all_reduce = hang
    command.main()
