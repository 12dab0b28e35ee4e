"""The last layer where its output is read, and nowhere else.

Every token's keys and values are needed in the last layer. What comes after, its attention's output and its feed-forward part,
acts on one position alone, and nobody looks at positions that are not read: few of a multiple-choice task's tokens are.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

_OTHERS = re.compile(r"vision|visual|image|audio|speech")  # in names of modules: towers beside the language model
MOST = 0.75  # share of columns that are read from which picking them saves nothing


class LastLayer:
    """Has the last layer's feed-forward part (its module called `mlp`) work on the columns of `only`, where there are any.

    index: the layer's number; None for a model without such a module. feed_forward: that module.
    """

    def __init__(self, model: Any) -> None:
        last = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0)) - 1
        at_end = re.compile(rf"(?:^|\.){last}\.mlp$")
        found = [module for name, module in model.named_modules() if at_end.search(name) and not _OTHERS.search(name)]
        self.index = last if len(found) == 1 else None
        self.feed_forward = found[0] if self.index is not None else None
        self._columns: torch.Tensor | None = None
        self._undo: Callable[[], None] = lambda: None
        if self.feed_forward is not None:
            self._undo = _replace_forward(self.feed_forward, functools.partial(self._run, self.feed_forward.forward))

    def close(self) -> None:
        """Give the model back as it came."""
        self._undo()

    @contextlib.contextmanager
    def only(self, columns: torch.Tensor) -> Iterator[None]:
        """columns: (R,) positions of each row that are read. The others come out as they went in, or worse."""
        self._columns = columns
        try:
            yield
        finally:
            self._columns = None

    def _run(self, forward: Callable[..., torch.Tensor], hidden: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
        """hidden: (B, L, H). rest: what some layers take besides, such as the residual: those run whole."""
        columns = self._columns
        if columns is None or rest or kwargs or len(columns) > MOST * hidden.shape[1]:
            return forward(hidden, *rest, **kwargs)
        output = torch.zeros_like(hidden)
        output[:, columns] = forward(hidden[:, columns])
        return output


def _replace_forward(module: Any, forward: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Give one module another forward. Returns what undoes it."""
    before = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo
