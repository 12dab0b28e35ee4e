"""Which documents `compare` holds against each other. Source: attempts to break this program. lm_eval numbers what `--samples`
chooses by its place in that list; pairs by number were different documents, 61 nats apart, and nothing said so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import lm_eval
import numpy as np
import pyarrow.parquet
import pytest
import tolerance
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import ddp_eval
from ddp_eval import demo
from ddp_eval.analysis import report
from ddp_eval.analysis.difference import compare_runs
from ddp_eval.analysis.matching import Identity, pair
from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.verdict import list_notes
from ddp_eval.cli.compare import main
from ddp_eval.output import tables

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")

TWO_FILTERS = """\
task: two_filters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
num_fewshot: 0
repeats: 2
doc_to_text: "{{{{text.split(' ')[:20]|join(' ')}}}}"
doc_to_target: "{{{{text.split(' ')[20]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: word, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks_path(tmp_path: Path) -> str:
    """A directory with `two_filters`."""
    place = tmp_path / "tasks"
    place.mkdir()
    data = Path(demo.TASKS_PATH).parent / "data" / "lambada_test.jsonl"
    (place / "two_filters.yaml").write_text(TWO_FILTERS.format(data=data))
    return str(place)


@pytest.fixture
def sides(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tasks_path: str, tmp_path: Path) -> tuple[Any, Any]:
    """(by_us, by_lm_eval): each evaluates (directory, tasks, options of `simple_evaluate`) and returns the directory."""
    model = tiny_model("llama")

    def by_us(name: str, tasks: Sequence[str], **options: Any) -> Path:
        given = {"include_path": tasks_path, "bootstrap_iters": 0, **options}
        ddp_eval.evaluate(model, tiny_tokenizer, list(tasks), output_path=str(tmp_path / name), **given)
        return tmp_path / name

    def by_lm_eval(name: str, tasks: Sequence[str], **options: Any) -> Path:
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        manager = TaskManager(include_path=[demo.TASKS_PATH, tasks_path], include_defaults=False)
        lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1)
        given = {"task_manager": manager, "bootstrap_iters": 0, "evaluation_tracker": tracker, **options}
        found: Any = lm_eval.simple_evaluate(model=lm, tasks=list(tasks), log_samples=True, **given)
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for task in samples:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        return tmp_path / name

    return by_us, by_lm_eval


def compared(a: Path, b: Path) -> tuple[dict[str, Any], list[str]]:
    found = compare_runs(read_run(a), read_run(b))
    return found, list_notes(found)


def allowed_nats(run: Path) -> dict[str, float]:
    """By task, what rounding may bring between our run and another of the same requests, one of lm_eval's too."""
    scores = tables.read_scores(run / tables.SCORES)
    allowed: dict[str, float] = {}
    nats = tolerance.of_kind("llama").nats(scores.num_tokens)
    nats = nats + tolerance.float32_sum_nats(scores.num_tokens, scores.loglikelihood)
    for task, limit in zip(scores.task, nats.tolist(), strict=True):
        allowed[task] = max(limit, allowed.get(task, 0.0))
    return allowed


def within_rounding(found: dict[str, Any], run: Path) -> bool:
    """Whether all log-probabilities of a comparison are. run: ours."""
    return all(found["tasks"][task]["delta_nats"]["max"] <= limit for task, limit in allowed_nats(run).items())


@pytest.mark.parametrize("log_samples", [False, True])
def test_documents_that_lm_eval_misnumbers(log_samples: bool, sides: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches other documents compared under one number: with choices, in two filters and repeats, behind lists out of order, and
    repeats by which lm_eval gives two documents one number."""
    by_us, by_lm_eval = sides
    tasks = ["demo_hellaswag", "two_filters", "demo_wikitext"]
    samples = {"demo_hellaswag": [9, 2, 7, 4], "two_filters": [3, 3, 8, 5], "demo_wikitext": [0, 1]}
    ours = by_us("ours", tasks, samples=samples, log_samples=log_samples)
    theirs = by_lm_eval("theirs", tasks, samples=samples)
    found, notes = compared(ours, theirs)
    assert found["same_requests"] and within_rounding(found, ours)
    assert (found["overall"]["texts"], found["overall"]["texts_differing"]) == (6, 0)
    assert (found["overall"]["prompts_compared"], found["overall"]["prompts_differing"]) == (9, 0)
    assert found["tasks"]["demo_hellaswag"]["requests"] == 16 and found["overall"]["answers_flipped"] == 0
    assert found["tasks"]["demo_hellaswag"]["pairing"]["renumbered"] == 3
    assert "demo_hellaswag: 3 documents have other numbers in B than in A: they are paired by what they hold" in notes
    assert [note.partition(":")[0] for note in notes] == ["demo_hellaswag", "two_filters"]
    for task in ("demo_hellaswag", "two_filters"):
        for metric in found["tasks"][task]["metrics"].values():
            assert metric["difference"] == 0 and metric["right_to_wrong"] == 0
    assert set(found["tasks"]["two_filters"]["metrics"]) == {"exact_match,whole", "exact_match,word"}
    back, _ = compared(theirs, ours)
    assert back["overall"]["delta_nats"]["max"] == found["overall"]["delta_nats"]["max"] and back["same_requests"]
    assert main([str(ours), str(theirs), "--expect", "within", str(max(allowed_nats(ours).values()))]) == 0
    assert "they are paired by what they hold" in capsys.readouterr().out
    page = report.render([read_run(ours), read_run(theirs)], 3)
    assert "3 documents have other numbers in B than in A" in page and '["flipped"' not in page


def test_a_limit_on_one_side(sides: Any) -> None:
    """Catches documents beyond a limit paired with others, and a comparison of a part that passes for one of the whole."""
    by_us, by_lm_eval = sides
    few = by_us("few", ["demo_hellaswag"], limit=2)
    for many in (by_us("many", ["demo_hellaswag"], limit=5), by_lm_eval("theirs", ["demo_hellaswag"], limit=5)):
        found, notes = compared(few, many)
        part = found["tasks"]["demo_hellaswag"]
        assert (part["requests"], part["requests_only_in"]) == (8, {"a": 0, "b": 12})
        assert within_rounding(found, few) and notes == [] and not found["same_requests"]


def test_two_of_ours_with_other_samples(sides: Any) -> None:
    """Catches documents paired by their place among those that were chosen."""
    by_us, _ = sides
    first = by_us("first", ["demo_hellaswag"], samples={"demo_hellaswag": [1, 3, 4]}, num_fewshot=0)
    second = by_us("second", ["demo_hellaswag"], samples={"demo_hellaswag": [4, 0, 3, 3]}, num_fewshot=0)
    found, notes = compared(first, second)
    part = found["tasks"]["demo_hellaswag"]
    assert (part["requests"], part["requests_only_in"]) == (8, {"a": 4, "b": 4})
    assert within_rounding(found, first) and part["prompts_differing"] == 0 and notes == []


def write_lm_eval(
    place: Path, task: str, documents: Sequence[Any], date: str = "2026-01-02T00-00-00.000001", **more: Any
) -> Path:
    """A samples file of two-choice documents (number, document, nats of each choice) and, unless more says no, its results."""
    folder = place / "m"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, document, nats in documents:
        sample = {
            "doc_id": number, "doc": document, "target": "0", "filter": "none", "metrics": ["acc"],
            "acc": float(nats[0] > nats[1]), "resps": [[[str(value), "False"]] for value in nats],
            "arguments": {f"gen_args_{i}": {"arg_0": document.get("q", ""), "arg_1": f" {i}"} for i in range(len(nats))},
            "prompt_hash": document.get("q", ""),
        }  # fmt: skip
        lines.append(json.dumps(sample) + "\n")
    (folder / f"samples_{task}_{date}.jsonl").write_text("".join(lines))
    if more.get("summary", True):
        accuracy = float(np.mean([nats[0] > nats[1] for _, _, nats in documents]))
        summary = {
            "results": {task: {"acc,none": accuracy}, **more.get("others", {})},
            "config": {"model_args": more.get("model_args", {"pretrained": "m"})},
            "n-samples": {name: {} for name in (task, *more.get("others", {}))},
        }
        (folder / f"results_{date}.json").write_text(json.dumps(summary))
    return place


DOCUMENTS = [(number, {"q": f"question {number}", "gold": number % 2}, (-1.0 - number, -2.0)) for number in range(5)]


def test_documents_in_another_order(tmp_path: Path) -> None:
    """Catches a data set in another order, and one that repeats documents, compared line by line."""
    turned = [(number, document, nats) for number, (_, document, nats) in enumerate(reversed(DOCUMENTS))]
    found, notes = compared(write_lm_eval(tmp_path / "a", "t", DOCUMENTS), write_lm_eval(tmp_path / "b", "t", turned))
    assert found["identical"] and notes == ["t: 4 documents have other numbers in B than in A: they are paired by what they hold"]
    repeated = [*DOCUMENTS, (5, *DOCUMENTS[2][1:]), (6, *DOCUMENTS[2][1:])]
    shuffled = [(number, *repeated[old][1:]) for number, old in enumerate((6, 0, 2, 3, 1, 4))]
    found, _ = compared(write_lm_eval(tmp_path / "c", "t", repeated), write_lm_eval(tmp_path / "d", "t", shuffled))
    assert found["tasks"]["t"]["requests_only_in"] == {"a": 2, "b": 0} and found["overall"]["requests_differing"] == 0
    assert found["tasks"]["t"]["metrics"]["acc,none"]["documents"] == 6


def test_prompts_that_tell_nothing(tmp_path: Path) -> None:
    """Catches documents taken for the same because their prompts are: those of BLiMP are all empty."""
    plain = [(number, {"good": f"g{number}"}, nats) for number, _, nats in DOCUMENTS]
    turned = [(number, document, nats) for number, (_, document, nats) in enumerate(reversed(plain[:4]))]
    found, _ = compared(write_lm_eval(tmp_path / "a", "t", plain), write_lm_eval(tmp_path / "b", "t", turned))
    assert found["overall"]["requests_differing"] == 0 and found["tasks"]["t"]["pairing"]["renumbered"] == 4
    others = [(0, plain[0][1], plain[0][2]), *((number, {"good": f"x{number}"}, nats) for number, _, nats in plain[1:])]
    found, notes = compared(tmp_path / "a", write_lm_eval(tmp_path / "c", "t", others))
    assert found["tasks"]["t"]["requests"] == 2 and found["tasks"]["t"]["requests_only_in"] == {"a": 8, "b": 8}
    assert notes == ["t: 4 numbers stand for other documents in B than in A: these are not compared"]


def test_other_gold_labels(tmp_path: Path) -> None:
    """Catches answers to the same questions left uncompared because something else about the documents has changed, unsaid."""
    relabelled = [(number, {**document, "gold": 7}, nats) for number, document, nats in DOCUMENTS]
    found, notes = compared(write_lm_eval(tmp_path / "a", "t", DOCUMENTS), write_lm_eval(tmp_path / "b", "t", relabelled))
    assert found["overall"]["requests"] == 10 and found["overall"]["requests_differing"] == 0
    assert notes == ["t: 5 documents have the same number and prompt in A and B, but hold something else"]


def test_nothing_but_numbers(tmp_path: Path) -> None:
    """Catches two versions of a task, prompts and documents both changed, compared as one without a word."""
    renewed = [(number, {"q": f"new {number}"}, nats) for number, _, nats in DOCUMENTS]
    found, notes = compared(write_lm_eval(tmp_path / "a", "t", DOCUMENTS), write_lm_eval(tmp_path / "b", "t", renewed))
    assert found["overall"]["requests"] == 10 and found["tasks"]["t"]["prompts_differing"] == 5
    assert notes == ["t: no document holds the same in A and B: they are paired by number alone"]


def test_runs_of_older_versions(sides: Any) -> None:
    """Catches runs whose documents.parquet tells nothing of documents: prompts must do, and few-shot examples may differ."""
    by_us, by_lm_eval = sides
    place = by_us("old", ["demo_hellaswag"], samples={"demo_hellaswag": [2, 5, 8]}, num_fewshot=0)
    file = place / tables.DOCUMENTS
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).drop_columns(["doc_hash"]), file)
    misnumbered = by_lm_eval("theirs", ["demo_hellaswag"], samples={"demo_hellaswag": [8, 2, 5]}, num_fewshot=0)
    found, notes = compared(place, misnumbered)
    assert found["same_requests"] and within_rounding(found, place)
    assert notes[0].startswith("demo_hellaswag: 3 documents have other numbers")
    other = by_us("shots", ["demo_hellaswag"], samples={"demo_hellaswag": [2, 5, 8]}, num_fewshot=1)
    found, notes = compared(place, other)
    assert (found["overall"]["requests"], found["overall"]["prompts_differing"], notes) == (12, 3, [])


def test_several_dates(tmp_path: Path) -> None:
    """Catches metrics of one evaluation beside the samples of another, and nothing said of which were taken."""
    place = write_lm_eval(tmp_path / "a", "t", DOCUMENTS, date="2026-01-01T00-00-00.000001")
    write_lm_eval(place, "u", DOCUMENTS[:2], date="2026-01-01T00-00-00.000002")
    better = [(number, document, (-0.5, nats[1])) for number, document, nats in DOCUMENTS]
    write_lm_eval(place, "t", better, date="2026-01-03T00-00-00.000001", model_args={"pretrained": "m", "dtype": "bfloat16"})
    newest = read_run(place)
    assert newest.requests["t"].loglikelihood[0] == -0.5 and newest.reported["t"]["acc,none"] == 1.0
    assert newest.reported["u"]["acc,none"] == pytest.approx(0.5)
    assert newest.notes[1].endswith(
        "several dates, of which the newest are taken: t of 2026-01-03T00-00-00.000001, u of 2026-01-01T00-00-00.000002"
    )
    assert "holds samples of runs with other model_args" in newest.notes[0]
    old = read_run(place / "m" / "samples_t_2026-01-01T00-00-00.000001.jsonl")
    assert old.reported == {"t": {"acc,none": pytest.approx(0.2)}} and old.notes == []
    found, notes = compared(place, place)
    assert found["identical"] and any(note.startswith("B: ") and "several dates" in note for note in notes)


def test_tasks_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches tasks that fall out of a comparison because one side kept no samples of them: their metrics are there."""
    a = write_lm_eval(tmp_path / "a", "t", DOCUMENTS, others={"u": {"acc,none": 0.5}})
    b = write_lm_eval(tmp_path / "b", "t", DOCUMENTS, others={"u": {"acc,none": 0.25}})
    write_lm_eval(a, "u", DOCUMENTS[:2], date="2026-01-02T00-00-00.000001", summary=False)
    found, notes = compared(a, b)
    assert found["tasks"]["u"]["metrics"]["acc,none"] == {"a": 0.5, "b": 0.25, "difference": -0.25}
    assert notes == ["B holds no samples, only metrics, of u"] and not found["same_requests"]
    assert main([str(a), str(b), "--expect", "within", "1"]) == 3
    assert "do not hold the same requests" in capsys.readouterr().out
    alone = read_run(b / "m" / "samples_t_2026-01-02T00-00-00.000001.jsonl")
    assert list(alone.reported) == ["t"]


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=12), st.randoms(use_true_random=False)
)
def test_every_document_finds_its_like(kinds: list[tuple[int, int]], random: Any) -> None:
    """Catches a pair of different documents, one that is paired twice, and a pair that is left out, under any numbers."""
    a = {number: Identity(f"c{content}", f"p{content}.{prompt}") for number, (content, prompt) in enumerate(kinds)}
    chosen = random.sample(sorted(a), random.randint(1, len(a)))
    numbers = random.sample(range(2 * len(a)), len(chosen))
    b = {number: copy.copy(a[old]) for number, old in zip(numbers, chosen, strict=True)}
    found = pair(a, b)
    assert sorted(found.number_in_a) == sorted(numbers)
    assert len(set(found.number_in_a.values())) == len(numbers)
    assert all(a[one].content == b[other].content for other, one in found.number_in_a.items())
    assert (found.not_paired, found.other_content, found.by_number) == (0, 0, False)
    same = sum(one == other for other, one in found.number_in_a.items())
    assert found.renumbered == len(numbers) - same
    assert all(found.number_in_a[number] == number for number in b if number in a and a[number].content == b[number].content)
