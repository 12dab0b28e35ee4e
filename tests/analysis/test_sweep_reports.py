"""A sweep's directory read back: its tables against the runs in it, its statistics against those of two runs, its page."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import look, needs_chromium
from sweeps import TASKS, entry, make_sweep, write_state

from ddp_eval.analysis import paired, sweep_compare
from ddp_eval.analysis.difference import compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.report import render as report_page
from ddp_eval.analysis.sweep import Metric, Score, read_sweep
from ddp_eval.analysis.sweep_compare import best_of, compare_sweep, holm
from ddp_eval.analysis.sweep_files import CSV, JSON, write_tables
from ddp_eval.analysis.sweep_report import render_sweep
from ddp_eval.cli import compare, report
from ddp_eval.errors import UserError

pytest.importorskip("matplotlib")
DONE = ["checkpoint-100", "checkpoint-200", "checkpoint-1000"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three checkpoints of the demo that are done, one that failed, one that waits. Tests may not change it."""
    return make_sweep(tmp_path_factory.mktemp("sweep") / "made", tmp_path_factory.mktemp("models"))


@pytest.fixture
def sweep(made, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "sweep"))


def scores_of(compared: dict[str, Any], task: str, key: str = "acc,none") -> list[dict[str, Any]]:
    return [one["metrics"][task][key] for one in compared["models"] if one["metrics"]]


def test_models_are_in_the_order_of_their_steps(made):
    """Catches a curve that runs back and forth: a sweep that watches takes checkpoints as they come, and 1000 is above 200."""
    models = read_sweep(made).models
    assert [(model.step, model.state) for model in models] == [
        (100, "done"), (200, "done"), (300, "failed"), (1000, "done"), (1100, "waiting"),
    ]  # fmt: skip
    assert [bool(model.scores) for model in models] == [True, True, False, True, False]
    tasks = list(dict.fromkeys(metric.task for metric in read_sweep(made).metrics))
    assert tasks[:3] == ["demo_boolean_expressions", "demo_lambada", "demo_mmlu"] and len(tasks) == 6  # a group's tasks last


def test_two_trainings_are_two_series(tmp_path):
    """Catches step 2 of one training between steps 1 and 3 of another, and revisions of one model taken for several."""
    names = ["7b/1/step-3", "13b/1/step-2", "7b/1/step-0001"]
    models = [entry(f"m{number}", "waiting", model=name, step=int(name[-1])) for number, name in enumerate(names)]
    models += [entry(f"r{step}", "waiting", model="org/pythia-70m", revision=f"step{step}", step=step) for step in (8, 4)]
    models += [entry("last", "waiting", model="x")]
    read = read_sweep(write_state(tmp_path / "sweep", models)).models
    assert [(model.series, model.step) for model in read] == [
        ("7b/1/step-#", 1), ("7b/1/step-#", 3), ("13b/1/step-#", 2), ("org/pythia-70m", 4), ("org/pythia-70m", 8), ("x", None),
    ]  # fmt: skip


def test_tables_hold_what_the_runs_report(sweep):
    """Catches a value under another model or metric, a model that failed left out, and a state file that two would write."""
    state = (sweep / "sweep.json").read_bytes()
    write_tables(sweep)
    with open(sweep / CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[f"{row['task']} {row['metric']},{row['filter']}"] = row["value"]
    for name in DONE:
        reported = json.loads((sweep / name / "results.json").read_text())["results"]
        wanted = {f"{task} {key}": value for task, values in reported.items() for key, value in values.items()}
        assert {key: float(value) for key, value in found[name].items()} == {
            key: value for key, value in wanted.items() if "," in key and "_stderr" not in key
        }
    (failed,) = [row for row in rows if row["name"] == "checkpoint-300"]
    assert (failed["state"], failed["reason"], failed["value"]) == ("failed", "there is no <b>config.json</b>", "")
    accuracy = json.loads((sweep / JSON).read_text())["models"][0]["metrics"]["demo_boolean_expressions"]["acc,none"]
    results = json.loads((sweep / "checkpoint-100" / "results.json").read_text())["results"]["demo_boolean_expressions"]
    assert (accuracy["value"], accuracy["stderr"]) == (results["acc,none"], results["acc_stderr,none"])
    assert accuracy["documents"] == 20 and accuracy["higher_is_better"] is True
    assert (sweep / "sweep.json").read_bytes() == state


def test_against_the_first(made):
    """Catches statistics of other pairs than the first and each model, and flips from a neighbour that is not one."""
    compared = compare_sweep(read_sweep(made))
    models = {one["name"]: one for one in compared["models"]}
    for name, before in (("checkpoint-200", "checkpoint-100"), ("checkpoint-1000", "checkpoint-200")):
        alone = compare_runs(read_run(made / DONE[0]), read_run(made / name))
        assert models[name]["flips"]["first"]["answers_flipped"] == alone["overall"]["answers_flipped"] > 0
        assert models[name]["flips"]["first"]["near_ties"] == alone["overall"]["near_ties"]
        neighbours = compare_runs(read_run(made / before), read_run(made / name))
        assert models[name]["flips"]["previous"]["name"] == before
        assert models[name]["flips"]["previous"]["answers_flipped"] == neighbours["overall"]["answers_flipped"]
        for task, part in alone["tasks"].items():
            for key, one in part["metrics"].items():
                paired = models[name]["metrics"][task][key]["paired"]
                assert {name: paired[name] for name in one} == one
    assert models[DONE[0]]["flips"] == {} and "paired" not in models[DONE[0]]["metrics"]["demo_mmlu"]["acc,none"]
    acc = scores_of(compared, "demo_boolean_expressions")
    assert acc[1]["paired"]["significant"] and acc[1]["paired"]["better"] and acc[1]["paired"]["p_holm"] < 0.05
    assert all(one["differences"] == [] for one in compared["models"])


@pytest.mark.parametrize(("nats", "share"), [("1e9", 1), ("-1", 0)])
def test_near_ties_of_a_sweep_are_as_near_as_asked(nats, share, made, capsys):
    """Catches --near_tie dropped where `compare` is given the directory of a sweep."""
    assert compare.main([str(made), "--near_tie", nats, "--json"]) == 0
    flips = [one["flips"]["first"] for one in json.loads(capsys.readouterr().out)["models"] if one["flips"]]
    assert [one["near_ties"] for one in flips] == [share * one["answers_flipped"] for one in flips]
    assert any(one["answers_flipped"] for one in flips)


def test_a_group_is_its_documents(made):
    """Catches a group without a p-value, though all of its documents are there, or one of a mean of means."""
    compared = compare_sweep(read_sweep(made))
    for number, name in enumerate(DONE[1:], 1):
        tasks = compare_runs(read_run(made / DONE[0]), read_run(made / name))["tasks"]
        parts = [part["metrics"]["acc,none"] for task, part in tasks.items() if task.startswith("demo_mmlu_")]
        paired = scores_of(compared, "demo_mmlu")[number]["paired"]
        for count in ("documents", "right_to_wrong", "wrong_to_right"):
            assert paired[count] == sum(part[count] for part in parts)
        assert paired["documents"] == 60
        groups = compare_runs(read_run(made / DONE[0]), read_run(made / name))["groups"]
        assert list(groups) == ["demo_mmlu"]
        assert {name: paired[name] for name in groups["demo_mmlu"]["metrics"]["acc,none"]} == groups["demo_mmlu"]["metrics"][
            "acc,none"
        ]


def test_runs_have_a_row_for_a_group(sweep, capsys):
    """Catches the one number that is quoted of MMLU missing where two runs are compared, or a p-value of another mean."""
    pair = [str(sweep / name) for name in DONE[::2]]
    assert compare.main(pair) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("demo_mmlu ")]
    assert row[:3] == ["demo_mmlu", "acc", "60"] and len(row) > 8
    assert compare.main([*pair, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    (a, b) = (json.loads((Path(place) / "results.json").read_text())["results"]["demo_mmlu"]["acc,none"] for place in pair)
    shown = found["groups"]["demo_mmlu"]["metrics"]["acc,none"]
    assert (shown["a"], shown["b"]) == pytest.approx((a, b)) and 0 < shown["p_mcnemar"] <= 1 and shown["documents"] == 60
    page = report_page([read_run(place) for place in pair], 1)
    assert re.search(r"<td>demo_mmlu</td><td class=.text.>acc</td>", page)
    results = json.loads((sweep / DONE[2] / "results.json").read_text())  # as of a group that weighs its tasks alike
    results["results"]["demo_mmlu"]["acc,none"] += 0.01
    (sweep / DONE[2] / "results.json").write_text(json.dumps(results))
    alone = compare_runs(read_run(pair[0]), read_run(pair[1]))["groups"]["demo_mmlu"]["metrics"]["acc,none"]
    assert alone == {"a": a, "b": b + 0.01, "difference": pytest.approx(b + 0.01 - a)}


def test_a_group_that_weighs_tasks_alike_has_no_pairs(sweep):
    """Catches a p-value of the documents' mean beside a reported mean of the tasks' means."""
    for name in DONE:
        file = sweep / name / "results.json"
        results = json.loads(file.read_text())
        results["results"]["demo_mmlu"]["acc,none"] += 0.01
        file.write_text(json.dumps(results))
    assert all("paired" not in one for one in scores_of(compare_sweep(read_sweep(sweep)), "demo_mmlu"))


def test_against_the_best(made):
    """Catches the worst perplexity taken for the best, and one model as the best of all metrics."""
    compared = compare_sweep(read_sweep(made), "best")
    references = {(one["task"], one["key"]): one["reference"] for one in compared["metrics"]}
    for task, key, choose in (("demo_boolean_expressions", "acc,none", max), ("demo_lambada", "perplexity,none", min)):
        scores = scores_of(compared, task, key)
        best = choose(range(3), key=lambda number: scores[number]["value"])
        assert references[task, key] == DONE[best]
        assert ["paired" in score for score in scores] == [number != best for number in range(3)]
        assert not any(score["paired"]["better"] for score in scores if "paired" in score)


def test_the_best_by_hand():
    """Catches a direction that is guessed, NaN as the best, and the last of equal ones."""

    def score(value: float, higher: bool | None) -> Score:
        return Score(value, None, None, higher)

    assert best_of([("a", score(0.5, True)), ("b", score(0.7, True)), ("c", score(0.7, True))]) == "b"
    assert best_of([("a", score(float("nan"), False)), ("b", score(3, False)), ("c", score(2, False))]) == "c"
    assert best_of([("a", score(1, None))]) is None and best_of([]) is None


def test_holm_by_hand():
    """Catches Bonferroni, values in another order, and one below a smaller one's."""
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]

    assert holm([0.01, 0.04], 6) == pytest.approx([0.06, 0.2])  # four others are not known


def judged(against: str, count: int, p: float) -> tuple[int, list[dict[str, Any]]]:
    """What is said of `count` models, each but the last with a p-value by bootstrap of its difference from that."""
    scores: list[dict[str, Any]] = [
        {"value": 0.5, "higher_is_better": True, "paired": {"difference": -0.1, "p_mcnemar": None, "p_bootstrap": p}}
        for _ in range(count - 1)
    ]
    return sweep_compare._judge([*scores, {"value": 0.6, "higher_is_better": True}], against), [one["paired"] for one in scores]


def test_the_best_is_corrected_for_all_pairs():
    """Catches stars for chance: the best of k equal models on some documents is ahead of the others by luck alone."""
    comparisons, found = judged("best", 6, 0.006)
    assert comparisons == 15 and [one["p_holm"] for one in found] == pytest.approx([0.09] * 5)
    assert not any(one["significant"] for one in found)
    comparisons, found = judged("first", 6, 0.006)
    assert comparisons == 5 and [one["p_holm"] for one in found] == pytest.approx([0.03] * 5)
    assert all(one["significant"] for one in found)


@pytest.mark.parametrize(("count", "starred"), [(32, True), (33, False)])
def test_the_least_p_value_may_have_a_star(count, starred):
    """Catches a sweep of so many models that nothing found by bootstrap can be significant, and that does not say so."""
    comparisons, found = judged("best", count, paired.LEAST_P)
    assert found[0]["significant"] is starred
    said = sweep_compare.explain_stars({"against": "best", "metrics": [{"comparisons": comparisons}]})
    assert said.startswith("p below 0.05 after Holm's correction for all pairs of models in that metric")
    assert ("of more than 500 comparisons (here up to 528) the least p by bootstrap, 0.0001, has none" in said) is not starred


@pytest.mark.parametrize("file", ["results.json", "scores.parquet", "manifest.json"])
def test_one_damaged_run_is_named(file, sweep, capsys):
    """Catches one run that keeps the others from being shown, and the first in a sweep that nothing is compared with."""
    (sweep / "checkpoint-100" / file).write_text("{")
    write_tables(sweep)
    assert compare.main([str(sweep)]) == 0
    out = capsys.readouterr().out
    assert f"without scores: checkpoint-100, unreadable: {sweep}/checkpoint-100/{file}" in out
    (last,) = [one for one in compare_sweep(read_sweep(sweep))["models"] if one["name"] == "checkpoint-1000"]
    assert last["flips"]["first"]["name"] == "checkpoint-200"
    assert file in render_sweep(read_sweep(sweep))


def test_a_run_that_lies_elsewhere_is_not_read(sweep, tmp_path):
    """Catches somebody's sweep that shows, through a link, a run which its reader did not mean to show."""
    shutil.move(sweep / "checkpoint-200", tmp_path / "private")
    (sweep / "checkpoint-200").symlink_to(tmp_path / "private")
    (model,) = [model for model in read_sweep(sweep).models if model.name == "checkpoint-200"]
    assert model.state == "unreadable" and model.reason is not None and "is a symbolic link to" in model.reason
    assert not model.scores


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ([entry("../run")], r'models\[0\].name must be the name of a directory in the sweep\'s, got "../run"'),
        ([entry("..")], "must be the name of a directory"),
        ([entry("\ud800")], "must be the name of a directory"),
        ([entry("x" * 256)], "must be the name of a directory"),
        ([entry("a"), entry("a")], 'models must name each model once, and "a" is there twice'),
        ([entry("a", step="1")], r'models\[0\].step must be a whole number, got "1"'),
        ([{"name": "a"}], r"models\[0\].state is missing"),
        ({}, "models must be a list"),
    ],
)
def test_a_state_that_cannot_be_meant(models, sentence, tmp_path):
    """Catches a name that leads out of the directory, and tracebacks over what is no state."""
    with pytest.raises(UserError, match=sentence):
        read_sweep(write_state(tmp_path / "sweep", models))


def test_another_version(tmp_path):
    """Catches a later version's file misread."""
    write_state(tmp_path / "sweep", [])
    (tmp_path / "sweep" / "sweep.json").write_text('{"version": 2, "models": []}')
    with pytest.raises(UserError, match=r"sweep\.json: version must be 1, the version that this ddp_eval reads, got 2"):
        read_sweep(tmp_path / "sweep")


def test_compare_prints_models_and_metrics(made, capsys):
    """Catches a table without a model or metric, JSON with NaN in it, and lines that no terminal holds."""
    assert compare.main([str(made)]) == 0
    out = capsys.readouterr().out
    for word in (*DONE, *(str(metric) for metric in read_sweep(made).metrics)):
        assert word in out
    assert "without scores: checkpoint-300, failed: there is no <b>config.json</b>\n" in out
    assert max(map(len, out.splitlines())) <= 140
    assert compare.main([str(made), "--json", "--against", "best"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert printed["against"] == "best" and len(printed["models"]) == 5


def test_the_page_is_in_the_directory(sweep, tmp_path, capsys):
    """Catches a page that nobody finds, and another reference than the one that was asked for."""
    assert report.main([str(sweep)]) == 0 and f"the report is in {sweep}/report.html" in capsys.readouterr().out
    assert "the first, checkpoint-100" in (sweep / "report.html").read_text()
    report.main([str(sweep), "--against", "best", "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "the best model in each metric" in page and ">best</small>" in page


def test_a_sweep_is_no_run(made, sweep, tmp_path):
    """Catches a sweep among runs called a directory without a run, and flags of the one taken for the other."""
    for main, command in ((compare.main, "compare"), (report.main, "report")):
        with pytest.raises(UserError, match=f"{sweep} is a sweep: {command} takes one alone; to set runs side"):
            main([str(sweep), str(made / DONE[0])])
        with pytest.raises(UserError, match="--against is for the directory of a sweep"):
            main([str(made / DONE[0]), str(made / DONE[1]), "--against", "best"])
    with pytest.raises(UserError, match="--expect is for runs, not for a sweep"):
        compare.main([str(made), "--expect", "identical"])


@pytest.mark.parametrize("models", [[], [entry("a", "waiting", seconds=None)]])
def test_nothing_is_done_yet(models, tmp_path, capsys):
    """Catches a page that a sweep cannot have before its first model is done."""
    place = write_state(tmp_path / "sweep", models)
    write_tables(place)
    assert compare.main([str(place)]) == 0 and f"0 of {len(models)} models evaluated" in capsys.readouterr().out
    assert report.main([str(place)]) == 0 and "Scores" not in (place / "report.html").read_text()


def test_models_without_steps(sweep):
    """Catches a line drawn from one model to another, where there is no step between them."""
    state = json.loads((sweep / "sweep.json").read_text())
    for model in state["models"]:
        model["step"] = None
    write_state(sweep, state["models"])
    page = render_sweep(read_sweep(sweep))
    assert "Metrics by model" in page and "Metrics against step" not in page
    compared = compare_sweep(read_sweep(sweep))
    assert [one["name"] for one in compared["models"] if one["metrics"]] == DONE[::-1]  # in the order of sweep.json
    assert compared["models"][-2]["flips"]["previous"]["name"] == "checkpoint-200"


def test_another_setup_is_named(sweep, capsys):
    """Catches a checkpoint of last week, evaluated with other packages, compared as if nothing were different."""
    file = sweep / "checkpoint-1000" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["packages"]["transformers"] = "0.0"
    file.write_text(json.dumps(manifest))
    compare.main([str(sweep)])
    assert "checkpoint-1000 was run differently from the first: packages.transformers" in capsys.readouterr().out
    assert "Differences in set-up" in render_sweep(read_sweep(sweep))


HOSTILE = "<script>alert(1)</script>$x^{$\x1b[31m"


def test_hostile_text_stays_text(sweep, capsys):
    """Catches a name, reason or task that becomes markup, a formula, or a command to the terminal."""
    state = json.loads((sweep / "sweep.json").read_text())
    name = HOSTILE.replace("/", "|")
    (sweep / "checkpoint-100").rename(sweep / name)
    for model in state["models"]:
        model["reason"] = HOSTILE
        model["model"] = HOSTILE + model["model"]
        model["name"] = model["name"].replace("checkpoint-100", name) if model["name"] == "checkpoint-100" else model["name"]
    state["models"][-1]["model"] += "other series"
    write_state(sweep, state["models"])
    for model in DONE[1:]:
        file = sweep / model / "results.json"
        results = json.loads(file.read_text())
        results["results"][HOSTILE] = {"acc,none": 0.5}
        file.write_text(json.dumps(results))
    (sweep / name / "report.html").write_text("")
    write_tables(sweep)
    for against in ("first", "best"):
        page = render_sweep(read_sweep(sweep), against)
        assert "&lt;script&gt;alert(1)" in page and "<script" not in page
        compare.main([str(sweep), "--against", against])
        assert "\x1b" not in (out := capsys.readouterr().out) and "\\x1b[31m" in out
    assert re.findall(r'href="([^#"]*)"', page) == ["./%3Cscript%3Ealert%281%29%3C%7Cscript%3E%24x%5E%7B%24%1B%5B31m/report.html"]


def test_it_asks_nothing_of_the_network(made):
    """Catches a font, script or picture that is not in the file."""
    page = render_sweep(read_sweep(made))
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page) and not re.findall(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/1999/xlink"}
    assert not re.findall(r"#0102\w\w|#0{6}\b", page)  # each colour is the page's own, which follows light and dark


@needs_chromium
@pytest.mark.parametrize("width", [1100, 390])
def test_in_a_browser(made, width, tmp_path):
    """Catches text cut off on a desk or a phone, a plot outside of its box, and an empty table."""
    seen, console = look(render_sweep(read_sweep(made)), tmp_path, width)
    assert console == [] and seen["clipped"] == []
    assert seen["plots"] == len(read_sweep(made).metrics) >= 7
    assert seen["rows"]["scores-table"] == seen["rows"]["flips-table"] == 3


def test_steps_over_several_orders_of_magnitude():
    """Catches steps 1, 2, 4, ... of a training all at the left edge, and more series than there are colours."""
    from ddp_eval.analysis import plots

    steps = [2**power for power in range(18)]
    assert plots.curves([("a", steps, [0.5] * 18, [None] * 18)]).count("10,000") == 1
    perplexities = plots.curves([("a", [1, 2, 3], [1e9, 30.0, 10.0], [1e11, 1.0, None])])
    assert "10" in perplexities and "2.5e" not in perplexities  # powers of ten
    many = [(f"series {number} $", [1, 2], [0.1, 0.2], [0.01, None]) for number in range(15)]
    drawn = plots.curves(many)
    assert all(f"series {number} $" in drawn for number in range(15))
    assert "stroke-dasharray" in drawn and "stroke-dasharray" not in plots.curves(many[:10])  # the colours come again
    drawn = plots.curves([(f"series {number} $", [1, 2], [0.1, 0.2], [0.01, None]) for number in range(41)])
    assert "series 39 $" in drawn and "series 40 $" not in drawn and "step; the first 40 of 41" in drawn


def test_the_tasks_are_real(made):
    """Catches a fixture whose runs are all alike, on which nothing above could fail."""
    values = {scores.scores[Metric(TASKS[0], "acc,none")].value for scores in read_sweep(made).done}
    assert len(values) > 1
