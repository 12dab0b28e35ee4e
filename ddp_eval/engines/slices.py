"""Feed-forward layers a slice of tokens at a time, on CPUs: what they compute in between then stays in the processor's cache.

One token's output does not depend on the others, so the sum of the slices is the whole, but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

TOKENS = 512  # in a slice
_LEAVES = ("Linear", "Conv1D", "Dropout")


def install(model: Any) -> Callable[[], None]:
    """Have the model's dense feed-forward layers (modules called `mlp`) work in slices. Returns what undoes it."""
    sliced = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp" and _is_dense(module)]
    sliced = [module for module in sliced if "forward" not in vars(module)]  # not one that somebody else has hooked
    for module in sliced:
        module.forward = functools.partial(_run, module.forward)

    def remove() -> None:
        for module in sliced:
            del module.forward

    return remove


def _run(forward: Callable[..., torch.Tensor], hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    """hidden: (…, H). rest: what some layers take besides, such as the residual: those run whole."""
    tokens = hidden.reshape(1, -1, hidden.shape[-1])
    if rest or tokens.shape[1] <= TOKENS:
        return forward(hidden, *rest)
    return torch.cat([forward(part) for part in tokens.split(TOKENS, dim=1)], dim=1).view_as(hidden)


def _is_dense(module: Any) -> bool:
    """Linear layers and what acts on each number alone: no routing to experts, no state, no look at neighbours."""
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    return all(type(leaf).__name__ in _LEAVES or not list(leaf.parameters()) for leaf in leaves) and len(leaves) > 1
