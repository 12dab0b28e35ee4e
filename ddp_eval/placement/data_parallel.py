"""Whole copies of the model, one on each rank."""

from __future__ import annotations

from typing import Any

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.placement.kinds import Kind
from ddp_eval.placement.memory import ModelSizes, room_bytes
from ddp_eval.placement.speed import RunCost, Workload
from ddp_eval.system.text import count_packs


class DataParallel(Kind):
    """Nothing is split: no bytes between ranks but results."""

    how = "on a rank each"

    def rank_bytes(self, sizes: ModelSizes, spans: list[range] | None, max_tokens: int) -> list[tuple[int, int]]:
        return [(sizes.weights, room_bytes(sizes, max_tokens, 1))]

    def run_cost(self, sizes: ModelSizes, spans: list[range] | None, work: Workload) -> RunCost:
        return RunCost(work.packs * work.pack_s, 0.0, f"{count_packs(work.packs)} on the busiest rank")

    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        from ddp_eval.engines.hf.load import load_whole

        return load_whole(config, model_config, world)
