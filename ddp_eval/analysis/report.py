"""`python -m ddp_eval report DIR [DIR2 …]`: one self-contained page of a run, and of its differences from others.

Everything is in the file: styles, plots as SVG, samples as JSON. It asks nothing of any network.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_eval.analysis import plots
from ddp_eval.analysis.difference import NEAR_TIE_NATS, answers_of, asks_twice, compare_runs
from ddp_eval.analysis.matching import align
from ddp_eval.analysis.read import Numbering, Run, read_samples, result_rows
from ddp_eval.analysis.verdict import jsonable, list_notes
from ddp_eval.output.documents import TRANSFORMS, arguments_of
from ddp_eval.system.read_back import read_json
from ddp_eval.telemetry import summary

if TYPE_CHECKING:
    import jinja2

REPORT = "report.html"  # beside what it is about
_PROMPT_CHARACTERS = 6000  # of a longer prompt the end is shown
_MARKED = 5  # flipped documents and near ties to browse, for each other document
_RIGHT_OR_WRONG = ("acc", "exact_match")  # metrics that say it of a document


def render(runs: Sequence[Run], most_samples: int) -> str:
    """The page. most_samples: documents of each task to browse; up to `_MARKED` times as many that are marked come on top."""
    first = runs[0]
    measured = _read_telemetry(first)
    comparisons = [{**one, "notes": list_notes(one)} for one in (compare_runs(first, run) for run in runs[1:])]
    samples, documents, left_out = _samples(first, [align(first, run)[0] for run in runs[1:]], most_samples)
    right, wrong = _margins(first)
    return template("report.html.jinja").render(
        title=first.results.get("model_name") or first.path.name,
        path=str(first.path),
        facts=_facts(first, measured),
        results=result_rows(first.results),
        results_plot=_results_plot(first),
        margins_plot=plots.margins(right, wrong, NEAR_TIE_NATS) if len(right) + len(wrong) else None,
        margins_count=len(right) + len(wrong),
        near_ties=int((np.concatenate([right, wrong]) <= NEAR_TIE_NATS).sum()),
        near_tie_nats=NEAR_TIE_NATS,
        telemetry=measured,
        phases=[name for name in summary.PHASES if measured and any(name in rank["phases_s"] for rank in measured["ranks"])],
        advice=summary.advise(measured) if measured else [],
        timeline_plot=plots.timeline(measured["ranks"]) if measured else None,
        utilisation_plot=plots.utilisation(measured["ranks"], measured["sample_columns"]) if measured else None,
        collectives=_collectives(measured) if measured else [],
        comparisons=[{**one, "plot": _difference_plot(one)} for one in comparisons],
        samples=samples,
        samples_json=_script_json({"documents": documents, "left_out": left_out, "shown": samples}),
        manifest=json.dumps(jsonable(first.manifest), indent=1, ensure_ascii=False),
    )


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page beside this module. All that it shows is escaped but for what the page marks as safe: our own plots and scripts."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader
    )
    environment.filters["number"] = _number
    return environment.get_template(name)


def _read_telemetry(run: Run) -> dict[str, Any] | None:
    from ddp_eval.output import shapes

    file = run.path / "telemetry.json"
    there = run.kind == "ddp_eval" and os.path.lexists(file)
    return read_json(file, shapes.TELEMETRY, run.path) if there else None


def _facts(run: Run, measured: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The figures at the top of the page."""
    manifest = run.manifest
    gpus = manifest.get("hardware", {}).get("gpus") or []
    engine, ranks = manifest.get("engine", {}), manifest.get("ranks", {})
    facts = [
        ("requests", f"{manifest['requests']:,}" if "requests" in manifest else ""),
        ("precision", engine.get("dtype", "").removeprefix("torch.")),
        ("ranks", " on ".join(str(ranks[name]) for name in ("world_size", "device") if name in ranks)),
        ("hardware", gpus[0]["name"] if gpus else manifest.get("hardware", {}).get("cpu", "")),
    ]
    if measured:
        facts += [
            ("wall time", f"{measured['wall_s']:.1f} s"),
            ("tokens/s", _number(measured["tokens_per_s"], ",.0f")),
            ("useful tokens/s", _number(measured["useful_tokens_per_s"], ",.0f")),
            ("sharing", _number(measured["sharing"], ".2f")),
            ("padding", _number(measured["padding"], ".2f")),
            ("imbalance", _number(measured["imbalance"], ".0%")),
            ("idle", _number(measured["idle_share"], ".0%")),
        ]
        shares = [rank["share_of_peak"] for rank in measured["ranks"] if rank["share_of_peak"] is not None]
        facts += [("share of peak", f"{sum(shares) / len(shares):.0%}")] if shares else []
    return [(name, value) for name, value in facts if value]


def _results_plot(run: Run) -> str | None:
    """The metrics that are shares of documents; a perplexity has no place on their axis."""
    rows = [row for row in result_rows(run.results) if 0 <= row["value"] <= 1 and row["metric"] not in TRANSFORMS]
    named = [(f"{row['task']} {row['metric']}", float(row["value"]), row["stderr"]) for row in rows]
    return plots.intervals(named, "share of documents, 95% interval") if named else None


def _difference_plot(comparison: dict[str, Any]) -> str | None:
    named = {**comparison["tasks"], **comparison["groups"], "all of these": comparison["overall"]}
    rows = [
        (f"{task} {key.removesuffix(',none')}", one["difference"], one["stderr"])
        for task, part in named.items()
        for key, one in part["metrics"].items()
        if one.get("stderr") is not None and "right_to_wrong" in one
    ]
    return plots.intervals(rows, "B - A, share of documents, paired 95% interval", zero=True) if rows else None


def _margins(run: Run) -> tuple[Any, Any]:
    """Leads, in nats, of answers that were right and of those that were wrong, over all tasks with choices."""
    right, wrong = [np.zeros(0)], [np.zeros(0)]
    for task, requests in run.requests.items():
        doc_ids, _, leads = answers_of(requests, asks_twice(run, task))
        accuracy = run.metrics.get(task, {}).get("acc,none")
        if accuracy is not None and len(doc_ids):
            known = dict(zip(accuracy.doc_id.tolist(), accuracy.value.tolist(), strict=True))
            hit = np.array([known.get(doc_id, 0.0) > 0.5 for doc_id in doc_ids.tolist()])
            right.append(leads[hit])
            wrong.append(leads[~hit])
    return np.concatenate(right), np.concatenate(wrong)


def _collectives(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Sums over all ranks by collective; seconds are the longest of any rank."""
    names = dict.fromkeys(name for rank in measured["ranks"] for name in rank["collectives"])
    rows = []
    for name in names:
        parts = [rank["collectives"][name] for rank in measured["ranks"] if name in rank["collectives"]]
        total = {key: sum(part[key] for part in parts) for key in ("sent_bytes", "received_bytes")}
        calls, seconds = (max(part[key] for part in parts) for key in ("calls", "seconds"))
        rows.append({"name": name, **total, "calls": calls, "seconds": seconds})
    return rows


def _samples(run: Run, others: Iterable[Run], most: int) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, int]]:
    """What the browser shows, flipped documents first; by task the number of documents, and of marked ones that are left out.

    lm_eval writes all documents once for each filter: the first gives a document's requests, all of them its metrics.
    """
    shown, documents, left_out = [], {}, {}
    for task, file in run.samples.items():
        marks, twice = _marks(run, others, task), asks_twice(run, task)
        chosen = set(sorted(marks, key=lambda doc_id: "flipped" not in marks[doc_id])[: _MARKED * most])
        seen: set[int] = set()
        numbering = Numbering()
        kept: dict[int, dict[str, Any]] = {}
        for sample in read_samples(file, run.path):
            doc_id = numbering.number(sample)
            if doc_id not in seen and (len(seen) < most or doc_id in chosen):
                kept[doc_id] = {"task": task, "doc": doc_id, "marks": marks.get(doc_id, []), **_show_sample(sample, twice)}
            seen.add(doc_id)
            if doc_id in kept:
                _add_filter(kept[doc_id], sample)
        shown += sorted(kept.values(), key=lambda one: "flipped" not in one["marks"])
        documents[task] = len(seen)
        left_out[task] = len(seen & marks.keys() - kept.keys())
    return shown, documents, left_out


def _marks(run: Run, others: Iterable[Run], task: str) -> dict[int, list[str]]:
    """By document: "flipped" where another run chose or generated another answer, "near tie" where rounding may do so."""
    doc_ids, best, leads = _choices(run, task)
    flipped: set[int] = set()
    for other in others:
        other_ids, other_best, _ = _choices(other, task)
        answers = dict(zip(other_ids.tolist(), other_best.tolist(), strict=True))
        flipped |= {
            doc_id
            for doc_id, choice in zip(doc_ids.tolist(), best.tolist(), strict=True)
            if answers.get(doc_id, choice) != choice
        }
        texts = other.texts.get(task, {})
        flipped |= {key[0] for key, text in run.texts.get(task, {}).items() if texts.get(key, text) != text}
    marks = {doc_id: ["flipped"] for doc_id in sorted(flipped)}
    for doc_id in doc_ids[leads <= NEAR_TIE_NATS].tolist():
        marks.setdefault(doc_id, []).append("near tie")
    return marks


def _choices(run: Run, task: str) -> tuple[Any, Any, Any]:
    """What `answers_of` says, of no documents where the task has no choices."""
    nothing = np.zeros(0, dtype=np.int64)
    return answers_of(run.requests[task], asks_twice(run, task)) if task in run.requests else (nothing, nothing, np.zeros(0))


def _show_sample(sample: dict[str, Any], twice: bool) -> dict[str, Any]:
    arguments = arguments_of(sample)
    contexts = [str(argument[0]) for argument in arguments]
    alike = len(set(contexts)) == 1
    choices: list[dict[str, Any]] = []
    for argument, resps in zip(arguments, sample["resps"], strict=True):
        if len(argument) > 1 and not isinstance(resps[0], list):  # generated
            choices += [{"text": str(text)[-_PROMPT_CHARACTERS:], "nats": "", "greedy": None} for text in resps]
            continue
        text = str(argument[-1]) if alike and len(argument) > 1 else "".join(map(str, argument))
        nats, greedy = (resps[0][0], str(resps[0][1]) == "True") if isinstance(resps[0], list) else (resps[0], None)
        choices.append({"text": text[-_PROMPT_CHARACTERS:], "nats": str(nats), "greedy": greedy})
    return {
        "prompt": contexts[0][-_PROMPT_CHARACTERS:] if alike and len(arguments[0]) > 1 else "",
        "cut": len(contexts[0]) > _PROMPT_CHARACTERS,
        "choices": choices,
        "answers": len(choices) // 2 if twice else len(choices),  # the first ones, among which the best is marked
        "target": sample.get("target"),
        "metrics": {},
        "wrong": None,
    }


def _add_filter(shown: dict[str, Any], sample: dict[str, Any]) -> None:
    """Metrics behind one filter; the first that says right or wrong marks the document."""
    metrics = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], (bool, int, float))}
    kept = sample.get("filter", "none")
    behind = "" if kept == "none" else f" ({kept})"
    shown["metrics"] |= {name + behind: value for name, value in metrics.items()}
    judged = next((metrics[name] for name in _RIGHT_OR_WRONG if name in metrics), None)
    if shown["wrong"] is None and judged is not None:
        shown["wrong"] = not judged


def _script_json(value: Any) -> str:
    """JSON that may stand inside <script>: nothing in it can end the element."""
    text = json.dumps(jsonable(value), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _number(value: Any, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)
