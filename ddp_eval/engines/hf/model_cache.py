"""A transformers model's own cache: keys and values, states of recurrences and convolutions, and copies of some of its rows.

What a layer keeps is its own business, dtypes included: a copy is made by the layer's own `reorder_cache`, which beam search
needs (transformers 5.23). Models that keep their states in no `Cache` are known by name or have none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

_ARGUMENTS = ("past_key_values", "cache_params", "state")  # by which forwards take a cache, and return it


def cache_argument(model: Any) -> str | None:
    """What its forward calls the cache that it takes and returns; None where it takes none."""
    taken = [set(inspect.signature(part.forward).parameters) for part in (model, model.base_model)]
    return next((name for name in _ARGUMENTS if all(name in names for names in taken)), None)


def copy_rows(cache: Any, rows: torch.Tensor) -> Any:
    """A cache of its own whose row i is row `rows[i]` of `cache`, which stays as it is. rows: (B,), ascending."""
    if isinstance(cache, (list, tuple)):  # RWKV
        return [state.index_select(0, rows) for state in cache]
    made = copy.copy(cache)
    made.layers = [_copy_layer(layer, rows) for layer in cache.layers]
    if hasattr(cache, "linear_cache"):  # MiniMax: [] for layers that attend
        made.linear_cache = [
            state.index_select(0, rows) if isinstance(state, torch.Tensor) else [] for state in cache.linear_cache
        ]
    return made


def _copy_layer(layer: Any, rows: torch.Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    made = copy.copy(layer)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized and bool((rows == rows[0]).all()):
        # Keys and values are only ever appended to, in memory of their own: until then one row serves all.
        row = int(rows[0])
        made.keys, made.values = (part[row : row + 1].expand(len(rows), -1, -1, -1) for part in (layer.keys, layer.values))
        return made
    for name, value in vars(layer).items():
        if isinstance(value, (dict, list)):
            setattr(made, name, copy.copy(value))
    made.reorder_cache(rows)
    return made


def row_bytes(cache: Any, rows: int) -> int:
    """What one of the `rows` of a cache takes."""
    return sum(tensor.nbytes for tensor in _tensors(cache)) // rows


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else vars_of(value)
        for one in inner:
            yield from _tensors(one, depth + 1)


def vars_of(value: Any) -> Iterator[Any]:
    """What an object of a cache's own classes holds; nothing of others."""
    yield from vars(value).values() if hasattr(value, "reorder_cache") else ()
