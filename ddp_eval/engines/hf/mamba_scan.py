"""The scan of Mamba-1 layers (Mamba, Falcon Mamba, Jamba, Zamba) from a given state.

transformers' scan (5.23) begins at zero whatever state the cache holds, unless it is given one token alone. What it leaves out
is linear in the state that it should have begun with:

    h[t] = A[t] h[t-1] + b[t]      =>      h[t] = (scan from zero) + A[1] ... A[t] h[0],  A[t] = exp(A dt[t])

So the model's own scan runs, and the second term is added to what it returns.

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

_SCAN = "mamba_selective_scan"


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
        for code in {type(mixer).__module__: sys.modules[type(mixer).__module__] for mixer in mixers}.values():
            scan = functools.partial(_scan_from, getattr(code, _SCAN), given)
            undo.enter_context(unittest.mock.patch.object(code, _SCAN, scan))
        yield


def _is_mamba(module: Any) -> bool:
    return hasattr(sys.modules[type(module).__module__], _SCAN) and hasattr(module, "conv1d") and hasattr(module, "A_log")


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
    decay = torch.exp(A.float()[None, :, None] * step.cumsum(-1)[..., None])  # (B, D, L, N)
    carried = decay * given.pop(0).float()[:, :, None]
    added = torch.einsum("bdln,bnl->bdl", carried, C.float())
    if (gate := kwargs.get("z")) is not None:
        added = added * torch.nn.functional.silu(gate.float())
    output = (output + added).to(output.dtype)
    return output if last is None else (output, (last + carried[:, :, -1]).to(last.dtype))
