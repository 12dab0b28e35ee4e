"""What `test_sharded.py` runs: transformers' Trainer with the callback. Rank R writes its log history to DIRECTORY/R.json."""

import json
import sys
from pathlib import Path
from typing import Any

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks
import tiny_models
import torch
import torch.distributed as dist
import transformers

from ddp_eval.integrations.trainer import EvaluationCallback


def train(place: Path, every_steps: int) -> tuple[list[dict[str, Any]], list[Any]]:
    model = tiny_models.make_model("llama")
    rows = [
        {"input_ids": row, "labels": row} for row in torch.randint(0, 400, (64, 16), generator=torch.Generator().manual_seed(0))
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(place / "out"), max_steps=6, per_device_train_batch_size=2, use_cpu=True, ddp_backend="gloo",
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, processing_class=tiny_models.make_tokenizer(pad_token=tiny_models.EOS)
    )
    if every_steps:
        trainer.add_callback(EvaluationCallback(trainer, ["demo_hellaswag"], every_steps=every_steps, limit=2))
    trainer.train()
    weights = [weight.tolist() for weight in model.parameters()]
    return trainer.state.log_history, weights


def main() -> None:
    place = Path(sys.argv[1])
    plain, evaluated = train(place, 0), train(place, 3)
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = {"plain": plain[0], "evaluated": evaluated[0], "same weights": plain[1] == evaluated[1]}
    (place / f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
