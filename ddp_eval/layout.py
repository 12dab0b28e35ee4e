"""How the model lies over the ranks: world size = replicas x ranks per replica.

A replica is one whole copy of the model on neighbouring ranks, so that it stays within a node where it divides the node's ranks:

    layers:2 on 6 ranks      rank      0   1   2   3   4   5
                             replica   0   0   1   1   2   2
                             place     0   1   0   1   0   1     which part of the copy

Only the words are here, so that the command line can be checked before anything loads: no torch, no ranks. What a kind of layout
means (memory, time, loading) stands in its class in placement/.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ddp_eval.errors import UserError
from ddp_eval.system.text import read_count

REPLICAS, TENSOR, LAYERS, SHARD = "replicas", "tensor", "layers", "shard"
AUTO, MEASURE = "auto", "measure"


class KindName(NamedTuple):
    """module, class_name: in placement/, see kinds.py.

    splits: several ranks hold a replica, and their number follows the kind's name.
    own_packs: each of these ranks runs packs of its own, in lockstep with the others.
    """

    module: str
    class_name: str
    splits: bool
    own_packs: bool = False


# Every kind of layout, in the order in which they are listed and tried. A new kind: its module in placement/, a line here, and
# the help of --layout.
KINDS = {
    REPLICAS: KindName("data_parallel", "DataParallel", splits=False),
    TENSOR: KindName("tensor_parallel", "TensorParallel", splits=True),
    LAYERS: KindName("pipeline_parallel", "PipelineParallel", splits=True),
    SHARD: KindName("fully_sharded", "FullySharded", splits=True, own_packs=True),
}
WHOLE_KINDS = tuple(kind for kind, name in KINDS.items() if not name.splits)
SPLIT_KINDS = tuple(kind for kind, name in KINDS.items() if name.splits)


@dataclasses.dataclass(frozen=True)
class Layout:
    """kind: of KINDS; ranks_per_replica: 1 exactly with a kind that does not split."""

    kind: str
    ranks_per_replica: int

    def __str__(self) -> str:
        return self.kind if self.kind in WHOLE_KINDS else f"{self.kind}:{self.ranks_per_replica}"

    def replicas(self, world_size: int) -> int:
        return world_size // self.ranks_per_replica

    @property
    def ranks_per_pack(self) -> int:
        """How many ranks run a pack together."""
        return 1 if KINDS[self.kind].own_packs else self.ranks_per_replica

    def is_local(self, ranks_per_node: int) -> bool:
        """Whether every replica stays within a node.

        >>> [Layout(LAYERS, 2).is_local(ranks_per_node) for ranks_per_node in (1, 2, 3, 4)]
        [False, True, False, True]
        """
        return ranks_per_node % self.ranks_per_replica == 0


WHOLE_COPIES = Layout(REPLICAS, 1)


def check_layout(words: str) -> None:
    """Raise UserError unless `words` is one of the forms that --layout takes; a kind that splits may leave K open."""
    kind, colon, count = words.partition(":")
    if kind in (AUTO, MEASURE, *WHOLE_KINDS) and not colon:
        return
    if kind in SPLIT_KINDS and (not colon or (read_count(count) or 0) >= 2):
        return
    *forms, last = AUTO, MEASURE, *WHOLE_KINDS, *(f"{kind}:K" for kind in SPLIT_KINDS)
    raise UserError(f"--layout must be {', '.join(forms)} or {last} with K of 2 or more, got {words}")


def check_division(layout: Layout, world_size: int) -> None:
    """Raise UserError, with what would do, when `world_size` ranks do not divide into whole replicas."""
    each = layout.ranks_per_replica
    if world_size % each == 0:
        return
    whole, left = divmod(world_size, each)
    found = f"{world_size} ranks leave {left} over" if whole else f"there {'is' if left == 1 else 'are'} only {left}"
    fit = f"start {whole * each} or {(whole + 1) * each} ranks" if whole else f"start {each} ranks"
    raise UserError(f"--layout {layout} takes {each} ranks for each copy of the model, and {found}: {fit}")


def possible_layouts(world_size: int) -> list[Layout]:
    """Every layout that divides `world_size` ranks into replicas, the smallest replicas first."""
    splits = [count for count in range(2, world_size + 1) if world_size % count == 0]
    whole = [Layout(kind, 1) for kind in WHOLE_KINDS]
    return whole + [Layout(kind, count) for count in splits for kind in SPLIT_KINDS]
