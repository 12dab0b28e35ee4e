"""Tensor parallelism: each rank of a replica holds a share of every matrix."""

from __future__ import annotations

from typing import Any

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.placement.kinds import Kind
from ddp_eval.placement.memory import ModelSizes, room_bytes
from ddp_eval.placement.speed import RunCost, Workload


class TensorParallel(Kind):
    """Two all-reduces of hidden states for each layer and pack."""

    how = "each matrix split"
    fails_together = True

    @staticmethod
    def open_ranks(ranks_per_node: int) -> int | None:
        """All ranks of a node."""
        return ranks_per_node

    def check(self, whole: Any) -> None:
        from ddp_eval.engines.hf.tensor_parallel import check_model

        check_model(whole, self.ranks)

    def rank_bytes(self, sizes: ModelSizes, spans: list[range] | None, max_tokens: int) -> list[tuple[int, int]]:
        share = -(-(sizes.weights - sizes.vectors) // self.ranks) + sizes.vectors
        return [(share, room_bytes(sizes, max_tokens, self.ranks))] * self.ranks

    def run_cost(self, sizes: ModelSizes, spans: list[range] | None, work: Workload) -> RunCost:
        ranks, layers = self.ranks, len(work.layers)
        link_bytes = 2 * layers * 2 * (ranks - 1) / ranks * float(sizes.hidden * sizes.value_bytes)
        link_s = link_bytes * work.tokens / work.link + 2 * layers * work.latency_s
        why = f"{2 * layers} all-reduces a pack, {link_bytes / 1e6:.2f} MB of them a token"
        return RunCost(work.packs * (work.pack_s / ranks + link_s), link_bytes, why)

    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        from ddp_eval.engines.hf.tensor_parallel import load_tensor_engine

        return load_tensor_engine(config.loader_args, model_config, world)
