"""How long a run would take under each layout, by arithmetic: work, idle stages, bytes over the links, loading.

The seconds are as good as the speeds that go in; between layouts on one machine they are meant to be compared. A run measures
itself against them (`--layout measure` prints both).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ddp_eval.placement.memory import ModelSizes


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What the hardware does. flops: floating-point operations per second of a rank in matrix products, as reached in runs;
    link, node_link: bytes per second between ranks of a node, and between nodes; latency_s: of one collective;
    load: bytes of weights per second that a node reads from its disk, once for all of its ranks; copy: that a rank then takes
    to its device; overlaps: whether a layer's weights are gathered while the one before computes."""

    flops: float
    link: float
    node_link: float
    latency_s: float
    load: float
    copy: float
    overlaps: bool = False


# Reached, not peak: H100 in bfloat16 (LOG.md), NVLink and 200 Gbit/s networks at about two thirds; a CPU core and gloo.
CUDA_SPEEDS = Speeds(flops=4e14, link=2e11, node_link=2e10, latency_s=2e-5, load=2e9, copy=1e10, overlaps=True)
CPU_SPEEDS = Speeds(flops=1e11, link=1e9, node_link=1e9, latency_s=2e-4, load=1e9, copy=4e9, overlaps=False)


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


class RunCost(NamedTuple):
    """Of the busiest replica: seconds of the run, and bytes that each token costs a link. why: for people."""

    run_s: float
    link_bytes_per_token: float
    why: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """The packs of the busiest replica, and what one of them takes in the mean.

    tokens: of a pack. layers, head: floating-point operations of a pack in each layer, and in the head.
    flops, link, latency_s, overlaps: as in `Speeds`; `link` is the slower one where a replica lies across nodes.
    """

    packs: int
    tokens: float
    layers: list[float]
    head: float
    flops: float
    link: float
    latency_s: float
    overlaps: bool = True

    @property
    def pack_s(self) -> float:
        """Seconds of a pack on one rank that holds the whole model."""
        return (sum(self.layers) + self.head) / self.flops

    @classmethod
    def of(cls, sizes: ModelSizes, amount: Amount, replicas: int, is_local: bool, speeds: Speeds) -> Workload:
        """is_local: every replica stays within a node."""
        tokens, reads = amount.tokens / max(1, amount.packs), amount.reads / max(1, amount.packs)
        return cls(
            packs=max(1, -(-amount.packs // replicas)),
            tokens=tokens,
            layers=[2.0 * active * tokens for active in sizes.active],
            head=2.0 * sizes.hidden * sizes.vocab * reads,
            flops=speeds.flops,
            link=speeds.link if is_local else speeds.node_link,
            latency_s=speeds.latency_s,
            overlaps=speeds.overlaps,
        )
