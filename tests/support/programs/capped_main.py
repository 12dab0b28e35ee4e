"""quick_main.py with a limit on this process's memory, that prints its peak at the end.

DDP_EVAL_CAP_BYTES: the most that the process may have in data: the heap, and files mapped writable as safetensors' are.
DDP_EVAL_PEAKS: a directory; each rank leaves its peak resident bytes there.
"""

import atexit
import os
import resource
from pathlib import Path

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks

from ddp_eval.__main__ import main  # not `command`, which ends the process before what was registered earlier


def leave_peak() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (Path(os.environ["DDP_EVAL_PEAKS"]) / os.environ.get("RANK", "0")).write_text(str(peak))


if __name__ == "__main__":
    cap = int(os.environ["DDP_EVAL_CAP_BYTES"])
    if cap:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    atexit.register(leave_peak)
    main()
