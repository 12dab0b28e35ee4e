"""`--load broadcast`: the leader reads the checkpoint once, every other rank receives the weights from it.

For file systems that many nodes read at once slowly. The others build the model without weights, from its config alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ddp_eval.distributed import collectives
from ddp_eval.distributed.messages import next_work
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint
from ddp_eval.engines.hf import engine as hf
from ddp_eval.errors import UserError, describe, is_out_of_memory
from ddp_eval.packs.results import NO_RESULTS


class _Tensor(NamedTuple):
    """What the leader sends of a tensor before its values. name: as in the model, each shared weight once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool


def load_engine(model_args: dict[str, Any], config: Any, world: World) -> hf.HFEngine:
    """As `hf.load_engine`, on all ranks together. Raises UserError for models whose weights are more than plain tensors."""
    if world.world_size == 1:
        return hf.load_engine(model_args, config, world.device)
    if world.is_leader:
        try:
            engine = hf.load_engine(model_args, config, world.device)
        except BaseException:
            collectives.broadcast_object(world, None)
            raise
        named = _named_tensors(engine.model)
        header = [_Tensor(name, tuple(value.shape), value.dtype, is_buffer) for name, value, is_buffer in named]
        collectives.broadcast_object(world, (header, engine.model.generation_config))
        with _all_ready(world):
            pass
        collectives.broadcast_tensors(world, [value for _, value, _ in named])
        return engine
    header_and_config = collectives.broadcast_object(world, None)
    if header_and_config is None:
        if world.goes_on:  # where each rank reports how its load went
            raise UserError("rank 0 could not read the model")
        next_work(world)  # raises the leader's error
        raise AssertionError("the leader went on without a model")
    with _all_ready(world):
        model = _build_empty(model_args, config)
        header, model.generation_config = header_and_config
        _fill(model, header, world.device)
    collectives.broadcast_tensors(world, [value for _, value, _ in _named_tensors(model)])
    return hf.HFEngine(model.eval(), world.device, keep_attention="attn_implementation" in model_args)


@contextlib.contextmanager
def _all_ready(world: World) -> Iterator[None]:
    """Where ranks go on after a failure, those that are ready to send or receive wait here for the others. Collective.

    Raises FailedTogether on all ranks where one has failed in the block: none of them is left in a transfer.
    """
    if not world.goes_on:
        yield
        return
    why = None
    try:
        yield
    except Exception as error:
        why = describe(error)
    try:
        collectives.all_gather_rows(world, NO_RESULTS, failed=why is not None)
    except collectives.RankFailed:
        raise collectives.fail_together(world, why) from None


def _named_tensors(model: Any) -> list[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is a buffer) of all weights and buffers, those that checkpoints leave out included."""
    weights = [(name, value.detach(), False) for name, value in model.named_parameters()]
    return weights + [(name, value, True) for name, value in model.named_buffers()]


def _build_empty(model_args: dict[str, Any], config: Any) -> Any:
    if model_args.get("use_kernels"):
        raise UserError("--load broadcast cannot serve model_args use_kernels: give --load disk")
    computing = ("attn_implementation", "experts_implementation")
    options = {key: model_args[key] for key in computing if key in model_args} | checkpoint.trust(model_args)
    with torch.device("meta"):
        return checkpoint.auto_class(config).from_config(copy.deepcopy(config), **options)


def _fill(model: Any, header: list[_Tensor], device: torch.device) -> None:
    """Give every tensor of the model memory on `device`, of the leader's shape and type."""
    theirs = {tensor.name for tensor in header}
    apart = theirs & {*getattr(model, "all_tied_weights_keys", ())}  # not tied in the checkpoint, by whatever its config says
    for name in apart:
        del model.all_tied_weights_keys[name]
    mine = {name for name, _, _ in _named_tensors(model)} | apart
    if mine != theirs:
        odd = min(mine ^ theirs)
        raise UserError(f"--load broadcast cannot serve this model, whose {odd} is not on all ranks: give --load disk")
    try:
        for tensor in header:
            path, _, leaf = tensor.name.rpartition(".")
            module = model.get_submodule(path)
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if tensor.is_buffer:
                module._buffers[leaf] = memory
            else:
                module._parameters[leaf] = torch.nn.Parameter(memory, requires_grad=False)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"the model does not fit into the memory of {device}") from None
    model.tie_weights(**({"recompute_mapping": False} if apart else {}))
    left = [name for name, value in model.named_parameters(remove_duplicate=False) if value.is_meta]
    left += [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if left:
        raise UserError(f"--load broadcast cannot serve this model, whose {left[0]} is no plain weight: give --load disk")
