"""The scans of state-space layers: Mamba-1's from a given state, Mamba-2's in chunks that fit what is scanned.

Mamba-1 (Mamba, Falcon Mamba, Jamba, Zamba): transformers' scan (5.23) begins at zero whatever state the cache holds, unless it
is given one token alone. What it leaves out is linear in the state that it should have begun with:

    h[t] = A[t] h[t-1] + b[t]      =>      h[t] = (scan from zero) + A[1] ... A[t] h[0],  A[t] = exp(A dt[t])

So the model's own scan runs, and the second term is added to what it returns.

Mamba-2 (Bamba, Falcon-H1, Granite 4 H, Nemotron-H, Zamba2): on a CPU each layer pads to whole chunks, mostly of 256 tokens, and
computes all pairs of tokens within one. Any size gives the same numbers but for rounding, and short ones take a fraction of the
time: 4 rows of 25 tokens 6 ms and not 79 in a layer of 1024 channels.

Letters: B rows, D channels, N state size, L tokens.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ddp_eval.distributed.sharding import own_class

_SCAN, _CHUNK_SCAN = "mamba_selective_scan", "mamba2_chunk_scan"
_SLICE = 128  # tokens whose states, N numbers for each channel, are there at once
_SHORT, _LONG = 32, 64  # tokens of a chunk: up to so many tokens, and beyond


@contextlib.contextmanager
def beginning_at_states(model: Any) -> Iterator[None]:
    """Forwards with a cache begin at its states. Nothing is changed for models without such layers."""
    mixers = [module for module in model.modules() if hasattr(module, "layer_idx") and _is_mamba(module)]
    given: list[torch.Tensor] = []  # of the layer that runs, in the order in which it asks

    def note(module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("cache_params")
        state = cache.get_recurrent_state(module.layer_idx) if cache is not None else None
        given[:] = [] if state is None else list(state.unbind(1)) if state.dim() == 4 else [state]  # Zamba scans head by head

    with contextlib.ExitStack() as undo:
        for mixer in mixers:
            undo.callback(mixer.register_forward_pre_hook(note, with_kwargs=True).remove)
        for code in {id(code): code for code in map(_code_of, mixers)}.values():
            scan = functools.partial(_scan_from, getattr(code, _SCAN), given)
            undo.enter_context(unittest.mock.patch.object(code, _SCAN, scan))
        yield


def chunked_layers(model: Any) -> list[Any]:
    """The Mamba-2 layers of a model on a CPU; on a GPU kernels do without padding."""
    if model.device.type != "cpu":
        return []
    return [
        module
        for module in model.modules()
        if hasattr(_code_of(module), _CHUNK_SCAN) and type(getattr(module, "chunk_size", None)) is int
    ]


@contextlib.contextmanager
def in_short_chunks(layers: list[Any], tokens: int) -> Iterator[None]:
    """Forwards of rows of so many tokens with the chunks that suit them. layers: of `chunked_layers`."""
    before = [layer.chunk_size for layer in layers]
    try:
        for layer in layers:
            layer.chunk_size = min(layer.chunk_size, _SHORT if tokens <= _SHORT else _LONG)
        yield
    finally:
        for layer, size in zip(layers, before, strict=True):
            layer.chunk_size = size


def _code_of(module: Any) -> Any:
    """The file of the module's class as it was before `fully_shard` derived one from it; None for a class of no file."""
    return sys.modules.get(own_class(module).__module__)


def _is_mamba(module: Any) -> bool:
    return hasattr(_code_of(module), _SCAN) and hasattr(module, "conv1d") and hasattr(module, "A_log")


def _scan_from(
    scan: Callable[..., Any],
    given: list[torch.Tensor],
    hidden: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """`scan`, from the next of the states `given`, (B, D, N) each.

    hidden, dt: (B, D, L). A: (D, N). C: (B, N, L). kwargs: as in transformers.
    """
    result = scan(hidden, dt, A, B, C, **kwargs)
    if not given:
        return result
    output, last = result if kwargs.get("return_last_state") else (result, None)
    bias = kwargs.get("delta_bias")
    step = dt.float() if bias is None else dt.float() + bias.float()[..., None]
    if kwargs.get("delta_softplus"):
        step = torch.nn.functional.softplus(step)
    total, state = step.cumsum(-1), given.pop(0).float()[:, :, None]
    parts = []
    for start in range(0, total.shape[-1], _SLICE):
        stop = start + _SLICE
        carried = torch.exp(A.float()[None, :, None] * total[..., start:stop, None]) * state  # (B, D, tokens, N)
        parts.append(torch.einsum("bdln,bnl->bdl", carried, C[..., start:stop].float()))
    added = torch.cat(parts, -1)
    if (gate := kwargs.get("z")) is not None:
        added = added * torch.nn.functional.silu(gate.float())
    output = (output + added).to(output.dtype)
    return output if last is None else (output, (last + carried[:, :, -1]).to(last.dtype))
