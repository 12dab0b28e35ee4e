"""Load this rank's part of the model, as the engine and the layout say."""

from __future__ import annotations

import dataclasses
from typing import Any

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine, registry
from ddp_eval.engines.hf import draws
from ddp_eval.layout import Layout
from ddp_eval.placement.kinds import kind_of


def lay_out(world: World, chosen: Layout) -> World:
    """The same ranks, grouped into replicas."""
    own_packs = chosen.ranks_per_pack < chosen.ranks_per_replica
    ranks_per_shard = chosen.ranks_per_replica if own_packs else 1
    return dataclasses.replace(world, ranks_per_replica=chosen.ranks_per_pack, ranks_per_shard=ranks_per_shard)


def load_replica(config: Config, model_config: Any, world: World, chosen: Layout) -> Engine:
    """This rank's engine. world: as `lay_out` returns it. Collective where several ranks hold a replica.

    What is drawn comes from --seed. No other thread may draw meanwhile where `brings_code` says so.
    """
    spec = registry.spec_of(config.model)
    with draws.loading_for(config.seed, world.is_leader, brings_code(config, model_config)):
        if spec.own_layout:
            return spec.load(config, model_config, world)
        return kind_of(chosen).load(config, model_config, world)


def brings_code(config: Config, model_config: Any) -> bool:
    """Whether loading runs a checkpoint's own code, or an engine that seeds Python's and numpy's generators."""
    own = config.loader_args.get("trust_remote_code") and getattr(model_config, "auto_map", None)
    return bool(own) or registry.spec_of(config.model).seeds_generators
