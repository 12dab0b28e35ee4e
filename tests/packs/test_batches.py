"""Batches cut from prompts: by hand and over random prompts."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np

from ddp_eval.packs.batches import LEAST_SHARED, BatchLimits, Prompts, Settings, build_batch, plan_batches

GREEDY, DRAWN = Settings(("\n",), {"do_sample": False}), Settings(("\n",), {"do_sample": True, "temperature": 1.0})
SIZES = BatchLimits(slot_tokens=10_000, max_slots=4, queue=8)


def prompts_of(lists: list[list[int]], kinds: list[int] | None = None, seeds: list[int] | None = None) -> Prompts:
    count = len(lists)
    arrays = [np.array(tokens, dtype=np.int32) for tokens in lists]
    return Prompts(arrays, kinds or [0] * count, [5] * count, seeds or [0] * count, [GREEDY, DRAWN], ["task"] * count)


lists_of_tokens = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=40)


@hypothesis.given(lists_of_tokens, st.data())
def test_every_prompt_is_in_one_batch_whole(lists: list[list[int]], data: Any) -> None:
    """Catches a prompt that is lost, doubled, cut or given another's answer, and settings that are mixed in one batch."""
    kinds = data.draw(st.lists(st.integers(0, 1), min_size=len(lists), max_size=len(lists)))
    seeds = [kind * data.draw(st.integers(1, 3)) for kind in kinds]
    prompts = prompts_of(lists, kinds, seeds)
    plan, item_of_prompt = plan_batches(prompts, SIZES, [False, False])
    batches = [build_batch(plan, index) for index in range(plan.num_batches)]
    found = {item: (batch, place) for batch in batches for place, item in enumerate(batch.items)}
    assert sorted(found) == list(range(plan.num_items))
    for tokens, kind, seed, item in zip(lists, kinds, seeds, item_of_prompt.tolist(), strict=True):
        batch, place = found[item]
        assert batch.prompts[place].tolist() == tokens
        assert (batch.settings, batch.seeds[place]) == ([GREEDY, DRAWN][kind], seed)
    assert int(plan.num_requests.sum()) == len(lists)
    for batch in batches:
        assert 1 <= batch.slots <= SIZES.max_slots
        assert len({tuple(prompt[: batch.prefix].tolist()) for prompt in batch.prompts}) == 1
        assert all(len(prompt) > batch.prefix for prompt in batch.prompts)


@hypothesis.given(lists_of_tokens, st.randoms())
def test_the_order_of_prompts_does_not_matter(lists: list[list[int]], dice: Any) -> None:
    """Catches batches cut by where a prompt stood: a resumed run would not find its journal."""
    shuffled = list(lists)
    dice.shuffle(shuffled)
    first, second = (plan_batches(prompts_of(given), SIZES, [False, False])[0] for given in (lists, shuffled))
    assert first.digest() == second.digest()


def test_what_begins_alike_goes_together() -> None:
    """Catches a family split over batches of strangers, and a prefix that is not all that it shares."""
    head = list(range(LEAST_SHARED + 8))
    family = [[*head, 100 + index] for index in range(6)]
    strangers = [[200 + index] * (50 + index) for index in range(5)]
    mixed = [prompt for pair in zip(family, [*strangers, [9, 9]], strict=True) for prompt in pair]
    plan, _ = plan_batches(prompts_of(mixed), SIZES, [False, False])
    batches = [build_batch(plan, index) for index in range(plan.num_batches)]
    (own,) = [batch for batch in batches if batch.prefix]
    assert own.prefix == len(head)
    assert sorted(prompt.tolist() for prompt in own.prompts) == family
    (rest,) = [batch for batch in batches if not batch.prefix]
    lengths = [len(prompt) for prompt in rest.prompts]
    assert lengths == sorted(lengths, reverse=True)


def test_one_by_one_and_by_memory() -> None:
    """Catches slots for more tokens than there is room, and slots where the model's own `generate` must answer."""
    lists = [[index] * 20 for index in range(8)]
    plan, _ = plan_batches(prompts_of(lists), BatchLimits(slot_tokens=60, max_slots=4, queue=8), [False, False])
    assert plan.slots.tolist() == [2]  # 20 and 5 tokens each
    plan, _ = plan_batches(prompts_of(lists), SIZES, [True, False])
    assert plan.slots.tolist() == [0]


def test_equal_greedy_requests_are_answered_once() -> None:
    """Catches greedy repeats that are computed again, and drawn ones that are not drawn again."""
    plan, items = plan_batches(prompts_of([[1, 2]] * 3 + [[1, 2]] * 3, [0] * 3 + [1] * 3, [0, 0, 0, 7, 8, 9]), SIZES, [False] * 2)
    assert plan.num_items == 4
    assert len(set(items[:3].tolist())) == 1
    assert len(set(items.tolist())) == 4
