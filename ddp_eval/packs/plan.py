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

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ddp_eval.packs.requests import IntArray, Requests, gather_runs, offsets_of

PACKS, ROWS, STATES = "packs", "rows", "states"  # how a plan's packs are run


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
    kind:          PACKS: a pack is a prefix tree in one line. ROWS: a batch of plain rows, one root each. STATES: prefix trees
                   whose shared parts are run once each, and their caches copied for the branches (packs/states.py).
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
    kind: str

    @property
    def rows(self) -> bool:
        return self.kind == ROWS

    @property
    def num_packs(self) -> int:
        return len(self.token_starts) - 1

    @property
    def num_items(self) -> int:
        return len(self.shared)

    def digest(self) -> str:
        """A name for exactly this work: equal plans have equal digests."""
        return digest_arrays(self.kind.encode(), self)


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
    kind:                as the plan's.
    """

    tokens: IntArray
    depth: IntArray
    end: IntArray
    reads: IntArray
    answer_reads: IntArray
    answer_targets: IntArray
    answer_items: IntArray
    items: range
    kind: str

    @property
    def rows(self) -> bool:
        return self.kind == ROWS

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no token branches: then a plain causal forward does."""
        return bool((self.end == len(self.tokens)).all())


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
        kind=plan.kind,
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
    kept_before = offsets_of(kept)
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
        kind=pack.kind,
    )


def assemble(
    requests: Requests,
    order: IntArray,
    item_of_request: IntArray,
    shared: IntArray,
    bounds: IntArray,
    groups: IntArray,
    kind: str,
) -> tuple[Plan, IntArray]:
    """Write the plan whose packs are the item ranges `bounds`, taken in the order `groups`.

    order: (M,) the request behind each item. item_of_request: (N,). shared: (M,) input tokens in common with the item before.
    """
    if not len(order):
        return empty_plan(kind), item_of_request
    sizes = np.diff(bounds)[groups]
    moved = gather_runs(np.arange(len(order)), bounds[:-1][groups], sizes)
    order, shared = order[moved], shared[moved]
    new_place = np.empty_like(moved)
    new_place[moved] = np.arange(len(moved))
    item_of_request = new_place[item_of_request]

    item_starts = offsets_of(sizes)
    begins, stops = requests.starts[:-1][order], requests.starts[1:][order]
    lengths = stops - begins - 1
    num_targets = requests.num_targets[order]
    copies = np.bincount(item_of_request, minlength=len(order))
    plan = Plan(
        tokens=gather_runs(requests.tokens, begins + shared, lengths - shared),
        token_starts=offsets_of(lengths - shared)[item_starts],
        item_starts=item_starts,
        target_starts=offsets_of(num_targets)[item_starts],
        shared=shared.astype(np.int32),
        lengths=lengths.astype(np.int32),
        num_targets=num_targets.astype(np.int32),
        targets=gather_runs(requests.tokens, stops - num_targets, num_targets.astype(np.int64)),
        num_requests=np.add.reduceat(copies, item_starts[:-1]).astype(np.int32),
        kind=kind,
    )
    return plan, item_of_request


def empty_plan(kind: str) -> Plan:
    none, zero = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
    return Plan(none, zero, zero, zero, none, none, none, none, none, kind)


def fed_tokens(plan: Plan, pad: Callable[[np.ndarray], np.ndarray] = np.asarray) -> int:
    """Tokens that all forwards of a plan take, padding included. pad: from packs' tokens to the lengths that they are fed in."""
    if not plan.num_packs:
        return 0
    if plan.kind == STATES:
        return len(plan.tokens)  # what little padding there is depends on the device
    if not plan.rows:
        return int(pad(np.diff(plan.token_starts)).sum())
    roots = np.flatnonzero(plan.shared == 0)
    row_lengths = np.maximum.reduceat(plan.lengths, roots).astype(np.int64)
    first_rows = np.searchsorted(roots, plan.item_starts[:-1])
    rows = np.diff([*first_rows, len(roots)])
    return int((rows * np.maximum.reduceat(row_lengths, first_rows)).sum())


def take_packs(plan: Plan, indices: list[int]) -> Plan:
    """A plan of only those packs, in that order."""

    def runs(values: Any, starts: Any) -> Any:
        return np.concatenate([values[starts[index] : starts[index + 1]] for index in indices])

    def offsets(starts: Any) -> Any:
        return np.concatenate([[0], np.cumsum(np.diff(starts)[indices])]).astype(np.int64)

    return Plan(
        tokens=runs(plan.tokens, plan.token_starts),
        token_starts=offsets(plan.token_starts),
        item_starts=offsets(plan.item_starts),
        target_starts=offsets(plan.target_starts),
        shared=runs(plan.shared, plan.item_starts),
        lengths=runs(plan.lengths, plan.item_starts),
        num_targets=runs(plan.num_targets, plan.item_starts),
        targets=runs(plan.targets, plan.target_starts),
        num_requests=plan.num_requests[indices],
        kind=plan.kind,
    )
