"""Cut requests for models whose layers keep a state: a shared prefix is run once, and its cache is copied for each branch.

    prefix ─┬─ question 1 ─┬─ choice 1        forward 1   prefix                  1 row
            │              └─ choice 2        forward 2   questions 1 and 2       2 rows of one length
            └─ question 2 ─── choice 3        forward 3   choices 1, 2 and 3      3 rows, padded on the right

A padded token would change a row's state. So what others continue from is run in rows of one length; ends alone are padded, since
nothing continues from there. Requests that share nothing run as plain rows do, sorted by length.

A pack is laid out as any other (plan.py). What is cut here differs: a branch costs a copy of its prefix's cache and a forward of
its own, so prefixes of a few tokens are repeated instead, and trees whose first branch lies at the same depth become neighbours,
since those run side by side. Pure numpy: the same packs on any number of ranks.

Letters: M items, S segments of a pack (runs of tokens without a branch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddp_eval.packs.cut import CostModel, cut_in_order, sort_and_share
from ddp_eval.packs.plan import STATES, Pack, Plan, assemble, empty_plan
from ddp_eval.packs.requests import IntArray, Requests, gather_runs, offsets_of
from ddp_eval.packs.rows import RowLimits, batch_rows

LEAST_SEGMENT = 16  # tokens of a shared part that are worth a forward of their own
# Tokens that a branching point must save: linear attention and Mamba-2 pad each run of tokens to chunks of 32 or 64.
LEAST_SAVED = 48
LEAST_SHARE = 0.05  # of all tokens that trees must save, or everything runs as rows
# Forwards that a branching point adds, for its own part and what goes on from it, if eight trees run side by side.
FORWARDS_OF_BRANCH = 2 / 8


def plan_states(requests: Requests, cost: CostModel, max_tokens: int, max_reads: int | None = None) -> tuple[Plan, IntArray]:
    """Cut `requests` into packs of trees that share caches, and packs of plain rows for those that share nothing.

    max_tokens, max_reads: the most that one pack holds; a request beyond them gets a pack of its own.
    Returns as `plan_packs`.
    """
    order, item_of_request, shared = sort_and_share(requests)
    if not len(order):
        return empty_plan(STATES), item_of_request
    lengths, num_targets = (np.diff(requests.starts)[order] - 1).astype(np.int64), requests.num_targets[order]
    least_saved = max(LEAST_SAVED, int(cost.forward / max(cost.token, 1e-9) * FORWARDS_OF_BRANCH))
    shared, branches = keep_worthwhile(lengths, shared, LEAST_SEGMENT, least_saved)
    families = np.append(np.flatnonzero(shared == 0), len(order))
    has_branch: npt.NDArray[np.bool_] = np.logical_or.reduceat(branches, families[:-1])

    trees = _sort_trees(families, has_branch, shared, branches)
    limits = RowLimits(max_tokens, max_reads, most_padding=cost.most_padding)
    rows, row_bounds = _sort_rows(families, ~has_branch, lengths, num_targets, limits)
    by_rows = dataclasses.replace(cost, dense=False)  # no masks
    of_trees = cut_in_order(lengths[trees], shared[trees], num_targets[trees], by_rows, max_tokens, max_reads)
    bounds = np.concatenate([of_trees, row_bounds[1:] + len(trees)])
    moved = np.concatenate([trees, rows])
    shared = shared[moved]
    shared[bounds[:-1]] = 0

    rank_of_item = np.empty_like(moved)
    rank_of_item[moved] = np.arange(len(moved))
    groups = np.argsort(np.add.reduceat(lengths[moved] - shared, bounds[:-1]), kind="stable")
    return assemble(requests, order[moved], rank_of_item[item_of_request], shared, bounds, groups, STATES)


def plan_one_forest(requests: Requests) -> tuple[Plan, IntArray]:
    """All of `requests`, of which there is one or more, in a single pack with every branch there is. Returns as `plan_packs`."""
    order, item_of_request, shared = sort_and_share(requests)
    lengths = (np.diff(requests.starts)[order] - 1).astype(np.int64)
    shared, _ = keep_worthwhile(lengths, shared, 2, 1)
    whole, only = np.array([0, len(order)]), np.zeros(1, dtype=np.int64)
    return assemble(requests, order, item_of_request, shared, whole, only, STATES)


def pays(plan: Plan) -> bool:
    """Whether the trees of `plan` save enough for what copies and short runs of tokens cost."""
    if not count_branches(plan):
        return False
    lays = plan.lengths > plan.shared  # others lie within what was laid before
    lengths, shared = plan.lengths[lays], plan.shared[lays]
    goes_on = np.append(shared[1:] == lengths[:-1], False)  # the next one's row begins with this one's
    rows = int(lengths[~goes_on].sum(dtype=np.int64))
    return rows - len(plan.tokens) >= LEAST_SHARE * rows


def count_branches(plan: Plan) -> int:
    """How many items of `plan` go on from a copied cache."""
    if not plan.num_items:
        return 0
    lengths, shared = plan.lengths.astype(np.int64), plan.shared.astype(np.int64)
    laid = np.maximum.accumulate(np.where(lengths > shared, np.arange(len(lengths)), 0))
    tips = np.concatenate([[0], lengths[laid[:-1]]])
    return int(((shared > 0) & (shared < lengths) & (shared != tips)).sum())


def keep_worthwhile(
    lengths: IntArray, shared: IntArray, least_segment: int, least_saved: int
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Give up branches that save less than they cost: what stands before them is repeated instead.

    lengths, shared: (M,) as `sort_and_share` leaves them. least_segment: tokens between two branches of a path.
    least_saved: tokens that a branching point saves.
    Returns `shared`, with less of it, and (M,) bool: whether an item branches off from those before it.
    """
    shared, branches = shared.copy(), np.zeros(len(shared), dtype=bool)
    open_nodes: list[tuple[int, list[int]]] = []  # depth, and the items that branch off there; each deeper than the one before

    def close(new: int) -> None:
        """new: the depth of a node that is about to be opened, 0 if there is none."""
        depth, members = open_nodes.pop()
        parent = max(new, open_nodes[-1][0] if open_nodes else 0)
        if depth - parent >= least_segment and (depth - parent) * len(members) >= least_saved:
            branches[members] = True
            return
        shared[members] = parent
        if parent:
            add(parent, members)

    def add(depth: int, members: list[int]) -> None:
        if open_nodes and open_nodes[-1][0] == depth:
            open_nodes[-1][1].extend(members)
        else:
            open_nodes.append((depth, members))

    tip = 0  # tokens of the path that was laid last
    for item, (length, common) in enumerate(zip(lengths.tolist(), shared.tolist(), strict=True)):
        while open_nodes and open_nodes[-1][0] > common:
            close(common if common < length else 0)
        if common == length:
            continue  # its input lies within the path
        if 0 < common < tip:
            add(common, [item])
        tip = length
    while open_nodes:
        close(0)
    return shared, branches


def _sort_trees(
    families: IntArray, has_branch: npt.NDArray[np.bool_], shared: IntArray, branches: npt.NDArray[np.bool_]
) -> IntArray:
    """The items of trees; those whose first branch lies at the same depth are neighbours.

    families: (F+1,) where each tree or row begins among the items. has_branch: (F,).
    """
    first_branch = np.minimum.reduceat(np.where(branches, shared, np.iinfo(np.int64).max), families[:-1])
    chosen = np.flatnonzero(has_branch)
    chosen = chosen[np.argsort(first_branch[chosen], kind="stable")]
    return gather_runs(np.arange(families[-1]), families[:-1][chosen], np.diff(families)[chosen])


def _sort_rows(
    families: IntArray, is_row: npt.NDArray[np.bool_], lengths: IntArray, num_targets: IntArray, limits: RowLimits
) -> tuple[IntArray, IntArray]:
    """The items of plain rows by length, and the bounds of their batches, as of rows.py. Arguments as of `_sort_trees`."""
    chosen = np.flatnonzero(is_row)
    if not len(chosen):
        return np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    row_lengths = np.maximum.reduceat(lengths, families[:-1])[chosen]
    row_reads = np.add.reduceat(num_targets.astype(np.int64), families[:-1])[chosen]
    by_length = np.argsort(row_lengths, kind="stable")
    chosen = chosen[by_length]
    batches = batch_rows(row_lengths[by_length], row_reads[by_length], limits)
    items = np.diff(families)[chosen]
    return gather_runs(np.arange(families[-1]), families[:-1][chosen], items), offsets_of(items)[batches]


class Segments(NamedTuple):
    """The runs of a pack's tokens without a branch, in the order of its line.

    starts: (S,) where each begins in the line. lengths: its tokens. depths: tokens before it in its request.
    parents: the segment that it goes on from; -1: none. is_leaf: whether none goes on from it.
    """

    starts: IntArray
    lengths: IntArray
    depths: IntArray
    parents: IntArray
    is_leaf: npt.NDArray[np.bool_]


def find_segments(pack: Pack) -> Segments:
    """A token goes on with the run of the one before it if it is its only child."""
    end = pack.end.astype(np.int64)
    follows = (np.arange(1, len(pack)) < end[:-1]) & (end[1:] == end[:-1])
    starts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
    stops = np.append(starts[1:], len(pack))
    parents: list[int] = []
    path: list[int] = []
    for segment, start in enumerate(starts.tolist()):
        while path and end[starts[path[-1]]] <= start:
            path.pop()
        parents.append(path[-1] if path else -1)
        path.append(segment)
    return Segments(
        starts, stops - starts, pack.depth[starts].astype(np.int64), np.array(parents, dtype=np.int64), end[starts] == stops
    )


class ForwardLimits(NamedTuple):
    """Of one forward: tokens, padding included; rows; and tokens of padding.

    rows_that_fit: how many rows of so many tokens, those in their cache included, have memory for it; None: not known.
    """

    max_tokens: int
    max_rows: int
    most_padding: int
    rows_that_fit: Callable[[int], int] | None = None


def batch_segments(segments: Segments, members: IntArray, limits: ForwardLimits) -> list[IntArray]:
    """Divide `members`, segments that begin at one depth, into batches: those with branches by length, leaves by about the same.

    Leaves come last: what others go on from is done, and freed, before.
    """
    inner, leaves = members[~segments.is_leaf[members]], members[segments.is_leaf[members]]
    have_cache = len(members) > 0 and bool(segments.parents[members[0]] >= 0)
    of_leaves = limits if have_cache else limits._replace(rows_that_fit=None)
    return [*_split(segments, inner, limits._replace(most_padding=0)), *_split(segments, leaves, of_leaves)]


def _split(segments: Segments, members: IntArray, limits: ForwardLimits) -> Iterator[IntArray]:
    """Batches of ascending length within the limits."""
    members = members[np.argsort(segments.lengths[members], kind="stable")]
    lengths = segments.lengths[members].tolist()
    ends = (segments.depths + segments.lengths)[members].tolist()
    start = total = 0
    for place, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        rows = place + 1 - start
        total += length
        fitting = limits.max_rows
        if limits.rows_that_fit is not None:
            fitting = min(fitting, limits.rows_that_fit(end))
        if rows > 1 and (rows > fitting or rows * length > limits.max_tokens or rows * length - total > limits.most_padding):
            yield members[start:place]
            start, total = place, length
    if lengths:
        yield members[start:]
