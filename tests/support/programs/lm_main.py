"""What `test_lm_ranks.py` runs: lm_eval evaluates on all ranks. Rank R writes what it came to to DIRECTORY/R.json."""

import atexit
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch.distributed as dist
from lm_eval.tasks import TaskManager

from ddp_eval import UserError, demo
from ddp_eval.lm import launch

TASKS = ["demo_hellaswag", "demo_boolean_expressions", "demo_wikitext"]
GENERATING = ["gen_boolean", "gen_story"]  # a batch for each of two ranks
GENERATION = str(Path(__file__).resolve().parents[1] / "generation_tasks")


def evaluate(model: Any, **more: Any) -> Any:
    manager = TaskManager(include_path=[demo.TASKS_PATH, GENERATION], include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=TASKS + GENERATING, task_manager=manager, limit=3, bootstrap_iters=0, log_samples=True, **more
    )


def numbers_of(results: dict[str, Any]) -> dict[str, Any]:
    answers = {task: [one["resps"] for one in rows] for task, rows in results["samples"].items()}
    kept = ("doc_id", "arguments", "resps")
    samples = {task: [{name: one[name] for name in kept} for one in rows] for task, rows in results["samples"].items()}
    config = {"model": results["config"]["model"]}
    return {"metrics": results["results"], "answers": answers, "samples": samples, "config": config}


def gloo_threads() -> list[str]:
    """Names of this process's threads that gloo has left; one that was joined may show for a moment more."""
    deadline = time.monotonic() + 5
    while True:
        names = []
        for path in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):
                names.append(path.read_text().strip())
        names = [name for name in names if "gloo" in name]
        if not names or time.monotonic() > deadline:
            return names
        time.sleep(0.02)


def main(directory: str, how: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    outcome: dict[str, Any] = {"results": None}

    def write() -> None:
        outcome["group"] = dist.is_initialized()
        outcome["threads"] = gloo_threads()
        (Path(directory) / f"{rank}.json").write_text(json.dumps(outcome))

    atexit.register(write)
    if how == "name":
        outcome["results"] = numbers_of(evaluate("ddp_eval", model_args="pretrained=demo,batch_size=4", device="cpu"))
        outcome["after"] = True
        return
    if how == "borrowed":
        dist.init_process_group("gloo")
    try:
        lm = launch(pretrained="nowhere/at/all" if how == "wrong" else "demo", device="cpu")
    except UserError as error:
        outcome["error"] = str(error)
        return
    if lm is not None:
        with lm:
            outcome["results"] = numbers_of(evaluate(lm))
        try:
            lm.loglikelihood([])
        except UserError as error:
            outcome["closed"] = str(error)
    outcome["after"] = True
    if how == "borrowed":
        dist.barrier()  # the caller's group still works


if __name__ == "__main__":
    main(*sys.argv[1:])
