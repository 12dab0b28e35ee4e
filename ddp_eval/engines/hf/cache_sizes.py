"""What a row of a model's own cache takes: read off two caches of a few tokens, which the model makes on the meta device.

    bytes
      │           ╭──────  a window holds no more tokens
      │       ╭───╯        keys and values, latents, an indexer's keys: by token
      │───────╯            states of recurrences and convolutions: whatever the length
      └─────────────────── tokens

So no weight is read, no device is asked, and every rank and layout comes to the same numbers.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from ddp_eval.distributed.sharding import own_class
from ddp_eval.engines.hf import model_cache

_FEW = 8  # tokens of the shorter cache


class PartSize(NamedTuple):
    """Bytes of a row in a part of a layer. most_tokens: that a window keeps of the row; None: all."""

    fixed: int
    per_token: int
    most_tokens: int | None


class CacheSizes(NamedTuple):
    """parts: of each layer its keys and values, and what it keeps beside them."""

    parts: tuple[PartSize, ...]

    def row_bytes(self, tokens: int, ranks: int = 1) -> int:
        """What a row of so many tokens takes. ranks: over how many its heads are split; states are not."""
        kept = [tokens if part.most_tokens is None else min(tokens, part.most_tokens) for part in self.parts]
        by_token = sum(part.per_token * count for part, count in zip(self.parts, kept, strict=True))
        return sum(part.fixed for part in self.parts) + -(-by_token // ranks)


def measure_cache(model: Any, dtype: torch.dtype) -> CacheSizes | None:
    """The sizes for a transformers model, with or without weights, that computes in `dtype`.

    None where its forward takes no cache, or needs values to run (the indexer of Qwen 4).
    """
    name = model_cache.cache_argument(model)
    if name is None:
        return None
    rates = getattr(model.config.get_text_config(), "compress_rates", None) or {}  # DeepSeek V4: what is left of a run is kept
    few = max([_FEW, *(rate for rate in dict(rates).values() if type(rate) is int)])
    try:
        whole = _without_weights(model, dtype)
        shorter, longer = (_parts_of(_fill(whole, name, tokens)) for tokens in (few, 2 * few))
    except Exception:  # a model's own code may raise anything where it looks at values
        return None
    return CacheSizes(tuple(_size(*each, few) for each in zip(shorter, longer, strict=True)))


class _Part(NamedTuple):
    """Of a cache. window: that its tokens are cut to, None if they are not."""

    size_bytes: int
    window: int | None = None


def _size(shorter: _Part, longer: _Part, few: int) -> PartSize:
    """The same part at `few` tokens and at twice as many."""
    most = None if shorter.window is None else shorter.window - 1
    first, second = (count if most is None else min(count, most) for count in (few, 2 * few))
    per_token = -(-(longer.size_bytes - shorter.size_bytes) // max(1, second - first))
    return PartSize(shorter.size_bytes - per_token * first, per_token, most)


def _without_weights(model: Any, dtype: torch.dtype) -> Any:
    kind: Any = own_class(model)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made = kind._from_config(copy.deepcopy(model.config), dtype=dtype, attn_implementation="eager")
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("batched_mm")  # another wants bfloat16 (torch 2.13), or values
    return made.eval()


def _fill(model: Any, name: str, tokens: int) -> Any:
    """The cache of one row of so many tokens."""
    with torch.inference_mode():
        fed = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
        return getattr(model.base_model(input_ids=fed, use_cache=True), name)


def _parts_of(cache: Any) -> list[_Part]:
    layers = getattr(cache, "layers", None)
    if layers is None:  # RWKV
        return [_Part(model_cache.row_bytes(cache, 1))]
    parts = [_Part(model_cache.row_bytes(state, 1)) for state in getattr(cache, "linear_cache", [])]  # MiniMax
    for layer in layers:
        keys = model_cache.row_bytes([getattr(layer, "keys", None), getattr(layer, "values", None)], 1)
        parts += [
            _Part(keys, getattr(layer, "sliding_window", None)),
            _Part(model_cache.row_bytes(layer, 1) - keys),
        ]
    return parts
