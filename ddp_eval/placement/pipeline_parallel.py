"""Pipeline parallelism: each rank of a replica holds some of the layers, and hands hidden states on."""

from __future__ import annotations

from typing import Any

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.placement.kinds import Kind
from ddp_eval.placement.memory import ModelSizes, pack_bytes
from ddp_eval.placement.speed import RunCost, Workload
from ddp_eval.system.text import count_packs

_IN_FLIGHT = 6  # hidden states of packs that a stage keeps


class PipelineParallel(Kind):
    """One transfer of hidden states between neighbouring stages for each pack; stages idle while it fills and drains."""

    how = "the layers split"
    serves_generation = False

    def spans(self, whole: Any) -> list[range] | None:
        from ddp_eval.engines.hf.pipeline_parallel import plan_stages

        return [stage.layers for stage in plan_stages(whole, self.ranks)]

    def rank_bytes(self, sizes: ModelSizes, spans: list[range] | None, max_tokens: int) -> list[tuple[int, int]]:
        assert spans is not None
        last = len(spans) - 1
        return [
            (
                sum(sizes.layers[span.start : span.stop])
                + sizes.rest
                + (sizes.embedding if stage == 0 else 0)
                + ((sizes.embedding if sizes.tied else sizes.head) if stage == last else 0),
                pack_bytes(sizes, max_tokens, 1, has_head=stage == last, in_flight=_IN_FLIGHT),
            )
            for stage, span in enumerate(spans)
        ]

    def run_cost(self, sizes: ModelSizes, spans: list[range] | None, work: Workload) -> RunCost:
        assert spans is not None
        stages_s = [sum(work.layers[span.start : span.stop]) / work.flops for span in spans]
        stages_s[-1] += work.head / work.flops
        link_bytes = float(sizes.hidden * sizes.value_bytes)
        slowest_s = max(*stages_s, link_bytes * work.tokens / work.link)
        uneven = slowest_s * self.ranks / work.pack_s - 1
        why = f"{count_packs(self.ranks - 1)} to fill and drain {self.ranks} stages, the slowest {uneven:.0%} over even"
        return RunCost(sum(stages_s) + (work.packs - 1) * slowest_s, link_bytes, why)

    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        from ddp_eval.engines.hf.pipeline_parallel import load_layers_engine

        return load_layers_engine(config.loader_args, model_config, world)
