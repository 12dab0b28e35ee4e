"""Requests built by ddp_eval against those that lm_eval builds alone: every argument to the byte, every number, in order.

Each kind of task is a change of `TASK`. Its requests are built twice: by `lm_eval.simple_evaluate` with lm_eval's own HFLM, and
by ddp_eval's harness, which renders templates from a cache. Nothing is scored.
"""

from __future__ import annotations

import ast
import copy
import json
import random
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import lm_eval
import numpy as np
import pytest
import tiny_models
from chat_templates import CHATML, GEMMA, LLAMA3
from hypothesis import given, settings
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ddp_eval.config import Config
from ddp_eval.packs.results import RESULT
from ddp_eval.tasks import collector, harness, select
from ddp_eval.tasks.lm_eval_patches import keep_examples
from ddp_eval.tasks.request_types import Answers, Asked
from ddp_eval.tasks.templates import TemplateCache
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

END = "\x1e"
ANIMALS = ("cat", "dog", "owl", "fox", "eel", "ant", "bee", "cow")


def row(split: str, number: int) -> dict[str, Any]:
    choices = [ANIMALS[(number + step) % len(ANIMALS)] for step in (0, 1, 3, 5)]
    return {
        "question": f"{split} question {number}: is it a {choices[0]}?\n",
        "choices": choices,
        "answer": number % 4,
        "letter": "ABCD"[number % 4],
        "right": choices[:1] + choices[2:3],
        "subject": "birds & fish" if number % 2 else 'the "others"',
        "prefix": f"It is a {'very ' * (number % 2)}",
        "range": f"{number} to {number + 5}",
        "number": "12" if number % 2 else "7",
    }


DATASET = datasets.DatasetDict(
    {
        split: datasets.Dataset.from_list([row(split, number) for number in range(size)])
        for split, size in (("test", 5), ("dev", 4), ("train", 7))
    }
)


def make_dataset(**unused: Any) -> datasets.DatasetDict:
    return DATASET  # each access returns new rows


EXAMPLES = [{**row("listed", number), "more": number} for number in range(4)]  # for fewshot_config: samples
TASK: dict[str, Any] = {
    "task": "animals",
    "custom_dataset": make_dataset,
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": 3,
    "output_type": "multiple_choice",
    "doc_to_text": "{{ question.strip() }}\n{{ choices | join(', ') }}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "description": "The following are questions about {{ subject }}.\n\n",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GENERATING: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{ choices[answer] }}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


class Collected(Exception):
    """Carries the requests out of an evaluation that would go on to score them."""


def describe(tasks: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Everything about the requests; as text, in which 1 and True differ, and which later changes of a document leave alone."""
    return [
        (one.task_name, one.doc_id, one.idx, one.repeats, one.request_type, repr(one.args), repr(one.doc))
        for task in tasks.values()
        for one in task.instances
    ]


def built_by_lm_eval(model: Any, tokenizer: Any, tasks: list[Any], include_path: Any = None, **options: Any) -> list[Any]:
    manager = TaskManager(include_path=include_path, include_defaults=False)
    load, loaded = manager.load, {}

    def load_and_remember(specs: Any) -> Any:
        loaded.update(load(specs))
        return loaded

    def stop(requests: Any) -> Any:
        raise Collected

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Collected):
        patch.setattr(manager, "load", load_and_remember)
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            patch.setattr(lm, name, stop)
        lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    return describe(loaded["tasks"])


def built_by_ddp_eval(model: Any, tokenizer: Any, tasks: list[Any], include_path: Any = None, **options: Any) -> list[Any]:
    def collect(lm: Any, instances: Sequence[Any]) -> Any:
        assert instances == [instance for task in lm.tasks.values() for instance in task.instances]
        raise Collected(describe(lm.tasks))

    config = Config(tasks=tasks, bootstrap_iters=0, **options)
    paths = [] if include_path is None else [str(include_path)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Collected) as collected:
        patch.setattr(collector.RequestCollector, "_score_instances", collect)
        patch.setattr(select, "is_complete", lambda tasks, index: True)  # else lm_eval's own 14,000 task files are read
        encoder = Encoder(tokenizer, 2048)
        never: Any = None  # what answers the requests: `collect` raises before
        harness.evaluate_tasks(config, encoder, model.config, never, Phases(), paths)
    found: list[Any] = collected.value.args[0]
    return found


@pytest.fixture
def check(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., str]:
    """check(*changes of TASK, tokenizer=None, **options) -> the texts of all requests, END between them, once both agree."""

    def check(*changes: dict[str, Any], tokenizer: Any = None, seed: Any = None, **options: Any) -> str:
        tasks = [TASK | {"task": f"animals_{number}"} | change for number, change in enumerate(changes)]
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        model, tokenizer = tiny_model("llama"), tokenizer or tiny_tokenizer
        # each side has its own documents
        theirs = built_by_lm_eval(
            model, tokenizer, copy.deepcopy(tasks), **options, **(dict(zip(names, seed, strict=True)) if seed else {})
        )
        ours = built_by_ddp_eval(model, tokenizer, copy.deepcopy(tasks), **options, **({"seed": seed} if seed else {}))
        assert ours == theirs
        return END.join("".join(map(str, ast.literal_eval(request[5]))) for request in ours)

    return check


# Where examples come from


def list_examples() -> list[dict[str, Any]]:
    return [{**row("made", number), "more": number} for number in range(4)]


def upper_questions(documents: Any) -> Any:
    return documents.map(lambda document: {**document, "question": document["question"].upper()})


class NumberingSampler(ContextSampler):
    """Numbers the examples in place, again for each document."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> Any:
        examples = self.rnd.sample(list(self.df), n)
        for number, example in enumerate(examples, 1):
            example["question"] = f"{number}. {example['question'].split('. ')[-1]}"
        return examples


EXAMPLE_SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "first of a split": ({}, "dev question 2"),
    "drawn from a split": ({"fewshot_config": {"sampler": "default"}}, "dev question"),
    "drawn from train": ({"fewshot_split": None, "fewshot_config": None, "training_split": "train"}, "train question"),
    "drawn from train by its name": ({"fewshot_split": "train", "fewshot_config": None}, "train question"),
    "drawn from validation": ({"fewshot_split": None, "fewshot_config": None, "validation_split": "dev"}, "dev question"),
    "drawn from the documents": ({"fewshot_split": "test", "fewshot_config": None}, "test question"),
    "first of the documents": ({"fewshot_split": "test"}, "test question"),
    "listed": ({"fewshot_split": None, "fewshot_config": {"sampler": "first_n", "samples": EXAMPLES}}, "listed question 2"),
    "listed and drawn": ({"fewshot_split": None, "fewshot_config": {"samples": EXAMPLES}}, "listed question"),
    "listed by a function": (
        {"fewshot_split": None, "fewshot_config": {"sampler": "first_n", "samples": list_examples}},
        "made question 2",
    ),
    "processed": ({"process_docs": upper_questions}, "DEV QUESTION 2"),
    "processed by a function of their own": (
        {"fewshot_config": {"sampler": "first_n", "process_docs": upper_questions}},
        "DEV QUESTION 2",
    ),
    "drawn by the task's own code": ({"fewshot_config": {"sampler": NumberingSampler}}, "3. "),
    "none": ({"num_fewshot": 0}, "test question"),
    "no number": ({"num_fewshot": None}, "test question"),
}


@pytest.mark.parametrize("kind", EXAMPLE_SOURCES)
def test_sources_of_examples(kind: str, check: Callable[..., str]) -> None:
    """Catches other examples, another order, and outdated text of an example that the task's own code has changed."""
    change, shows = EXAMPLE_SOURCES[kind]
    assert shows in check(change)


def test_document_is_not_among_its_examples(check: Callable[..., str]) -> None:
    """Catches a document that appears among its own examples, with its answer, where both come from the same split."""
    for sampler in ("default", "first_n"):
        change = {
            "fewshot_split": "test",
            "fewshot_config": {"sampler": sampler},
            "num_fewshot": 4,
            "output_type": "loglikelihood",
        }
        text = check({**change, "doc_to_target": "{{ letter }}"})
        prompts = text.split("The following")[1:]
        assert len(prompts) == 5
        for prompt in prompts:
            assert [prompt.count(f"test question {number}") for number in range(5)] == [1] * 5


# How a document becomes text


def ask(document: dict[str, Any]) -> str:
    return f"{document['question']}Answer ({document['subject']}):"


def ask_at_random(document: dict[str, Any]) -> str:
    return f"{document['question']}{random.choice(ANIMALS)}, {random.random():.3f}:"


def ask_and_count(document: dict[str, Any]) -> str:
    document["asked"] = document.get("asked", 0) + 1
    document["choices"].append(f"more {document['asked']}")
    return f"{document['question']}for the {document['asked']}. time:"


def answer_letter(document: dict[str, Any]) -> str:
    return f"letter {document['letter']}"


def list_choices(document: dict[str, Any]) -> list[str]:
    return [choice.upper() for choice in document["choices"]]


def which_text(document: dict[str, Any]) -> int:
    return int(document["answer"]) % 2


def two_texts(document: dict[str, Any]) -> list[str]:
    return [f"{document['question']}{choice} it is" for choice in document["choices"][:2]]


OWN_TEMPLATES = {
    "doc_to_text": "Example about {{ subject }}: {{ question }}=",
    "doc_to_target": "{{ answer }}",
    "doc_to_choice": "{{ choices | map('title') | list }}",
    "target_delimiter": "=>",
    "fewshot_delimiter": "\n---\n",
    "gen_prefix": "so",
}
LOGLIKELIHOOD: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_choice": None,
    "doc_to_target": "{{ letter }} and {{ right[0] }}",
}
TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "choices in a field": ({"doc_to_choice": "choices"}, "Answer: owl"),
    "choices by a template": ({"doc_to_choice": "{{ choices | map('capitalize') | list }}"}, "Answer: Owl"),
    "choices by a function": ({"doc_to_choice": list_choices}, "Answer: OWL"),
    "choices in a mapping": ({"doc_to_choice": {"first": "one", "second": "two", "third": "three", "fourth": "four"}}, "three"),
    "choices that are numbers": ({"doc_to_choice": "{{ [answer, answer + 1, 7, 8] | map('string') | list }}"}, "Answer: 7"),
    "target by a template": ({"doc_to_target": "{{ answer }}"}, "Answer: C"),
    "target by name": ({"doc_to_target": "letter"}, "Answer: C"),
    "target by a function": ({"doc_to_target": answer_letter}, "Answer: letter C"),
    "target that is a number": ({"doc_to_target": 2}, "Answer: C"),
    "target of digits": ({**LOGLIKELIHOOD, "doc_to_target": "{{ number }}"}, "Answer: 12"),
    "text in a field": ({"doc_to_text": "question"}, "is it a owl?\n C"),
    "text by a loop": (
        {"doc_to_text": "{{ question }}{% for c in choices %}{{ 'ABCD'[loop.index0] }}. {{ c }}\n{% endfor %}Answer:"},
        "C. eel\nD. bee\nAnswer: B\n",
    ),
    "text by a function": ({"doc_to_text": ask}, "Answer (birds & fish)"),
    "text by a function that draws": ({"doc_to_text": ask_at_random}, ", 0."),
    "text by a function that changes": ({"doc_to_text": ask_and_count, "doc_to_choice": "choices"}, "for the 4. time: "),
    "text by a function, target by a template": ({**LOGLIKELIHOOD, "doc_to_text": ask_and_count}, "for the 4. time: "),
    "text by lm_eval's own prompts": ({**LOGLIKELIHOOD, "use_prompt": "qa-basic:q-newline-a"}, "Q: dev question 2"),
    "a field named like a function": ({"doc_to_text": "{{ range }}", "doc_to_target": "{{ answer }}"}, "1 to 6 B"),
    "a constant": ({"doc_to_text": "Choose:", "description": "Choose well.\n"}, "Choose well.\nChoose: A"),
    "examples with templates of their own": (
        {"fewshot_config": {"sampler": "first_n", **OWN_TEMPLATES}},
        "---\nExample about birds & fish: dev question 1: is it a dog?\n==>so Owl",
    ),
    "examples with functions of their own": (
        {"fewshot_config": {"sampler": "first_n", "doc_to_text": ask_at_random, "doc_to_choice": list_choices}},
        ", 0.",
    ),
    "examples with code, documents with templates": (
        {"fewshot_config": {"sampler": "default", "doc_to_text": ask_and_count, "doc_to_target": "{{ choices[-1] }}"}},
        "for the 2. time: more 2",
    ),
    "several inputs": (
        {
            "doc_to_text": "{{ answer % 2 }}",
            "doc_to_choice": "{{ [question ~ choices[0], question ~ choices[1]] }}",
            "doc_to_target": "{{ subject }}",
        },
        "is it a cat?\ncat the",
    ),
    "several inputs by functions": (
        {"doc_to_text": which_text, "doc_to_choice": two_texts, "doc_to_target": "subject"},
        "cat it is the",
    ),
    "several inputs in fields": (
        {"doc_to_text": "answer", "doc_to_choice": "choices", "doc_to_target": "{{ 'is here' }}", "num_fewshot": 1},
        "cat is here\n\neel is here",
    ),
    "several right answers": ({**GENERATING, "doc_to_target": "right"}, "Answer: cat\n\n"),
    "several right answers by a template": ({**GENERATING, "doc_to_target": "{{ right | list }}"}, "Answer: cat\n\n"),
    "several right choices": ({"doc_to_target": "{{ [0, answer] }}", "num_fewshot": 0}, "test question"),
    "processed documents": ({"process_docs": upper_questions}, "TEST QUESTION 4"),
    "description of a field": ({"description": "subject"}, "birds & fish"),
    "description that draws": ({"description": "{{ choices | random }}: "}, "ant: dev question 0"),
    "gen_prefix": ({**GENERATING, "gen_prefix": "It is"}, "Answer: It is cat"),
    "gen_prefix that ends in a space": ({**GENERATING, "gen_prefix": "It is "}, "Answer: It is cat"),
    "gen_prefix from a field": ({**GENERATING, "gen_prefix": "prefix"}, "Answer: It is a very "),
    "gen_prefix by a template": ({"gen_prefix": "{{ subject }}:"}, "Answer: birds & fish: B"),
    "gen_prefix for examples alone": ({"fewshot_config": {"sampler": "first_n", "gen_prefix": "{{ letter }}"}}, "Answer: C C"),
    "no space before answers": ({"target_delimiter": ""}, "Answer:C\n\n"),
    "a line before answers": ({"target_delimiter": "\n"}, "Answer:\nC\n\n"),
    "one line between examples": ({"fewshot_delimiter": "\n"}, "Answer: C\ntest question"),
    "nothing between examples": ({"fewshot_delimiter": ""}, "Answer: Ctest question"),
    "braces between examples": ({"fewshot_delimiter": "{{ x }}", "target_delimiter": "{% x %}"}, "Answer:{% x %}C{{ x }}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_documents(kind: str, check: Callable[..., str]) -> None:
    """Catches a byte of difference in any part of a prompt: text, choices, target, description, gen_prefix or delimiters."""
    change, shows = TEXTS[kind]
    assert shows in check(change)


UNSTEADY: dict[str, tuple[dict[str, Any], str]] = {
    "text draws": ({"doc_to_text": "{{ choices | random }}, {{ question }}"}, "eel, "),
    "text draws by map": ({"doc_to_text": "{{ [choices, right] | map('random') | join('/') }}"}, "/"),
    "text of words at random": ({"doc_to_text": "{{ lipsum(1, False, 3, 5) }}"}, "."),
    "text draws from a constant": ({"doc_to_text": "{{ ['Well', 'So'] | random }}:"}, "So:"),
    "target draws": ({**LOGLIKELIHOOD, "doc_to_target": "{{ choices | random }}"}, "Answer: "),
    "choices draw": ({"doc_to_choice": "{{ [choices | random, 'b', 'c', 'd'] }}"}, "Answer: "),
    "gen_prefix draws": ({**GENERATING, "gen_prefix": "{{ choices | random }}:"}, ": "),
    "text changes": ({"doc_to_text": "{{ choices.append('more') }}{{ choices }}"}, "'more', 'more"),
    "text changes what the target reads": (
        {**LOGLIKELIHOOD, "doc_to_text": "{{ right.insert(0, letter ~ right | length) }}{{ right }}"},
        "C and C4",
    ),
    "target changes what the text reads": (
        {**LOGLIKELIHOOD, "doc_to_text": "{{ choices }}", "doc_to_target": "{{ choices.sort() }}{{ choices[0] }}"},
        "['bee",
    ),
    "choices change what the text reads": (
        {"doc_to_text": "{{ question }}{{ right | length }}", "doc_to_choice": "{% set _ = right.append('x') %}{{ choices }}"},
        "?\n5",
    ),
    "one example changes by its description": ({"description": "{{ choices.pop() }}", "doc_to_text": "{{ choices }}"}, "cat"),
    "a name of a function changes": ({"doc_to_text": "{% set range = choices.append %}{{ range('x') }}{{ choices }}"}, "x"),
    "a macro": ({"doc_to_text": "{% macro m(c) %}{{ c.append('x') }}{{ c }}{% endmacro %}{{ m(choices) }}"}, "x"),
    "state of a rendering": (
        {"doc_to_text": "{% set turn = cycler(1, 2) %}{% for c in choices %}{{ turn.next() }}{{ c }}{% endfor %}"},
        "1dog2owl1",
    ),
}


@pytest.mark.parametrize("sampler", ["first_n", "default"])
@pytest.mark.parametrize("kind", UNSTEADY)
def test_templates_that_draw_or_change(kind: str, sampler: str, check: Callable[..., str]) -> None:
    """Catches text of an example that is reused although it was drawn at random, or a template has changed the example since."""
    change, shows = UNSTEADY[kind]
    text = check({**change, "fewshot_config": {"sampler": sampler}})
    assert shows in text or sampler == "default"


def test_templates_that_draw_in_several_tasks(check: Callable[..., str]) -> None:
    """Catches one random draw too many or too few in a task, which changes the prompts of the next."""
    changes = [UNSTEADY[kind][0] for kind in ("text draws", "target draws", "text of words at random", "text draws by map")]
    assert check(*changes, {"doc_to_text": ask_at_random}) != check(*changes, {"doc_to_text": ask_at_random}, seed=(5, 1, 1, 1))


def test_examples_that_tasks_share(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches outdated text of examples that two tasks share, where the code or a template of one changes them."""

    def share(*changes: dict[str, Any]) -> list[dict[str, Any]]:
        shared = {"fewshot_split": None, "fewshot_config": {"sampler": "first_n", "samples": copy.deepcopy(EXAMPLES)}}
        return [TASK | shared | {"task": f"animals_{number}"} | change for number, change in enumerate(changes)]

    reading = {**LOGLIKELIHOOD, "doc_to_text": "{{ question }}", "doc_to_target": "{{ choices | join(' ') }}"}
    for changing in (
        {**reading, "doc_to_text": ask_and_count},
        {**reading, "doc_to_text": "{{ choices.append('x') }}"},
    ):
        for changes in ([reading, changing], [changing, reading], [reading, changing, reading]):
            theirs = built_by_lm_eval(tiny_model("llama"), tiny_tokenizer, share(*changes))
            assert built_by_ddp_eval(tiny_model("llama"), tiny_tokenizer, share(*changes)) == theirs


# Kinds of requests, and the run's settings


KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {},
    "mutual information": {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]},
    "loglikelihood": LOGLIKELIHOOD,
    "loglikelihood_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None, "doc_to_target": "{{ question }}",
        "num_fewshot": 0, "metric_list": [{"metric": "word_perplexity"}],
    },
    "generate_until": GENERATING,
    "generate_until, several times": {**GENERATING, "repeats": 3},
    "generate_until, no settings": {**GENERATING, "generation_kwargs": None},
    "several inputs, mutual information": {
        "doc_to_text": "{{ answer % 2 }}", "doc_to_choice": "{{ [question, choices[0] ~ question] }}",
        "doc_to_target": "subject",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    },
}  # fmt: skip
REQUESTS = {"mutual information": 40, "several inputs, mutual information": 20, "multiple_choice": 20}  # of 5 documents


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_requests(kind: str, check: Callable[..., str]) -> None:
    """Catches requests that are missing, doubled, in another order or of another type, and generation settings that differ."""
    found = check(KINDS[kind])
    assert found.count("test question") >= 5
    if kind in REQUESTS:
        assert found.count(END) + 1 == REQUESTS[kind]


def test_all_kinds_at_once(check: Callable[..., str]) -> None:
    """Catches templates or examples of one task used for another, and random draws made in another order."""
    changes = [*KINDS.values(), *(change for change, _ in [*EXAMPLE_SOURCES.values(), *TEXTS.values(), *UNSTEADY.values()])]
    random.Random(0).shuffle(changes)
    check(*changes)


RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "fewer examples": {"num_fewshot": 1},
    "more examples": {"num_fewshot": 4},
    "no examples": {"num_fewshot": 0},
    "limit": {"limit": 2},
    "a share": {"limit": 0.5},
    "samples": {"samples": {"animals_0": [1, 4], "animals_1": [0]}},
    "system": {"system_instruction": "Be brief."},
    "other seeds": {"seed": (7, 8, 9, 10)},
    "generation settings": {"gen_kwargs": {"max_gen_toks": 9, "temperature": 0.5}},
    "no metrics": {"predict_only": True},
}


@pytest.mark.parametrize("kind", RUN_OPTIONS)
def test_settings_of_the_run(kind: str, check: Callable[..., str]) -> None:
    """Catches a flag that changes the prompts in another way than lm_eval's flag of the same name."""
    drawing = {"fewshot_split": "train", "fewshot_config": None, "doc_to_text": "{{ choices | random }}: {{ question }}"}
    changes = [
        drawing,
        {**drawing, **GENERATING, "doc_to_text": ask_at_random},
        {"fewshot_split": "test"},
        UNSTEADY["text changes"][0],
    ]
    assert (check(*changes, **RUN_OPTIONS[kind]) == check(*changes)) == (kind == "no metrics")


@pytest.mark.parametrize("multiturn", [True, False], ids=["turns", "one-turn"])
@pytest.mark.parametrize("system", [None, "You are terse."], ids=["plain", "system"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA], ids=["chatml", "llama3", "gemma"])
def test_chat(template: str, system: Any, multiturn: bool, check: Callable[..., str]) -> None:
    """Catches a turn, a delimiter or a gen_prefix that differs under a chat template, for any kind of task."""
    tokenizer = tiny_models.make_tokenizer(chat_template=template)
    names = ("several inputs", "gen_prefix from a field", "examples with templates of their own", "no space before answers")
    changes = [*KINDS.values(), *(TEXTS[name][0] for name in names), UNSTEADY["text changes"][0], UNSTEADY["text draws"][0]]
    options: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": system}
    found = check(*changes, tokenizer=tokenizer, limit=2, **options)
    assert ("You are terse." in found) == (system is not None and template != GEMMA)  # whose template refuses system turns


# Tasks that are files


def test_tasks_in_files(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a difference in what only task files have: rows in JSON files, functions in utils.py, groups, tags, includes."""
    for split, size in (("test", 4), ("dev", 3)):
        rows = [json.dumps(row(split, number)) for number in range(size)]
        (tmp_path / f"{split}.json").write_text("\n".join(rows), encoding="utf-8")
    files = {split: str(tmp_path / f"{split}.json") for split in ("test", "dev")}
    (tmp_path / "_base").write_text(
        "dataset_path: json\n"
        f"dataset_kwargs: {json.dumps({'data_files': files, 'cache_dir': str(tmp_path / 'cache')})}\n"
        "test_split: test\nfewshot_split: dev\noutput_type: multiple_choice\nnum_fewshot: 2\n"
        "fewshot_config:\n  sampler: first_n\n"
        'doc_to_text: "{{question}}\\nAnswer:"\ndoc_to_choice: [A, B, C, D]\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "utils.py").write_text(
        "from lm_eval.utils import apply_template\n"
        "def ask(document):\n    document['answer'] = (document['answer'] + 1) % 4\n"
        "    return apply_template('{{question}}{{answer}}:', document)\n"
    )
    tasks = {
        "plain": "tag: my_tag\ndescription: 'About {{subject}}.'\n",
        "drawn": "fewshot_config:\n  sampler: default\ndoc_to_text: '{{choices | random}} {{question}}'\n",
        "by_code": "tag: my_tag\ndoc_to_text: !function utils.ask\n",
    }
    for name, more in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ninclude: _base\n{more}")
    (tmp_path / "group.yaml").write_text("group: my_group\ntask: [plain, drawn]\n")
    for names in (["my_group", "by_code"], ["my_tag", "drawn"], ["drawn"]):
        theirs = built_by_lm_eval(tiny_model("llama"), tiny_tokenizer, names, tmp_path)
        ours = built_by_ddp_eval(tiny_model("llama"), tiny_tokenizer, names, tmp_path)
        assert ours == theirs and "dev question" in ours[0][5]


# Which examples are kept


class OwnTask(ConfigurableTask):
    """A task that is a class: its code sees the documents."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        doc["seen"] = doc.get("seen", 0) + 1
        return f"{doc['question']}{doc['seen']}"


def test_task_that_is_a_class(check: Callable[..., str]) -> None:
    """Catches outdated text of an example that the task's own class changes: the target is a template over the changed field."""
    assert "\n5 5 times" in check({"class": OwnTask, **LOGLIKELIHOOD, "doc_to_target": "{{ seen }} times"})


@pytest.mark.parametrize(
    ("change", "is_kept"),
    [
        *((EXAMPLE_SOURCES[name][0], True) for name in ("first of a split", "drawn from a split", "listed", "processed")),
        *((TEXTS[name][0], True) for name in ("choices by a template", "several inputs", "choices in a mapping")),
        (TEXTS["examples with templates of their own"][0], True),
        (EXAMPLE_SOURCES["drawn by the task's own code"][0], False),
        *((TEXTS[name][0], False) for name in ("text by a function", "choices by a function", "target by a function")),
        (TEXTS["examples with functions of their own"][0], False),
        (TEXTS["text by lm_eval's own prompts"][0], False),
    ],
)  # fmt: skip
def test_which_examples_are_kept(change: dict[str, Any], is_kept: bool) -> None:
    """Catches examples rendered again for every document without need, and text kept of examples that code may change."""
    task = ConfigurableTask(config=copy.deepcopy(TASK | change))
    with unittest.mock.patch.object(TemplateCache, "keep") as keep:
        keep_examples(TemplateCache(lm_eval.utils.env), [task])
    kept = [id(document) for call in keep.call_args_list for document in call.args[0]]
    assert kept == ([id(document) for document in task.sampler.df] if is_kept else [])


LISTED = [dict(example) for example in EXAMPLES]


def score_with_an_example(document: dict[str, Any], results: Any) -> dict[str, float]:
    LISTED[0]["more"] += 1
    return {"acc": float(lm_eval.utils.apply_template("more: {{ more }}", LISTED[0]).split()[1])}


def test_metrics_see_documents_as_they_are(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches text of examples that is still kept when metrics are computed, by code that may change the examples."""
    examples = {"sampler": "first_n", "samples": lambda: LISTED, "doc_to_text": "more: {{ more }}"}
    change = {"fewshot_split": None, "fewshot_config": examples, "process_results": score_with_an_example}

    def answer(asked: Asked) -> Answers:
        return Answers(np.zeros(len(asked.requests), dtype=RESULT), [], [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "is_complete", lambda tasks, index: True)
        config = Config(tasks=[TASK | change], bootstrap_iters=0)
        encoder, model_config = Encoder(tiny_tokenizer, 2048), tiny_model("llama").config
        outcome = harness.evaluate_tasks(config, encoder, model_config, answer, Phases())
    assert [sample["acc"] for sample in outcome.results["samples"]["animals"]] == [1, 2, 3, 4, 5]


# Any task


PARTS = [
    "question", "choices", "{{ question }}", "{{ choices }}", "{{ choices | join(', ') }}", "{{ right[0] }}", "{{ range }}",
    "{{ choices[answer] }}", "{{ subject | upper }}", "{{ right | length }}", "Answer:", "{{ 'const' }}",
    "{% for c in choices %}{{ loop.index }}{{ c }} {% endfor %}",
    "{{ choices | random }}", "{{ ['a', 'b'] | random }}", "{{ right.append(letter) }}", "{{ choices.append(right[0]) }}",
    "{% set _ = choices.reverse() %}{{ choices[0] }}", "{% set range = right.append %}{{ range('x') }}", "{{ choices.pop(0) }}",
]  # fmt: skip
PART = st.sampled_from(PARTS)
CHOICES = ["{{ choices }}", "{{ [choices[0], right[0], 'z'] }}", "{% set _ = right.append('r') %}{{ [right | join] * 3 }}"]
ANY_TASK = st.fixed_dictionaries(
    {
        "doc_to_text": PART.filter(lambda part: part != "choices"),
        "doc_to_target": st.one_of(PART, st.sampled_from(["{{ answer % 2 }}", "letter"])).filter(lambda part: part != "choices"),
        "doc_to_choice": st.one_of(st.none(), st.sampled_from(CHOICES)),
        "description": st.one_of(st.just(""), PART.filter(lambda part: part != "choices")),
        "gen_prefix": st.one_of(st.none(), st.sampled_from(["prefix", "{{ right | last }}:", "{{ choices | random }}"])),
        "fewshot_split": st.sampled_from(["dev", "train", "test"]),
        "fewshot_config": st.fixed_dictionaries(
            {"sampler": st.sampled_from(["first_n", "default"])}, optional={"doc_to_text": PART, "doc_to_target": PART}
        ),
        "num_fewshot": st.integers(0, 3),
    }
)


def build(config: dict[str, Any], templates: TemplateCache | None) -> Any:
    """The requests of one task, or the error that building them ends in. templates: the cache to take, None for none."""
    render = lm_eval.utils.apply_template if templates is None else templates.render
    random.seed(0)
    with unittest.mock.patch("lm_eval.utils.apply_template", render):
        try:
            task = ConfigurableTask(config=copy.deepcopy(config))
            task.set_fewshot_seed(1234)
            if templates is not None:
                keep_examples(templates, [task])
            task.build_all_requests()
        except Exception as error:
            return type(error), str(error)
    return [*describe({"": task}), random.getstate()]


@settings(max_examples=100)
@given(ANY_TASK)
def test_any_task(change: dict[str, Any]) -> None:
    """Catches combinations that the kinds above leave out: templates that read what another one changes, or draw at random."""
    kind = {} if change["doc_to_choice"] else LOGLIKELIHOOD
    config = TASK | kind | change
    assert build(config, TemplateCache(lm_eval.utils.env)) == build(config, None)
