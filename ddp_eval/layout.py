"""How the model lies over the ranks: world size = replicas x ranks per replica.

A replica is one whole copy of the model on neighbouring ranks, so that it stays within a node where it divides the node's ranks:

    layers:2 on 6 ranks      rank      0   1   2   3   4   5
                             replica   0   0   1   1   2   2
                             place     0   1   0   1   0   1     which part of the copy

Pure arithmetic: no torch, no ranks of its own, so that the command line can be checked before anything loads.
"""

from __future__ import annotations

import dataclasses

from ddp_eval.errors import UserError

REPLICAS, TENSOR, LAYERS = "replicas", "tensor", "layers"
AUTO, MEASURE = "auto", "measure"
FORMS = "auto, measure, replicas, tensor:K or layers:K"


@dataclasses.dataclass(frozen=True)
class Layout:
    """kind: REPLICAS, TENSOR or LAYERS; ranks_per_replica: 1 exactly with REPLICAS."""

    kind: str
    ranks_per_replica: int

    def __str__(self) -> str:
        return self.kind if self.kind == REPLICAS else f"{self.kind}:{self.ranks_per_replica}"

    def replicas(self, world_size: int) -> int:
        return world_size // self.ranks_per_replica

    def is_local(self, ranks_per_node: int) -> bool:
        """Whether every replica stays within a node.

        >>> [Layout(LAYERS, 2).is_local(ranks_per_node) for ranks_per_node in (1, 2, 3, 4)]
        [False, True, False, True]
        """
        return ranks_per_node % self.ranks_per_replica == 0

    def sentence(self, world_size: int) -> str:
        """For the one line that a run says of its layout."""
        copies = self.replicas(world_size)
        of_what = {REPLICAS: "on a rank each", TENSOR: "each matrix split", LAYERS: "the layers split"}[self.kind]
        over = "" if self.kind == REPLICAS else f" over {self.ranks_per_replica} ranks"
        return f"{copies} {'copy' if copies == 1 else 'copies'} of the model, {of_what}{over}"


WHOLE_COPIES = Layout(REPLICAS, 1)


def check_words(words: str) -> None:
    """Raise UserError unless `words` is one of the forms that --layout takes; `tensor` and `layers` may leave K open."""
    kind, colon, count = words.partition(":")
    if kind in (AUTO, MEASURE, REPLICAS) and not colon:
        return
    if kind in (TENSOR, LAYERS) and (not colon or (count.isdecimal() and int(count) >= 2)):
        return
    raise UserError(f"--layout must be {FORMS} with K of 2 or more, got {words}")


def fixed_layout(words: str, world_size: int, ranks_per_node: int) -> Layout | None:
    """The layout that `words` name, None where it depends on the model: `auto`, `measure` and `layers` with no number.

    `tensor` with no number takes all ranks of a node. Raises UserError when the ranks do not divide into replicas.
    """
    check_words(words)
    kind, _, count = words.partition(":")
    if kind == REPLICAS:
        return WHOLE_COPIES
    if kind == TENSOR and not count:
        count = str(ranks_per_node)
        if ranks_per_node < 2:
            return WHOLE_COPIES
    if kind in (AUTO, MEASURE) or not count:
        return None
    check_division(Layout(kind, int(count)), world_size)
    return Layout(kind, int(count))


def again(earlier: str, world_size: int) -> Layout | None:
    """The layout that another start has written down; None where these ranks do not divide into its replicas."""
    try:
        return fixed_layout(earlier, world_size, world_size)
    except (UserError, ValueError):  # a number of thousands of digits, which Python does not read
        return None


def check_division(layout: Layout, world_size: int) -> None:
    """Raise UserError, with the arithmetic, when `world_size` ranks do not divide into whole replicas."""
    each = layout.ranks_per_replica
    if world_size % each == 0:
        return
    whole, left = divmod(world_size, each)
    fit = f"start {whole * each} or {(whole + 1) * each} ranks" if whole else f"start {each} ranks"
    raise UserError(
        f"--layout {layout} takes {each} ranks for each copy of the model, and {world_size} = {whole} x {each} + {left}: {fit}"
    )


def possible_layouts(world_size: int) -> list[Layout]:
    """Every layout that divides `world_size` ranks into replicas, the smallest replicas first."""
    splits = [count for count in range(2, world_size + 1) if world_size % count == 0]
    return [WHOLE_COPIES, *(Layout(kind, count) for count in splits for kind in (TENSOR, LAYERS))]
