"""Requests of several types at once: who gets which answer, and the order of the tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from ddp_eval.errors import OutOfRange, UserError
from ddp_eval.packs.batches import NO_TOKEN
from ddp_eval.packs.results import NO_RESULTS, RESULT
from ddp_eval.tasks import request_types
from ddp_eval.tasks.request_types import Answers, Asked, RunOptions, encode
from ddp_eval.tasks.request_types.generate_until import GenerateUntil
from ddp_eval.tasks.request_types.loglikelihood import Loglikelihood
from ddp_eval.tasks.tokenization import Encoder

GREEDY, RANDOM = {"until": ["."], "max_gen_toks": 4}, {"until": ["!"], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0}


def instance(kind: str, doc_id: int, *arguments: Any, repeats: int = 1) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(f"t_{kind}", doc_id, repeats))


@pytest.fixture
def options(tiny_tokenizer: Any) -> RunOptions:
    return RunOptions(Encoder(tiny_tokenizer, 8), {}, {"t_loglikelihood": [3, 7, 9]}, 1234, None, None)


@pytest.fixture
def ask(options: RunOptions) -> Callable[..., Asked]:
    def join(*instances: Instance) -> Asked:
        return Asked.join(encode(instances, options), instances, {"prompts_sha256": "x"})

    return join


@pytest.mark.parametrize(
    "one",
    [
        instance("loglikelihood", 1, "one", 4),
        instance("loglikelihood", 1, ["one"], "two"),
        instance("loglikelihood_rolling", 1, None),
        instance("generate_until", 1, ["one", "two"], GREEDY),
    ],
)
def test_what_is_no_text_is_named(one: Instance, options: RunOptions) -> None:
    """Catches a traceback from the tokenizer, which names neither the task nor the document."""
    good = {"loglikelihood": ("one", " two"), "loglikelihood_rolling": ("one",), "generate_until": ("one", GREEDY)}
    document = 7 if one.request_type == "loglikelihood" else 1
    with pytest.raises(UserError, match=rf"^the task t_{one.request_type} makes a request of .* in document {document}, "):
        encode([instance(one.request_type, 0, *good[one.request_type]), one], options)


def test_every_instance_gets_its_own(ask: Callable[..., Asked], tiny_tokenizer: Any) -> None:
    """Catches tables by type instead of in lm_eval's order, a window that counts for its neighbour, and a repeat that is lost."""
    text = "one two three four five six seven eight nine ten eleven twelve"
    instances = [
        instance("generate_until", 0, "Say a word:", GREEDY, repeats=2),
        instance("loglikelihood", 0, "one two", " three"),
        instance("loglikelihood_rolling", 0, text),
        instance("loglikelihood", 2, "one", ""),
        instance("generate_until", 1, "And one more:", RANDOM),
    ]
    asked = ask(*instances)
    windows = len(asked.requests) - 1
    assert [type(part).name for part in asked.parts] == ["loglikelihood", "loglikelihood_rolling", "generate_until"]
    assert windows > 1 and len(asked.prompts) == 3 and list(asked.prompts.kinds) == [0, 0, 1]
    words = [tiny_tokenizer.encode(word, add_special_tokens=False) for word in ("four", "five", "six")]
    answers = Answers(
        np.array([(0, -1.5, True), *[(0, -2.0, False)] * windows], dtype=RESULT),
        [words[0], words[1], [*words[2], NO_TOKEN]],
        [4, len(words[1]), 5],
    )
    scores, texts = asked.tables(answers)
    assert scores.task == ["t_loglikelihood", "t_loglikelihood_rolling", "t_loglikelihood"]
    assert (scores.doc_id, scores.is_greedy) == ([3, 0, 9], [True, None, False])
    assert scores.loglikelihood == [-1.5, -2.0 * windows, -np.inf]
    assert list(scores.num_tokens) == [asked.requests.num_targets[0], asked.requests.num_targets[1:].sum(), 0]
    assert (texts.doc_id, texts.repeat, texts.text) == ([0, 0, 1], [0, 1, 0], ["four", "five", "six"])
    assert (texts.at_limit, texts.not_finite) == ([False, True, False], [False, False, True])
    found = asked.by_instance(answers)
    wanted = [["four", "five"], [(-1.5, True)], [-2.0 * windows], [(-np.inf, False)], ["six"]]
    assert [found[id(one)] for one in instances] == wanted


def test_the_instance_of_a_request(ask: Callable[..., Asked]) -> None:
    """Catches an error that blames the wrong task: requests and prompts are counted through all types."""
    scored = instance("loglikelihood", 0, "one", " two")
    rolling = instance("loglikelihood_rolling", 0, "one two")
    text = instance("generate_until", 0, "one", GREEDY, repeats=2)
    asked = ask(rolling, text, scored)
    assert [asked.instance_of(OutOfRange(index, False, 5, "")) for index in range(2)] == [scored, rolling]
    assert asked.instance_of(OutOfRange(1, True, 5, "")) is text


def test_nothing_was_asked() -> None:
    """Catches an error over tokens that belong to no instance, which `DDPEvalLM._loglikelihood_tokens` scores."""
    asked = Asked.join([], [], {})
    assert (len(asked.requests), len(asked.prompts)) == (0, 0)
    scores, texts = asked.tables(Answers(NO_RESULTS, [], []))
    assert (len(scores), len(texts)) == (0, 0)


def test_unknown_types_are_refused(ask: Callable[..., Asked]) -> None:
    """Catches requests that are dropped, or a sentence about another task than the first."""
    unknown = [instance("telepathy", 0, "a"), instance("loglikelihood", 0, "a", "b"), instance("prophecy", 0, "a")]
    with pytest.raises(UserError, match=r"^the task t_telepathy makes telepathy requests, which are not supported yet$"):
        ask(*unknown)


def test_a_new_type_is_one_line(ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of types beside the table, and types that cannot share the tables and the prompts of others."""

    class YesOrNo(Loglikelihood):
        name, output_types = "yes_or_no", ("yes_or_no",)

        def answers(self, result: Any) -> list[Any]:
            return [nats > -1 for nats in result.logprobs.tolist()]

    class Essay(GenerateUntil):
        name, output_types = "essay", ("essay",)

    assert not request_types.makes_text("essay")
    monkeypatch.setattr(request_types, "REQUEST_TYPES", (*request_types.REQUEST_TYPES, YesOrNo, Essay))
    assert request_types.served_output_types()[-2:] == ("yes_or_no", "essay") and request_types.makes_text("essay")
    instances = [
        instance("essay", 0, "one", RANDOM),
        instance("yes_or_no", 5, "one", " two"),
        instance("generate_until", 0, "one", GREEDY),
        instance("loglikelihood", 0, "one", " two"),
    ]
    asked = ask(*instances)
    assert list(asked.prompts.kinds) == [0, 1] and [one.until[0] for one in asked.prompts.settings] == [".", "!"]
    assert list(asked.prompts.tasks) == ["t_generate_until", "t_essay"] and asked.prompts.seeds[0] == 0 < asked.prompts.seeds[1]
    answers = Answers(np.array([(0, -2.0, True), (1, -0.5, True)], dtype=RESULT), [[], []], [4, 5])
    scores, texts = asked.tables(answers)
    assert (scores.task, scores.loglikelihood) == (["t_yes_or_no", "t_loglikelihood"], [-0.5, -2.0])
    assert texts.task == ["t_essay", "t_generate_until"]
    assert [asked.by_instance(answers)[id(one)] for one in instances] == [[""], [True], [""], [(-2.0, True)]]
