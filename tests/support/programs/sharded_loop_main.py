"""What `test_sharded.py` runs: a loop of 20 training steps under FSDP2, without evaluations and with some; and what fails.

Rank R writes to DIRECTORY/R.json: losses and final weights of both loops, and the words of each failure.
"""

import contextlib
import gc
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

import ddp_eval
from ddp_eval.engines.hf.fully_sharded import ShardedEngine

TASKS = ["demo_hellaswag", "demo_lambada"]


def evaluate(model: Any, tokenizer: Any, **options: Any) -> dict[str, Any] | None:
    return ddp_eval.evaluate(model, tokenizer, TASKS, limit=2, **options)


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
def failing(rank: int, make_error: Callable[[], Exception], times: int = 1) -> Iterator[None]:
    """The rank's first layers of some packs raise in the middle of the forward."""
    left = [times]
    launch = ShardedEngine.launch

    def launch_and_fail(engine: ShardedEngine, pack: Any) -> Any:
        if dist.get_rank() == rank and left[0] and not engine.is_probe:
            left[0] -= 1
            layer = engine.model.model.layers[0]
            own = layer.forward

            def broken(*args: Any, **kwargs: Any) -> None:
                layer.forward = own
                raise make_error()

            layer.forward = broken
        return launch(engine, pack)

    with unittest.mock.patch.object(ShardedEngine, "launch", launch_and_fail):
        yield


def failure(model: Any, tokenizer: Any, rank: int, make_error: Callable[[], Exception]) -> tuple[Any, float]:
    started = time.monotonic()
    try:
        with failing(rank, make_error):
            results = evaluate(model, tokenizer, log_samples=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return sharded_main.answers(results), time.monotonic() - started


def main() -> None:
    dist.init_process_group("gloo")
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    plain, evaluated = train(20, (), tokenizer), train(20, (5, 10), tokenizer)
    model = sharded_main.make_model("llama", torch.float32)
    sharded_main.shard(model, "root", torch.float32)
    usual = sharded_main.answers(evaluate(model, tokenizer, log_samples=True))
    found = {
        "losses": [plain[0], evaluated[0]],
        "same weights": plain[1] == evaluated[1],
        "usual": usual,
        "memory": failure(model, tokenizer, 1, lambda: torch.OutOfMemoryError("CUDA out of memory")),
        "bug": failure(model, tokenizer, 1, lambda: ValueError("a bug")),
        "bug on the leader": failure(model, tokenizer, 0, lambda: ValueError("a bug")),
        "afterwards": sharded_main.answers(evaluate(model, tokenizer, log_samples=True)),
    }
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    del model
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
