"""Linear layers in float32 by oneDNN on processors with AVX-512 that torch's own choice, MKL, does not use.

One core of AMD EPYC, GFLOP/s of one product: 80 to 92 by MKL and 97 to 107 by oneDNN where a core computes 256 bits at a time
(Zen 4), 95 to 111 and 220 to 249 where it computes 512 (Zen 5), weights reordered anew each time. oneDNN's error is 3 to 6e-7 of
the result, MKL's 2 to 3e-7. torch takes oneDNN by itself in bfloat16. The kernel is the one that torch.compile puts in place of
linear layers.

Which of the two is decided by what they say of the processor, and never timed: on a busy machine a product takes ten times as
long now and then, and ranks, or a run and its continuation, that came to different kernels would come to different bits.

oneDNN compiles and keeps a kernel (half a MB) for every number of tokens that a layer sees. So only a grid of such numbers is
used, and the engine lengthens packs to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from ddp_eval.engines.ops import mkl

FINE, COARSE = 128, 256  # steps of the grid, below and from NAN_PROBE on
NAN_PROBE = 4096
MOST_ADDED = 1 / 16  # of a number of tokens; where the grid is further off, it is left alone
WIDE = 1024  # features of a layer's output from which copying its input costs little

Count = TypeVar("Count", int, "np.ndarray[Any, Any]")


def to_grid(tokens: Count) -> Count:
    """The number of tokens that so many should be lengthened to: on the grid, or the same where that is far.

    By the number alone, on every machine: what is planned and sent must not depend on the processor.
    """
    if isinstance(tokens, np.ndarray):
        return np.array([to_grid(int(count)) for count in tokens], dtype=tokens.dtype)
    step = _step(tokens)
    longer = -(-tokens // step) * step
    return longer if longer - tokens <= MOST_ADDED * tokens else tokens


def _step(tokens: int) -> int:
    return FINE if tokens < NAN_PROBE else COARSE


def install(model: Any) -> Callable[[], None]:
    """Have the model's dense linear layers on the CPU multiply by oneDNN, if that is faster here. Returns what undoes it."""
    linears = [module for module in model.modules() if _can_serve(module)] if is_wanted() else []
    for module in linears:
        module.forward = functools.partial(linear, module)

    def remove() -> None:
        while linears:
            del linears.pop().forward

    return remove


def is_wanted() -> bool:
    """Whether oneDNN's products are there and allowed, and use vectors of this processor that MKL's do not."""
    return bool(torch.backends.mkldnn.enabled) and _is_faster_here()


@functools.cache
def _is_faster_here() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not mkl.leaves_out_avx512():
        return False
    try:  # a private function of torch (2.11 to 2.13), which may come to look otherwise
        with torch.inference_mode():
            return bool(multiply(torch.ones(2, 3), torch.ones(4, 3)).eq(3).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def multiply(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """tokens (…, K) @ weight (M, K).T + bias (M,), by oneDNN. weight: contiguous; others take 1,000 times as long."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(tokens.contiguous(), weight, bias, "none", [], "")
    return product


def linear(module: torch.nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    """What the layer's own forward computes. tokens: (…, K)."""
    weight, bias = module.weight, module.bias
    count = tokens.numel() // module.in_features
    longer = to_grid(count)
    on_grid = longer > 0 and longer % _step(longer) == 0
    as_it_came = tokens.dtype == torch.float32 and weight.is_contiguous() and not torch.is_grad_enabled()
    if not (as_it_came and on_grid and (longer == count or module.out_features >= WIDE)):
        return torch.nn.functional.linear(tokens, weight, bias)
    if longer == count:
        return multiply(tokens, weight, bias)
    padded = tokens.new_zeros((longer, module.in_features))
    padded[:count] = tokens.reshape(count, -1)
    return multiply(padded, weight, bias)[:count].view(*tokens.shape[:-1], -1)


def matrix_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T of contiguous matrices, by the kernel that linear layers get: for measuring what the machine can do."""
    if is_wanted() and left.device.type == "cpu" and left.dtype == torch.float32:
        return multiply(left, right)
    return torch.nn.functional.linear(left, right)


def _can_serve(module: Any) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module):  # or somebody else has hooked it
        return False
    weight = module.weight
    if hasattr(weight, "placements"):  # sharded over ranks, and plain once it is gathered
        return bool(weight.dtype == torch.float32 and weight.device.type == "cpu")
    plain = type(weight.data) is torch.Tensor and weight.dtype == torch.float32
    return plain and weight.device.type == "cpu" and weight.is_contiguous()
