"""`quick_main` whose packs take SLOW_PACK_S seconds each at a SLURM job's first start, so that a test can come in between."""

import os
import time
from typing import Any

from quick_main import main

from ddp_eval.run import execute

build_pack = execute.build_pack


def build_slowly(plan: Any, index: int) -> Any:
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(float(os.environ.get("SLOW_PACK_S", "0")))
    return build_pack(plan, index)


if __name__ == "__main__":
    execute.build_pack = build_slowly
    main()
