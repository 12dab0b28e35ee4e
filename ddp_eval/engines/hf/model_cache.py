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
_MAX_ROWS = {"cuda": 256, "cpu": 64}
_ARGUMENTS = ("past_key_values", "cache_params", "state")  # by which forwards take a cache, and return it


def cache_argument(model: Any) -> str | None:
    """What its forward calls the cache that it takes and returns; None where it takes none."""
    taken = [set(inspect.signature(part.forward).parameters) for part in (model, model.base_model)]
    return next((name for name in _ARGUMENTS if all(name in names for names in taken)), None)


def most_copies(device: torch.device, bytes_each: int) -> int:
    """How many copies of such a size may be there at once; at least one."""
    return max(1, COPIES_BYTES[_kind(device)] // max(1, bytes_each))


def max_rows(device: torch.device) -> int:
    """Of one forward that goes on from copies of a cache."""
    return _MAX_ROWS[_kind(device)]


def copies_bytes(device: torch.device, row_bytes: int) -> int:
    """The most that caches take of rows of such a size.

    In scoring: copies while they are appended to, what they were copied from, and what that was copied from. In generation:
    the rows in slots, and the cache that they are joined in with new ones.
    """
    together = min(max_rows(device), most_copies(device, 2 * row_bytes))
    return 4 * together * row_bytes


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"


def copy_rows(cache: Any, rows: Sequence[int], device: torch.device, tokens: int | None = None) -> Any:
    """A cache of its own whose row i is row `rows[i]` of `cache`, which stays as it is.

    tokens: keep only the last so many of what `cache` holds, where what it holds before them is padding.
    """
    chosen, same = torch.tensor(rows, device=device), len(set(rows)) == 1  # here: a GPU would have to be waited for
    if isinstance(cache, (list, tuple)):  # RWKV
        return [state.index_select(0, chosen) for state in cache]
    made = copy.copy(cache)
    made.layers = [_copy_layer(layer, chosen, rows[0] if same else None, tokens) for layer in cache.layers]
    if hasattr(cache, "linear_cache"):  # MiniMax: [] for layers that attend
        made.linear_cache = [
            state.index_select(0, chosen) if isinstance(state, torch.Tensor) else [] for state in cache.linear_cache
        ]
    return made


def _copy_layer(layer: Any, rows: torch.Tensor, only: int | None, tokens: int | None = None) -> Any:
    """only: the one row that is copied, however often; None where there are several."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    made = copy.copy(layer)
    if tokens is not None:
        _fit_layer(made, [layer], [tokens])
    if only is not None and type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
        # Keys and values are only ever appended to, in memory of their own: until then one row serves all.
        made.keys, made.values = (part[only : only + 1].expand(len(rows), -1, -1, -1) for part in (made.keys, made.values))
        return made
    for name, value in vars(layer).items():
        if isinstance(value, (dict, list)):
            setattr(made, name, copy.copy(value))
    made.reorder_cache(rows)
    return made


# Layers whose tensors are those of _BY_TOKEN, and dicts of states, (B, ...) each.
_PADDED = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
# Of a layer's tensors: the dimension of rows, and that of tokens.
_BY_TOKEN = {"keys": (0, -2), "values": (0, -2), "indexer_keys": (0, -2), "indexer_position_ids": (1, -1)}


def can_pad(cache: Any) -> bool:
    """Whether rows of other lengths may be joined in one cache, padded on the left.

    Not where layers compress runs of tokens that they count from the first of the cache (DeepSeek V4, MiniMax M3), nor where
    they are of a kind that is not known.
    """
    return isinstance(cache, (list, tuple)) or all(type(layer).__name__ in _PADDED for layer in cache.layers)


def join_rows(caches: Sequence[Any], lengths: Sequence[int]) -> Any:
    """One cache of all rows of several, padded on the left with zeros to the longest, in new memory.

    caches: for which `can_pad`. lengths: tokens of each, its own padding included.
    """
    if isinstance(caches[0], (list, tuple)):
        return [torch.cat(states) for states in zip(*caches, strict=True)]
    made = copy.copy(caches[0])
    made.layers = [_join_layers(layers, lengths) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    if hasattr(made, "linear_cache"):
        states = zip(*(cache.linear_cache for cache in caches), strict=True)
        made.linear_cache = [torch.cat(one) if isinstance(one[0], torch.Tensor) else [] for one in states]
    return made


def _join_layers(layers: Sequence[Any], lengths: Sequence[int]) -> Any:
    made = copy.copy(layers[0])
    _fit_layer(made, layers, lengths)
    for name, value in vars(made).items():
        if isinstance(value, dict):
            parts = [getattr(layer, name) for layer in layers]
            setattr(made, name, {key: _join_states([part[key] for part in parts]) for key in value})
    return made


def _join_states(states: Sequence[Any]) -> Any:
    return torch.cat(list(states)) if isinstance(states[0], torch.Tensor) else states[0]


def _fit_layer(made: Any, layers: Sequence[Any], lengths: Sequence[int]) -> None:
    """Give `made` what `layers` keep by token, for as many tokens as the longest of `lengths`; of a single one, as a view."""
    total, window = max(lengths), getattr(made, "sliding_window", None)
    kept = total if window is None else min(total, window - 1)
    for name, (rows, tokens) in _BY_TOKEN.items():
        if isinstance(getattr(made, name, None), torch.Tensor):
            parts = [_fit(getattr(layer, name), kept, tokens) for layer in layers]
            setattr(made, name, parts[0] if len(parts) == 1 else torch.cat(parts, rows))
    if hasattr(made, "cumulative_length"):
        made.cumulative_length = total


def _fit(part: torch.Tensor, tokens: int, dim: int) -> torch.Tensor:
    """The last `tokens` of a tensor along `dim`, counted from its end, with zeros before them where there are fewer."""
    missing = tokens - part.shape[dim]
    if missing <= 0:
        return part.narrow(dim, -missing, tokens)
    return torch.nn.functional.pad(part, (*[0] * (2 * (-dim - 1)), missing, 0))


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
