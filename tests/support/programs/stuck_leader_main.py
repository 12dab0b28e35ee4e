"""What `test_waiting.py` runs: `evaluate` in a caller's group whose leader gets stuck in a task's regular expression.

stuck_leader_main.py DIRECTORY      of the task "regex"; rank R > 0 writes what it was told to DIRECTORY/R.txt
"""

import datetime
import os
import signal
import sys
from pathlib import Path

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import torch.distributed as dist
import transformers

import ddp_eval
from ddp_eval import demo
from ddp_eval.errors import LostContact

GROUP_S = 4


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GROUP_S))
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    try:
        ddp_eval.evaluate(model, tokenizer, "regex", include_path=sys.argv[1])
    except LostContact as error:
        Path(sys.argv[1], f"{dist.get_rank()}.txt").write_text(str(error))
        os.kill(pids[0], signal.SIGKILL)  # nothing else ends it
    os._exit(0)


if __name__ == "__main__":
    main()
