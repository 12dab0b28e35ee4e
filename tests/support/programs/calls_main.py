"""What `test_every_rank_calls.py` runs: ranks of a caller's group that do not call alike. Rank R writes DIRECTORY/R.json.

barrier   rank 0 evaluates while the others are in a barrier
apart     one mistake after the other, each followed by what all ranks do together
no_group  torchrun's ranks, in no process group
"""

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import torch.distributed as dist
import transformers

import ddp_eval
from ddp_eval import demo
from ddp_eval.lm import launch

GROUP_S = 7  # the group's timeout
RANK = int(os.environ["RANK"])
tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)


def evaluate(tasks: str = "demo_lambada", **options: Any) -> tuple[Any, float]:
    """(what it came to, after how many seconds)"""
    started = time.monotonic()
    try:
        results = ddp_eval.evaluate(model, tokenizer, tasks, limit=2, **options)
        outcome = results and results["results"]["demo_lambada"]["perplexity,none"]
    except ddp_eval.UserError as error:
        outcome = str(error)
    return outcome, time.monotonic() - started


def open_lm(**arguments: Any) -> str | None:
    try:
        lm = launch(device="cpu", **arguments)
        if lm is not None:
            lm.close()
    except ddp_eval.UserError as error:
        return str(error)
    return None


def in_step(name: str) -> None:
    """All ranks are here; no collective of the group, which may time out."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{RANK}", "here")
    store.wait([f"{name}/{rank}" for rank in range(dist.get_world_size())], datetime.timedelta(seconds=60))


def evaluate_late() -> tuple[Any, float]:
    time.sleep(RANK)
    return evaluate()


def apart() -> dict[str, Any]:
    outcome = {}
    steps: dict[str, Callable[[], Any]] = {
        "rank 0 alone": lambda: evaluate() if RANK == 0 else None,
        "rank 1 alone": lambda: evaluate() if RANK == 1 else None,
        "after that": evaluate,
        "other tasks": lambda: evaluate("demo_lambada" if RANK == 0 else "demo_wikitext"),
        "other options": lambda: evaluate(num_fewshot=RANK),
        "rank 0 twice": lambda: [evaluate(), *([evaluate()] if RANK == 0 else [])],
        "rank 1 late": evaluate_late,
        "launch on rank 0 alone": lambda: open_lm(pretrained="demo") if RANK == 0 else None,
        "launch of other models": lambda: open_lm(pretrained="demo", dtype="float32" if RANK == 0 else "bfloat16"),
        "at the end": evaluate,
    }
    for name, step in steps.items():
        in_step(name)
        outcome[name] = step()
    return outcome


def main(directory: str, how: str) -> None:
    outcome: dict[str, Any] = {}
    if how != "no_group":
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GROUP_S))
        dist.barrier()
    if how == "apart":
        outcome = apart()
    elif how == "barrier":
        if RANK == 0:
            outcome["alone"] = evaluate()
            (Path(directory) / "0.json").write_text(json.dumps(outcome))
        dist.barrier()
    else:
        outcome["alone"] = evaluate()
        outcome["writes"] = evaluate(output_path=f"{directory}/run")
    (Path(directory) / f"{RANK}.json").write_text(json.dumps(outcome))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
