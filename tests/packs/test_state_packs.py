"""Trees that share caches: worked by hand, then random requests, each of which must be answered from its own tokens."""

from __future__ import annotations

import unittest.mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from request_sets import Request, paths_of, request_sets, to_requests

from ddp_eval.packs import states
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import STATES, Pack, Plan, build_pack, halve
from ddp_eval.packs.states import (
    ForwardLimits,
    batch_segments,
    count_branches,
    find_segments,
    keep_worthwhile,
    plan_one_forest,
    plan_states,
)

COSTS = [CostModel(), CostModel(forward=7, pair=0.25), CostModel(idle=8, dense=False)]


def check_pack(pack: Pack, items: list[Request]) -> None:
    """Each of `items` is read at its own places, behind its own tokens."""
    assert pack.kind == STATES
    paths = paths_of(pack)
    for item, (tokens, count) in enumerate(items):
        mine = pack.answer_items == item
        read_at = [paths[position] for position in pack.reads[pack.answer_reads[mine]]]
        assert read_at == [tokens[:stop] for stop in range(len(tokens) - count, len(tokens))]
        assert pack.answer_targets[mine].tolist() == list(tokens[len(tokens) - count :])
    for token, path in enumerate(paths):
        above = [earlier for earlier in range(token + 1) if token < pack.end[earlier]]
        assert tuple(pack.tokens[above].tolist()) == path


def check_plan(plan: Plan, item_of_request: np.ndarray, requests: list[Request]) -> list[Pack]:
    packs = [build_pack(plan, index) for index in range(plan.num_packs)]
    assert [item for pack in packs for item in pack.items] == list(range(plan.num_items))
    assert plan.num_items == len(set(requests))
    request_of_item = dict(zip(item_of_request.tolist(), requests, strict=True))
    for pack in packs:
        check_pack(pack, [request_of_item[item] for item in pack.items])
    return packs


def check_segments(pack: Pack) -> None:
    """Every token lies in one segment, behind the end of its parent; nothing goes on from a leaf."""
    found = find_segments(pack)
    assert int(found.lengths.sum()) == len(pack) and (found.starts == np.cumsum(found.lengths) - found.lengths).all()
    paths = paths_of(pack)
    for index, (start, length, depth, parent, _) in enumerate(zip(*(column.tolist() for column in found), strict=True)):
        assert pack.depth[start : start + length].tolist() == list(range(depth, depth + length))
        if parent < 0:
            assert depth == 0
        else:
            last = int(found.starts[parent] + found.lengths[parent]) - 1
            assert paths[last] == paths[start][:-1] and start < pack.end[last]
        assert found.is_leaf[index] == (index not in found.parents.tolist())


@settings(deadline=None, max_examples=150)
@given(request_sets(), st.sampled_from(COSTS), st.sampled_from([8, 20, 10**6]), st.sampled_from([None, 3]))
def test_every_request_is_answered_from_its_own_tokens(
    requests: list[Request], cost: CostModel, max_tokens: int, max_reads: int | None
) -> None:
    """Catches a prefix that is given up or kept in the wrong place, an item lost on its way, and a branch from another tree."""
    with unittest.mock.patch.object(states, "LEAST_SEGMENT", 2):
        plan, item_of_request = plan_states(to_requests(requests), cost, max_tokens, max_reads)
    check_plan(plan, item_of_request, requests)


@settings(deadline=None, max_examples=150)
@given(request_sets(min_size=1))
def test_trials_take_every_branch(requests: list[Request]) -> None:
    """Catches a trial that shares nothing, segments of one token that others go on from, and halves that do not answer all."""
    plan, item_of_request = plan_one_forest(to_requests(requests))
    (pack,) = check_plan(plan, item_of_request, requests)
    check_segments(pack)
    found = find_segments(pack)
    goes_on = ~found.is_leaf & (found.parents >= 0)
    assert (found.lengths[goes_on] > 1).all()
    if len(pack.items) > 1:
        request_of_item = dict(zip(item_of_request.tolist(), requests, strict=True))
        for half in halve(pack):
            check_pack(half, [request_of_item[item] for item in half.items])
            check_segments(half)


def test_small_savings_are_given_up() -> None:
    """Catches branches that cost more than they save, and what is given up at one depth but would pay at the one above it.

    A stem of 20 tokens; two pairs that part 4 tokens behind it, and one that parts 30 behind it.
    """
    lengths = np.array([30, 30, 30, 30, 60, 60])
    shared = np.array([0, 24, 20, 24, 20, 50])
    kept, branches = keep_worthwhile(lengths, shared, least_segment=16, least_saved=16)
    assert kept.tolist() == [0, 20, 20, 20, 20, 50]
    assert branches.tolist() == [False, True, True, True, True, True]
    kept, branches = keep_worthwhile(lengths, shared, least_segment=16, least_saved=90)
    assert kept.tolist() == [0, 20, 20, 20, 20, 20] and branches.sum() == 5
    kept, branches = keep_worthwhile(lengths, shared, least_segment=16, least_saved=1000)
    assert not kept.any() and not branches.any()


def test_trees_that_save_little_are_none() -> None:
    """Catches copies of caches for prefixes so short that rows are as fast: two choices behind a sentence."""
    random = np.random.default_rng(0)

    def plan_of(context: int, choices: int, others: int = 0) -> Plan:
        requests = []
        for _ in range(10):
            question = tuple(random.integers(0, 1000, context).tolist())
            requests += [((*question, *random.integers(0, 1000, 15).tolist()), 15) for _ in range(choices)]
        requests += [(tuple(random.integers(0, 1000, 500).tolist()), 1) for _ in range(others)]
        return plan_states(to_requests(requests), CostModel(), 4000)[0]

    assert not states.pays(plan_of(context=20, choices=2)) and not states.pays(plan_of(context=20, choices=3))
    assert states.pays(plan_of(context=20, choices=4)) and states.pays(plan_of(context=100, choices=2))
    assert not states.pays(plan_of(context=100, choices=2, others=60)), "1,000 of 33,000 tokens"
    questions = [(*range(500), *random.integers(500, 1000, 30).tolist()) for _ in range(10)]
    requests = [((*question, letter), 1) for question in questions for letter in range(4)]
    assert states.pays(plan_states(to_requests(requests), CostModel(), 4000)[0]), "four requests of the same tokens but the last"


def test_trees_alike_run_side_by_side_and_what_shares_nothing_in_rows() -> None:
    """Catches trees of other depths between those that could share a forward, and rows among trees."""
    random = np.random.default_rng(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(random.integers(0, 1000, count).tolist())

    contexts = [draw(length) for length in (40, 70) * 8]
    requests = [(context + draw(5), 2) for context in contexts for _ in range(4)] + [(draw(30 + index), 1) for index in range(6)]
    plan, item_of_request = plan_states(to_requests(requests), CostModel(idle=8), 400)
    packs = check_plan(plan, item_of_request, requests)
    assert count_branches(plan) == 16 * 3
    roots = [pack.depth[1:][np.flatnonzero(np.diff(pack.depth) < 0)] for pack in packs if not find_segments(pack).is_leaf.all()]
    assert sum(len(np.unique(of_pack[of_pack > 0])) > 1 for of_pack in roots) <= 1, "at most one pack holds trees of both depths"
    plain = [pack for pack in packs if find_segments(pack).is_leaf.all()]
    assert sum(len(pack.items) for pack in plain) == 6
    for pack in plain:
        assert len(pack.items) * (int(pack.depth.max()) + 1) - len(pack) <= 8


def test_batches_keep_their_limits() -> None:
    """Catches padding in rows that others go on from, batches beyond their limits, and rows counted without their cache."""
    requests = [((1,) * 20 + (branch,) * (5 + branch % 3) + tail, 1) for branch in range(2, 11) for tail in ((0, 0), (12, 0))]
    pack = build_pack(plan_one_forest(to_requests(requests))[0], 0)
    found = find_segments(pack)
    members = np.flatnonzero(found.depths == 20)
    assert len(members) == 9 and not found.is_leaf[members].any()
    batches = batch_segments(found, members, ForwardLimits(max_tokens=14, max_rows=8, most_padding=100))
    assert sorted(np.concatenate(batches).tolist()) == members.tolist()
    for batch in batches:
        assert len(set(found.lengths[batch].tolist())) == 1 and found.lengths[batch].sum() <= 14
    leaves = np.flatnonzero(found.is_leaf)
    assert [len(batch) for batch in batch_segments(found, leaves, ForwardLimits(1000, 5, 0))] == [5, 5, 5, 3]
    asked: list[int] = []
    two_fit = ForwardLimits(1000, 5, 0, lambda tokens: asked.append(tokens) or 2)
    assert [len(batch) for batch in batch_segments(found, leaves, two_fit)] == [2] * 9
    assert set(asked) == set((found.depths + found.lengths)[leaves].tolist())
