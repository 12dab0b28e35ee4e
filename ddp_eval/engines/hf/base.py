"""What all engines on a transformers model have in common, causal or encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch

from ddp_eval.distributed.sharding import class_name
from ddp_eval.engines import Engine
from ddp_eval.engines.hf import generate_one
from ddp_eval.engines.ops import logprobs
from ddp_eval.packs.results import Results


class TransformersEngine(Engine):
    """One replica of a transformers model on one device, or a part of one.

    name: in the manifest. whole: where `model` is a part of a replica, the replica on the meta device: sizes and costs are
    computed from it.
    """

    name: str

    def __init__(self, model: Any, device: torch.device, whole: Any = None) -> None:
        self.model = model
        self.whole = model if whole is None else whole
        self.device = device
        self.config = model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class": class_name(self.model),
            "parameters": int(self.whole.num_parameters()),
            "dtype": str(self.dtype),
            "attention": self.tree_attention or getattr(self.config, "_attn_implementation", None),
            **({"random_rows": self.model.random_rows} if hasattr(self.model, "random_rows") else {}),
        }

    @property
    def most_new_tokens(self) -> int | None:
        return generate_one.most_new_tokens(self.model)

    def collect(self, launched: logprobs.Launched) -> Results:
        return logprobs.sum_logprobs(launched)
