"""Checkpoints of a training run: the demo model with its weights moved a little from step to step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from ddp_eval import demo

WEIGHTS = "model.safetensors"


def write_checkpoint(path: Path, step: int) -> Path:
    """A directory with the demo model as it would be after `step` steps."""
    path.mkdir(parents=True, exist_ok=True)
    for file in Path(demo.MODEL_PATH).iterdir():
        if file.name != WEIGHTS:
            shutil.copyfile(file, path / file.name)
    (path / WEIGHTS).write_bytes(weights_of(step))
    return path


def weights_of(step: int) -> bytes:
    tensors = safetensors.torch.load_file(Path(demo.MODEL_PATH) / WEIGHTS)
    moved = {name: (tensor.float() * (1 + step / 1000)).to(tensor.dtype) for name, tensor in tensors.items()}
    return safetensors.torch.save(moved, {"format": "pt"})


def write_checkpoints(place: Path, steps: Sequence[int]) -> Path:
    """`place`/checkpoint-STEP for each."""
    torch.set_num_threads(1)
    for step in steps:
        write_checkpoint(place / f"checkpoint-{step}", step)
    return place
