"""Cut requests that are sorted by their tokens into packs of even cost."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_eval.packs.plan import PACKS, Plan, assemble, empty_plan
from ddp_eval.packs.requests import IntArray, Requests


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What a forward pass costs, in any one unit (floating-point operations are a good one).

    A pack of L tokens, Q attention pairs and R reads costs `forward + token * L + slowdown * pair * Q + read * R`: attention
    reaches only a fraction of a matrix product's speed. With `dense` the attention kernel pays for all L * L pairs when
    a mask is given (and for half of them in a pack with no branch); without, for the visible pairs alone.
    `idle` is the number of tokens below which a forward takes hardly less time: it reads all weights whatever there is to do.
    `enough` is work that one rank does in a few seconds: less than that need not be spread over more.
    """

    enough: float = 0.0
    forward: float = 0.0
    token: float = 1.0
    pair: float = 0.0
    read: float = 0.0
    slowdown: float = 1.0
    dense: bool = True
    idle: float = 0.0

    @property
    def most_padding(self) -> int:
        """Tokens of padding in a batch of rows from which another forward is cheaper."""
        return int(self.idle + self.forward / self.token)


def plan_packs(requests: Requests, cost: CostModel, max_tokens: int, max_reads: int | None = None) -> tuple[Plan, IntArray]:
    """Cut `requests` into prefix trees so that the whole costs little and spreads evenly over ranks.

    max_tokens, max_reads: the most that one pack holds; a request beyond them gets a pack of its own.
    Returns the plan, its packs in ascending order of cost, and (N,) int64: the item that answers each request.
    """
    order, item_of_request, shared = sort_and_share(requests)
    if not len(order):
        return empty_plan(PACKS), item_of_request
    lengths = (np.diff(requests.starts)[order] - 1).astype(np.int64)
    bounds, pack_costs = _cut(_Costs(lengths, shared, requests.num_targets[order], cost), max_tokens, max_reads)
    shared[bounds[:-1]] = 0
    groups = np.argsort(pack_costs, kind="stable")
    return assemble(requests, order, item_of_request, shared, bounds, groups, PACKS)


def cut_in_order(
    lengths: IntArray, shared: IntArray, num_targets: IntArray, cost: CostModel, max_tokens: int, max_reads: int | None
) -> IntArray:
    """Where packs of neighbouring items begin, (P+1,), as `plan_packs` cuts them. All (M,): see `_Costs`."""
    if not len(lengths):
        return np.zeros(1, dtype=np.int64)
    return _cut(_Costs(lengths, shared, num_targets, cost), max_tokens, max_reads)[0]


def plan_one_tree(requests: Requests) -> tuple[Plan, IntArray]:
    """All of `requests`, of which there is one or more, in a single pack, whatever it costs. Returns as `plan_packs`."""
    order, item_of_request, shared = sort_and_share(requests)
    whole, only = np.array([0, len(order)]), np.zeros(1, dtype=np.int64)
    return assemble(requests, order, item_of_request, shared, whole, only, PACKS)


def sort_and_share(requests: Requests) -> tuple[IntArray, IntArray, IntArray]:
    """Order the distinct requests so that those that share a prefix stand together.

    Returns order (M,), the request behind each item; item_of_request (N,); shared (M,), how many leading input tokens each item
    shares with the item before it.
    """
    view = np.ascontiguousarray(requests.tokens, dtype="<i4").data
    bounds = requests.starts.tolist()
    keys = [view[begin:stop].tobytes() for begin, stop in itertools.pairwise(bounds)]
    by_targets = np.argsort(requests.num_targets, kind="stable").tolist()
    order = np.array(sorted(by_targets, key=keys.__getitem__), dtype=np.int64)
    del keys

    lengths = np.diff(requests.starts)[order]
    common = _common_prefixes(requests, order, lengths)
    num_targets = requests.num_targets[order]
    repeats = np.zeros(len(order), dtype=bool)
    repeats[1:] = (common[1:] == lengths[1:]) & (lengths[1:] == lengths[:-1]) & (num_targets[1:] == num_targets[:-1])

    item_of_request = np.empty(len(order), dtype=np.int64)
    item_of_request[order] = np.cumsum(~repeats) - 1
    inputs = lengths - 1
    shared = np.minimum(common, inputs)
    shared[1:] = np.minimum(shared[1:], inputs[:-1])
    # A dropped repeat had the same tokens as the item before it, so its neighbours' shares stay true.
    return order[~repeats], item_of_request, shared[~repeats]


def _common_prefixes(requests: Requests, order: IntArray, lengths: IntArray) -> IntArray:
    """For each request in `order` the number of leading tokens it has in common with the one before it; 0 for the first."""
    common = np.zeros(len(order), dtype=np.int64)
    if len(order) < 2:
        return common
    limit = np.minimum(lengths[1:], lengths[:-1])
    here, before = requests.starts[:-1][order[1:]], requests.starts[:-1][order[:-1]]
    block = min(_BLOCK, len(requests.tokens))
    windows = np.lib.stride_tricks.sliding_window_view(requests.tokens, block)
    open_pairs = np.arange(len(limit))
    while len(open_pairs):
        done = common[1:][open_pairs]
        left, right = here[open_pairs] + done, before[open_pairs] + done
        at_end = np.maximum(left, right) >= len(windows)  # no whole block is left: the last tokens of all
        for pair, one, other in zip(open_pairs[at_end], left[at_end], right[at_end], strict=True):
            rest = int(limit[pair] - common[1:][pair])
            differs = requests.tokens[one : one + rest] != requests.tokens[other : other + rest]
            common[1:][pair] += differs.argmax() if differs.any() else rest
        open_pairs, done, left, right = (array[~at_end] for array in (open_pairs, done, left, right))
        differs = windows[left] != windows[right]
        differs |= np.arange(block) >= (limit[open_pairs] - done)[:, None]
        steps = np.where(differs.any(axis=1), differs.argmax(axis=1), block)
        common[1:][open_pairs] += steps
        open_pairs = open_pairs[steps == block]
    return common


_BLOCK = 64  # tokens that are compared at a time


# Ranks that a plan should keep evenly busy. Any number may run it: the plan is made for this one so that it is always the same.
TYPICAL_RANKS = 8


MANY_ITEMS = 1000  # from here on no rank may have more than EVEN times the mean, if any way of cutting allows it


EVEN = 1.02


class _Costs:
    """Cost of any pack of neighbouring items [first, stop): a head that depends on `first` plus a sum that runs to `stop`."""

    def __init__(self, lengths: IntArray, shared: IntArray, num_targets: IntArray, cost: CostModel) -> None:
        triangle = lengths * (lengths + 1) / 2
        # Behind the same input as the item before it, an item reads the same positions; else at most all of its own.
        fresh_reads = num_targets.astype(np.int64)
        same = np.flatnonzero((lengths[1:] == shared[1:]) & (lengths[1:] == lengths[:-1])) + 1
        fresh_reads[same] = np.maximum(0, fresh_reads[same] - num_targets[same - 1])
        self.model = cost
        self.tokens_to = np.concatenate([[0], np.cumsum(lengths - shared)])
        self.pairs_to = np.concatenate([[0.0], np.cumsum(triangle - shared * (shared + 1) / 2)])
        self.reads_to = np.concatenate([[0], np.cumsum(fresh_reads)])
        self.token_head = lengths - self.tokens_to[1:]
        self.pair_head = triangle - self.pairs_to[1:]
        self.read_head = num_targets - self.reads_to[1:]
        self._items = lengths, shared, num_targets

    def at(self, places: IntArray) -> _Costs:
        """The same costs with places for items: pack [first, stop) runs from one place to another."""
        coarse = copy.copy(self)
        del coarse._items
        for name in ("token_head", "pair_head", "read_head"):
            setattr(coarse, name, getattr(self, name)[places[:-1]])
        for name in ("tokens_to", "pairs_to", "reads_to"):
            setattr(coarse, name, getattr(self, name)[places])
        return coarse

    def places_to_cut(self, max_tokens: int, max_reads: int | None) -> IntArray:
        """Where the cheapest split may be cut: before the first item, behind the last, and wherever a cut can pay.

        Items with one input that read nothing new are free in a pack that holds the first of them. So a cut among them never
        pays, unless the item behind them goes on from their whole input (it may come to the same), or a pack holds but one.
        """
        lengths, shared, num_targets = self._items
        free = (lengths[1:] == lengths[:-1]) & (shared[1:] == lengths[1:]) & (num_targets[1:] <= num_targets[:-1])
        starts = np.concatenate([[0], np.flatnonzero(~free) + 1])  # of the groups of such items
        ends = np.append(starts[1:], len(lengths))
        cut_within = lengths[starts] > max_tokens
        if max_reads is not None:
            cut_within |= num_targets[starts] > max_reads
        cut_within[:-1] |= shared[starts[1:]] == lengths[ends[:-1] - 1]
        places = np.repeat(cut_within, ends - starts)
        places[starts] = True
        return np.append(np.flatnonzero(places), len(lengths))

    def __len__(self) -> int:
        return len(self.token_head)

    def of(self, first: Any, stop: Any) -> Any:
        """Cost of packs; first, stop: integers, slices or arrays that broadcast."""
        tokens = self.token_head[first] + self.tokens_to[stop]
        pairs = self.pair_head[first] + self.pairs_to[stop]
        if self.model.dense:
            # A pack whose visible pairs are all of the triangle has no branch and needs no mask.
            full = tokens * (tokens + 1) / 2
            pairs = np.where(pairs == full, full, tokens.astype(np.float64) ** 2)
        reads = self.read_head[first] + self.reads_to[stop]
        return (
            self.model.forward
            + self.model.token * tokens
            + self.model.slowdown * self.model.pair * pairs
            + self.model.read * reads
        )

    def fits(self, first: int, stop: int, max_tokens: int, max_reads: int | None) -> bool:
        few_tokens = self.token_head[first] + self.tokens_to[stop] <= max_tokens
        return bool(few_tokens and (max_reads is None or self.read_head[first] + self.reads_to[stop] <= max_reads))


def _cut(costs: _Costs, max_tokens: int, max_reads: int | None) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """Split the item order into packs. Returns bounds (P+1,) and costs (P,).

    Large packs repeat few prefixes, small ones spread evenly over ranks. So several sizes are tried, and each with its packs
    evened out; the best has the least (time on one rank) x (time on TYPICAL_RANKS), where a few seconds are as good as less.
    """
    choices = []
    while True:
        bounds = _cut_cheapest(costs, max_tokens, max_reads)
        choices += [bounds, _even_out(costs, bounds, max_tokens, max_reads)]
        if len(bounds) - 1 >= 16 * TYPICAL_RANKS or max_tokens < 1024:
            break
        max_tokens //= 2
    totals, busiest = np.array([_times(costs.of(bounds[:-1], bounds[1:])) for bounds in choices]).T
    uneven = (busiest > EVEN * totals / TYPICAL_RANKS) & (len(costs) >= MANY_ITEMS)
    best = choices[int(np.lexsort((totals * np.maximum(busiest, costs.model.enough), uneven))[0])]
    return best, costs.of(best[:-1], best[1:])


def _times(pack_costs: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Cost on one rank, and of the busiest of TYPICAL_RANKS, as a DistributedSampler deals packs of ascending cost."""
    ascending = np.sort(pack_costs)
    return float(ascending.sum()), float(max(ascending[rank::TYPICAL_RANKS].sum() for rank in range(TYPICAL_RANKS)))


def _cut_cheapest(costs: _Costs, max_tokens: int, max_reads: int | None) -> IntArray:
    """The split whose packs' costs add up to the least, within the limits (dynamic programming over the split points)."""
    places = costs.places_to_cut(max_tokens, max_reads)
    costs = costs.at(places)
    best = np.zeros(len(places))
    choice = np.zeros(len(places), dtype=np.int64)
    oldest = 0
    for stop in range(1, len(places)):
        while oldest < stop - 1 and not costs.fits(oldest, stop, max_tokens, max_reads):
            oldest += 1
        total = best[oldest:stop] + costs.of(slice(oldest, stop), stop)
        choice[stop] = oldest + int(total.argmin())
        best[stop] = total[choice[stop] - oldest]
    bounds = [len(places) - 1]
    while bounds[-1]:
        bounds.append(int(choice[bounds[-1]]))
    return places[np.array(bounds[::-1], dtype=np.int64)]


def _even_out(costs: _Costs, bounds: IntArray, max_tokens: int, max_reads: int | None) -> IntArray:
    """About as many packs as in `bounds`, up to a multiple of TYPICAL_RANKS, the most expensive of them as cheap as can be."""
    target = -(-(len(bounds) - 1) // TYPICAL_RANKS) * TYPICAL_RANKS
    low, high = 0.0, float(costs.of(bounds[:-1], bounds[1:]).max())
    found = bounds
    for _ in range(20):
        middle = (low + high) / 2
        tried = _fill_up_to(costs, middle, max_tokens, max_reads, target)
        if tried is None:
            low = middle
        else:
            found, high = tried, middle
    return found


def _fill_up_to(costs: _Costs, most: float, max_tokens: int, max_reads: int | None, max_packs: int) -> IntArray | None:
    """Packs filled from the left, each costing at most `most`; None if that takes more than `max_packs`."""
    model = costs.model
    running = model.token * costs.tokens_to + model.slowdown * model.pair * costs.pairs_to + model.read * costs.reads_to
    bounds = [0]
    while bounds[-1] < len(costs):
        first = bounds[-1]
        if len(bounds) > max_packs:
            return None
        stop = int(np.searchsorted(costs.tokens_to, max_tokens - costs.token_head[first], side="right")) - 1
        if max_reads is not None:
            stop = min(stop, int(np.searchsorted(costs.reads_to, max_reads - costs.read_head[first], side="right")) - 1)
        if model.dense:  # what an item adds depends on the pack
            stop = first + int(np.searchsorted(costs.of(first, slice(first + 1, stop + 1)), most, side="right"))
        else:
            room = most - float(costs.of(first, first + 1)) + running[first + 1]
            stop = min(stop, int(np.searchsorted(running, room, side="right")) - 1)
        bounds.append(max(stop, first + 1))
    return np.array(bounds, dtype=np.int64)
