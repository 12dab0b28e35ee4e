"""Fully sharded models: every rank runs packs of its own, and weights are gathered layer by layer (torch's `fully_shard`).

The forward of a layer is that of the whole model on gathered weights, so the numbers are those of one rank, bit for bit. What
it asks is that the ranks which share weights run the same number of forwards: lockstep.py.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ddp_eval.distributed import sharding
from ddp_eval.distributed.meeting import LostContact
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import engine
from ddp_eval.engines.hf.lockstep import Lockstep
from ddp_eval.engines.ops import logprobs
from ddp_eval.errors import is_out_of_memory
from ddp_eval.packs.plan import Pack

Result = TypeVar("Result")


class ShardedEngine(engine.HFEngine):
    """A causal model that `fully_shard` has spread over ranks. Made, and used within `together`, on all of them at once."""

    def __init__(self, model: Any, world: World, keep_attention: bool = False, whole: Any = None) -> None:
        self._named = contextlib.ExitStack()
        self._named.enter_context(_under_its_own_name(model))
        self._lockstep = Lockstep(model, sharding.Pace(world, sharding.shard_ranks(model)))
        self._dtype = sharding.compute_dtype(model)
        try:
            super().__init__(model, sharding.device_of(model), keep_attention, whole)
            with self.together():
                _ = self.splits_head  # which asks the model
        except BaseException:
            self._lockstep.close()
            self._named.close()
            raise

    def close(self) -> None:
        super().close()
        self._lockstep.close()
        self._named.close()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def together(self) -> contextlib.AbstractContextManager[None]:
        return self._lockstep.together()

    def launch(self, pack: Pack) -> logprobs.Launched:
        """As of a whole model; in a trial, NaN where the forward fails."""
        try:
            return super().launch(pack)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
            if not self.is_probe or is_out_of_memory(error) or isinstance(error, LostContact):
                raise
            return logprobs.Launched(pack, logprobs.nan_scores(len(pack.answer_reads)))

    def _run(self, compute: Callable[[], Result]) -> Result:
        return self._lockstep.run(compute)

    @property
    def _whole(self) -> Callable[..., Any]:
        """Without the model's own hooks, which run once for each step."""
        return self._lockstep.own_forward

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._lockstep.calling_head():
            return super()._head(hidden)

    def _without_gradients(self) -> contextlib.AbstractContextManager[None]:
        """Gathered weights made in inference mode would stay, and the next training step could not use them."""
        return torch.no_grad()


@contextlib.contextmanager
def _under_its_own_name(model: Any) -> Iterator[None]:
    """transformers looks at the source of a class's module to learn what attention it can do; `fully_shard` puts in its own."""
    with contextlib.ExitStack() as undo:
        for module in sharding.sharded_modules(model):
            own = sharding.own_class(module)
            if type(module).__module__ != own.__module__:
                undo.enter_context(unittest.mock.patch.object(type(module), "__module__", own.__module__))
        yield
