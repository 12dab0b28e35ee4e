"""What acts on each token alone, a slice of tokens at a time, on CPUs: what it computes in between then stays in their cache.

Feed-forward layers and rotary embeddings are meant. One token's output does not depend on the others, so the slices together are
the whole, but for rounding in the feed-forward layers' products.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

TOKENS = 512  # in a slice
_LEAVES = ("Linear", "Conv1D", "Dropout")
_ROTARY = "apply_rotary_pos_emb"  # what nearly all of transformers' modeling files call it


def install(model: Any) -> Callable[[], None]:
    """Have the model's dense feed-forward layers (modules called `mlp`) and rotary embeddings work in slices.

    Returns what undoes it.
    """
    sliced = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp" and _is_dense(module)]
    sliced = [module for module in sliced if "forward" not in vars(module)]  # not one that somebody else has hooked
    for module in sliced:
        module.forward = functools.partial(_run, module.forward)
    code = sys.modules[type(model).__module__]
    rotate = getattr(code, _ROTARY, None)
    if inspect.isfunction(rotate) and [*inspect.signature(rotate).parameters] == ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        setattr(code, _ROTARY, functools.partial(_rotate, rotate))

    def remove() -> None:
        for module in sliced:
            del module.forward
        if rotate is not None:
            setattr(code, _ROTARY, rotate)

    return remove


def _run(forward: Callable[..., torch.Tensor], hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    """hidden: (…, H). rest: what some layers take besides, such as the residual: those run whole."""
    tokens = hidden.reshape(1, -1, hidden.shape[-1])
    if rest or tokens.shape[1] <= TOKENS:
        return forward(hidden, *rest)
    return torch.cat([forward(part) for part in tokens.split(TOKENS, dim=1)], dim=1).view_as(hidden)


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


def _is_dense(module: Any) -> bool:
    """Linear layers and what acts on each number alone: no routing to experts, no state, no look at neighbours."""
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    return all(type(leaf).__name__ in _LEAVES or not list(leaf.parameters()) for leaf in leaves) and len(leaves) > 1
