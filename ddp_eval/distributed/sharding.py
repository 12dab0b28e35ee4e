"""Weights that torch's `fully_shard` (FSDP2) has spread over ranks: who shares them, and keeping those ranks in lockstep.

Each rank of a shard group holds a part of every weight. A layer's weights are gathered before its forward and freed behind it,
by a collective that all ranks of the group must join: they must run the same number of forwards, in the same order.
"""

from __future__ import annotations

import datetime
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.world import LEADER_TIMEOUT, World, global_rank, group_timeout_s, new_group
from ddp_eval.errors import LostContact, UserError

RUNS, DONE, FAILED = 1, 0, -1  # what a rank is about to do: a forward; nothing more; nothing, as it failed


def shard(model: Any, layers: list[Any], mesh: Any) -> None:
    """Spread each layer's weights, and all others together, over the ranks of a one-dimensional mesh."""
    from torch.distributed.fsdp import fully_shard

    for part in (*layers, model):
        fully_shard(part, mesh=mesh)
    check_torch(model)


def is_fsdp_module(module: Any) -> bool:
    """Whether `fully_shard` was called on this very module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def sharded_modules(model: Any) -> list[Any]:
    """The modules that `fully_shard` was called on, the model itself included, in the order of `modules()`."""
    return [module for module in model.modules() if is_fsdp_module(module)]


def is_sharded(model: Any) -> bool:
    return bool(sharded_modules(model))


def class_name(model: Any) -> str:
    """The name of the model's class, without what `fully_shard` has put before it."""
    return own_class(model).__name__


def own_class(model: Any) -> type:
    """The model's class as it was before `fully_shard` derived one from it."""
    from torch.distributed.fsdp import FSDPModule

    cls = type(model)
    return cls.__mro__[2] if issubclass(cls, FSDPModule) else cls


# What is read here of FSDP's own objects, which torch promises to nobody. Tried with torch 2.8 and 2.13.
_OF_STATE = ("_device", "_mp_policy", "_comm_ctx", "_modules_to_run_forward")
_OF_GROUP = ("fsdp_params", "mesh_info", "post_forward_mesh_info", "_post_forward_indices", "is_sharded")


def check_torch(model: Any) -> None:
    """Raise UserError for a sharded model of a torch whose FSDP is another one than this module knows."""
    try:
        for state in _states(model):
            operator.attrgetter(*_OF_STATE)(state)
            for group in _groups(state):
                operator.attrgetter(*_OF_GROUP)(group)
    except AttributeError as error:
        raise UserError(
            f"sharded models need a torch from 2.8 to 2.13, and the FSDP of torch {torch.__version__} is another one ({error}): "
            "use one of those, or pass a whole copy on every rank"
        ) from None


def check_kind(model: Any) -> None:
    """Raise UserError for a model whose weights lie over ranks otherwise than by `fully_shard`."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UserError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which evaluate does not serve: shard it with fully_shard "
            "(FSDP2; fsdp_version=2 in accelerate and Trainer), or pass a whole copy on every rank"
        )
    check_torch(model)
    managed = {id(weight) for state in _states(model) for group in _groups(state) for weight in _weights(group)}
    for name, weight in model.named_parameters():
        if hasattr(weight, "placements") and id(weight) not in managed:
            raise UserError(
                f"the weight {name} is a DTensor that fully_shard does not manage (tensor parallel?): evaluate serves whole "
                "copies and models sharded by fully_shard"
            )
    for state in _states(model):
        for group in _groups(state):
            if any(getattr(weight, "is_dtensor", False) for weight in group.fsdp_params):
                raise UserError(
                    "the model is both tensor parallel and sharded by fully_shard: evaluate serves sharded models whose "
                    "layers are whole once they are gathered"
                )


def shard_ranks(model: Any) -> list[int]:
    """The global ranks that share this rank's weights, itself included. Raises UserError where weights differ in that."""
    found = {
        tuple(dist.get_process_group_ranks(group.mesh_info.shard_process_group))
        for state in _states(model)
        for group in _groups(state)
        if hasattr(group.mesh_info, "shard_process_group")
    }
    if len(found) > 1:
        raise UserError(
            f"the model's layers are sharded over different ranks ({' and '.join(map(str, sorted(found)))}): "
            "evaluate needs one mesh"
        )
    return list(found.pop()) if found else [dist.get_rank()]


def device_of(model: Any) -> torch.device:
    """Where a sharded model computes; with CPU offload its weights lie elsewhere."""
    device: torch.device = _states(model)[0]._device
    return device


def compute_dtype(model: Any) -> torch.dtype:
    """What a sharded model computes in: by its mixed-precision policy where it has one."""
    policies = [state._mp_policy.param_dtype for state in _states(model)]
    dtype: torch.dtype = next((dtype for dtype in policies if dtype is not None), model.dtype)
    return dtype


class Kept:
    """Modules whose weights stay gathered between forwards, until `release`."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}  # parameter group, and what it did behind a forward

    def add(self, module: Any) -> None:
        """From now on the module's weights stay once they are gathered."""
        for group in _groups(module._get_fsdp_state()):
            if id(group) not in self._before:
                self._before[id(group)] = group, group.post_forward_mesh_info
                group.post_forward_mesh_info = None

    def release(self) -> None:
        """Have them do again what they did before."""
        for group, mesh_info in self._before.values():
            group.post_forward_mesh_info = mesh_info
        self._before.clear()


class ForwardOrder:
    """The order of forwards that FSDP keeps for its next backward pass. `restore` takes out what was added since."""

    def __init__(self, model: Any) -> None:
        self._states = _states(model)
        self._before = {id(group): list(group._post_forward_indices) for group in self._all_groups()}
        self._order = {id(state._comm_ctx): list(getattr(state._comm_ctx, "post_forward_order", ())) for state in self._states}

    def _all_groups(self) -> Iterator[Any]:
        return (group for state in self._states for group in _groups(state))

    def restore(self) -> None:
        for group in self._all_groups():
            group._post_forward_indices[:] = self._before[id(group)]
        for state in self._states:
            order = getattr(state._comm_ctx, "post_forward_order", None)
            if order is not None:
                order[:] = self._order.get(id(state._comm_ctx), [])


def forget_unfinished(model: Any) -> None:
    """Let modules that `fully_shard` was given together count as not begun, where only some of them ran in a forward.

    torch (2.8) would not gather their weights in the next one; a later one does this by itself behind the model's forward.
    """
    for state in _states(model):
        state._modules_to_run_forward.clear()


def drop_received(module: Any) -> None:
    """Free what the last gathering received, before the next one. On a CPU, where it has been copied into the weights by now.

    torch keeps it for streams of a device: a layer more that is held.
    """
    state = module._get_fsdp_state()
    if state._device.type == "cpu":
        state._comm_ctx.all_gather_state = None


def _states(model: Any) -> list[Any]:
    return list({id(state): state for state in (module._get_fsdp_state() for module in sharded_modules(model))}.values())


def _groups(state: Any) -> list[Any]:
    """A module's groups of weights: one, or one for each mesh since torch 2.12."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups if groups is not None else filter(None, [state._fsdp_param_group]))


def _weights(group: Any) -> Iterator[Any]:
    for weight in group.fsdp_params:
        yield weight.sharded_param
        if hasattr(weight, "_unsharded_param"):
            yield weight._unsharded_param


_paces = itertools.count()  # of a run of our own, in which all ranks make them alike


class Pace:
    """Keeps the ranks of a shard group in step: before each forward every rank says what it is about to do.

    ranks: global ranks of the group. Collective over them; undo with `close`.
    """

    def __init__(self, world: World, ranks: list[int]) -> None:
        self._world, self._ranks = world, ranks
        self._group: Any = None
        if len(ranks) > 1:
            timeout = datetime.timedelta(seconds=group_timeout_s()) if world.borrowed else LEADER_TIMEOUT
            self._group = new_group(ranks, timeout, f"pace/{world.call or next(_paces)}/{ranks[0]}")

    @property
    def rank(self) -> int:
        return self._world.rank

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    def agree(self, state: int) -> bool:
        """Say RUNS, DONE or FAILED. Returns whether any rank runs a forward. Raises LostContact if another one has failed."""
        if self._group is None:
            return state == RUNS
        states = [torch.zeros(1, dtype=torch.int8) for _ in self._ranks]
        count = len(states)
        pace = self._world.meter.collective("all_gather (pace)", 1, count - 1)
        with naming_lost_ranks("keeping pace with its shard group"), self._world.meter.phases("wait"), pace:
            dist.all_gather(states, torch.tensor([state], dtype=torch.int8), group=self._group)
        said = [int(one) for one in states]
        if FAILED in said and state != FAILED:
            raise LostContact(f"rank {self._name(said.index(FAILED))} failed while it ran its packs")
        return RUNS in said

    def note_gather(self, module: Any) -> None:
        """Count the bytes that gathering a module's weights moves, if they are not gathered yet."""
        sharded = [group for group in _groups(module._get_fsdp_state()) if group.is_sharded]
        sent = sum(weight._sharded_param_data.nbytes for group in sharded for weight in group.fsdp_params)
        if sent and len(self._ranks) > 1:
            others = len(self._ranks) - 1
            with self._world.meter.collective("all_gather (weights)", sent * others, sent * others):
                pass

    def _name(self, place: int) -> int:
        """The rank, as the run counts them, at a place of the group."""
        return next((rank for rank in range(self._world.world_size) if global_rank(self._world, rank) == self._ranks[place]), 0)
