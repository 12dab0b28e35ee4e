"""Chat: prompts equal to those of lm_eval's HF backend to the byte, under templates of several kinds; reasoning cut as there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
from chat_templates import CHATML, GEMMA, LLAMA3, MISTRAL
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tiny_models import evaluate_with_lm_eval

from ddp_eval import demo
from ddp_eval.api import evaluate
from ddp_eval.config import Config, read_think_end
from ddp_eval.errors import UserError
from ddp_eval.packs.results import RESULT
from ddp_eval.tasks import harness
from ddp_eval.tasks.collector import RequestCollector
from ddp_eval.tasks.reasoning import finish_answer
from ddp_eval.tasks.request_types import Answers, Asked
from ddp_eval.tasks.task_errors import OwnError
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")

EXTRA = CHATML + "{{ tools_note | default('') }}"
TASKS = ["demo_mmlu_global_facts", "demo_lambada", "demo_hellaswag"]


def prompts_of(results: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [sample["arguments"] for sample in samples] for task, samples in results["samples"].items()}


def prompts_by_lm_eval(model: Any, tokenizer: Any, tasks: list[str], lm_args: Any = None, **options: Any) -> dict[str, list[Any]]:
    """What lm_eval's HFLM is given to score; its answers are left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "_loglikelihood_tokens", lambda self, requests, **_: [(0.0, False)] * len(requests))
        return prompts_of(evaluate_with_lm_eval(model, tokenizer, tasks, lm_args=lm_args, bootstrap_iters=0, **options))


def our_prompts(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> dict[str, list[Any]]:
    def answer(asked: Asked) -> Answers:
        return Answers(np.zeros(len(asked.requests), dtype=RESULT), [], [])

    config = Config(tasks=list(tasks), bootstrap_iters=0, **options)
    encoder = Encoder(tokenizer, 2048)
    outcome = harness.evaluate_tasks(config, encoder, model.config, answer, Phases(), [demo.TASKS_PATH])
    return prompts_of(outcome.results)


@pytest.mark.parametrize("multiturn", [True, False], ids=["turns", "one-turn"])
@pytest.mark.parametrize("system", [None, "You are terse."], ids=["plain", "system"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA], ids=["chatml", "llama3", "mistral", "gemma"])
def test_prompts_are_those_of_lm_eval(template: str, system: Any, multiturn: bool, tiny_model: Callable[..., Any]) -> None:
    """Catches a prompt that differs by a byte: a turn, a system message, a BOS twice, a blank."""
    tokenizer = tiny_models.make_tokenizer(chat_template=template)
    options: dict[str, Any] = {
        "apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": system, "limit": 2,
        "num_fewshot": 2,
    }  # fmt: skip
    ours = our_prompts(tiny_model("llama"), tokenizer, TASKS, **options)
    assert ours == prompts_by_lm_eval(tiny_model("llama"), tokenizer, TASKS, **options)
    assert system is None or (system in ours["demo_lambada"][0][0][0]) == (template != GEMMA)


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_thinking": False},
        {"enable_thinking": False, "chat_template_args": {"enable_thinking": True, "tools_note": "none"}},
        {"chat_template_args": {"tools_note": "some"}},
        {"think_end_token": "</think>"},
    ],
    ids=["off", "both", "more", "end"],
)
def test_settings_of_the_template(settings: dict[str, Any], tiny_model: Callable[..., Any]) -> None:
    """Catches a setting that does not reach the template, or loses against its namesake among chat_template_args."""
    tokenizer = tiny_models.make_tokenizer(chat_template=EXTRA)
    options: dict[str, Any] = {"apply_chat_template": True, "limit": 1, "fewshot_as_multiturn": True}
    ours = our_prompts(tiny_model("llama"), tokenizer, TASKS[:1], model_args=settings, **options)
    assert ours == prompts_by_lm_eval(tiny_model("llama"), tokenizer, TASKS[:1], lm_args=settings, **options)
    assert ("<think>" in ours[TASKS[0]][0][0][0]) == (settings.get("enable_thinking") is False)


def test_a_template_may_be_given_to_a_tokenizer_that_has_none(tiny_model: Callable[..., Any]) -> None:
    """Catches a refusal where lm_eval applies the template that the user gives."""
    tokenizer = tiny_models.make_tokenizer()
    assert tokenizer.chat_template is None
    settings = {"chat_template_args": {"chat_template": CHATML}}
    options: dict[str, Any] = {"apply_chat_template": True, "limit": 1}
    ours = our_prompts(tiny_model("llama"), tokenizer, TASKS[:1], model_args=settings, **options)
    assert ours == prompts_by_lm_eval(tiny_model("llama"), tokenizer, TASKS[:1], lm_args=settings, **options)
    assert "<|im_start|>" in ours[TASKS[0]][0][0][0]
    with pytest.raises(UserError, match=r"^--apply_chat_template needs a tokenizer with a chat template, and this one has none"):
        evaluate(tiny_model("llama"), tokenizer, TASKS[:1], apply_chat_template=True, limit=1)


def no_answers(asked: Asked) -> Answers:
    raise AssertionError("nothing is to be answered")


def test_a_task_of_several_types_scores_nothing_behind_thoughts(tiny_model: Callable[..., Any]) -> None:
    """Catches SQuAD's second request, for a log-probability, which only its own code shows; lm_eval raises there."""
    settings = {"enable_thinking": True, "think_end_token": "</think>"}
    encoder = Encoder(tiny_models.make_tokenizer(), 64)
    lm = RequestCollector(encoder, tiny_model("llama").config, no_answers, Config(model_args=settings), Phases())
    requests = [
        Instance(kind, {}, ("one", more), 0, metadata=("squadv2", 0, 1))
        for kind, more in (("generate_until", {"until": ["."]}), ("loglikelihood", " two"))
    ]
    with pytest.raises(OwnError) as caught:
        lm.loglikelihood(requests)
    assert str(caught.value.error) == (
        "enable_thinking=True is for tasks that generate text, and squadv2 makes loglikelihood requests too: leave it out"
    )


def test_thinking_is_for_tasks_that_generate(tiny_model: Callable[..., Any]) -> None:
    """Catches a score of an answer that was to follow thoughts, where lm_eval raises too."""
    tokenizer = tiny_models.make_tokenizer(chat_template=EXTRA)
    settings = {"enable_thinking": True, "think_end_token": "</think>"}
    with pytest.raises(
        UserError, match=r"^enable_thinking=True is for tasks that generate text, and demo_lambada is of the type"
    ):
        evaluate(tiny_model("llama"), tokenizer, ["demo_lambada"], model_args=settings, apply_chat_template=True, limit=1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"enable_thinking": True}, "model_args enable_thinking=True needs think_end_token=TEXT_OR_ID"),
        ({"enable_thinking": "yes"}, "model_args enable_thinking must be true or false, got yes"),
        ({"think_end_token": 1.5}, "model_args think_end_token must be a string or a token id, got 1.5"),
        ({"chat_template_args": "a"}, "model_args chat_template_args must be a mapping, got a"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], sentence: str) -> None:
    """Catches a setting that is dropped without a word, or a traceback out of the template."""
    with pytest.raises(UserError) as caught:
        Config(model_args=settings)
    assert str(caught.value).startswith(sentence)


WORDS = {1: "I ", 2: "think", 3: "</think>", 4: " so\n", 5: "\nstop", 6: " yes"}


def decode(tokens: Any) -> str:
    return "".join(WORDS[token] for token in tokens)


def finish_as_lm_eval(tokens: list[int], until: list[str], end: Any) -> str:
    """What `HFLM.generate_until` does behind `_model_generate`."""
    if isinstance(end, int):
        places = [index for index, token in enumerate(tokens) if token == end]
        tokens = tokens[places[-1] + 1 :] if places else tokens
    text = decode(tokens)
    if isinstance(end, int):
        text = text.lstrip()
    return postprocess_generated_text(text, until, end if isinstance(end, str) else None)


@pytest.mark.parametrize("end", [None, "</think>", "3", 3, "absent", 9], ids=repr)
@pytest.mark.parametrize("until", [[], ["\n"], ["stop", "", "yes"], ["\n\n", "</think>"]], ids=repr)
@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 6], [4, 5, 3, 3, 4, 5, 6], [4, 6], [3], []], ids=repr)
def test_the_answer_behind_a_trace(tokens: list[int], until: list[str], end: Any) -> None:
    """Catches an answer cut at a stop string of the trace, at the first end of several, or stripped where nothing was cut."""
    wanted = read_think_end({"think_end_token": end})
    assert wanted == (3 if end == "3" else end)
    assert finish_answer(tokens, decode, until, wanted) == finish_as_lm_eval(tokens, until, wanted)


def test_an_answer_behind_a_trace_in_numbers_of_its_own() -> None:
    """Catches both sides of the comparison above wrong alike."""
    assert finish_answer([1, 2, 5, 3, 4, 6], decode, ["\n"], "</think>") == "so"
    assert finish_answer([1, 2, 5, 3, 4, 6], decode, ["\n"], 3) == "so"
    assert finish_answer([1, 2, 5, 3, 4, 6], decode, ["\n"]) == "I think"
