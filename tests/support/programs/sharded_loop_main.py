"""What `test_sharded.py` runs: a loop of 20 training steps under FSDP2, without evaluations and with some; and what fails.

Rank R writes to DIRECTORY/R.json: losses and final weights of both loops, and the words of each failure.
"""

import contextlib
import gc
import itertools
import json
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import sharded_main
import tiny_models
import torch
import torch.distributed as dist
from places import GENERATION_TASKS
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

import ddp_eval
from ddp_eval.engines.hf.fully_sharded import ShardedEngine

TASKS = ["demo_hellaswag", "demo_lambada"]


def evaluate(model: Any, tokenizer: Any, **options: Any) -> dict[str, Any] | None:
    return ddp_eval.evaluate(model, tokenizer, TASKS, limit=2, **options)


def generate(model: Any, tokenizer: Any, **options: Any) -> dict[str, Any] | None:
    tasks = sharded_main.TEXTS[:2]
    return ddp_eval.evaluate(model, tokenizer, tasks, limit=4, include_path=str(GENERATION_TASKS), **options)


def train(steps: int, evaluate_at: Sequence[int], tokenizer: Any) -> tuple[list[float], list[list[float]]]:
    model = sharded_main.make_model("llama", torch.float32)
    sharded_main.shard(model, "root", torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    losses = []
    for step in range(1, steps + 1):
        tokens = torch.randint(0, tiny_models.VOCAB_SIZE, (2, 16))
        loss = model(input_ids=torch.nn.functional.dropout(tokens.float()).long() % tiny_models.VOCAB_SIZE, labels=tokens).loss
        loss.backward()
        if step in evaluate_at:  # between the backward pass and the optimizer's step: gradients are there
            evaluate(model, tokenizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [weight.to_local().flatten().tolist() for weight in model.parameters()]


@contextlib.contextmanager
def failing(rank: int, make_error: Callable[[], Exception], work: str, gathers: int) -> Iterator[None]:
    """One forward of the rank fails in the middle.

    work: the engine's method that does it, `launch` or `generate`. gathers: after how many gathered modules, the root among them:
    at the gathering itself; with 0 the first layer raises.
    """
    is_left = [True]
    do = getattr(ShardedEngine, work)

    def do_and_fail(engine: ShardedEngine, *args: Any) -> Any:
        if dist.get_rank() == rank and is_left[0] and not engine.is_probe:
            is_left[0] = False
            fail_once(engine.model.model.layers[0], "forward", 1, make_error) if not gathers else fail_once(
                _fsdp_param_group, "foreach_all_gather", gathers, make_error
            )
        return do(engine, *args)

    with unittest.mock.patch.object(ShardedEngine, work, do_and_fail):
        yield


def fail_once(owner: Any, name: str, number: int, make_error: Callable[[], Exception]) -> None:
    """The call of this number from now on raises."""
    own, calls = getattr(owner, name), itertools.count(1)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < number:
            return own(*args, **kwargs)
        setattr(owner, name, own)
        raise make_error()

    setattr(owner, name, broken)


def failure(
    model: Any, tokenizer: Any, rank: int, make_error: Callable[[], Exception], work: str = "launch", gathers: int = 0
) -> tuple[Any, float]:
    """The answers, or the error, and how long it took."""
    started = time.monotonic()
    try:
        with failing(rank, make_error, work, gathers):
            results = (generate if work == "generate" else evaluate)(model, tokenizer, log_samples=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return sharded_main.answers(results), time.monotonic() - started


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def main() -> None:
    dist.init_process_group("gloo")
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    plain, evaluated = train(20, (), tokenizer), train(20, (5, 10), tokenizer)
    model = sharded_main.make_model("llama", torch.float32)
    sharded_main.shard(model, "root", torch.float32)
    towered = sharded_main.add_tower(sharded_main.make_model("llama", torch.float32))
    sharded_main.shard(towered, "root", torch.float32)
    usual = sharded_main.answers(evaluate(model, tokenizer, log_samples=True))
    texts = sharded_main.answers(generate(model, tokenizer, log_samples=True))
    found = {
        "losses": [plain[0], evaluated[0]],
        "same weights": plain[1] == evaluated[1],
        "usual": usual,
        "texts": texts,
        "memory": failure(model, tokenizer, 1, out_of_memory),
        "memory for the root's weights": failure(model, tokenizer, 1, out_of_memory, gathers=1),
        "memory for a layer's weights": failure(model, tokenizer, 0, out_of_memory, gathers=3),
        "memory beside a tower": failure(towered, tokenizer, 1, out_of_memory),
        "memory for texts": failure(model, tokenizer, 1, out_of_memory, "generate"),
        "memory for the root's weights in texts": failure(model, tokenizer, 1, out_of_memory, "generate", gathers=1),
        "bug": failure(model, tokenizer, 1, lambda: ValueError("a bug")),
        "bug on the leader": failure(model, tokenizer, 0, lambda: ValueError("a bug")),
        "bug in texts": failure(model, tokenizer, 1, lambda: ValueError("a bug"), "generate"),
        "afterwards": sharded_main.answers(evaluate(model, tokenizer, log_samples=True)),
    }
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    del model, towered
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
