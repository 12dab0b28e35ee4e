"""Prompts and seeds from lm_eval's requests that generate, and the answers to them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models

from ddp_eval.errors import UserError
from ddp_eval.tasks.generation_requests import GenerationRequests
from ddp_eval.tasks.tokenization import Encoder


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
