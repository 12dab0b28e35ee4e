"""The interface of a kind of layout: whether a model allows it, its memory, its time, and how a rank loads its part.

`layout.KINDS` names the classes, one a module beside this one; they are imported when they are asked for.
"""

from __future__ import annotations

import abc
import importlib
from typing import Any

from ddp_eval import layout as layouts
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout
from ddp_eval.placement.memory import ModelSizes
from ddp_eval.placement.speed import Amount, Prediction, RunCost, Speeds, Workload


class Kind(abc.ABC):
    """A kind of layout with a number of ranks for each replica.

    how: for people, behind "2 copies of the model, ".
    serves_generation: whether tasks that generate text run under it.
    fails_together: while it loads, the ranks of a replica wait for each other in collectives, in which one that fails alone
    leaves the others.
    """

    how: str
    serves_generation = True
    fails_together = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.ranks = layout.ranks_per_replica

    def sentence(self, world_size: int) -> str:
        """For the line that a run logs about its layout."""
        copies = self.layout.replicas(world_size)
        over = "" if self.ranks == 1 else f" over {self.ranks} ranks"
        return f"{copies} {'copy' if copies == 1 else 'copies'} of the model, {self.how}{over}"

    @staticmethod
    def open_ranks(ranks_per_node: int) -> int | None:
        """Ranks of a replica where --layout leaves their number open; None: the fewest of a node that hold the model."""
        return None

    def check(self, whole: Any) -> None:
        """Raise UserError, before any weight is read, when the model cannot be laid out so. whole: it, on the meta device."""
        self.spans(whole)

    def spans(self, whole: Any) -> list[range] | None:
        """Which layers each rank of a replica holds; None where it holds all of them, or a part of each. Raises as `check`."""
        return None

    @abc.abstractmethod
    def rank_bytes(self, sizes: ModelSizes, spans: list[range] | None, max_tokens: int) -> list[tuple[int, int]]:
        """(bytes of weights, bytes of room for a pack) on each rank of a replica.

        spans: as `spans` returns. max_tokens: the budget of a pack.
        """

    @abc.abstractmethod
    def run_cost(self, sizes: ModelSizes, spans: list[range] | None, work: Workload) -> RunCost:
        """What the busiest replica takes for its packs."""

    def predict(
        self, sizes: ModelSizes, spans: list[range] | None, world_size: int, ranks_per_node: int, amount: Amount, speeds: Speeds
    ) -> Prediction:
        """Seconds that `amount` of work takes. spans: as `spans` returns."""
        is_local = self.layout.is_local(ranks_per_node)
        work = Workload.of(sizes, amount, world_size // self.layout.ranks_per_pack, is_local, speeds)
        cost = self.run_cost(sizes, spans, work)
        part = sizes.weights / self.ranks
        load_s = part * min(self.ranks, ranks_per_node) / speeds.load + part / speeds.copy
        perfect_s = amount.packs * work.pack_s / world_size
        idle_share = max(0.0, 1 - perfect_s / cost.run_s)
        where = "" if is_local else "; some copies lie across nodes"
        return Prediction(load_s, cost.run_s, idle_share, cost.link_bytes_per_token, is_local, cost.why + where)

    @abc.abstractmethod
    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        """This rank's engine. world: grouped into replicas. Raises UserError for what cannot be split or loaded."""


def kind_of(layout: Layout) -> Kind:
    """The class of a layout's kind, for its number of ranks."""
    made: Kind = _class_of(layout.kind)(layout)
    return made


def _class_of(kind: str) -> Any:
    module, name, *_ = layouts.KINDS[kind]
    return getattr(importlib.import_module(f"ddp_eval.placement.{module}"), name)


def resolve_layout(words: str, world_size: int, ranks_per_node: int) -> Layout | None:
    """The layout that `words` name, None where it depends on the model: `auto`, `measure`, and `layers` with no number.

    `tensor` with no number takes all ranks of a node. Raises UserError when the ranks do not divide into replicas.
    """
    layouts.check_layout(words)
    kind, _, count = words.partition(":")
    if kind in layouts.WHOLE_KINDS:
        return Layout(kind, 1)
    if kind in (layouts.AUTO, layouts.MEASURE):
        return None
    ranks = int(count) if count else _class_of(kind).open_ranks(ranks_per_node)
    if ranks is None:
        return None
    if ranks < 2:
        return layouts.WHOLE_COPIES
    chosen = Layout(kind, ranks)
    layouts.check_division(chosen, world_size)
    return chosen


def kept_layout(earlier: str, world_size: int) -> Layout | None:
    """The layout that another start has written down; None where these ranks do not divide into its replicas."""
    try:
        return resolve_layout(earlier, world_size, world_size)
    except UserError:
        return None
