"""Fully sharded models: every rank runs packs of its own, and weights are gathered layer by layer (torch's `fully_shard`).

The forward of a layer is that of the whole model on gathered weights, so the numbers are those of one rank, bit for bit. What
it asks is that the ranks which share weights run the same number of forwards: lockstep.py.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ddp_eval.distributed import sharding
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, engine, layer_configs
from ddp_eval.engines.hf.lockstep import Lockstep
from ddp_eval.engines.ops import logprobs
from ddp_eval.errors import LostContact, UserError, is_out_of_memory
from ddp_eval.packs.plan import Pack

Result = TypeVar("Result")


class ShardedEngine(engine.HFEngine):
    """A causal model that `fully_shard` has spread over ranks. Made, and used within `together`, on all of them at once.

    root: what `fully_shard` was called on last, where an adapter has put that around the model; else the model itself.
    """

    def __init__(self, model: Any, world: World, keep_attention: bool = False, whole: Any = None, root: Any = None) -> None:
        root = model if root is None else root
        self._named = contextlib.ExitStack()
        self._named.enter_context(_under_its_own_name(root))
        self._lockstep = Lockstep(model, sharding.Pace(world, sharding.shard_ranks(root)), root)
        self._dtype = sharding.compute_dtype(root)
        try:
            super().__init__(model, sharding.device_of(root), keep_attention, whole)
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


def check_model(whole: Any, ranks: int) -> None:
    """Raise UserError unless the model `whole` (on the meta device) can be sharded layer by layer."""
    distribute = getattr(whole, "maybe_distribute_model", None)
    if distribute is None or "mesh_manager" not in inspect.signature(distribute).parameters:
        raise UserError(
            f"--layout shard:{ranks} needs transformers 5.20 or newer, which loads weights into shards, and "
            f"{importlib.metadata.version('transformers')} is installed"
        )
    if not layer_configs.modules_of_layers(whole):
        raise UserError(
            f"--layout shard:{ranks} cannot shard {whole.config.get_text_config().model_type} models: their layers are in no list"
        )


def load_sharded_engine(model_args: dict[str, Any], config: Any, world: World) -> ShardedEngine:
    """Load this rank's part of every weight onto its device. Collective. Raises UserError for what cannot be loaded."""
    whole = checkpoint.whole_model(model_args, config)
    check_model(whole, world.ranks_per_shard)
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(fsdp_size=world.ranks_per_shard, dp_replicate_size=world.world_size // world.ranks_per_shard)
    with _reading_rows():
        model = checkpoint.load_weights(
            model_args, config, world.device, _sharding_class(type(whole)), keeps_freed=False, distributed_config=split
        )
    model.requires_grad_(False)  # of weights that are trained together, `fully_shard` wants one dtype
    return ShardedEngine(model, world, keep_attention="attn_implementation" in model_args, whole=whole)


@contextlib.contextmanager
def _reading_rows() -> Iterator[None]:
    """Have transformers' loader read the rows that it takes of a weight, instead of mapping all files and keeping views of them.

    Pages of a mapped file count as memory of the rank as long as it has a view of any of them: more than the whole model.
    """
    from transformers import modeling_utils

    def open_to_read(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "backend": "pread"})

    own = modeling_utils.safe_open
    with unittest.mock.patch.object(modeling_utils, "safe_open", open_to_read):
        yield


def _sharding_class(base: type) -> type:
    """`base` whose `from_pretrained` shards each layer, and then the rest, before it reads any weight.

    transformers (5.23) then reads of each weight the rows of this rank alone. Its own plan knows fewer models, and its sharding
    over groups that are copies of each other would sum up gradients that there are none of.
    """

    def maybe_distribute_model(cls: Any, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        model._is_distributed_loading_by_transformers = True
        sharding.shard(model, layer_configs.modules_of_layers(model), mesh_manager.get_mesh("fsdp"))
        return model

    own = {
        "maybe_distribute_model": classmethod(maybe_distribute_model),
        # transformers looks into the module of a class to learn what attention it can do.
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), own)


@contextlib.contextmanager
def _under_its_own_name(model: Any) -> Iterator[None]:
    """transformers looks at the source of a class's module to learn what attention it can do; `fully_shard` puts in its own."""
    with contextlib.ExitStack() as undo:
        for module in sharding.sharded_modules(model):
            own = sharding.own_class(module)
            if type(module).__module__ != own.__module__:
                undo.enter_context(unittest.mock.patch.object(type(module), "__module__", own.__module__))
        yield
