"""report.html, read in headless Chromium where there is one: no errors, tables filled, nothing clipped, nothing fetched."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from browser import look, needs_chromium

from ddp_eval.analysis import plots, report
from ddp_eval.analysis.read import read_run
from ddp_eval.cli.report import main
from ddp_eval.errors import UserError

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    """The demo in packs and in rows, a few documents."""
    from ddp_eval.config import Config
    from ddp_eval.distributed.world import join_group
    from ddp_eval.run import runner

    place = tmp_path_factory.mktemp("runs")
    tasks = ["demo_boolean_expressions", "demo_wikitext"]
    for name, packing in (("packs", True), ("rows", False)):
        config = Config(
            model_args={"pretrained": "demo"},
            tasks=tasks,
            limit=6,
            output_path=str(place / name),
            log_samples=True,
            packing=packing,
            bootstrap_iters=0,
        )
        runner.run(config, join_group("cpu"))
    return place / "packs", place / "rows"


@pytest.fixture(scope="module")
def page(run_dirs):
    assert main([str(run_dirs[0]), str(run_dirs[1])]) == 0
    return (run_dirs[0] / "report.html").read_text(encoding="utf-8")


@needs_chromium
@pytest.mark.parametrize("width", [1100, 360])
def test_in_a_browser(page, tmp_path, width):
    """Catches a script that fails, an empty table or plot, samples that do not show, and text cut off on a desk or a phone."""
    seen, console = look(page, tmp_path, width)
    assert console == []
    assert seen["clipped"] == []
    assert seen["plots"] == 5 and seen["texts"] > 40
    assert seen["rows"] == {"results-table": 4, "phases-table": 1, "comparison-table": 4, "drift-table": 2}
    assert seen["picked"] == "6 of 6 documents shown" and seen["samples"] == 6 and seen["choices"] == 12


@needs_chromium
def test_the_browser_would_tell(tmp_path):
    """Catches a probe that sees nothing: a broken script and a clipped text must show."""
    broken = '<body><main><p style="width:3em;white-space:nowrap">much too long</p></main><script>nothing.here()</script></body>'
    seen, console = look(broken, tmp_path)
    assert [text.split()[0] for text in seen["clipped"]] == ["P"]
    assert len(console) == 1 and "nothing is not defined" in console[0]


def test_it_asks_nothing_of_the_network(page):
    """Catches a font, script or picture that is not in the file."""
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
    assert "@import" not in page and not re.findall(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", re.sub(r"<(script|pre)[^>]*>.*?</\1>", "", page, flags=re.DOTALL))) <= {
        "http://www.w3.org/1999/xlink"
    }


def test_plots_follow_the_page(page):
    """Catches a colour that stays dark on dark, and an absolute size that a phone cannot shrink."""
    plot = plots.intervals([("a task", 0.5, 0.1), ("<b>", 0.7, None)], "share")
    assert plot.startswith("<svg viewBox=") and "var(--ink)" in plot and "var(--c0)" in plot
    assert not re.findall(r"#0102\w\w|#0{6}\b|#000\b", plot)
    assert "&lt;b&gt;" in plot and "<b>" not in plot


def test_hostile_text_stays_text(run_dirs, tmp_path):
    """Catches a prompt or a task's name that becomes markup or ends the script."""
    place = shutil.copytree(run_dirs[0], tmp_path / "run")
    file = place / "samples_demo_boolean_expressions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["arguments"]["gen_args_0"]["arg_0"] = line["arguments"]["gen_args_1"]["arg_0"] = "</script><script>alert(1)//\u2028"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "batching": "<script>alert(2)</script>"}))
    page = report.render([read_run(place)], 100)
    assert "alert(1)" in page and "alert(2)" in page
    assert "<script>alert" not in page and page.count("</script>") == 2


SAMPLE = {"filter": "none", "target": "t", "metrics": ["exact_match"], "exact_match": 0.0}


def generated(doc_id, text, **change):
    asked = {"arguments": {"gen_args_0": {"arg_0": "ask", "arg_1": {}}}, "resps": [[text]], "doc": {}, "doc_id": doc_id}
    return {**SAMPLE, **asked, **change}


def write_samples(place, samples):
    """A directory of lm_eval's samples of the task t."""
    place.mkdir()
    (place / "samples_t.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return read_run(place)


def test_texts_that_differ_are_found(tmp_path):
    """Catches a generated answer that another run did not give, lost beyond the first documents, and a cut without a word."""
    first = write_samples(tmp_path / "a", [generated(doc_id, "the same") for doc_id in range(5)])
    other = write_samples(tmp_path / "b", [generated(doc_id, "another" if doc_id == 3 else "the same") for doc_id in range(5)])
    shown, documents, left_out = report._samples(first, [other], 2)
    assert [(one["doc"], one["marks"]) for one in shown] == [(3, ["flipped"]), (0, []), (1, [])]
    assert documents == {"t": 5} and left_out == {"t": 0}
    page = report.render([first, other], 2)
    assert "1 of 5 generated texts differ" in page and "<th>texts differ</th>" in page


def test_marked_documents_have_a_limit_too(tmp_path):
    """Catches a page of a gigabyte for two models whose answers nearly all differ, and documents left out without a word."""

    def choices(doc_id, nats):
        arguments = {f"gen_args_{idx}": {"arg_0": "ask", "arg_1": word} for idx, word in enumerate(["no", "yes"])}
        return {**generated(doc_id, ""), "arguments": arguments, "resps": [[[str(value), "False"]] for value in nats]}

    ties = [choices(doc_id, (-1.0, -1.001)) for doc_id in range(30)]
    first = write_samples(tmp_path / "a", ties)
    turned = [choices(doc_id, (-3.0, -1.001)) if doc_id in (7, 29) else one for doc_id, one in enumerate(ties)]
    shown, documents, left_out = report._samples(first, [write_samples(tmp_path / "b", turned)], 2)
    assert [one["doc"] for one in shown] == [7, 29, 0, 1, 2, 3, 4, 5, 6, 8]
    assert shown[0]["marks"] == ["flipped", "near tie"] and shown[2]["marks"] == ["near tie"]
    assert documents == {"t": 30} and left_out == {"t": 20}
    assert '"left_out": {"t": 20}' in report.render([first, read_run(tmp_path / "b")], 2)


def test_all_filters_are_shown(tmp_path):
    """Catches the metrics of every filter but the first left out: lm_eval writes all documents once for each."""
    strict = [generated(doc_id, "say 4", filter="strict-match") for doc_id in range(2)]
    flexible = [generated(doc_id, "say 4", filter="flexible-extract", exact_match=1.0) for doc_id in range(2)]
    shown, documents, _ = report._samples(write_samples(tmp_path / "a", strict + flexible), [], 100)
    assert documents == {"t": 2}
    wanted = {"exact_match (strict-match)": 0.0, "exact_match (flexible-extract)": 1.0}
    assert [(one["metrics"], one["wrong"]) for one in shown] == [(wanted, True)] * 2


def test_a_metric_that_says_neither_right_nor_wrong(tmp_path):
    """Catches a word error rate taken for right or wrong."""
    sample = generated(0, "text", metrics=["wer"], wer=0.0)
    (shown,) = report._samples(write_samples(tmp_path / "a", [sample]), [], 100)[0]
    assert shown["wrong"] is None and shown["metrics"] == {"wer": 0.0}


def test_the_best_is_one_of_the_answers(tmp_path):
    """Catches a choice without its question, of acc_mutual_info, marked as the answer, or counted as a flip."""
    nats = [-5.0, -4.0, -1.0, -2.0]
    arguments = {f"gen_args_{idx}": {"arg_0": "ask" if idx < 2 else "", "arg_1": ["no", "yes"][idx % 2]} for idx in range(4)}
    resps = [[[str(value), "False"]] for value in nats]
    sample = {**generated(0, ""), "arguments": arguments, "resps": resps, "metrics": ["acc_mutual_info"], "acc_mutual_info": 1.0}
    turned = {**sample, "resps": [*resps[:2], *reversed(resps[2:])]}
    first, other = write_samples(tmp_path / "a", [sample]), write_samples(tmp_path / "b", [turned])
    (shown,) = report._samples(first, [other], 100)[0]
    assert (shown["answers"], len(shown["choices"]), shown["marks"]) == (2, 4, [])


def test_margins_of_equal_choices_have_a_place():
    """Catches a lead of zero on a logarithmic axis."""
    assert plots.margins(np.array([0.0, 1.0]), np.array([np.inf]), 0.01).startswith("<svg")


def test_mistakes_have_a_sentence(tmp_path):
    """Catches a traceback for a directory that is no run, and a report written where it cannot be."""
    with pytest.raises(UserError, match="there is no run at"):
        main([str(tmp_path / "nothing")])
