"""`compare`: statistics against scipy's on the same data, runs against hand-made ones, and exit codes for CI."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tolerance
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval_answers import close_metric, largest_bound
from places import GENERATION_TASKS
from tiny_models import evaluate_with_lm_eval

from ddp_eval import demo
from ddp_eval.analysis import paired
from ddp_eval.analysis.difference import answers_of, compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.verdict import why_not
from ddp_eval.cli.compare import main
from ddp_eval.errors import UserError
from ddp_eval.output import tables, write
from ddp_eval.output.documents import document_metrics, shared_context


def draw(count=400, seed=1):
    """Right or wrong of two models on the same documents, the second a bit better."""
    random = np.random.default_rng(seed)
    skill = random.normal(size=count)
    return ((skill + random.normal(size=count) > 0.2).astype(float), (skill + random.normal(size=count) > 0.0).astype(float))


def ones(values):
    return values, np.ones(len(values))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 3), (1, 9), (9, 1), (41, 60), (700, 790), (5900, 6100), (0, 2000)])
def test_mcnemar_is_scipys_binomial_test(lost, won):
    """Catches a one-sided test, a tail that leaves out or doubles the middle, an overflow of 2^n, and a cost of n³."""
    wanted = scipy.stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert paired.mcnemar_p(lost, won) == pytest.approx(wanted, rel=1e-12)


def test_stderr_is_that_of_scipys_paired_t_test():
    """Catches an unpaired error, and a wrong count of degrees of freedom."""
    a, b = draw()
    wanted = scipy.stats.ttest_rel(b, a)
    assert (b - a).mean() / paired.clustered_stderr(b - a, np.arange(len(a))) == pytest.approx(wanted.statistic, rel=1e-12)


def test_clustered_stderr_by_hand():
    """Catches clusters taken for independent documents. Statsmodels' OLS on a constant, cov_type="cluster", gives the same."""
    differences = np.array([1.0, 1.0, 0.0, -1.0, 0.0, 1.0])
    clusters = np.array([7, 7, 7, 2, 2, 5])
    residuals = differences - differences.mean()  # 2/3 2/3 -1/3 | -4/3 -1/3 | 2/3
    sums = [residuals[:3].sum(), residuals[3:5].sum(), residuals[5]]
    wanted = math.sqrt(sum(value**2 for value in sums) * 3 / 2) / 6
    assert paired.clustered_stderr(differences, clusters) == pytest.approx(wanted, rel=1e-12)
    assert wanted != pytest.approx(differences.std(ddof=1) / math.sqrt(6), rel=0.05)


@pytest.mark.parametrize("continuous", [False, True], ids=["few kinds of cluster", "each cluster its own"])
def test_bootstrap_agrees_with_scipys(continuous):
    """Catches resamples that break pairs, of the wrong size, or an interval and p-value from the wrong distribution."""
    a, b = draw(300)
    if continuous:
        b = b + np.random.default_rng(2).normal(size=len(b))
    ours = paired.compare_metric("acc", ones(a), ones(b), np.arange(len(a)))
    theirs = scipy.stats.bootstrap(
        (b - a,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3), batch=1000
    )
    assert ours["interval_95"] == pytest.approx(list(theirs.confidence_interval), abs=0.006)
    distance = np.abs(theirs.bootstrap_distribution - (b - a).mean()) >= abs((b - a).mean()) * (1 - 1e-12)
    assert ours["p_bootstrap"] == pytest.approx(distance.mean(), abs=0.02)
    assert ours["p_bootstrap"] == pytest.approx(scipy.stats.ttest_rel(b, a).pvalue, abs=0.06)
    assert ours["stderr"] == pytest.approx(theirs.standard_error, rel=0.05)


def test_clusters_widen_the_bootstrap():
    """Catches documents of one passage drawn one by one: five copies of each must not look like five times the evidence."""
    a, b = draw(80)
    alone = paired.compare_metric("acc", ones(a), ones(b), np.arange(80))
    copied = paired.compare_metric("acc", ones(np.repeat(a, 5)), ones(np.repeat(b, 5)), np.repeat(np.arange(80), 5))
    assert copied["interval_95"] == pytest.approx(alone["interval_95"], abs=0.01)
    assert copied["stderr"] == pytest.approx(alone["stderr"], rel=0.02)
    assert copied["p_mcnemar"] is None and alone["p_mcnemar"] is not None


@pytest.mark.parametrize("count", [1, 3, 5, 19])
def test_few_documents_have_no_bootstrap(count):
    """Catches certainty out of nothing: a handful of documents that all changed gave p = 0.0001 beside McNemar's 0.0625."""
    found = paired.compare_metric("acc", ones(np.zeros(count)), ones(np.ones(count)), np.arange(count))
    assert (found["p_bootstrap"], found["interval_95"]) == (None, None)
    assert found["p_mcnemar"] == pytest.approx(scipy.stats.binomtest(0, count).pvalue) and found["difference"] == 1
    assert (found["stderr"] is None) == (count == 1)


@pytest.mark.parametrize(("a", "b", "clusters"), [(0.0, 1.0, np.arange(50)), (0.5, 0.5, np.arange(50)), (0.0, 1.0, np.zeros(50))])
def test_no_p_value_where_nothing_varies(a, b, clusters):
    """Catches p = 0.0001 from resamples that are all one number: all documents differ alike, or are one cluster."""
    found = paired.compare_metric("f1", ones(np.full(50, a)), ones(np.full(50, b)), clusters.astype(np.int64))
    assert (found["p_bootstrap"], found["interval_95"]) == (None, None)


def test_one_in_twenty_is_found_where_there_is_nothing(monkeypatch, clusters=20, each=4):
    """Catches p-values that are too small: of pairs without a difference 5% may have p <= 0.05, as scipy's t test finds."""
    monkeypatch.setattr(paired, "RESAMPLES", 2000)
    random = np.random.default_rng(0)
    ours = theirs = 0
    for _ in range(600):
        means = random.normal(size=clusters)
        values = (means[:, None] + random.normal(size=(clusters, each))).ravel()
        found = paired.compare_metric("f1", ones(np.zeros_like(values)), ones(values), np.repeat(np.arange(clusters), each))
        ours += found["p_bootstrap"] <= 0.05
        theirs += scipy.stats.ttest_1samp(values.reshape(clusters, each).mean(axis=1), 0).pvalue <= 0.05
    assert 15 <= ours <= 45 and abs(ours - theirs) <= 8, (ours, theirs)


@pytest.mark.parametrize("count", [5, 25])
def test_stderr_of_a_perplexity_is_no_half_interval(count):
    """Catches a standard error of resamples that are stretched by Student's t for their interval: 1.6 times too large for 5."""
    a, noise = np.full(count, -1.0), 1e-4 * np.random.default_rng(3).normal(size=count)
    found = paired.compare_metric("word_perplexity", ones(a), ones(a + noise), np.arange(count))
    # exp(1 - mean noise) - exp(1) is -e times the mean noise, but for its square.
    assert found["stderr"] == pytest.approx(math.e * noise.std(ddof=1) / math.sqrt(count), rel=0.03)


def test_perplexity_is_of_sums():
    """Catches an average of perplexities, and words counted as documents."""
    values, weights = np.array([-10.0, -30.0]), np.array([5.0, 10.0])
    assert paired.aggregate("word_perplexity", values, weights) == pytest.approx(math.exp(40 / 15))
    assert paired.aggregate("bits_per_byte", values, weights) == pytest.approx(40 / 15 / math.log(2))
    assert paired.aggregate("acc", *ones(np.array([1.0, 0.0]))) == 0.5


# (document, choice) -> nats; document 0 is a near tie, 1 clear, 2 a single request
NATS = {(0, 0): -1.000, (0, 1): -1.002, (1, 0): -5.0, (1, 1): -2.0, (2, 0): -7.0}
RIGHT = {0: 1.0, 1: 0.0, 2: 1.0}


def write_run(place: Path, nats=NATS, right=RIGHT, manifest=None, context=None, prompt="p", metric="acc") -> Path:
    """A run directory by the functions that write real ones."""
    place.mkdir()
    keys = sorted(nats)
    scores = tables.Scores(
        task=["t"] * len(keys),
        doc_id=[doc for doc, _ in keys],
        idx=[idx for _, idx in keys],
        loglikelihood=[nats[key] for key in keys],
        is_greedy=[nats[key] > -1.5 for key in keys],
        num_tokens=[1] * len(keys),
    )
    tables.write_scores(place, scores)
    rows = [
        {"task": "t", "doc_id": doc, "filter": "none", "metric": metric, "value": value, "weight": 1.0}
        | {"prompt_hash": f"{prompt}{doc}", "context_hash": context}
        for doc, value in right.items()
    ]
    tables.write_documents(place, rows)
    mean = sum(right.values()) / len(right)
    write.write_run(
        place, {"results": {"t": {"alias": "t", f"{metric},none": mean}}}, manifest or {"engine": {"dtype": "float32"}}
    )
    return place


@pytest.fixture
def first(tmp_path):
    return write_run(tmp_path / "first")


def test_a_run_is_identical_to_itself(first, capsys):
    """Catches a comparison that finds differences where there are none."""
    assert main([str(first), str(first), "--expect", "identical"]) == 0
    out = capsys.readouterr().out
    assert "identical: every request has the same bits" in out and "what was run does not differ" in out


def test_flips_and_near_ties(first, tmp_path):
    """Catches a flip that is missed, a near tie judged by one run only, and differences not taken request by request."""
    turned = write_run(tmp_path / "b", {**NATS, (0, 1): -0.999}, {**RIGHT, 0: 0.0})
    found = compare_runs(read_run(first), read_run(turned))
    assert not found["identical"]
    overall = found["overall"]
    assert (overall["requests"], overall["requests_differing"]) == (5, 1)
    assert (overall["answers"], overall["answers_flipped"], overall["near_ties"]) == (2, 1, 1)
    assert overall["delta_nats"]["max"] == pytest.approx(0.003) and overall["delta_nats"]["p50"] == 0
    acc = found["tasks"]["t"]["metrics"]["acc,none"]
    assert (acc["right_to_wrong"], acc["wrong_to_right"], acc["p_mcnemar"]) == (1, 0, 1.0)
    far = write_run(tmp_path / "c", {**NATS, (0, 1): -0.5}, RIGHT)
    overall = compare_runs(read_run(first), read_run(far))["overall"]
    assert (overall["answers_flipped"], overall["near_ties"]) == (1, 0)


@pytest.mark.parametrize(
    ("change", "expect", "code"),
    [
        ({}, ["identical"], 0),
        ({(2, 0): np.nextafter(-7.0, 0)}, ["identical"], 3),
        ({(2, 0): np.nextafter(-7.0, 0)}, ["within", "1e-9"], 0),
        ({(2, 0): -7.1}, ["within", "1e-2"], 3),
        ({(2, 0): math.nan}, ["within", "1e9"], 3),
        ({(3, 0): -1.0}, ["within", "1e9"], 3),  # a request that only one run has
    ],
)
def test_exit_codes(first, tmp_path, change, expect, code, capsys):
    """Catches a CI check that passes on the last bit, on a NaN, or on requests that were never run."""
    other = write_run(tmp_path / "b", NATS | change)
    assert main([str(first), str(other), "--expect", *expect]) == code
    assert "expected" in capsys.readouterr().out


def test_other_right_answers_are_not_identical(first, tmp_path, capsys):
    """Catches gold labels that changed behind the same log-probabilities, also where right and wrong cancel."""
    for name, right in (("fewer", {**RIGHT, 0: 0.0}), ("others", {0: 0.0, 1: 1.0, 2: 1.0})):
        other = write_run(tmp_path / name, right=right)
        assert main([str(first), str(other), "--expect", "identical"]) == 3
        out = capsys.readouterr().out
        assert "are alike, but not t acc" in out and "\nnot identical\n" in out
        assert main([str(first), str(other), "--expect", "within", "1e-9"]) == 0


def test_a_metric_that_is_gone_is_not_identical(tmp_path, capsys):
    """Catches a metric that one run reports and the other does not."""
    runs = [write_run(tmp_path / side) for side in ("a", "b")]
    told = json.loads((runs[1] / write.RESULTS).read_text())
    told["results"]["t"]["acc_norm,none"] = 0.5
    (runs[1] / write.RESULTS).write_text(json.dumps(told))
    assert main([*map(str, runs), "--expect", "identical"]) == 3
    assert "are alike, but not t acc_norm" in capsys.readouterr().out


def test_other_texts_are_not_within(tmp_path, capsys):
    """Catches a CI check that passes though every generated answer is another, beside log-probabilities that are alike."""
    for side, text in (("a", "one"), ("b", "eins")):
        write_run(tmp_path / side)
        tables.write_texts(
            tmp_path / side, tables.Texts(["g"] * 2, [0, 1], [0] * 2, [0] * 2, [text] * 2, [1] * 2, [False] * 2, [False] * 2)
        )
    a, b = (str(tmp_path / side) for side in "ab")
    assert main([a, b, "--expect", "within", "1e-4"]) == 3
    assert f"expected within 0.0001 nats: 2 of 2 generated texts of {a} and {b} differ" in capsys.readouterr().out


def test_runs_that_only_generate_can_be_within():
    """Catches a check of texts that can never pass, because there are no log-probabilities beside them."""
    overall = {"texts": 2, "texts_differing": 0, "delta_nats": None}
    told = {"a": {"path": "a"}, "b": {"path": "b"}, "same_requests": True, "tasks": {"g": {"requests": 2}}, "overall": overall}
    assert why_not(told, 1e-4) is None
    assert why_not(told | {"overall": overall | {"texts": 0}}, 1e-4) == "a and b hold no log-probabilities"


def test_flags_that_turn_within_are_told(tmp_path, capsys):
    """Catches a greedy flag that a last bit turned and that nobody is told of, or that fails the check."""
    runs = [str(write_run(tmp_path / side, {**NATS, (2, 0): nats})) for side, nats in (("a", -1.4999999), ("b", -1.5000001))]
    assert main([*runs, "--expect", "within", "1e-4"]) == 0
    assert "nats: yes\n0 answers and 1 greedy flags flipped" in capsys.readouterr().out


def test_choices_without_their_question_are_no_answers(tmp_path):
    """Catches flips and near ties among the second half of the requests of acc_mutual_info, which hold no question."""
    nats = {(0, 0): -5.0, (0, 1): -4.0, (0, 2): -1.0, (0, 3): -1.001}
    runs = [
        write_run(tmp_path / side, {**nats, (0, 2): best}, {0: 1.0}, metric="acc_mutual_info")
        for side, best in (("a", -1.0), ("b", -1.002))
    ]
    a, b = map(read_run, runs)
    overall = compare_runs(a, b)["overall"]
    assert (overall["answers"], overall["answers_flipped"], overall["near_ties"]) == (1, 0, 0)
    assert [column.tolist() for column in answers_of(read_run(runs[0]).requests["t"], twice=True)] == [[0], [1], [1.0]]


@pytest.mark.parametrize("field", ["passage", "flores_passage", "document_str", "narrative", "premise"])
def test_questions_on_one_passage_share_it(field):
    """Catches Belebele's and others' questions on one text taken for independent documents."""
    contexts = [shared_context({field: text, "question": question}) for text, question in (("x", "a"), ("x", "b"), ("y", "a"))]
    assert contexts[0] == contexts[1] != contexts[2] and None not in contexts


@pytest.mark.parametrize("expect", [["identical"], ["within", "0.1"]])
def test_nothing_compared_is_not_alike(tmp_path, expect, capsys):
    """Catches a CI check that passes because no answer of a task could be read, beside a task whose answers are all alike."""
    sample = {"doc_id": 0, "doc": {}, "target": "0", "filter": "none", "metrics": ["exact_match"], "exact_match": 1.0}
    sample |= {"arguments": {}, "resps": []}
    scored = {**sample, "arguments": {"gen_args_0": {"arg_0": "a", "arg_1": "b"}}, "resps": [[["-1.5", "True"]]]}
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        write_lines(tmp_path / side / "samples_mute.jsonl", [sample])
        write_lines(tmp_path / side / "samples_scored.jsonl", [scored])
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--expect", *expect]) == 3
    out = capsys.readouterr().out
    assert "no answer of mute could be compared" in out and "not identical" in out


def test_json_is_json(first, tmp_path, capsys):
    """Catches numpy numbers, NaN and infinity in what other programs are to read."""
    other = write_run(tmp_path / "b", {**NATS, (2, 0): math.nan})
    main([str(first), str(other), str(first), "--json"])
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [one["identical"] for one in printed["comparisons"]] == [False, True]
    assert printed["comparisons"][0]["overall"]["delta_nats"]["max"] == "inf"


def test_manifests_are_told_apart(first, tmp_path):
    """Catches a difference that goes unsaid or lands under the wrong head."""
    manifest = {"engine": {"dtype": "bfloat16"}, "packages": {"torch": "9"}, "hardware": {"cpu": "x"}, "ranks": {"world_size": 2}}
    other = write_run(tmp_path / "b", manifest={**manifest, "config": {"output_path": "elsewhere"}}, prompt="q")
    found = compare_runs(read_run(first), read_run(other))
    assert [(one["group"], one["key"]) for one in found["differences"]] == [
        ("dtype and kernels", "engine.dtype"),
        ("versions", "packages.torch"),
        ("hardware", "hardware.cpu"),
        ("layout", "ranks.world_size"),
    ]
    assert found["tasks"]["t"]["prompts_differing"] == 3


@pytest.mark.parametrize("prompt", ["p", "q"])
def test_other_gen_kwargs_are_not_other_prompts(prompt, tmp_path):
    """Catches prompts said to differ because their digest, which settings count in, does; and other prompts that go unsaid."""
    for side, setting, written in (("a", 0.0, "p"), ("b", 1.0, prompt)):
        facts = {"prompts_sha256": side, "prompts_by_task": {"t": side}, "config": {"gen_kwargs": {"temperature": setting}}}
        place = write_run(tmp_path / side, manifest=facts, prompt=written)
        tables.write_texts(place, tables.Texts(["t"], [0], [0], [0], ["one"], [1], [False], [False]))
    found = compare_runs(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    keys = [one["key"] for one in found["differences"]]
    digests = ["prompts_sha256", "prompts_by_task.t"] if prompt == "q" else []
    assert sorted(keys) == sorted([*digests, "config.gen_kwargs.temperature"])
    assert found["tasks"]["t"]["prompts_differing"] == (3 if prompt == "q" else 0)


def test_documents_with_one_context_are_a_cluster(first, tmp_path):
    """Catches a passage that is written down and then not used."""
    together = write_run(tmp_path / "b", context="same")
    assert compare_runs(read_run(together), read_run(first))["tasks"]["t"]["metrics"]["acc,none"]["clusters"] == 1
    assert compare_runs(read_run(first), read_run(first))["tasks"]["t"]["metrics"]["acc,none"]["clusters"] == 3


def test_lm_evals_samples_are_read(first, tmp_path):
    """Catches lm_eval's strings misread: flags, rolling sums, documents of the newest of several files."""
    folder = tmp_path / "theirs" / "model"
    folder.mkdir(parents=True)
    samples = []
    for doc in (0, 1, 2):
        choices = [idx for document, idx in NATS if document == doc]
        samples.append(
            {
                "doc_id": doc,
                "doc": {"passage": "the same"},
                "target": "0",
                "arguments": {f"gen_args_{idx}": {"arg_0": "ask", "arg_1": "answer"} for idx in choices},
                "resps": [[[str(NATS[doc, idx]), str(NATS[doc, idx] > -1.5)]] for idx in choices],
                "filter": "none",
                "metrics": ["acc"],
                "acc": RIGHT[doc],
                "prompt_hash": f"p{doc}",
            }
        )
    rolling: dict[str, Any] = {
        **samples[0],
        "arguments": {"gen_args_0": {"arg_0": "text\u2028"}},
        "resps": [["-12.5"]],
        "metrics": ["word_perplexity"],
    }
    rolling["word_perplexity"] = [-12.5, 4]
    write_lines(folder / "samples_t_2026-01-01T00-00-00.000001.jsonl", samples[:1])
    write_lines(folder / "samples_t_2026-01-02T00-00-00.000001.jsonl", samples)
    write_lines(folder / "samples_roll_2026-01-02T00-00-00.000001.jsonl", [rolling])
    theirs = read_run(tmp_path / "theirs")
    assert compare_runs(read_run(first), theirs)["overall"]["requests_differing"] == 0
    assert theirs.requests["roll"].loglikelihood.tolist() == [-12.5] and theirs.requests["roll"].is_greedy.tolist() == [-1]
    assert theirs.metrics["roll"]["word_perplexity,none"].weight.tolist() == [4.0]
    assert len(set(theirs.contexts["t"].values())) == 1
    assert main([str(first), str(folder / "samples_t_2026-01-02T00-00-00.000001.jsonl"), "--expect", "identical"]) == 0


def test_files_that_lm_eval_wrote(tmp_path, tiny_model, tiny_tokenizer, capsys):
    """Catches a reader of files as we think they are: here lm_eval's own tracker has written them, of choices, sums and texts."""
    import ddp_eval

    own_tasks = str(GENERATION_TASKS)
    tasks = ["demo_boolean_expressions", "demo_wikitext", "gen_boolean"]
    model, tracker = tiny_model("llama"), EvaluationTracker(output_path=str(tmp_path / "theirs"))
    manager = TaskManager(include_path=[demo.TASKS_PATH, own_tasks], include_defaults=False)
    theirs = evaluate_with_lm_eval(model, tiny_tokenizer, tasks, task_manager=manager, limit=2, evaluation_tracker=tracker)
    samples = theirs.pop("samples")
    saved = copy.deepcopy(samples)  # the tracker turns its numbers to text
    tracker.save_results_aggregated(results=theirs, samples=saved)
    for task in tasks:
        tracker.save_results_samples(task_name=task, samples=saved[task])
    options = {"include_path": own_tasks, "limit": 2, "bootstrap_iters": 0, "log_samples": True}
    ddp_eval.evaluate(model, tiny_tokenizer, tasks, output_path=str(tmp_path / "ours"), **options)

    found = compare_runs(read_run(tmp_path / "ours"), read_run(tmp_path / "theirs"))
    rounding = tolerance.of_kind("llama")
    allowed = max(largest_bound(samples[task], rounding) for task in tasks)
    assert found["same_requests"] and found["differences"] == []
    assert {task: part["requests"] for task, part in found["tasks"].items()} == dict(zip(tasks, (4, 2, 2), strict=True))
    assert (found["overall"]["answers"], found["overall"]["answers_flipped"]) == (2, 0)
    assert (found["overall"]["texts"], found["overall"]["texts_differing"]) == (2, 0)
    assert (found["overall"]["prompts_compared"], found["overall"]["prompts_differing"]) == (6, 0)
    for task in tasks:
        for key, one in found["tasks"][task]["metrics"].items():
            assert one["b"] == theirs["results"][task][key], key
            assert one["a"] == close_metric(key, one["b"], samples[task], rounding), key
    assert set(found["tasks"]["gen_boolean"]["metrics"]) == {"exact_match,first-word"}
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--expect", "within", f"{allowed:.6f}"]) == 0
    assert f"expected within {allowed:.6g} nats: yes" in capsys.readouterr().out


def test_a_pair_of_gold_and_prediction_is_no_value():
    """Catches Σ gold / Σ prediction shown as a mean where no results.json says what the metric is."""
    sample = {"metrics": ["acc", "mcc", "byte_perplexity"], "acc": True, "mcc": [1, 0], "byte_perplexity": [-12.5, 4]}
    assert list(document_metrics(sample)) == [("acc", 1.0, 1.0), ("byte_perplexity", -12.5, 4.0)]


def write_lines(path, samples):
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{first}"], "compare needs two runs or more"),
        (["{first}", "nowhere"], "there is no run at nowhere"),
        (
            ["{first}", "{first}", "--expect", "alike"],
            "--expect must be identical, or within and a number of nats above 0, got alike",
        ),
        (["{first}", "{first}", "--expect", "within", "-1"], "--expect must be identical"),
        (["{first}", "{first}", "--bits"], "compare: unrecognized arguments: --bits"),
        (["{first}", "{empty}"], "holds neither a run of ddp_eval"),
    ],
)
def test_mistakes_have_a_sentence(first, tmp_path, arguments, sentence):
    """Catches a traceback, or a comparison of nothing, where the command line cannot be meant."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        main([word.format(first=first, empty=tmp_path / "empty") for word in arguments])


def test_it_needs_no_torch(first):
    """Catches an import that makes a comparison of two small files wait for seconds."""
    import subprocess

    code = f"import sys; from ddp_eval.cli.compare import main; main([{str(first)!r}] * 2); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
