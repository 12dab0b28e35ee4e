"""Multi-GPU evaluation of language models on lm-evaluation-harness tasks, under torchrun.

`torchrun --nproc_per_node=8 -m ddp_eval --help` for the command; `ddp_eval.evaluate` and `ddp_eval.Evaluator` for training loops.
"""

from __future__ import annotations

from typing import Any

from ddp_eval import demo
from ddp_eval.errors import UserError

__all__ = ["Evaluator", "UserError", "demo", "evaluate"]


def __getattr__(name: str) -> Any:
    # torch and transformers load when they are needed: `--help` should not wait for them.
    if name in ("Evaluator", "evaluate"):
        from ddp_eval import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
