"""What `test_api.py` runs: a training script that evaluates now and then. Rank R writes what it saw to DIRECTORY/R.json."""

import copy
import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import torch
import torch.distributed as dist
import transformers

import ddp_eval
from ddp_eval import demo
from ddp_eval.distributed import progress

TASKS = ["demo_hellaswag", "demo_lambada", "demo_wikitext"]


def watch_tallies() -> list[int]:
    """What the progress bar reads from now on."""
    read = progress.Tally.read
    values: list[int] = []

    def read_and_note(tally: progress.Tally) -> int:
        values.append(read(tally))
        return values[-1]

    mock.patch.object(progress.Tally, "read", read_and_note).start()
    return values


def numbers_of(results: dict[str, Any] | None) -> dict[str, Any] | None:
    return results and {task: {name: value for name, value in row.items()} for task, row in results["results"].items()}


def error_of(model: Any, tokenizer: Any, **wrong: Any) -> str | None:
    try:
        ddp_eval.evaluate(model=model, tokenizer=tokenizer, limit=2, **{"tasks": TASKS, **wrong})
    except ddp_eval.UserError as error:
        return str(error)
    return None


def random_states() -> list[Any]:
    state: Any = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]]


def state_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Everything that an evaluation must leave as it was."""
    return {
        "training": [module.training for module in model.modules()],
        "needs gradient": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": torch.is_grad_enabled(),
        "random": random_states(),
        "pad token": tokenizer.pad_token,
        "padding side": tokenizer.padding_side,
        "attention": model.config._attn_implementation,
        "groups": len(dist.distributed_c10d._world.pg_map),
    }


def train_one_step(model: Any) -> float:
    """The sum of all gradients. DDP has made them the same on all ranks."""
    tokens = torch.arange(20)[None] + (dist.get_rank() if dist.is_initialized() else 0)
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return sum(float(parameter.grad.abs().sum()) for parameter in model.parameters() if parameter.requires_grad)


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    tokenizer.pad_token = None
    bare = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    bare.model.layers[0].requires_grad_(False)  # a frozen part
    model: torch.nn.Module = bare
    if world_size > 1:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(bare)
    model.train()
    bare.model.layers[0].eval()
    before = copy.deepcopy(state_of(bare, tokenizer))

    place = Path(sys.argv[1])
    counted = watch_tallies()
    first = ddp_eval.evaluate(model=model, tokenizer=tokenizer, tasks=TASKS, limit=2)
    after = state_of(bare, tokenizer)
    gradients = train_one_step(model)
    second = ddp_eval.evaluate(model, tokenizer, TASKS, limit=2)
    errors = {
        "unknown task": error_of(model, tokenizer, tasks=["demo_lambda"]),
        "bad option": error_of(model, tokenizer, num_fewshot=-1),
        "unusable output": error_of(model, tokenizer, output_path="/proc/results"),
        "new output": error_of(model, tokenizer, output_path=str(place / "run")),
        "output in use": error_of(model, tokenizer, output_path=str(place / "run")),
    }
    counted.clear()
    third = ddp_eval.evaluate(model, tokenizer, TASKS, limit=2)
    total = torch.tensor([rank + 1])
    if world_size > 1:
        dist.all_reduce(total)
    got = {
        "numbers": [numbers_of(results) for results in (first, second, third)],
        "changed": [name for name, value in before.items() if after[name] != value],
        "changed by errors": [
            name for name, value in state_of(bare, tokenizer).items() if name != "random" and before[name] != value
        ],
        "gradients": gradients,
        "errors": errors,
        "counted": max(counted, default=0),
        "computed": third and third["ddp_eval"]["computed_tokens"],
        "sum": int(total),
    }
    (place / f"{rank}.json").write_text(json.dumps(got))
    if world_size > 1:
        # A DDP model that is the last to hold the group waits for its threads with Python's lock held, sometimes for ever.
        del model
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
