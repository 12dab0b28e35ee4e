"""Rotary embeddings a slice of tokens at a time, on CPUs: what they compute in between then stays in the cache.

One token's embedding does not depend on the others, so the slices together are the whole.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from ddp_eval.distributed.sharding import own_class

TOKENS = 512  # in a slice
_FUNCTION = "apply_rotary_pos_emb"  # what nearly all of transformers' modeling files call it


def install(model: Any) -> Callable[[], None]:
    """Have the model's rotary embeddings work in slices. Returns what undoes it."""
    code = sys.modules[own_class(model).__module__]
    rotate = getattr(code, _FUNCTION, None)
    if not (inspect.isfunction(rotate) and [*inspect.signature(rotate).parameters] == ["q", "k", "cos", "sin", "unsqueeze_dim"]):
        return lambda: None
    setattr(code, _FUNCTION, functools.partial(_rotate, rotate))
    return lambda: setattr(code, _FUNCTION, rotate)


def _rotate(
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k: (B, heads, L, head size), or (B, L, heads, head size) with unsqueeze_dim 2. cos, sin: (B or 1, L, head size)."""
    axis = 3 - unsqueeze_dim
    length = q.shape[axis]
    if length <= TOKENS or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
        return rotate(q, k, cos, sin, unsqueeze_dim)
    turned = torch.empty_like(q), torch.empty_like(k)
    for start in range(0, length, TOKENS):
        count = min(TOKENS, length - start)
        parts = (
            *(whole.narrow(axis, start, count) for whole in (q, k)),
            *(angles.narrow(1, start, count) for angles in (cos, sin)),
        )
        for whole, part in zip(turned, rotate(*parts, unsqueeze_dim), strict=True):
            whole.narrow(axis, start, count).copy_(part)
    return turned
