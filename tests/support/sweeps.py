"""A small sweep: real runs of the demo model with less and less noise on its weights, and models that did not come so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from screenshots import make_checkpoint

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.run.runner import run
from ddp_eval.tasks import select

NOISE = {100: 0.05, 200: 0.02, 1000: 0.0}  # by step: the spread of what is added to each weight
TASKS = ["demo_boolean_expressions", "demo_mmlu", "demo_lambada"]


def entry(name: str, state: str = "done", **facts: Any) -> dict[str, Any]:
    """A model of sweep.json."""
    return {"name": name, "model": name, "revision": None, "step": None, "state": state, "reason": None, "seconds": 1.5, **facts}


def write_state(place: Path, models: list[dict[str, Any]]) -> Path:
    place.mkdir(exist_ok=True)
    (place / "sweep.json").write_text(json.dumps({"version": 1, "models": models}))
    return place


def make_sweep(place: Path, scratch: Path, limit: int = 20) -> Path:
    """Three checkpoints that are done, one that failed, one that waits; sweep.json has them in another order than their steps."""
    place.mkdir()
    models = [entry("checkpoint-300", "failed", model="runs/checkpoint-300", step=300, reason="there is no <b>config.json</b>")]
    with pytest.MonkeyPatch.context() as patch:
        manager = select.TaskManager
        patch.setattr(select, "TaskManager", lambda **options: manager(**{**options, "include_defaults": False}))
        for step, noise in reversed(NOISE.items()):
            name = f"checkpoint-{step}"
            make_checkpoint(scratch / name, noise, seed=step)
            config = Config(
                model_args={"pretrained": str(scratch / name)}, tasks=TASKS, limit=limit, output_path=str(place / name),
                bootstrap_iters=100, device="cpu",
            )  # fmt: skip
            run(config, World(0, 0, 1, torch.device("cpu")))
            models.append(entry(name, model=f"runs/{name}", step=step))
    models.append(entry("checkpoint-1100", "waiting", model="runs/checkpoint-1100", step=1100, seconds=None))
    return write_state(place, models)
