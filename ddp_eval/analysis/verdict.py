"""A comparison as tables and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ddp_eval.analysis.paired import LEAST_CLUSTERS
from ddp_eval.errors import UserError, printable

_TEXTS = ("task", "metric", "model", "state")  # columns that are flush left
NOT_AS_EXPECTED = 3  # the exit code, beside 2 for a user error and 1 for a bug


def read_expectation(words: Sequence[str] | None) -> float | None:
    """None: nothing is expected. 0: the same bits. Else the largest difference allowed, in nats."""
    if not words:
        return None
    if list(words) == ["identical"]:
        return 0.0
    if len(words) == 2 and words[0] == "within":
        try:
            nats = float(words[1])
        except ValueError:
            nats = math.nan
        if nats > 0:
            return nats
    raise UserError(f"--expect must be identical, or within and a number of nats above 0, got {' '.join(words)}")


def why_not(comparison: dict[str, Any], expectation: float | None) -> str | None:
    """What falls short of the expectation, in one phrase; None when nothing does."""
    if expectation is None:
        return None
    names = f"{comparison['a']['path']} and {comparison['b']['path']}"
    if not comparison["tasks"]:
        return f"{names} share no task"
    if not comparison["same_requests"]:
        return f"{names} do not hold the same requests"
    mute = [task for task, part in comparison["tasks"].items() if not part["requests"]]
    if mute:
        return f"no answer of {', '.join(mute)} could be compared in {names}"
    overall = comparison["overall"]
    if expectation == 0:
        changed = overall["requests_differing"]
        if changed:
            return f"{changed} of {overall['requests']} requests of {names} differ"
        metrics = _metrics_differing(comparison)
        return f"the requests of {names} are alike, but not {', '.join(metrics)}" if metrics else None
    if overall["texts_differing"]:
        return f"{overall['texts_differing']} of {overall['texts']} generated texts of {names} differ"
    summary = overall["delta_nats"]
    if summary is None:
        return None if overall["texts"] else f"{names} hold no log-probabilities"
    return f"{names} differ by up to {summary['max']:.3g} nats" if not summary["max"] <= expectation else None


def print_verdict(expectation: float | None, failures: Sequence[str], comparisons: Sequence[dict[str, Any]]) -> None:
    if expectation is not None:
        wanted = "identical" if expectation == 0 else f"within {expectation:g} nats"
        print(f"\nexpected {wanted}: " + (printable("; ".join(failures)) if failures else "yes"))
        turned = {name: sum(one["overall"][name] for one in comparisons) for name in ("answers_flipped", "greedy_flipped")}
        if expectation and any(turned.values()):
            print(f"{turned['answers_flipped']} answers and {turned['greedy_flipped']} greedy flags flipped")


def _metrics_differing(comparison: dict[str, Any]) -> list[str]:
    return [
        f"{task} {key.removesuffix(',none')}" for task, part in comparison["tasks"].items() for key in part["metrics_differing"]
    ]


def format_comparison(comparison: dict[str, Any]) -> str:
    """The comparison for a terminal; names out of files can do nothing to it."""
    overall, lines = comparison["overall"], [f"A  {comparison['a']['path']}", f"B  {comparison['b']['path']}", ""]
    rows = [
        ["task", "metric", "documents", "A", "B", "B - A", "± s.e.", "p bootstrap", "p McNemar", "right>wrong", "wrong>right"]
    ]
    named = {**comparison["tasks"], "all of these": overall}
    with_metrics = {**comparison["tasks"], **comparison["groups"], "all of these": overall}
    rows += [_metric_row(task, key, one) for task, part in with_metrics.items() for key, one in part["metrics"].items()]
    lines += [*format_table(rows).split("\n"), ""] if len(rows) > 1 else []
    if any(
        one.get("clusters", LEAST_CLUSTERS) < LEAST_CLUSTERS for part in with_metrics.values() for one in part["metrics"].values()
    ):
        lines[-1:] = [f"fewer than {LEAST_CLUSTERS} documents, or groups of them on one text, give no p-value by bootstrap", ""]
    rows = [
        [
            "task",
            "requests",
            "differ",
            "texts",
            "texts differ",
            "max nats",
            "mean",
            "p50",
            "p99",
            "answers",
            "flipped",
            "near ties",
            "greedy flips",
        ]
    ]
    lines += format_table(rows + [_request_row(task, part) for task, part in named.items()]).split("\n")
    lines += [f"near ties: flipped answers whose choices lie within {comparison['near_tie_nats']:g} nats in both runs"]
    for side, tasks in comparison["tasks_only_in"].items():
        if tasks:
            lines.append(f"only in {side.upper()}: {', '.join(tasks)}")
    lines += list_notes(comparison)
    for task, part in comparison["tasks"].items():
        if any(part["requests_only_in"].values()):
            counts = part["requests_only_in"]
            lines.append(f"{task}: {counts['a']} requests only in A, {counts['b']} only in B")
        if part["prompts_differing"]:
            lines.append(f"{task}: {part['prompts_differing']} of {part['prompts_compared']} documents have another prompt")
    lines += [f"{task}: no answer could be compared" for task, part in comparison["tasks"].items() if not part["requests"]]
    lines += ["", "identical: every request has the same bits" if comparison["identical"] else "not identical"]
    if metrics := _metrics_differing(comparison):
        lines.append(f"metrics that differ, in all or in some document: {', '.join(metrics)}")
    lines += _format_differences(comparison["differences"])
    return "\n".join(map(printable, lines))


def list_notes(comparison: dict[str, Any]) -> list[str]:
    """What a reader must know of the files that were compared, and of how their documents were paired."""
    lines = [f"{side.upper()}: {note}" for side, notes in comparison["notes"].items() for note in notes]
    for side, tasks in comparison["no_samples_in"].items():
        if tasks:
            lines.append(f"{side.upper()} holds no samples, only metrics, of {', '.join(tasks)}")
    return lines + [f"{task}: {line}" for task, part in comparison["tasks"].items() for line in _describe(part["pairing"])]


def _describe(pairing: dict[str, Any]) -> list[str]:
    lines = []
    if pairing["renumbered"]:
        lines.append(f"{pairing['renumbered']} documents have other numbers in B than in A: they are paired by what they hold")
    if pairing["other_content"]:
        lines.append(f"{pairing['other_content']} documents have the same number and prompt in A and B, but hold something else")
    if pairing["not_paired"]:
        lines.append(f"{pairing['not_paired']} numbers stand for other documents in B than in A: these are not compared")
    if pairing["by_number"]:
        lines.append("no document holds the same in A and B: they are paired by number alone")
    return lines


def jsonable(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _format_differences(found: list[dict[str, Any]]) -> list[str]:
    lines = ["", "what was run differs in:" if found else "what was run does not differ"]
    group = None
    for one in found:
        if one["group"] != group:
            group = one["group"]
            lines.append(f"  {group}")
        lines.append(f"    {one['key']}: {_short(one['a'])} | {_short(one['b'])}")
    return lines


def _metric_row(task: str, key: str, one: dict[str, Any]) -> list[str]:
    def show(name: str, form: str) -> str:
        return format(one[name], form) if one.get(name) is not None else ""

    documents = show("documents", ",")
    if "clusters" in one and one["clusters"] < one["documents"]:
        documents += f" in {one['clusters']:,}"
    name = key.removesuffix(",none")
    numbers = [show("a", ".6g"), show("b", ".6g"), show("difference", "+.4g"), show("stderr", ".2g")]
    tests = [show("p_bootstrap", ".3g"), show("p_mcnemar", ".3g")]
    return [task, name, documents, *numbers, *tests, show("right_to_wrong", ","), show("wrong_to_right", ",")]


def _request_row(task: str, part: dict[str, Any]) -> list[str]:
    summary = part["delta_nats"] or {}
    nats = [f"{summary[name]:.2g}" if name in summary else "" for name in ("max", "mean", "p50", "p99")]
    counts = [f"{part[name]:,}" for name in ("answers", "answers_flipped", "near_ties", "greedy_flipped")]
    texts = [f"{part['texts']:,}", f"{part['texts_differing']:,}"] if part["texts"] else ["", ""]
    return [task, f"{part['requests']:,}", f"{part['requests_differing']:,}", *texts, *nats, *counts]


def format_table(rows: list[list[str]]) -> str:
    """Columns that line up; one that is empty below its head is left out."""
    rows = [[printable(cell) for cell in row] for row in rows]
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    text = [column[0] in _TEXTS for column in kept]
    lines = []
    for row in zip(*kept, strict=True):
        cells = [cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, widths, text, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
