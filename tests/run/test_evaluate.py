"""The Python API on one process: the numbers of lm_eval's own HF backend, and a caller left as it was."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_models
import tolerance
import torch
from chat_templates import CHAT_TEMPLATE
from lm_eval_answers import answers_of, assert_same_outcome, texts_of
from task_files import write_pairs_task
from tiny_models import evaluate_with_lm_eval

import ddp_eval
from ddp_eval.api import evaluate
from ddp_eval.errors import UserError
from ddp_eval.output.tables import read_scores

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run(model, tokenizer, tasks, **options) -> our results, with samples."""

    def run(model: Any, tokenizer: Any, tasks: list[Any], **options: Any) -> dict[str, Any]:
        options = {"output_path": str(tmp_path / "out"), "overwrite": True, "log_samples": True, "bootstrap_iters": 0, **options}
        results = evaluate(model, tokenizer, tasks, **options)
        assert results is not None
        return results

    return run


TASKS = ["demo_boolean_expressions", "demo_hellaswag", "demo_lambada", "demo_mmlu"]


@pytest.fixture(scope="module")
def by_lm_eval(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, Any]:
    return evaluate_with_lm_eval(tiny_model("llama"), tiny_tokenizer, TASKS, limit=3)


@pytest.mark.parametrize("packing", [True, False], ids=["packs", "rows"])
def test_demo_tasks(
    packing: bool, run: Callable[..., Any], by_lm_eval: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Catches any change on the way from documents to metrics: prompts, few-shot draws, order, sums, flags, groups."""
    results = run(tiny_model("llama"), tiny_tokenizer, TASKS, limit=3, packing=packing)
    assert_same_outcome(results, by_lm_eval, tolerance.of_kind("llama"))
    assert results["ddp_eval"]["batching"] == ("packs" if packing else "rows")


def test_rolling_task(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches windows added up to the wrong document, or mistaken for another task's requests: several for each document.

    lm_eval adds up the log-probabilities of a window in float32, which rounds at the size of the sum. Given float64 for its
    softmax it adds in float64, as we do.
    """
    tasks, max_length = ["demo_lambada", "demo_wikitext"], {"max_length": 500}
    lm_args = {"softmax_dtype": "float64", **max_length}
    theirs = evaluate_with_lm_eval(tiny_model("llama"), tiny_tokenizer, tasks, lm_args=lm_args, limit=3)
    ours = run(tiny_model("llama"), tiny_tokenizer, tasks, model_args=max_length, limit=3)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"), float32_sums=False)
    assert ours["ddp_eval"]["requests"] > 3 + 2 * 3


@pytest.mark.parametrize(
    ("kind", "task", "layout"),
    [
        ("gpt2", "demo_hellaswag", "packs"),
        ("mistral", "demo_mmlu_philosophy", "packs"),
        ("gemma2", "demo_lambada", "packs"),
        ("gemma3", "demo_boolean_expressions", "packs"),
        ("qwen3_moe", "demo_mmlu_global_facts", "packs"),
        ("llama4", "demo_hellaswag", "packs"),
        ("mpt", "demo_hellaswag", "packs"),
        ("mamba", "demo_boolean_expressions", "rows"),
    ],
)
def test_other_models(
    kind: str, task: str, layout: str, run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Catches a model that packs serve wrongly, or not at all though they could; rows must be right where they cannot."""
    theirs = evaluate_with_lm_eval(tiny_model(kind), tiny_tokenizer, [task], limit=2)
    ours = run(tiny_model(kind), tiny_tokenizer, [task], limit=2)
    assert_same_outcome(ours, theirs, tolerance.of_kind(kind))
    assert ours["ddp_eval"]["batching"] == layout
    assert (ours["ddp_eval"]["why_rows"] is None) == (layout == "packs")


def test_section_of_its_own(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches counts that do not add up: 4 questions of 4 letters each share a prompt and differ by one scored token."""
    results = run(tiny_model("llama"), tiny_tokenizer, ["demo_mmlu_philosophy"], limit=4)
    section = results["ddp_eval"]
    assert section["requests"] == section["distinct_requests"] == 16
    assert 1 <= section["packs"] <= 4
    # What is shared is computed once: a letter's prompt for all four, the five examples before it for all in a pack.
    assert section["computed_tokens"] < section["request_tokens"] / 4 + 16
    for name in ("plan_sha256", "prompts_sha256"):
        assert len(section[name]) == 64
    assert {"tokenize", "plan", "forward", "gather"} <= set(section["phases_s"])
    assert json.dumps(section)


def test_same_run_same_bits(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a plan or a prompt that depends on what ran before in this process."""
    first, second = (run(tiny_model("llama"), tiny_tokenizer, ["demo_hellaswag"], limit=2) for _ in range(2))
    assert answers_of(first["samples"]["demo_hellaswag"]) == answers_of(second["samples"]["demo_hellaswag"])
    for name in ("plan_sha256", "prompts_sha256"):
        assert first["ddp_eval"][name] == second["ddp_eval"][name]


def test_one_request(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a plan, a check or a gather that needs two: one document with one continuation."""
    options: dict[str, Any] = {"samples": {"demo_lambada": [7]}}
    ours = run(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], **options)
    theirs = evaluate_with_lm_eval(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], **options)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"))
    assert ours["ddp_eval"]["requests"] == 1
    scores = read_scores(tmp_path / "out" / "scores.parquet")
    assert (list(scores.task), list(scores.idx)) == (["demo_lambada"], [0])


def test_chosen_samples(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches documents counted from elsewhere, and few-shot examples drawn for a document's place instead of itself."""
    tasks = ["demo_hellaswag", "demo_lambada"]
    ours = run(tiny_model("llama"), tiny_tokenizer, tasks, samples={"demo_hellaswag": [5, 2], "demo_lambada": [11]})
    # lm_eval numbers the documents of an unsorted list wrongly: it evaluates them in their own order.
    in_order = {"samples": {"demo_hellaswag": [2, 5], "demo_lambada": [11]}}
    theirs = evaluate_with_lm_eval(tiny_model("llama"), tiny_tokenizer, tasks, **in_order)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"))
    scores = read_scores(tmp_path / "out" / "scores.parquet")
    assert list(dict.fromkeys(zip(scores.task, scores.doc_id, strict=True))) == [
        ("demo_hellaswag", 2), ("demo_hellaswag", 5), ("demo_lambada", 11),
    ]  # fmt: skip


def test_samples_of_a_task_that_is_not_evaluated(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Catches a misspelt task in --samples, for which every document would be evaluated in silence."""
    for name, hint in (("demo_lambda", "did you mean demo_lambada?"), ("demo_hellaswag", "add it there")):
        with pytest.raises(UserError) as refusal:
            run(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], samples={name: [0]})
        assert str(refusal.value) == f"--samples names the task {name}, which is not among --tasks (demo_lambada): {hint}"


def fail_to_score(doc: Any, results: Any) -> dict[str, float]:
    raise KeyError("answer_key")


def test_scores_outlive_a_metric_that_fails(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches hours of forwards thrown away by a task's own code, and its error passed off as the user's."""
    rows = [{"text": "the cat sat on the mat"}, {"text": "a dog ran"}]
    config = {
        "task": "my_task", "test_split": "test", "output_type": "loglikelihood",
        "doc_to_text": "{{text}}", "doc_to_target": " yes",
        "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)),
        "process_results": fail_to_score, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    with pytest.raises(KeyError, match="answer_key"):
        run(tiny_model("llama"), tiny_tokenizer, [config])
    assert len(read_scores(tmp_path / "out" / "scores.parquet")) == 2


def test_tasks_given_as_text_and_as_configs(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a task config that cannot be told from the others, and a string read as a list of letters."""
    model = tiny_model("llama")
    by_name = run(model, tiny_tokenizer, "demo_lambada,demo_boolean_expressions", limit=2)
    config = {**by_name["configs"]["demo_lambada"], "task": "my_lambada"}
    config = {
        key: value
        for key, value in config.items()
        if key in ("task", "output_type", "doc_to_text", "doc_to_target", "metric_list")
    }
    rows = [{"text": "the cat sat on the mat"}, {"text": "a dog ran"}]
    config |= {"custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)), "test_split": "test"}
    by_config = run(model, tiny_tokenizer, [config])
    assert by_config["n-samples"]["my_lambada"]["effective"] == 2


def test_a_row_of_scores_for_each_request(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches rows in another order than lm_eval's, rounded sums, and a flag where a rolling request has none."""
    tasks = ["demo_lambada", "demo_hellaswag", "demo_wikitext"]
    ours = run(tiny_model("llama"), tiny_tokenizer, tasks, limit=2)
    scores = read_scores(tmp_path / "out" / "scores.parquet")
    rows = list(zip(scores.task, scores.doc_id, scores.idx, strict=True))
    assert rows == [
        *(("demo_lambada", doc, 0) for doc in range(2)),
        *(("demo_hellaswag", doc, idx) for doc in range(2) for idx in range(4)),
        *(("demo_wikitext", doc, 0) for doc in range(2)),
    ]
    for (task, doc, idx), value, greedy in zip(rows, scores.loglikelihood, scores.is_greedy, strict=True):
        expected = answers_of(ours["samples"][task])[doc, idx]
        assert ((value, greedy) if task != "demo_wikitext" else value) == expected
        assert (greedy is None) == (task == "demo_wikitext")


def test_predict_only(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches metrics computed all the same, and answers that are not kept."""
    options = {"limit": 2, "predict_only": True}
    ours = run(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], log_samples=False, **options)
    theirs = evaluate_with_lm_eval(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], **options)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"))
    lines = (tmp_path / "out" / "samples_demo_lambada.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Answer with one letter."},
        {"system_instruction": "Be brief."},
    ],
    ids=["chat", "multiturn", "system"],
)
def test_chat_prompts(options: dict[str, Any], run: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    """Catches a prompt that differs from lm_eval's by a byte, a turn, or a BOS twice."""
    tokenizer = tiny_models.make_tokenizer(chat_template=CHAT_TEMPLATE)
    tasks = ["demo_mmlu_global_facts", "demo_lambada"]
    theirs = evaluate_with_lm_eval(tiny_model("llama"), tokenizer, tasks, limit=1, **options)
    ours = run(tiny_model("llama"), tokenizer, tasks, limit=1, **options)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"))
    prompt = ours["samples"]["demo_mmlu_global_facts"][0]["arguments"][0][0]
    assert ("<|assistant|>" in prompt) == ("apply_chat_template" in options)
    assert ours["chat_template"] == (CHAT_TEMPLATE if "apply_chat_template" in options else None)
    assert ours["system_instruction"] == options.get("system_instruction")


def test_answer_that_is_begun_for_the_model(run: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a turn closed, or a second one opened, where a task's `gen_prefix` is to be continued."""
    from lm_eval.tasks import TaskManager

    tokenizer = tiny_models.make_tokenizer(chat_template=CHAT_TEMPLATE)
    rows = [{"context": "What is it?", "continuation": "a cat"}]
    path = write_pairs_task(tmp_path / "tasks", rows, more="gen_prefix: 'It is'\n")
    options: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    manager = TaskManager(include_path=path, include_defaults=False)
    theirs = evaluate_with_lm_eval(tiny_model("llama"), tokenizer, ["pairs"], task_manager=manager, **options)
    ours = run(tiny_model("llama"), tokenizer, ["pairs"], include_path=path, **options)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"))
    assert ours["samples"]["pairs"][0]["arguments"][0][0].endswith("<|assistant|>It is")


def test_empty_continuation(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a crash, as in lm_eval, or another request's answer, where there is nothing to predict."""
    rows = [{"context": "first", "continuation": " one"}, {"context": "nothing", "continuation": ""}]
    path = write_pairs_task(tmp_path / "tasks", [*rows, {"context": "last", "continuation": " one"}])
    with caplog.at_level(logging.WARNING, logger="ddp_eval"):
        ours = run(tiny_model("llama"), tiny_tokenizer, ["pairs"], include_path=path)
    answers = answers_of(ours["samples"]["pairs"])
    assert answers[1, 0] == (-math.inf, False)
    for doc, text in ((0, "first one"), (2, "last one")):
        num_targets = len(tiny_tokenizer(" one").input_ids)
        expected = tiny_models.score_plainly(tiny_model("llama"), tiny_tokenizer(text).input_ids, num_targets)
        assert answers[doc, 0] == (tolerance.of_kind("llama").close(expected[0], num_targets), expected[1])
    assert "requests whose continuation has no token: their log-probability is -inf" in caplog.text
    assert ours["ddp_eval"]["irregular"] == {"nothing_to_score": {"pairs": {"requests": 1, "first": [[1, 0]]}}}
    assert read_scores(tmp_path / "out" / "scores.parquet").num_tokens[1] == 0


def test_only_empty_continuations(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches a plan of no packs that breaks further on."""
    path = write_pairs_task(tmp_path / "tasks", [{"context": "nothing", "continuation": ""}])
    ours = run(tiny_model("llama"), tiny_tokenizer, ["pairs"], include_path=path)
    assert answers_of(ours["samples"]["pairs"]) == {(0, 0): (-math.inf, False)}
    assert ours["ddp_eval"]["packs"] == 0


def test_continuation_longer_than_the_window(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a crash, as in lm_eval, more tokens than the model can see, and tokens of a continuation that are not counted."""
    long = " many words in a row" * 10
    rows = [{"context": "short", "continuation": long}, {"context": long, "continuation": " end"}]
    path = write_pairs_task(tmp_path / "tasks", rows)
    with caplog.at_level(logging.WARNING, logger="ddp_eval"):
        ours = run(tiny_model("llama"), tiny_tokenizer, ["pairs"], include_path=path, model_args={"max_length": 16})
    answers = answers_of(ours["samples"]["pairs"])
    whole, end = tiny_tokenizer("short" + long).input_ids, len(tiny_tokenizer(" end").input_ids)
    first = len(tiny_tokenizer("short").input_ids)
    windows = [(whole[start - 1 : start + 16], 16) for start in range(first, len(whole) - 15, 16)]
    if left := (len(whole) - first) % 16:
        windows.append((whole[-17:], left))
    parts = [tiny_models.score_plainly(tiny_model("llama"), *window) for window in windows]
    expected = {0: (sum(part[0] for part in parts), all(part[1] for part in parts))}
    expected[1] = tiny_models.score_plainly(tiny_model("llama"), tiny_tokenizer(long + " end").input_ids[-17:], end)
    for doc, (value, greedy) in expected.items():
        assert answers[doc, 0] == (tolerance.of_kind("llama").close(value, len(whole) if doc == 0 else end), greedy)
    irregular = ours["ddp_eval"]["irregular"]
    assert irregular["continuation_in_windows"] == {"pairs": {"requests": 1, "first": [[0, 0]]}}
    assert irregular["context_cut"] == {"pairs": {"requests": 1, "first": [[1, 0]]}}
    assert all(text in caplog.text for text in ("longer than the model's window", "lost its left end"))
    assert read_scores(tmp_path / "out" / "scores.parquet").num_tokens[0] == len(whole) - first


def test_greedy_continuations_are_told(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches flags that are always False, which random models would not show: a continuation that the model itself writes."""
    model, context = tiny_model("llama"), "The end"
    tokens = tiny_tokenizer(context).input_ids
    likeliest = torch.topk(model(torch.tensor([tokens])).logits[0, -1], 40).indices.tolist()
    texts = [tiny_tokenizer.decode([token]) for token in likeliest]
    usable = [tiny_tokenizer(context + text).input_ids == [*tokens, token] for text, token in zip(texts, likeliest, strict=True)]
    assert usable[0] and sum(usable) > 5
    candidates = [{"context": context, "continuation": text} for text, fits in zip(texts, usable, strict=True) if fits]
    ours = run(model, tiny_tokenizer, ["pairs"], include_path=write_pairs_task(tmp_path / "tasks", candidates))
    answers = answers_of(ours["samples"]["pairs"])
    values = [answers[doc, 0][0] for doc in range(len(candidates))]
    assert values == sorted(values, reverse=True)
    assert [answers[doc, 0][1] for doc in range(len(candidates))] == [True] + [False] * (len(candidates) - 1)


def test_package_exports_the_function() -> None:
    """Catches a module that takes the function's name once it is imported: the second call of a training loop would fail."""
    for _ in range(2):
        assert ddp_eval.evaluate is evaluate


def random_states() -> list[Any]:
    return [random.getstate(), *np.random.get_state(), torch.get_rng_state()]


def assert_same_states(before: list[Any], after: list[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        assert one == other if isinstance(one, (tuple, str)) else np.array_equal(one, other)


@pytest.mark.parametrize("task", ["demo_hellaswag", "demo_no_such_task"])
def test_caller_is_left_as_it_was(task: str) -> None:
    """Catches a training loop that goes on in evaluation mode, with lm_eval's seeds, other attention, padding or no gradients."""
    tokenizer = tiny_models.make_tokenizer()
    assert tokenizer.pad_token is None  # lm_eval would choose one
    model = tiny_models.make_model("llama")
    model.train()
    model.model.layers[1].mlp.eval()  # a frozen part
    flags = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention = model.config._attn_implementation
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    torch.rand(3), np.random.normal(), random.gauss(0, 1)  # leaves half of a pair in two of them
    before = random_states()

    if task == "demo_no_such_task":
        with pytest.raises(UserError, match="there is no task demo_no_such_task"):
            evaluate(model, tokenizer, [task], limit=1)
    else:
        assert evaluate(model, tokenizer, [task], limit=1, bootstrap_iters=0)

    assert_same_states(before, random_states())
    assert [module.training for module in model.modules()] == flags
    assert model.config._attn_implementation == attention
    assert tokenizer.pad_token is None
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.is_grad_enabled() and all(weight.requires_grad for weight in model.parameters())
    tokens = torch.tensor([[3, 4, 5]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_dropout_is_off(tiny_model: Callable[..., Any], run: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches scores of a model that still drops out: it comes in training mode."""
    model = tiny_models.make_model("gpt2")
    model.train()
    noisy = run(model, tiny_tokenizer, ["demo_lambada"], limit=2)
    quiet = run(tiny_model("gpt2"), tiny_tokenizer, ["demo_lambada"], limit=2)
    assert answers_of(noisy["samples"]["demo_lambada"]) == answers_of(quiet["samples"]["demo_lambada"])
    assert model.training


def test_wrapped_models(run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a wrapper whose forward is called, or whose config is missed."""
    model = tiny_models.make_model("llama")
    plain = run(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], limit=2)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
        ours = run(wrapped, tiny_tokenizer, ["demo_lambada"], limit=2)
        assert answers_of(ours["samples"]["demo_lambada"]) == answers_of(plain["samples"]["demo_lambada"])


@pytest.mark.parametrize("max_pack_tokens", [1, 100])
def test_pack_size_changes_nothing(
    max_pack_tokens: int, run: Callable[..., Any], by_lm_eval: Any, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Catches answers that depend on where packs are cut."""
    ours = run(tiny_model("llama"), tiny_tokenizer, ["demo_boolean_expressions"], limit=3, max_pack_tokens=max_pack_tokens)
    samples, rounding = by_lm_eval["samples"]["demo_boolean_expressions"], tolerance.of_kind("llama")
    theirs, texts = answers_of(samples), texts_of(samples)
    for key, (value, flag) in answers_of(ours["samples"]["demo_boolean_expressions"]).items():
        assert value == rounding.close_for(theirs[key][0], texts[key]) and flag == theirs[key][1]


def test_documents_that_do_not_exist(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches lm_eval's assertion that comes through as a traceback."""
    with pytest.raises(
        UserError, match="--samples asks for document 10000 of the task demo_lambada, whose documents are 0 to 99"
    ):
        evaluate(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], samples={"demo_lambada": [10_000]})


def test_close_names_are_offered(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a bare refusal of a typing error."""
    with pytest.raises(UserError, match=r"there is no task demo_helaswag: did you mean demo_hellaswag"):
        evaluate(tiny_model("llama"), tiny_tokenizer, ["demo_helaswag"])


def test_tokenizer_without_bos_or_eos(tiny_model: Callable[..., Any]) -> None:
    """Catches a traceback where an empty context would have no token."""
    tokenizer = tiny_models.make_tokenizer(bos_token=None, eos_token=None)
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        evaluate(tiny_model("llama"), tokenizer, ["demo_lambada"], limit=1)


def test_unknown_options_are_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a TypeError out of a dataclass, options offered that do nothing here, and those taken in silence."""
    refusals = {
        "num_fewshots": r"evaluate takes no option num_fewshots: did you mean num_fewshot\?$",
        "colour": r"evaluate takes no option colour: there are model_args, num_fewshot, (?!.*(tasks|timeout|wandb))",
        "timeouts": r"evaluate takes no option timeouts: (?!did you mean timeout)",
        "timeout": r"evaluate takes no option timeout, which is for the command",
        "wandb_args": r"evaluate takes no option wandb_args, which is for the command",
    }
    for name, sentence in refusals.items():
        with pytest.raises(UserError, match=sentence):
            evaluate(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], **{name: 1})


def test_samples_without_a_directory(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a caller who must write files to see the samples, which are in the result."""
    results = evaluate(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], limit=2, log_samples=True, bootstrap_iters=0)
    assert results and [sample["doc_id"] for sample in results["samples"]["demo_lambada"]] == [0, 1]


def test_a_caller_hears_only_what_matters(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """Catches bars and lm_eval's chatter in a training log, and settings that are dropped without a word."""
    options: dict[str, Any] = {"num_fewshot": 2, "gen_kwargs": {"top_p": 0.9}, "limit": 1}
    run(tiny_model("llama"), tiny_tokenizer, ["demo_lambada", "demo_hellaswag", "demo_boolean_expressions"], **options)
    assert caplog.messages == [
        "--num_fewshot is ignored for tasks that are fixed at 0 examples: demo_lambada, demo_boolean_expressions",
        "--gen_kwargs is ignored: no task generates text",
    ]
    assert "it/s" not in capfd.readouterr().err
    caplog.clear()
    run(tiny_model("llama"), tiny_tokenizer, ["demo_lambada"], num_fewshot=0, limit=1)
    assert caplog.messages == []


def test_a_pattern_that_matches_a_group_and_its_members(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Catches a pattern refused because the group's members match it too."""
    results = run(tiny_model("llama"), tiny_tokenizer, ["demo_mmlu*"], limit=1)
    assert sorted(results["samples"]) == ["demo_mmlu_abstract_algebra", "demo_mmlu_global_facts", "demo_mmlu_philosophy"]
    assert list(results["groups"]) == ["demo_mmlu"]


def test_a_chat_template_by_name(run: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    """Catches the default template applied and the named one recorded, as in lm_eval."""
    tokenizer = tiny_models.make_tokenizer(chat_template={"default": CHAT_TEMPLATE, "short": "{{ messages[0]['content'] }} So:"})
    results = run(tiny_model("llama"), tokenizer, ["demo_lambada"], limit=1, apply_chat_template="short")
    prompt = results["samples"]["demo_lambada"][0]["arguments"][0][0]
    assert prompt.endswith(" So:") and "<|" not in prompt
    assert results["chat_template"] == "{{ messages[0]['content'] }} So:"


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}" + CHAT_TEMPLATE


def test_a_chat_template_that_refuses_system_turns(
    run: Callable[..., Any], tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning for every prompt, and prompts that differ from those without the system turn."""
    tokenizer = tiny_models.make_tokenizer(chat_template=REFUSING)
    options: dict[str, Any] = {"limit": 3, "apply_chat_template": True}
    plain = run(tiny_model("llama"), tokenizer, ["demo_lambada"], **options)
    ours = run(tiny_model("llama"), tokenizer, ["demo_lambada"], system_instruction="Be brief.", **options)
    assert caplog.messages == [
        "the chat template refuses prompts with a system turn (no system turn, please): they go without it"
    ]
    assert ours["ddp_eval"]["prompts_sha256"] == plain["ddp_eval"]["prompts_sha256"]


def test_a_chat_template_that_refuses_every_prompt(run: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    """Catches a Jinja error passed off as a fault of the task's documents."""
    tokenizer = tiny_models.make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"^the tokenizer's chat template refuses a prompt: roles must alternate$"):
        run(tiny_model("llama"), tokenizer, ["demo_lambada"], limit=1, apply_chat_template=True)


def test_manifest_tells_models_apart(
    run: Callable[..., Any], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Catches a manifest that does not say which model was passed in: one weight changed is another model."""

    def model_of(model: Any) -> Any:
        run(model, tiny_tokenizer, ["demo_lambada"], limit=1)
        return json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]

    model = tiny_models.make_model("llama")
    first, again = model_of(model), model_of(tiny_model("llama"))
    assert first == again
    assert (first["class"], first["dtype"]) == ("LlamaForCausalLM", "torch.float32")
    assert first["parameters"] == sum(weight.numel() for weight in model.parameters())
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    changed = model_of(model)
    assert changed.pop("weights_sha256") != first.pop("weights_sha256") and changed == first
    half = model_of(tiny_models.make_model("llama").bfloat16())
    assert half["dtype"] == "torch.bfloat16" and len(half["weights_sha256"]) == 64


def test_the_demo_is_at_hand() -> None:
    """Catches `ddp_eval.demo` missing until somebody else has imported it."""
    code = "import sys, ddp_eval; print(ddp_eval.demo.MODEL_PATH); assert 'torch' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(finished.stdout.strip()).is_dir()


def test_numbers_that_are_none_are_reported(demo_parts, run, caplog):
    """Catches a NaN that drowns in a mean or in an argmax without a word."""
    model, tokenizer = demo_parts
    with torch.no_grad():
        kept = model.lm_head.weight[0].clone()
        model.lm_head.weight[0] = math.nan
        results = run(model, tokenizer, ["demo_lambada"], limit=2)
        model.lm_head.weight[0] = kept
    assert results["ddp_eval"]["not_finite"] == {"demo_lambada": {"requests": 2, "first": [[0, 0], [1, 0]]}}
    said = [record.getMessage() for record in caplog.records if "do not trust" in record.getMessage()]
    assert said == [
        "2 requests of the task demo_lambada came to numbers that are NaN or infinite "
        "(document 0 choice 0, document 1 choice 0): do not trust its metrics"
    ]
    assert run(model, tokenizer, ["demo_lambada"], limit=2)["ddp_eval"]["not_finite"] == {}


@pytest.fixture
def demo_parts() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    import transformers

    from ddp_eval import demo

    model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    return model, transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
