"""`quick_main` whose packs take SLOW_PACK_S seconds each, so that a test can come in between."""

import os
import time

from quick_main import main

from ddp_eval import execution

build_pack = execution.build_pack


def build_slowly(plan, index):
    time.sleep(float(os.environ.get("SLOW_PACK_S", "0")))
    return build_pack(plan, index)


if __name__ == "__main__":
    execution.build_pack = build_slowly
    main()
