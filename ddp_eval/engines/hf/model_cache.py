"""A transformers model's own cache: keys and values, states of recurrences and convolutions, and copies of some of its rows.

What a layer keeps is its own business, dtypes included: a copy is made by the layer's own `reorder_cache`, which beam search
needs (transformers 5.23). Models that keep their states in no `Cache` are known by name or have none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

COPIES_BYTES = {"cuda": 2**33, "cpu": 2**30}  # of rows that run together, copies of one cache
_ARGUMENTS = ("past_key_values", "cache_params", "state")  # by which forwards take a cache, and return it


def cache_argument(model: Any) -> str | None:
    """What its forward calls the cache that it takes and returns; None where it takes none."""
    taken = [set(inspect.signature(part.forward).parameters) for part in (model, model.base_model)]
    return next((name for name in _ARGUMENTS if all(name in names for names in taken)), None)


def most_copies(device: torch.device, bytes_each: int) -> int:
    """How many copies of such a size may be there at once; at least one."""
    return max(1, COPIES_BYTES["cuda" if device.type == "cuda" else "cpu"] // max(1, bytes_each))


def copy_rows(cache: Any, rows: Sequence[int], device: torch.device) -> Any:
    """A cache of its own whose row i is row `rows[i]` of `cache`, which stays as it is."""
    chosen, same = torch.tensor(rows, device=device), len(set(rows)) == 1  # here: a GPU would have to be waited for
    if isinstance(cache, (list, tuple)):  # RWKV
        return [state.index_select(0, chosen) for state in cache]
    made = copy.copy(cache)
    made.layers = [_copy_layer(layer, chosen, rows[0] if same else None) for layer in cache.layers]
    if hasattr(cache, "linear_cache"):  # MiniMax: [] for layers that attend
        made.linear_cache = [
            state.index_select(0, chosen) if isinstance(state, torch.Tensor) else [] for state in cache.linear_cache
        ]
    return made


def _copy_layer(layer: Any, rows: torch.Tensor, only: int | None) -> Any:
    """only: the one row that is copied, however often; None where there are several."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    made = copy.copy(layer)
    if only is not None and type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
        # Keys and values are only ever appended to, in memory of their own: until then one row serves all.
        made.keys, made.values = (part[only : only + 1].expand(len(rows), -1, -1, -1) for part in (layer.keys, layer.values))
        return made
    for name, value in vars(layer).items():
        if isinstance(value, (dict, list)):
            setattr(made, name, copy.copy(value))
    made.reorder_cache(rows)
    return made


def join_rows(caches: Sequence[Any], lengths: Sequence[int]) -> Any:
    """One cache of all rows of several, padded on the left with zeros to the longest, in new memory.

    lengths: tokens of each cache, its own padding included. Raises ValueError for kinds of layers that are not known.
    """
    if isinstance(caches[0], (list, tuple)):
        return [torch.cat(states) for states in zip(*caches, strict=True)]
    made = copy.copy(caches[0])
    made.layers = [_join_layers(layers, lengths) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    if hasattr(made, "linear_cache"):
        states = zip(*(cache.linear_cache for cache in caches), strict=True)
        made.linear_cache = [torch.cat(one) if isinstance(one[0], torch.Tensor) else [] for one in states]
    return made


# Whose tensors are keys and values, (B, heads, tokens, size) each, and dicts of states, (B, ...) each.
_JOINED = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)


def _join_layers(layers: Sequence[Any], lengths: Sequence[int]) -> Any:
    first, total = layers[0], max(lengths)
    if type(first).__name__ not in _JOINED:
        raise ValueError(f"layers of its cache, of the kind {type(first).__name__}, are not known to hold one row each")
    made, window = copy.copy(first), getattr(first, "sliding_window", None)
    kept = total if window is None else min(total, window - 1)
    for name, value in vars(first).items():
        parts = [getattr(layer, name) for layer in layers]
        if isinstance(value, dict):
            setattr(made, name, {key: _join_states([part[key] for part in parts]) for key in value})
        elif name in ("keys", "values") and isinstance(value, torch.Tensor):
            setattr(made, name, torch.cat([_fit(part, kept) for part in parts]))
        elif name == "cumulative_length":
            made.cumulative_length = total
    return made


def _join_states(states: Sequence[Any]) -> Any:
    return torch.cat(list(states)) if isinstance(states[0], torch.Tensor) else states[0]


def _fit(keys: torch.Tensor, tokens: int) -> torch.Tensor:
    """The last `tokens` of (B, heads, tokens, size), with zeros before them where there are fewer."""
    missing = tokens - keys.shape[2]
    return torch.nn.functional.pad(keys, (0, 0, missing, 0)) if missing >= 0 else keys[:, :, -missing:]


def attends(cache: Any) -> bool:
    """Whether any of its layers keeps keys."""
    return any(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in getattr(cache, "layers", ()))


def row_bytes(cache: Any, rows: int) -> int:
    """What one of the `rows` of a cache takes."""
    return sum(tensor.nbytes for tensor in _tensors(cache)) // rows


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else _held_by(value)
        for one in inner:
            yield from _tensors(one, depth + 1)


def _held_by(value: Any) -> Iterator[Any]:
    """What an object of a cache's own classes holds; nothing of others."""
    yield from vars(value).values() if hasattr(value, "reorder_cache") else ()
