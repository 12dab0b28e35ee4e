"""Packs: worked by hand, then against a brute-force tree over random requests."""

from __future__ import annotations

import dataclasses
import itertools
import unittest.mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_sets import Request, paths_of, request_sets, to_requests

from ddp_eval.packs.cut import CostModel, _Costs, plan_packs
from ddp_eval.packs.plan import Pack, Plan, build_pack, halve, pad_tail
from ddp_eval.packs.requests import Requests, concatenate
from ddp_eval.packs.rows import plan_rows

ONE_PACK = CostModel(forward=1e9)  # a forward so dear that everything goes into one
NO_LIMIT = 10**6


@st.composite
def families(draw: st.DrawFn) -> list[Request]:
    """Requests of equal length with one scored token each: none is read within another, so reads are counted exactly."""
    length = draw(st.integers(2, 6))
    sequences = st.lists(st.integers(0, 2), min_size=length, max_size=length).map(tuple)
    return [(tokens, 1) for tokens in draw(st.lists(sequences, min_size=1, max_size=8))]


cost_models = st.builds(
    CostModel,
    forward=st.sampled_from([0.0, 1.0, 7.0, 50.0]),
    token=st.sampled_from([0.0, 1.0, 3.0]),
    pair=st.sampled_from([0.0, 0.25, 1.0]),
    dense=st.booleans(),
)


def check_pack(pack: Pack, items: list[Request]) -> None:
    """The pack is a depth-first walk over a forest, and asks each of `items` at the right places."""
    starts = np.flatnonzero(pack.depth == 0).tolist()
    subtree_end = []
    paths = paths_of(pack)
    for j, path in enumerate(paths):
        below = j
        while below < len(paths) and paths[below][: len(path)] == path and not (below > j and pack.rows and below in starts):
            below += 1
        subtree_end.append(below)
    assert pack.end.tolist() == subtree_end
    ancestors = [[j for j in range(i + 1) if i < pack.end[j]] for i in range(len(pack))]
    assert [tuple(pack.tokens[above].tolist()) for above in ancestors] == paths

    assert set(paths) == {tokens[:stop] for tokens, _ in items for stop in range(1, len(tokens))}
    if pack.rows:
        assert all(end in (*starts, len(pack)) for end in pack.end.tolist()), "a row branches"
    else:
        assert len(set(paths)) == len(paths), "a tree node is laid twice"

    assert np.all(np.diff(pack.reads) > 0)
    assert np.all(np.diff(pack.answer_items) >= 0)
    assert set(pack.answer_reads.tolist()) == set(range(len(pack.reads)))
    assert len(pack.items) == len(items)
    for item, (tokens, count) in enumerate(items):
        mine = pack.answer_items == item
        read_at = [paths[position] for position in pack.reads[pack.answer_reads[mine]]]
        assert read_at == [tokens[:stop] for stop in range(len(tokens) - count, len(tokens))]
        assert pack.answer_targets[mine].tolist() == list(tokens[len(tokens) - count :])


def check_plan(plan: Plan, item_of_request: np.ndarray, requests: list[Request]) -> list[Pack]:
    """Every request is answered by one item with its own tokens and targets; every item lies in one pack. Returns the packs."""
    packs = [build_pack(plan, index) for index in range(plan.num_packs)]
    assert [item for pack in packs for item in pack.items] == list(range(plan.num_items))
    assert plan.num_items == len(set(requests)), "identical requests are run once, others are not"
    assert len(item_of_request) == len(requests)
    request_of_item = dict(zip(item_of_request.tolist(), requests, strict=True))
    assert sorted(request_of_item) == list(range(plan.num_items))
    assert all(request_of_item[item] == request for item, request in zip(item_of_request.tolist(), requests, strict=True))
    for pack, answered in zip(packs, plan.num_requests.tolist(), strict=True):
        check_pack(pack, [request_of_item[item] for item in pack.items])
        assert answered == sum(item in pack.items for item in item_of_request.tolist())
    return packs


def cost_of(pack: Pack, cost: CostModel) -> float:
    pairs = float((pack.depth.astype(np.int64) + 1).sum())
    if cost.dense and not pack.is_chain:
        pairs = float(len(pack)) ** 2
    return cost.forward + cost.token * len(pack) + cost.slowdown * cost.pair * pairs + cost.read * len(pack.reads)


def test_worked_example() -> None:
    """Catches indices shifted by one, against the drawing at the top of packing.py."""
    requests = to_requests([((1, 2, 3, 5), 1), ((1, 2, 3, 6, 7), 2), ((1, 4, 8), 1)])
    plan, item_of_request = plan_packs(requests, ONE_PACK, NO_LIMIT)
    pack = build_pack(plan, 0)
    assert plan.num_packs == 1 and plan.num_requests.tolist() == [3]
    assert item_of_request.tolist() == [0, 1, 2]
    assert pack.tokens.tolist() == [1, 2, 3, 6, 4]
    assert pack.depth.tolist() == [0, 1, 2, 3, 1]
    assert pack.end.tolist() == [5, 4, 4, 4, 5]
    assert pack.reads.tolist() == [2, 3, 4]
    assert pack.answer_reads.tolist() == [0, 0, 1, 2]
    assert pack.answer_targets.tolist() == [5, 6, 7, 8]
    assert pack.answer_items.tolist() == [0, 1, 1, 2]
    assert not pack.is_chain


def test_worked_example_as_rows() -> None:
    """Catches rows that branch, and a request inside another's row that gets a row of its own."""
    requests = to_requests([((1, 2, 3, 5), 1), ((1, 2, 3, 6, 7), 2), ((1, 4, 8), 1)])
    plan, item_of_request = plan_rows(requests, NO_LIMIT)
    pack = build_pack(plan, 0)
    assert plan.num_packs == 1 and pack.rows
    assert item_of_request.tolist() == [1, 2, 0]  # the shortest row comes first
    assert pack.tokens.tolist() == [1, 4, 1, 2, 3, 6]
    assert pack.depth.tolist() == [0, 1, 0, 1, 2, 3]
    assert pack.end.tolist() == [2, 2, 6, 6, 6, 6]
    assert pack.reads.tolist() == [1, 4, 5]
    assert pack.answer_reads.tolist() == [0, 1, 1, 2]
    assert pack.answer_targets.tolist() == [8, 5, 6, 7]


def test_no_request() -> None:
    """Catches reductions over nothing: a resumed run may have nothing left to do."""
    for plan, item_of_request in (plan_packs(to_requests([]), CostModel(), 10), plan_rows(to_requests([]), 10)):
        assert plan.num_packs == plan.num_items == len(item_of_request) == 0
        assert len(plan.digest()) == 64


@settings(deadline=None, max_examples=150)
@given(request_sets(), cost_models, st.integers(1, 60))
def test_packs_answer_every_request_once(requests: list[Request], cost: CostModel, max_tokens: int) -> None:
    """Catches a request lost, answered twice or read at a wrong place, and a pack over its limit or in a wrong order."""
    plan, item_of_request = plan_packs(to_requests(requests), cost, max_tokens)
    packs = check_plan(plan, item_of_request, requests)
    assert all(len(pack) <= max_tokens or len(pack.items) == 1 for pack in packs)
    costs = [cost_of(pack, cost) for pack in packs]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(costs))


@settings(deadline=None, max_examples=150)
@given(request_sets(), st.integers(1, 60), st.none() | st.integers(1, 12))
def test_rows_answer_every_request_once(requests: list[Request], max_tokens: int, max_reads: int | None) -> None:
    """Catches the same in rows: there tokens are shared along a row only, and a batch is padded to its longest."""
    plan, item_of_request = plan_rows(to_requests(requests), max_tokens, max_reads)
    packs = check_plan(plan, item_of_request, requests)
    for pack in packs:
        num_rows = int((pack.depth == 0).sum())
        assert num_rows == 1 or num_rows * (int(pack.depth.max()) + 1) <= max_tokens
        assert num_rows == 1 or max_reads is None or len(pack.reads) <= max_reads


@settings(deadline=None, max_examples=100)
@given(request_sets(), st.integers(0, 40))
def test_rows_are_not_padded_beyond_what_a_forward_costs(requests: list[Request], most_padding: int) -> None:
    """Catches short rows lengthened to a long one's length, and batches cut where nothing was saved."""
    plan, item_of_request = plan_rows(to_requests(requests), NO_LIMIT, most_padding=most_padding)
    packs = check_plan(plan, item_of_request, requests)
    rows = [np.diff(np.append(np.flatnonzero(pack.depth == 0), len(pack))) for pack in packs]
    assert all(int((lengths.max() - lengths).sum()) <= most_padding for lengths in rows)
    for lengths, others in itertools.pairwise(rows):
        assert int((others.min() - lengths).sum()) > most_padding


@pytest.mark.parametrize("masked", [True, False])
def test_added_tokens_change_nothing_for_those_that_were_there(masked: bool) -> None:
    """Catches padding at a position that the model may not have, and padding that a token of the pack sees."""
    requests: list[Request] = [((7, 8, 9, 1), 1), ((7, 8, 9, 2), 1)]
    plan, _ = plan_packs(to_requests(requests[: 1 + masked]), ONE_PACK, NO_LIMIT)
    pack = build_pack(plan, 0)
    longer, old = pad_tail(pack, 32, masked), slice(len(pack))
    assert len(longer) == 32 and longer.depth.max() == pack.depth.max()
    assert all(part.dtype == np.int32 for part in (longer.tokens, longer.depth, longer.end))
    assert (longer.tokens[old] == pack.tokens).all() and (longer.depth[old] == pack.depth).all()
    assert longer.is_chain is not masked and (not masked or longer.end[old].max() <= len(pack))


def test_padding_is_weighed_against_a_forward() -> None:
    """Catches launches counted in operations where padding is counted in tokens, and weights that are read for nothing."""
    assert CostModel(forward=3e6, token=1000.0).most_padding == 3000
    assert CostModel(forward=3e6, token=1000.0, idle=64).most_padding == 3064


@settings(deadline=None)
@given(families(), st.integers(1, 6))
def test_reads_stay_within_their_limit(requests: list[Request], max_reads: int) -> None:
    """Catches a limit on reads that is ignored: each costs a row of logits as wide as the vocabulary."""
    plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, NO_LIMIT, max_reads)
    packs = check_plan(plan, item_of_request, requests)
    assert all(len(pack.reads) <= max_reads or len(pack.items) == 1 for pack in packs)


@pytest.mark.parametrize("planner", [lambda some: plan_packs(some, CostModel(forward=5), 20), lambda some: plan_rows(some, 20)])
def test_plan_does_not_depend_on_the_order_of_requests(planner) -> None:
    """Catches ties broken by where a request stood: a resumed run would not find its journal."""

    @settings(deadline=None, max_examples=60)
    @given(request_sets(min_size=1), st.randoms())
    def check(requests: list[Request], random) -> None:
        order = list(range(len(requests)))
        random.shuffle(order)
        plan, item_of_request = planner(to_requests(requests))
        shuffled_plan, shuffled_items = planner(to_requests([requests[index] for index in order]))
        assert shuffled_plan.digest() == plan.digest()
        assert shuffled_items.tolist() == item_of_request[order].tolist()

    check()


def cheapest_cut(requests: list[Request], cost: CostModel, max_tokens: int, max_reads: int = NO_LIMIT) -> float:
    """The least that any split of the sorted requests into runs costs, by trying all splits."""
    items = sorted(set(requests))
    piece_costs: dict[tuple[int, int], float] = {}
    for begin, stop in itertools.combinations(range(len(items) + 1), 2):
        paths = {tokens[:end] for tokens, _ in items[begin:stop] for end in range(1, len(tokens))}
        reads = {tokens[:end] for tokens, count in items[begin:stop] for end in range(len(tokens) - count, len(tokens))}
        if stop - begin > 1 and (len(paths) > max_tokens or len(reads) > max_reads):
            continue
        branches = len({len(path) for path in paths}) < len(paths)
        pairs = len(paths) ** 2 if cost.dense and branches else sum(map(len, paths))
        piece_costs[begin, stop] = cost.forward + cost.token * len(paths) + cost.pair * pairs + cost.read * len(reads)
    best = float("inf")
    for cuts in itertools.product([False, True], repeat=len(items) - 1):
        edges = [0, *(index + 1 for index, cut in enumerate(cuts) if cut), len(items)]
        best = min(best, sum(piece_costs.get(piece, float("inf")) for piece in itertools.pairwise(edges)))
    return best


@settings(deadline=None, max_examples=150)
@given(request_sets(min_size=1, max_size=8), cost_models, st.integers(1, 40))
def test_cut_is_the_cheapest(requests: list[Request], cost: CostModel, max_tokens: int) -> None:
    """Catches a plan that is right but dear: a wrong price of a head or of a branchless pack, a limit applied early.

    Of little work: of more, packs may also be evened out for the sake of many ranks.
    """
    cost = dataclasses.replace(cost, enough=1e12)
    plan, _ = plan_packs(to_requests(requests), cost, max_tokens)
    paid = sum(cost_of(build_pack(plan, index), cost) for index in range(plan.num_packs))
    assert paid == pytest.approx(cheapest_cut(requests, cost, max_tokens))


@settings(deadline=None)
@given(families(), cost_models, st.sampled_from([1.0, 10.0]), st.integers(1, 6))
def test_cut_is_the_cheapest_where_reads_count(requests: list[Request], cost: CostModel, read: float, max_reads: int) -> None:
    """Catches reads that are priced or limited wrongly, among them those that two requests share."""
    cost = dataclasses.replace(cost, read=read, enough=1e12)
    plan, _ = plan_packs(to_requests(requests), cost, NO_LIMIT, max_reads)
    paid = sum(cost_of(build_pack(plan, index), cost) for index in range(plan.num_packs))
    assert paid == pytest.approx(cheapest_cut(requests, cost, NO_LIMIT, max_reads))


@settings(deadline=None, max_examples=150)
@given(families(), cost_models.filter(lambda cost: cost.token > 0), st.integers(1, 60), st.none() | st.integers(1, 12))
def test_skipped_places_change_no_cut(requests: list[Request], cost: CostModel, max_tokens: int, max_reads: int | None) -> None:
    """Catches a place among the choices of a question that is skipped and would have been cut: other packs, other bits."""
    every = unittest.mock.patch.object(_Costs, "places_to_cut", lambda self, *limits: np.arange(len(self) + 1))
    found, items = plan_packs(to_requests(requests), cost, max_tokens, max_reads)
    with every:
        expected, expected_items = plan_packs(to_requests(requests), cost, max_tokens, max_reads)
    assert found.digest() == expected.digest() and items.tolist() == expected_items.tolist()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_eight_ranks_are_evenly_busy(dense: bool, seed: int) -> None:
    """Catches a way of cutting that leaves ranks waiting: of 1,000 requests or more, none has over 2% more than the mean.

    Contexts with four continuations each, on a model of 8 B parameters on a GPU.
    """
    random = np.random.default_rng(seed)
    requests: list[Request] = []
    for _ in range(300):
        context = random.integers(0, 9999, random.integers(20, 120)).tolist()
        tails = [random.integers(0, 9999, random.integers(12, 50)).tolist() for _ in range(4)]
        requests += [(tuple(context + tail), len(tail)) for tail in tails]
    cost = CostModel(
        enough=1.2e15, forward=9.6e11, token=1.4e10, pair=4.0 * 4096 * 32, read=2.0 * 4096 * 128256, slowdown=2, dense=dense
    )
    plan, _ = plan_packs(to_requests(requests), cost, 8192)
    costs = np.array([cost_of(build_pack(plan, index), cost) for index in range(plan.num_packs)])
    loads = [costs[rank::8].sum() for rank in range(8)]
    assert max(loads) <= 1.02 * np.mean(loads)


def test_oversized_request_gets_a_pack_of_its_own() -> None:
    """Catches a planner that drops, splits or never ends on a request beyond the limits."""
    long = tuple(range(40))
    requests = [(long, 20), ((*long[:30], 99), 1), ((1, 2), 1)]
    for max_tokens, max_reads in ((10, None), (NO_LIMIT, 5)):
        plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, max_tokens, max_reads)
        packs = check_plan(plan, item_of_request, requests)
        owner = next(pack for pack in packs if item_of_request[0] in pack.items)
        assert len(owner.items) == 1 and len(owner) == 39


@settings(deadline=None, max_examples=30)
@given(request_sets(min_size=2), st.data())
def test_digest_names_exactly_this_work(requests: list[Request], data: st.DataObject) -> None:
    """Catches a field that the digest leaves out: results of other work would be taken from a journal."""
    plan, _ = plan_packs(to_requests(requests), CostModel(forward=5), 20)
    names = [field.name for field in dataclasses.fields(plan)]
    changed = [dataclasses.replace(plan, kind="states")]
    for name in names:
        values = getattr(plan, name)
        if name != "kind" and len(values):
            other = values.copy()
            other[data.draw(st.integers(0, len(values) - 1))] += 1
            changed += [dataclasses.replace(plan, **{name: other}), dataclasses.replace(plan, **{name: values[:-1]})]
    assert len(changed) > len(names)
    digests = [plan.digest(), *(other.digest() for other in changed)]
    assert len(set(digests)) == len(digests)
    assert dataclasses.replace(plan, tokens=plan.tokens.copy()).digest() == plan.digest()


def test_digest_sees_where_one_array_ends_and_the_next_begins() -> None:
    """Catches arrays hashed as one run of bytes."""
    plan, _ = plan_packs(to_requests([((1, 2, 3), 1)]), CostModel(), 20)
    assert plan.lengths.dtype == plan.num_targets.dtype
    shifted = dataclasses.replace(
        plan,
        lengths=np.append(plan.lengths, plan.num_targets[:1]),
        num_targets=plan.num_targets[1:],
    )
    assert shifted.digest() != plan.digest()


@settings(deadline=None, max_examples=50)
@given(request_sets(), request_sets(), st.data())
def test_select_and_concatenate(first: list[Request], second: list[Request], data: st.DataObject) -> None:
    """Catches offsets of the second part that are not moved, and a selection that keeps the wrong tokens."""

    def to_list(requests: Requests) -> list[Request]:
        bounds = itertools.pairwise(requests.starts.tolist())
        return [
            (tuple(requests.tokens[begin:stop].tolist()), count)
            for (begin, stop), count in zip(bounds, requests.num_targets.tolist(), strict=True)
        ]

    both = concatenate(to_requests(first), to_requests(second))
    assert to_list(both) == first + second
    chosen = data.draw(st.lists(st.integers(0, len(both) - 1), max_size=8)) if len(both) else []
    assert to_list(both.select(np.array(chosen, dtype=np.int64))) == [(first + second)[index] for index in chosen]


def test_tokens_beyond_one_byte_are_told_apart() -> None:
    """Catches a sort key that keeps only part of an id, and so mixes families: vocabularies hold 250,000 ids and more."""
    requests: list[Request] = [((1, base + 3, tail, 9), 1) for tail in (4, 5) for base in (0, 2**8, 2**16, 2**17)]
    plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, NO_LIMIT)
    packs = check_plan(plan, item_of_request, requests)
    assert len(packs) == 1 and len(packs[0]) == 1 + 4 * 3


def test_prefixes_longer_than_a_comparison_block() -> None:
    """Catches a common prefix cut short where it spans several blocks of the comparison, or ends on the edge of one."""
    for shared in (31, 32, 33, 64, 65, 200):
        requests = [((*range(shared), 500 + tail, 600), 1) for tail in range(3)]
        plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, NO_LIMIT)
        packs = check_plan(plan, item_of_request, requests)
        assert len(packs) == 1 and len(packs[0]) == shared + 3


@given(request_sets(min_size=1), st.booleans())
def test_halves_hold_what_their_items_need(requests: list[Request], rows: bool) -> None:
    """Catches items lost or asked twice in the cut, ancestors that a half lacks, and tokens that nobody needs."""
    plan, item_of_request = (
        plan_rows(to_requests(requests), NO_LIMIT) if rows else plan_packs(to_requests(requests), ONE_PACK, NO_LIMIT)
    )
    (pack,) = check_plan(plan, item_of_request, requests)
    request_of_item = dict(zip(item_of_request.tolist(), requests, strict=True))
    if len(pack.items) == 1:
        with pytest.raises(ValueError, match="one item"):
            halve(pack)
        return
    left, right = halve(pack)
    assert [*left.items, *right.items] == list(pack.items)
    assert len(left) <= len(pack) and len(right) <= len(pack)
    for half in (left, right):
        check_pack(half, [request_of_item[item] for item in half.items])
        assert half.rows == rows
