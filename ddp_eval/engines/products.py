"""Linear layers in float32 by oneDNN on AMD processors, where torch's own choice, MKL, reaches less of the machine.

One core of an AMD EPYC with AVX-512, GFLOP/s of one product: MKL 80 to 92, oneDNN 97 to 107, weights reordered anew each time.
torch takes oneDNN by itself in bfloat16. The kernel is the one that torch.compile puts in place of linear layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ddp_eval import machine

FEWEST_TOKENS = 128  # below, reordering the weights takes what the product saves


def install(model: Any) -> Callable[[], None]:
    """Have the model's dense linear layers on the CPU multiply by oneDNN, if that is faster here. Returns what undoes it."""
    linears = [module for module in model.modules() if _can_serve(module)] if is_wanted() else []
    for module in linears:
        module.forward = functools.partial(linear, module)

    def remove() -> None:
        for module in linears:
            del module.forward

    return remove


@functools.cache
def is_wanted() -> bool:
    """Whether oneDNN's products are there, and this is a processor on which they were seen to be faster."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and torch.backends.mkl.is_available() and "AMD" in str(machine.cpu_name())


def multiply(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """tokens (…, K) @ weight (M, K).T + bias (M,), by oneDNN. weight: contiguous; others take 1,000 times as long."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(tokens.contiguous(), weight, bias, "none", [], "")
    return product


def linear(module: torch.nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    """What the layer's own forward computes. tokens: (…, K)."""
    if tokens.numel() < FEWEST_TOKENS * module.in_features or tokens.dtype != torch.float32:
        return torch.nn.functional.linear(tokens, module.weight, module.bias)
    return multiply(tokens, module.weight, module.bias)


def _can_serve(module: Any) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module):  # or somebody else has hooked it
        return False
    weight = module.weight
    plain = type(weight.data) is torch.Tensor and weight.dtype == torch.float32
    return plain and weight.device.type == "cpu" and weight.is_contiguous()


def matrix_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T of contiguous matrices, by the kernel that linear layers get: for measuring what the machine can do."""
    if is_wanted() and left.device.type == "cpu" and left.dtype == torch.float32:
        return multiply(left, right)
    return torch.nn.functional.linear(left, right)
