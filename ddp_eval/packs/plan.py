"""Cut tokenised requests into packs: prefix trees laid out in one line, each shared token once.

Pure numpy, no model, no ranks: the same requests, cost model and limits give the same plan on every machine and any number of
ranks. The leader makes one `Plan` for the whole run; each rank builds the `Pack`s it was dealt.

    inputs        A B C      (read at C, for x)        A─B─C─y
                  A B C y    (read at C for y, at y for z)    └ D
                  A D        (read at D, for w)
    index  i      0 1 2 3 4
    token         A B C y D
    depth         0 1 2 3 1        position in its own request
    end           5 4 4 4 5        index just past the token's subtree

Token i sees token j exactly when j <= i < end[j]: in depth-first order only ancestors pass.

Letters: N requests, M items (distinct requests), P packs, T tokens of all packs, L tokens of one pack, R reads, A answers.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class Requests:
    """Token ids of all requests, one behind another.

    tokens:       (T,) int32, context and continuation of each request.
    starts:       (N+1,) int64, where each request starts in `tokens`.
    num_targets:  (N,) int32, how many of its last tokens are scored; at least 1, at most its length - 1.
    """

    tokens: IntArray
    starts: IntArray
    num_targets: IntArray

    def __len__(self) -> int:
        return len(self.num_targets)

    def select(self, indices: IntArray) -> Requests:
        """The requests at `indices`, in that order."""
        lengths = np.diff(self.starts)[indices]
        return Requests(
            tokens=_gather_runs(self.tokens, self.starts[:-1][indices], lengths),
            starts=_offsets(lengths),
            num_targets=self.num_targets[indices],
        )


def concatenate(first: Requests, second: Requests) -> Requests:
    """Both sets of requests, one behind the other. Copies nothing where one of them is empty."""
    if not len(second) or not len(first):
        return second if len(second) else first
    return Requests(
        tokens=np.concatenate([first.tokens, second.tokens]),
        starts=np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
        num_targets=np.concatenate([first.num_targets, second.num_targets]),
    )


def requests_from_lists(sequences: list[list[int]], num_targets: list[int]) -> Requests:
    """`Requests` from plain lists, for tests and small callers."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    flat = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
    return Requests(flat, _offsets(lengths), np.array(num_targets, dtype=np.int32))


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """All packs of a run, as a few flat arrays that are cheap to send.

    tokens:        (T,) int32, the tokens of all packs.
    token_starts:  (P+1,) int64, where each pack starts in `tokens`.
    item_starts:   (P+1,) int64, where each pack starts in the item arrays.
    target_starts: (P+1,) int64, where each pack starts in `targets`.
    shared:        (M,) int32, leading input tokens that an item shares with what its pack (or row) laid down before it.
    lengths:       (M,) int32, input tokens of an item: all of its tokens but the last.
    num_targets:   (M,) int32, scored tokens of an item.
    targets:       (sum of num_targets,) int32, the tokens to be predicted.
    num_requests:  (P,) int32, requests that a pack answers (identical requests are run once).
    rows:          False: a pack is a prefix tree in one line. True: a pack is a batch of plain rows, one root each.
    """

    tokens: IntArray
    token_starts: IntArray
    item_starts: IntArray
    target_starts: IntArray
    shared: IntArray
    lengths: IntArray
    num_targets: IntArray
    targets: IntArray
    num_requests: IntArray
    rows: bool

    @property
    def num_packs(self) -> int:
        return len(self.token_starts) - 1

    @property
    def num_items(self) -> int:
        return len(self.shared)

    def digest(self) -> str:
        """A name for exactly this work: equal plans have equal digests."""
        return digest_arrays(b"rows" if self.rows else b"packs", self)


def digest_arrays(kind: bytes, plan: Any) -> str:
    """SHA-256 of what `kind` says of a plan and of its fields but the last, all of them arrays: names, types and content."""
    hasher = hashlib.sha256(kind)
    for field in dataclasses.fields(plan)[:-1]:
        array = np.ascontiguousarray(getattr(plan, field.name))
        hasher.update(f"{field.name} {array.dtype.str} {array.size} ".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


@dataclasses.dataclass(frozen=True)
class Pack:
    """One forward pass.

    tokens, depth, end:  (L,) int32, see the top of this file.
    reads:               (R,) int64, the positions whose predictions are scored, ascending, each once.
    answer_reads:        (A,) int64, for each scored token the index into `reads` of its prediction.
    answer_targets:      (A,) int64, the scored tokens.
    answer_items:        (A,) int64, the item of each scored token, counted from 0 within the pack, ascending.
    items:               which items of the plan these are.
    """

    tokens: IntArray
    depth: IntArray
    end: IntArray
    reads: IntArray
    answer_reads: IntArray
    answer_targets: IntArray
    answer_items: IntArray
    items: range
    rows: bool

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no token branches: then a plain causal forward does."""
        return bool((self.end == len(self.tokens)).all())


def plan_packs(requests: Requests, cost: CostModel, max_tokens: int, max_reads: int | None = None) -> tuple[Plan, IntArray]:
    """Cut `requests` into prefix trees so that the whole costs little and spreads evenly over ranks.

    max_tokens, max_reads: the most that one pack holds; a request beyond them gets a pack of its own.
    Returns the plan, its packs in ascending order of cost, and (N,) int64: the item that answers each request.
    """
    order, item_of_request, shared = _sort_and_share(requests)
    if not len(order):
        return _empty_plan(rows=False), item_of_request
    lengths = (np.diff(requests.starts)[order] - 1).astype(np.int64)
    bounds, pack_costs = _cut(_Costs(lengths, shared, requests.num_targets[order], cost), max_tokens, max_reads)
    shared[bounds[:-1]] = 0
    groups = np.argsort(pack_costs, kind="stable")
    return assemble(requests, order, item_of_request, shared, bounds, groups, rows=False)


def plan_one_tree(requests: Requests) -> tuple[Plan, IntArray]:
    """All of `requests`, of which there is one or more, in a single pack, whatever it costs. Returns as `plan_packs`."""
    order, item_of_request, shared = _sort_and_share(requests)
    whole, only = np.array([0, len(order)]), np.zeros(1, dtype=np.int64)
    return assemble(requests, order, item_of_request, shared, whole, only, rows=False)


def plan_rows(
    requests: Requests,
    max_tokens: int,
    max_reads: int | None = None,
    isolate: bool = False,
    most_padding: int | None = None,
) -> tuple[Plan, IntArray]:
    """Cut `requests` into batches of plain rows of near-equal length, for models that cannot take a tree.

    A request that continues or lies within the one before it shares its row; nothing else is shared.
    max_tokens: the most that a batch holds once every row is padded to its longest, max_reads: likewise for its reads.
    isolate: batch only rows of one length, with no longer request in a row, for models whose numbers depend on the longest.
    most_padding: tokens by which all rows of a batch together may be lengthened, if that matters.
    Returns as `plan_packs`.
    """
    order, item_of_request, shared = _sort_and_share(requests)
    if not len(order):
        return _empty_plan(rows=True), item_of_request
    lengths = (np.diff(requests.starts)[order] - 1).astype(np.int64)

    # The row laid so far ends where the latest item with tokens of its own ends.
    latest = np.maximum.accumulate(np.where(lengths > shared, np.arange(len(order)), 0))
    continues = (lengths == shared) | (shared == np.concatenate([[-1], lengths[latest[:-1]]]))
    if isolate:
        continues &= lengths == np.concatenate([[-1], lengths[:-1]])
    continues[0] = False
    shared[~continues] = 0
    row_bounds = np.append(np.flatnonzero(~continues), len(order))
    row_lengths = np.maximum.reduceat(lengths, row_bounds[:-1])
    row_reads = np.add.reduceat(requests.num_targets[order].astype(np.int64), row_bounds[:-1])

    by_length = np.argsort(row_lengths, kind="stable")
    batch_bounds = _batch_rows(row_lengths[by_length], row_reads[by_length], max_tokens, max_reads, isolate, most_padding)
    item_order = np.concatenate([np.arange(row_bounds[row], row_bounds[row + 1]) for row in by_length])
    rank_of_item = np.empty_like(item_order)
    rank_of_item[item_order] = np.arange(len(item_order))
    items_per_row = np.diff(row_bounds)[by_length]
    bounds = _offsets(items_per_row)[batch_bounds]
    return assemble(
        requests, order[item_order], rank_of_item[item_of_request], shared[item_order], bounds,
        np.arange(len(bounds) - 1), rows=True,
    )  # fmt: skip


def build_pack(plan: Plan, index: int) -> Pack:
    """Lay out pack `index` of `plan`."""
    begin, stop = int(plan.token_starts[index]), int(plan.token_starts[index + 1])
    items = range(int(plan.item_starts[index]), int(plan.item_starts[index + 1]))
    tokens = plan.tokens[begin:stop]
    shared = plan.shared[items.start : items.stop].tolist()
    lengths = plan.lengths[items.start : items.stop].tolist()
    num_targets = plan.num_targets[items.start : items.stop]

    depth = np.empty(len(tokens), dtype=np.int32)
    end = np.full(len(tokens), len(tokens), dtype=np.int32)
    path = np.empty(max(lengths), dtype=np.int64)  # path[d]: where the token at depth d of the latest item lies
    path_length = laid = 0
    positions = []
    for prefix, length, count in zip(shared, lengths, num_targets.tolist(), strict=True):
        if prefix < length:
            end[path[prefix:path_length]] = laid
            fresh = np.arange(laid, laid + length - prefix)
            depth[fresh] = np.arange(prefix, length)
            path[prefix:length] = fresh
            path_length, laid = length, laid + length - prefix
        positions.append(path[length - count : length].copy())
    assert laid == len(tokens), "a plan's items must lay down its tokens exactly"

    reads, answer_reads = np.unique(np.concatenate(positions), return_inverse=True)
    targets = plan.targets[plan.target_starts[index] : plan.target_starts[index + 1]]
    return Pack(
        tokens=tokens,
        depth=depth,
        end=end,
        reads=reads,
        answer_reads=answer_reads,
        answer_targets=targets.astype(np.int64),
        answer_items=np.repeat(np.arange(len(items)), num_targets),
        items=items,
        rows=plan.rows,
    )


def pad_tail(pack: Pack, length: int, masked: bool) -> Pack:
    """The same pack with `length` tokens: those added see only each other, at positions that the pack has anyway.

    masked: False for a chain that runs without a mask: its added tokens see all, and nothing sees them.
    """
    extra = length - len(pack)
    end = pack.end if masked else np.full(len(pack), length, dtype=np.int32)
    return dataclasses.replace(
        pack,
        tokens=np.concatenate([pack.tokens, np.zeros(extra, dtype=np.int32)]),
        depth=np.concatenate([pack.depth, np.arange(extra, dtype=np.int32) % (pack.depth.max() + 1)]),
        end=np.concatenate([end, np.full(extra, length, dtype=np.int32)]),
    )


def halve(pack: Pack) -> tuple[Pack, Pack]:
    """The same work in two packs, cut between two items so that each answers about half of the scored tokens.

    What both halves share is in both. Raises ValueError for a pack of one item.
    """
    if len(pack.items) < 2:
        raise ValueError("a pack of one item cannot be halved")
    # Behind the item that holds the middle answer, but for the last one.
    cut = min(int(pack.answer_items[len(pack.answer_items) // 2]) + 1, len(pack.items) - 1)
    return _take_items(pack, 0, cut), _take_items(pack, cut, len(pack.items))


def _take_items(pack: Pack, first: int, stop: int) -> Pack:
    """The part of a pack that its items [first, stop) need."""
    chosen = (pack.answer_items >= first) & (pack.answer_items < stop)
    positions = pack.reads[pack.answer_reads[chosen]]
    index = np.arange(len(pack))
    kept = np.zeros(len(pack), dtype=bool)
    for last in np.unique(positions):
        kept |= (index <= last) & (last < pack.end)
    kept_before = _offsets(kept)
    reads, answer_reads = np.unique(kept_before[positions], return_inverse=True)
    return Pack(
        tokens=pack.tokens[kept],
        depth=pack.depth[kept],
        end=kept_before[pack.end[kept]].astype(np.int32),
        reads=reads,
        answer_reads=answer_reads,
        answer_targets=pack.answer_targets[chosen],
        answer_items=pack.answer_items[chosen] - first,
        items=range(pack.items.start + first, pack.items.start + stop),
        rows=pack.rows,
    )


def _sort_and_share(requests: Requests) -> tuple[IntArray, IntArray, IntArray]:
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
    """About as many packs as in `bounds`, up to a multiple of TYPICAL_RANKS, the dearest of them as cheap as can be."""
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


def _batch_rows(
    row_lengths: IntArray,
    row_reads: IntArray,
    max_tokens: int,
    max_reads: int | None,
    one_length: bool,
    most_padding: int | None,
) -> IntArray:
    """Split rows of ascending length into batches within the limits. Returns the bounds, in rows.

    A batch's logits are computed for every row at every column where any row is read: about rows times the columns from the
    first read to the longest row's end.
    """
    bounds, tokens, reads, first_read = [0], 0, 0, 0
    for row, (length, count) in enumerate(zip(row_lengths.tolist(), row_reads.tolist(), strict=True)):
        rows = row + 1 - bounds[-1]
        too_long = rows * length > max_tokens
        too_padded = most_padding is not None and rows * length - (tokens + length) > most_padding
        columns = min(reads + count, length - min(first_read, length - count)) if rows > 1 else count
        too_many = max_reads is not None and rows * columns > max_reads
        other_length = one_length and row > 0 and length != row_lengths[row - 1]
        if row > bounds[-1] and (too_long or too_padded or too_many or other_length):
            bounds.append(row)
            tokens = reads = 0
        first_read = length - count if row == bounds[-1] else min(first_read, length - count)
        tokens += length
        reads += count
    return np.array([*bounds, len(row_lengths)], dtype=np.int64)


def assemble(
    requests: Requests,
    order: IntArray,
    item_of_request: IntArray,
    shared: IntArray,
    bounds: IntArray,
    groups: IntArray,
    rows: bool,
) -> tuple[Plan, IntArray]:
    """Write the plan whose packs are the item ranges `bounds`, taken in the order `groups`.

    order: (M,) the request behind each item. item_of_request: (N,). shared: (M,) input tokens in common with the item before.
    """
    if not len(order):
        return _empty_plan(rows), item_of_request
    sizes = np.diff(bounds)[groups]
    moved = _gather_runs(np.arange(len(order)), bounds[:-1][groups], sizes)
    order, shared = order[moved], shared[moved]
    new_place = np.empty_like(moved)
    new_place[moved] = np.arange(len(moved))
    item_of_request = new_place[item_of_request]

    item_starts = _offsets(sizes)
    begins, stops = requests.starts[:-1][order], requests.starts[1:][order]
    lengths = stops - begins - 1
    num_targets = requests.num_targets[order]
    copies = np.bincount(item_of_request, minlength=len(order))
    plan = Plan(
        tokens=_gather_runs(requests.tokens, begins + shared, lengths - shared),
        token_starts=_offsets(lengths - shared)[item_starts],
        item_starts=item_starts,
        target_starts=_offsets(num_targets)[item_starts],
        shared=shared.astype(np.int32),
        lengths=lengths.astype(np.int32),
        num_targets=num_targets.astype(np.int32),
        targets=_gather_runs(requests.tokens, stops - num_targets, num_targets.astype(np.int64)),
        num_requests=np.add.reduceat(copies, item_starts[:-1]).astype(np.int32),
        rows=rows,
    )
    return plan, item_of_request


def _empty_plan(rows: bool) -> Plan:
    none, zero = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
    return Plan(none, zero, zero, zero, none, none, none, none, none, rows)


def _offsets(lengths: IntArray) -> IntArray:
    """(n,) lengths -> (n+1,) int64 offsets, 0 first."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _gather_runs(values: IntArray, begins: IntArray, lengths: IntArray) -> IntArray:
    """Concatenate values[begin : begin + length] for each pair."""
    offsets = _offsets(lengths)
    return values[np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])]


def fed_tokens(plan: Plan, pad: Callable[[np.ndarray], np.ndarray] = np.asarray) -> int:
    """Tokens that all forwards of a plan take, padding included. pad: from packs' tokens to the lengths that they are fed in."""
    if not plan.num_packs:
        return 0
    if not plan.rows:
        return int(pad(np.diff(plan.token_starts)).sum())
    roots = np.flatnonzero(plan.shared == 0)
    row_lengths = np.maximum.reduceat(plan.lengths, roots).astype(np.int64)
    first_rows = np.searchsorted(roots, plan.item_starts[:-1])
    rows = np.diff([*first_rows, len(roots)])
    return int((rows * np.maximum.reduceat(row_lengths, first_rows)).sum())
