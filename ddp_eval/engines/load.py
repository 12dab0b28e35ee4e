"""Load this rank's part of the model, as the layout says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ddp_eval import layout
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.engines.hf import checkpoint, draws, engine
from ddp_eval.layout import Layout

if TYPE_CHECKING:
    from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine


def lay_out(world: World, chosen: Layout) -> World:
    """The same ranks, grouped into replicas."""
    return dataclasses.replace(world, ranks_per_replica=chosen.ranks_per_replica)


def load_replica(config: Config, model_config: Any, world: World, chosen: Layout) -> Engine:
    """This rank's engine. world: as `lay_out` returns it. Collective where several ranks hold a replica.

    What is drawn comes from --seed. No other thread may draw meanwhile where `brings_code` says so.
    """
    with draws.loading_for(config.seed, world.is_leader, brings_code(config, model_config)):
        return _load_replica(config, model_config, world, chosen)


def brings_code(config: Config, model_config: Any) -> bool:
    """Whether loading runs a checkpoint's own code, or an engine that seeds Python's and numpy's generators."""
    own = config.loader_args.get("trust_remote_code") and getattr(model_config, "auto_map", None)
    return bool(own) or config.model == "vllm"


def _load_replica(config: Config, model_config: Any, world: World, chosen: Layout) -> Engine:
    model_args = config.loader_args
    if config.model == "vllm":
        from ddp_eval.engines.vllm import load_vllm_engine

        return load_vllm_engine(model_args, model_config, world)
    if chosen.kind == layout.LAYERS:
        from ddp_eval.engines.hf.pipeline_parallel import load_layers_engine

        return load_layers_engine(model_args, model_config, world)
    if chosen.kind == layout.TENSOR:
        from ddp_eval.engines.hf.tensor_parallel import load_tensor_engine

        return load_tensor_engine(model_args, model_config, world)
    if config.load == "broadcast":
        from ddp_eval.engines.hf import broadcast_load

        return broadcast_load.load_engine(model_args, model_config, world)
    if checkpoint.is_seq2seq(model_args, model_config):
        from ddp_eval.engines.hf import seq2seq

        return seq2seq.load_engine(model_args, model_config, world.device)
    return engine.load_engine(model_args, model_config, world.device)


def wrap_model(model: Any, device: torch.device) -> engine.HFEngine | Seq2SeqEngine:
    """The engine of a whole model that is loaded already. To be closed, which gives the model back as it came."""
    if checkpoint.is_seq2seq({}, model.config):
        from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine

        return Seq2SeqEngine(model, device)
    return engine.HFEngine(model, device)
