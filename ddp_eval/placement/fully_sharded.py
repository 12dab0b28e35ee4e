"""Fully sharded: each rank holds a part of every weight, gathers a layer when it needs it, and runs packs of its own."""

from __future__ import annotations

from typing import Any

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.placement.kinds import Kind
from ddp_eval.placement.memory import ModelSizes, room_bytes
from ddp_eval.placement.speed import RunCost, Workload

_GATHERED = 3  # layers whose weights are there at once: the one that computes, what it was gathered into, and the one before


class FullySharded(Kind):
    """All layers' weights cross the links once for each pack and rank; embedding and head once for all packs."""

    how = "its weights sharded"
    fails_together = True

    def check(self, whole: Any) -> None:
        from ddp_eval.engines.hf.fully_sharded import check_model

        check_model(whole, self.ranks)

    def rank_bytes(self, sizes: ModelSizes, spans: list[range] | None, max_tokens: int) -> list[tuple[int, int]]:
        gathered = sizes.embedding + sizes.head + sizes.rest + _GATHERED * max(sizes.layers, default=0)
        return [(-(-sizes.weights // self.ranks) + gathered, room_bytes(sizes, max_tokens, 1))] * self.ranks

    def run_cost(self, sizes: ModelSizes, spans: list[range] | None, work: Workload) -> RunCost:
        received = sum(sizes.layers) * (self.ranks - 1) / self.ranks
        gather_s = received / work.link + len(sizes.layers) * work.latency_s
        pack_s = max(work.pack_s, gather_s) if work.overlaps else work.pack_s + gather_s
        why = f"{received / 1e6:.0f} MB of weights gathered for each pack"
        return RunCost(work.packs * pack_s, received / max(1.0, work.tokens), why)

    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        from ddp_eval.engines.hf.fully_sharded import load_sharded_engine

        return load_sharded_engine(config.loader_args, model_config, world)
