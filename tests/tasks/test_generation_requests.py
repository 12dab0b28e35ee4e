"""Prompts and seeds from lm_eval's requests that generate, and the answers to them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models

from ddp_eval.config import ENGINES
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


def test_stop_strings_within_thinking_end_nothing_with_vllm() -> None:
    """Catches thoughts cut at a stop string of the task's, so that there is no answer; and an end of thinking never found."""
    tokenizer = tiny_models.make_tokenizer()
    eos = str(tokenizer.decode(tokenizer.eos_token_id))
    settings = {"until": ["\n"]}
    late = ask([("a", settings)], think_end_token="so", stops_behind_thinking=True)
    assert late.prompts.settings[0].until == (eos,)
    assert ask([("a", settings)], think_end_token="so").prompts.settings[0].until == ("\n", eos)
    assert ask([("a", settings)], stops_behind_thinking=True).prompts.settings[0].until == ("\n", eos)
    assert late.read(0, tokenizer("one\n thinks so two\n more")["input_ids"]) == "two"

    special = ask([("a", settings)], think_end_token=eos * 2, stops_behind_thinking=True)
    ended = [*tokenizer("one\n thinks")["input_ids"], *[tokenizer.eos_token_id] * 2, *tokenizer(" two\n more")["input_ids"]]
    assert special.read(0, ended) == "two"
    assert special.read(0, tokenizer("no end\n more")["input_ids"]) == "no end"


def test_which_engine_stops_behind_thinking() -> None:
    """Catches lm_eval's rule of one backend applied to another."""
    assert ENGINES["vllm"].stops_behind_thinking and not ENGINES["hf"].stops_behind_thinking
