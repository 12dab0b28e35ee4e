"""Batches cut from prompts, stop strings, prompts and seeds from lm_eval's requests: by hand and over random prompts."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tiny_models

from ddp_eval.engines.hf.kv_slots import grow_tree
from ddp_eval.engines.stop_strings import StopRule
from ddp_eval.errors import UserError
from ddp_eval.packs.batches import LEAST_SHARED, Prompts, Settings, Sizes, build_batch, plan_batches
from ddp_eval.tasks.generation_requests import GenerationRequests
from ddp_eval.tasks.tokenization import Encoder

GREEDY, DRAWN = Settings(("\n",), {"do_sample": False}), Settings(("\n",), {"do_sample": True, "temperature": 1.0})
SIZES = Sizes(slot_tokens=10_000, most_slots=4, queue=8)


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
        assert 1 <= batch.slots <= SIZES.most_slots
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
    plan, _ = plan_batches(prompts_of(lists), Sizes(slot_tokens=60, most_slots=4, queue=8), [False, False])
    assert plan.slots.tolist() == [2]  # 20 and 5 tokens each
    plan, _ = plan_batches(prompts_of(lists), SIZES, [True, False])
    assert plan.slots.tolist() == [0]


def test_equal_greedy_requests_are_answered_once() -> None:
    """Catches greedy repeats that are computed again, and drawn ones that are not drawn again."""
    plan, items = plan_batches(prompts_of([[1, 2]] * 3 + [[1, 2]] * 3, [0] * 3 + [1] * 3, [0, 0, 0, 7, 8, 9]), SIZES, [False] * 2)
    assert plan.num_items == 4
    assert len(set(items[:3].tolist())) == 1
    assert len(set(items.tolist())) == 4


@hypothesis.given(lists_of_tokens)
def test_a_tree_holds_every_prompt(lists: list[list[int]]) -> None:
    """Catches a token that is laid down twice, that sees what is not before it, or does not see what is."""
    tree = grow_tree([np.array(tokens) for tokens in lists])
    index = np.arange(len(tree.tokens))
    for tokens, path in zip(lists, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == tokens
        assert tree.depth[path].tolist() == list(range(len(tokens)))
        sees = (index <= path[-1]) & (path[-1] < tree.end)
        assert np.flatnonzero(sees).tolist() == path.tolist()
    assert len(tree.tokens) == len({tuple(tokens[:end]) for tokens in lists for end in range(1, len(tokens) + 1)})


def test_stop_strings_across_tokens(tiny_tokenizer: Any) -> None:
    """Catches a stop string that is only found as whole tokens, in the prompt, or once it is long past."""
    from lm_eval.models.utils_hf import MultiTokenEOSCriteria

    until = ["the qu", "s", "</s>", ". "]
    rule = StopRule(tiny_tokenizer, until)
    text = tiny_tokenizer("a dog and the quick fox ran. it was </s> over.")["input_ids"]
    import torch

    for end in range(1, len(text) + 1):
        answer = torch.tensor([[5, 6, 7, *text[:end]]])
        wanted = any(MultiTokenEOSCriteria(stop, tiny_tokenizer, 3, 1)(answer, None) for stop in until)
        assert rule.ends([text[:end]]) == [wanted]


def ask(
    pairs: list[tuple[str, dict[str, Any]]], seed: int | None = 1234, max_length: int = 512, **more: Any
) -> GenerationRequests:
    encoder = Encoder(tiny_models.make_tokenizer(), max_length)
    return GenerationRequests(encoder, pairs, ["task"] * len(pairs), seed, **more)


def test_prompts_lose_their_left_end() -> None:
    """Catches a prompt that leaves no room for its answer, or loses its right end."""
    text = "the cat sat on the mat and looked at the dog, who ran away over the hills and far away " * 3
    asked = ask([(text, {"max_gen_toks": 24}), ("short", {"max_new_tokens": 24})], max_length=64)
    whole = tiny_models.make_tokenizer()(text)["input_ids"]
    assert asked.prompts.tokens[0].tolist() == whole[-40:]
    assert asked.truncated == [0]
    assert list(asked.prompts.limits) == [24, 24]
    assert len(asked.prompts.settings) == 1
    with pytest.raises(UserError, match="leaves no room for its prompts in the model's 64"):
        ask([(text, {"max_gen_toks": 64})], max_length=64)


def test_seeds_are_of_the_request() -> None:
    """Catches draws that depend on place or company, and repeats that draw the same."""
    drawn, greedy = {"do_sample": True, "temperature": 0.7}, {"temperature": 0.0}
    first = ask([("a", drawn), ("b", drawn), ("a", drawn), ("c", greedy)]).prompts.seeds
    second = ask([("c", greedy), ("a", drawn), ("a", drawn), ("b", drawn)]).prompts.seeds
    assert [first[0], first[2], first[1], first[3]] == [second[1], second[2], second[3], second[0]]
    assert len(set(first)) == 4
    assert first[3] == 0
    assert set(first[:3]).isdisjoint(ask([("a", drawn), ("b", drawn), ("a", drawn)], seed=1).prompts.seeds)
    assert set(first[:3]).isdisjoint(ask([("a", {**drawn, "top_k": 3}), ("b", {**drawn, "top_k": 3})]).prompts.seeds)


@pytest.mark.parametrize(("end", "wanted"), [(None, "one thinks so"), ("so", "two"), (399, "two")])
def test_answers_are_read_as_lm_eval_does(end: Any, wanted: str) -> None:
    """Catches thinking that is kept, a stop string within it that cuts it, and one that stays at the end."""
    tokenizer = tiny_models.make_tokenizer()
    answer = tokenizer("one thinks so")["input_ids"]
    answer += [end] if isinstance(end, int) else []
    answer += tokenizer(" two\n more")["input_ids"] if end else tokenizer("\n")["input_ids"]
    assert ask([("a", {"until": ["\n"]})], think_end_token=end).read(0, answer) == wanted
