"""How long a run would take under each layout, by arithmetic: work, idle stages, bytes over the links, loading.

The seconds are as good as the speeds that go in; between layouts on one machine they are meant to be compared. A run measures
itself against them (`--layout measure` prints both).
"""

from __future__ import annotations

import dataclasses

from ddp_eval.layout import LAYERS, TENSOR, Layout
from ddp_eval.placement.memory import ModelSizes
from ddp_eval.system.text import count_packs


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What the hardware does. flops: floating-point operations per second of a rank in matrix products, as reached in runs;
    link, node_link: bytes per second between ranks of a node, and between nodes; latency_s: of one collective;
    load: bytes of weights per second that a node reads from its disk, once for all of its ranks; copy: that a rank then takes
    to its device."""

    flops: float
    link: float
    node_link: float
    latency_s: float
    load: float
    copy: float


# Reached, not peak: H100 in bfloat16 (LOG.md), NVLink and 200 Gbit/s networks at about two thirds; a CPU core and gloo.
CUDA_SPEEDS = Speeds(flops=4e14, link=2e11, node_link=2e10, latency_s=2e-5, load=2e9, copy=1e10)
CPU_SPEEDS = Speeds(flops=1e11, link=1e9, node_link=1e9, latency_s=2e-4, load=1e9, copy=4e9)


@dataclasses.dataclass(frozen=True)
class Amount:
    """The work of a run: tokens to compute, of which `reads` are scored, in `packs` forward passes."""

    tokens: int
    reads: int
    packs: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of loading and of the run; of the run, the share in which a rank waits, and bytes that each token costs a link.

    is_local: no copy of the model lies across nodes.
    """

    load_s: float
    run_s: float
    idle_share: float
    link_bytes_per_token: float
    is_local: bool
    why: str

    @property
    def total_s(self) -> float:
        return self.load_s + self.run_s


def predict(
    sizes: ModelSizes,
    layout: Layout,
    spans: list[range] | None,
    world_size: int,
    ranks_per_node: int,
    amount: Amount,
    speeds: Speeds,
) -> Prediction:
    """Seconds that `amount` of work takes. spans: for LAYERS, the layers of each stage."""
    replicas, ranks = layout.replicas(world_size), layout.ranks_per_replica
    packs = max(1, -(-amount.packs // replicas))  # of the busiest replica
    tokens, reads = amount.tokens / max(1, amount.packs), amount.reads / max(1, amount.packs)
    head = 2.0 * sizes.hidden * sizes.vocab * reads
    layers = [2.0 * active * tokens for active in sizes.active]
    one_pack_s = (sum(layers) + head) / speeds.flops
    part = sizes.weights / ranks
    load_s = part * min(ranks, ranks_per_node) / speeds.load + part / speeds.copy
    is_local = layout.is_local(ranks_per_node)
    link = speeds.link if is_local else speeds.node_link
    perfect_s = amount.packs * one_pack_s / world_size

    if layout.kind == LAYERS:
        assert spans is not None
        stages_s = [sum(layers[span.start : span.stop]) / speeds.flops for span in spans]
        stages_s[-1] += head / speeds.flops
        link_bytes = float(sizes.hidden * sizes.value_bytes)
        slowest_s = max(*stages_s, link_bytes * tokens / link)
        run_s = sum(stages_s) + (packs - 1) * slowest_s
        uneven = slowest_s * ranks / one_pack_s - 1
        why = f"{count_packs(ranks - 1)} to fill and drain {ranks} stages, the slowest {uneven:.0%} over even"
    elif layout.kind == TENSOR:
        link_bytes = 2 * len(layers) * 2 * (ranks - 1) / ranks * float(sizes.hidden * sizes.value_bytes)
        link_s = link_bytes * tokens / link + 2 * len(layers) * speeds.latency_s
        run_s = packs * (one_pack_s / ranks + link_s)
        why = f"{2 * len(layers)} all-reduces a pack, {link_bytes / 1e6:.2f} MB of them a token"
    else:
        link_bytes = 0.0
        run_s = packs * one_pack_s
        why = f"{count_packs(packs)} on the busiest rank"
    where = "" if is_local else "; some copies lie across nodes"
    return Prediction(load_s, run_s, max(0.0, 1 - perfect_s / run_s), link_bytes, is_local, why + where)
