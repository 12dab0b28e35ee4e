"""What training puts around a model's modules, set aside while it is evaluated."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Run the model's modules as they are written: compiled ones would be compiled anew for the shapes of each pack.

    Also without the autocast that accelerate puts around a model's forward, as `evaluate` runs without a caller's autocast.
    """
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            if getattr(module, "_compiled_call_impl", None) is not None:  # by module.compile()
                undo.enter_context(unittest.mock.patch.object(module, "_compiled_call_impl", None))
            if "_orig_mod" in getattr(module, "_modules", {}):  # by torch.compile(module)
                undo.enter_context(unittest.mock.patch.object(module, "forward", module._orig_mod.__call__))
        if "_original_forward" in vars(model):
            undo.enter_context(unittest.mock.patch.object(model, "forward", model._original_forward))
        yield
