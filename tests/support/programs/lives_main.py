"""What `test_second_life.py` runs: one model after another in one process. Rank R writes what it saw to DIRECTORY/R.json.

launch   a group of the caller's that is gone, three models by `launch`, two open at once, then the command
name     lm_eval opens two models, and one that is not there between them, by the name "ddp_eval"
"""

import atexit
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import quick_main
import torch
import torch.distributed as dist
import transformers
from lm_eval.tasks import TaskManager

import ddp_eval
from ddp_eval import demo
from ddp_eval.lm import launch

RANK = int(os.environ.get("RANK", "0"))


def perplexity(model: Any, **more: Any) -> float:
    manager = TaskManager(include_path=[demo.TASKS_PATH], include_defaults=False)
    options = {"tasks": ["demo_lambada"], "task_manager": manager, "limit": 2, "bootstrap_iters": 0, **more}
    return lm_eval.simple_evaluate(model=model, **options)["results"]["demo_lambada"]["perplexity,none"]


def error_of(function: Callable[..., Any], *args: Any, **options: Any) -> str | None:
    try:
        function(*args, **options)
    except ddp_eval.UserError as error:
        return str(error)
    return None


def by_launch(directory: str, other: str) -> dict[str, Any]:
    outcome: dict[str, Any] = {"values": []}
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    for name in ("demo", other, "demo"):
        lm = launch(pretrained=name, device="cpu")
        if lm is not None:
            with lm:
                outcome["values"].append(perplexity(lm))
                outcome["two at once"] = error_of(launch, pretrained=other, device="cpu")
                model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
                outcome["evaluate meanwhile"] = error_of(ddp_eval.evaluate, model, lm.tokenizer, "demo_lambada", limit=1)
                outcome["values"].append(perplexity(lm))  # it still works
    sys.argv[1:] = ["--model_args", "pretrained=demo", "--tasks", "demo_lambada", "--limit", "2", "-o", f"{directory}/run"]
    quick_main.main.__globals__["main"]()  # without the end of the process
    return outcome


def by_name(other: str) -> dict[str, Any]:
    outcome: dict[str, Any] = {"values": []}
    names = ("demo", "nowhere/at/all", other)
    for name in names:
        try:
            outcome["values"].append(perplexity("ddp_eval", model_args=f"pretrained={name}", device="cpu"))
        except ddp_eval.UserError as error:
            outcome["error"] = str(error)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    outcome["evaluate meanwhile"] = error_of(ddp_eval.evaluate, model, tokenizer, "demo_lambada", limit=1)
    return outcome


def main(directory: str, how: str, other: str) -> None:
    outcome: dict[str, Any] = {}
    atexit.register(lambda: (Path(directory) / f"{RANK}.json").write_text(json.dumps(outcome)))
    outcome.update(by_launch(directory, other) if how == "launch" else by_name(other))


if __name__ == "__main__":
    main(*sys.argv[1:])
