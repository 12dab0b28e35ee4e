"""What `test_sharded.py` runs: transformers' Trainer with the callback.

    trainer_main.py DIRECTORY ddp|fsdp KIND

Rank R writes its log history and whether the final weights are the same to DIRECTORY/R.json.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import tiny_models
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule

from ddp_eval.integrations.trainer import EvaluationCallback

STEPS, EVERY = 6, 3


def shard_on_cpu() -> None:
    """Have accelerate take ranks on CPUs for a kind of device that it shards models over (1.15: all but CPUs)."""
    init = accelerate.state.AcceleratorState.__init__

    def init_as_device(state: Any, *args: Any, **kwargs: Any) -> None:
        own = accelerate.PartialState(cpu=True)
        own.distributed_type = accelerate.DistributedType.MULTI_XPU
        init(state, *args, **kwargs)

    accelerate.state.AcceleratorState.__init__ = init_as_device


def train(place: Path, way: str, kind: str, every_steps: int) -> tuple[list[dict[str, Any]], list[Any]]:
    model = tiny_models.make_model(kind)
    rows = [
        {"input_ids": row, "labels": row} for row in torch.randint(0, 400, (64, 16), generator=torch.Generator().manual_seed(0))
    ]
    sharding: dict[str, Any] = {}
    if way == "fsdp":
        layer = type(tiny_models_layer(model)).__name__
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer]}}
    arguments = transformers.TrainingArguments(
        output_dir=str(place / "out"), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True, ddp_backend="gloo",
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, seed=1, **sharding,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, processing_class=tiny_models.make_tokenizer(pad_token=tiny_models.EOS)
    )
    if every_steps:
        trainer.add_callback(EvaluationCallback(trainer, ["demo_hellaswag"], every_steps=every_steps, limit=2))
    trainer.train()
    assert (way == "fsdp") == isinstance(model, FSDPModule)
    weights = [getattr(weight, "to_local", lambda weight=weight: weight)().tolist() for weight in model.parameters()]
    return trainer.state.log_history, weights


def tiny_models_layer(model: Any) -> Any:
    return (model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers)[0]


def main() -> None:
    place, way, kind = Path(sys.argv[1]), *sys.argv[2:]
    if way == "fsdp":
        shard_on_cpu()
    plain, evaluated = train(place, way, kind, 0), train(place, way, kind, EVERY)
    found = {"plain": plain[0], "evaluated": evaluated[0], "same weights": plain[1] == evaluated[1]}
    (place / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
