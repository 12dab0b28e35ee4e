"""A sweep's comparison as tables for a terminal."""

from __future__ import annotations

from typing import Any

from ddp_eval.analysis.sweep import Metric
from ddp_eval.analysis.sweep_compare import BEST, explain_stars
from ddp_eval.analysis.verdict import format_table
from ddp_eval.errors import printable

_WIDTH = 130  # characters of a line, as long as one metric fits


def format_sweep(compared: dict[str, Any]) -> str:
    """The tables, the models without scores, and what the marks mean; names out of files can do nothing to a terminal."""
    done = [one for one in compared["models"] if one["metrics"]]
    lines = [f"sweep  {compared['path']}: {len(done)} of {len(compared['models'])} models evaluated", ""]
    if done:
        columns = [_column(done, metric, compared["against"] == BEST) for metric in compared["metrics"]]
        for part in _in_lines(columns, room=_WIDTH - _width(_names(done))):
            lines += [*format_table([list(row) for row in zip(*_names(done), *part, strict=True)]).split("\n"), ""]
        lines += [*format_table(_flips(done)).split("\n"), ""]
        lines += _legend(compared, done)
    lines += [f"without scores: {one['name']}, {one['state']}{explain(one)}" for one in compared["models"] if not one["metrics"]]
    for one in done:
        if one["differences"]:
            keys = ", ".join(fact["key"] for fact in one["differences"][:5])
            more = f" and {len(one['differences']) - 5} more" if len(one["differences"]) > 5 else ""
            lines.append(f"{one['name']} was run differently from the first: {keys}{more}")
    return "\n".join(map(printable, lines)).rstrip("\n")


def show_score(score: dict[str, Any] | None) -> str:
    """Value and standard error, which gives the digits."""
    if score is None:
        return ""
    stderr = score["stderr"]
    return f"{score['value']:.4g}" if stderr is None else f"{score['value']:.4g} ± {stderr:.2g}"


def show_difference(score: dict[str, Any] | None) -> str:
    """Difference from the reference, its p-value, and a mark where that is significant."""
    paired = None if score is None else score.get("paired")
    if paired is None:
        return ""
    p = "" if paired["p"] is None else f"  p {paired['p']:.2g}"
    return f"{paired['difference']:+.3g}{p}{' *' if paired['significant'] else ''}"


def explain(model: dict[str, Any]) -> str:
    """Why a model has no scores, behind its state."""
    return f": {model['reason']}" if model["reason"] else ""


def _names(done: list[dict[str, Any]]) -> list[list[str]]:
    steps = [] if all(one["step"] is None for one in done) else [["step", *(_count(one["step"]) for one in done)]]
    return [["model", *(one["name"] for one in done)], *steps]


def _column(done: list[dict[str, Any]], metric: dict[str, Any], mark_best: bool) -> list[str]:
    """The cells of one metric, value and difference each as wide as the widest."""
    scores = [one["metrics"].get(metric["task"], {}).get(metric["key"]) for one in done]
    best = [mark_best and one["name"] == metric["reference"] for one in done]
    values = [show_score(score) for score in scores]
    others = ["best" if is_best else show_difference(score) for score, is_best in zip(scores, best, strict=True)]
    wide = max(map(len, values))
    further = max(map(len, others))
    cells = [f"{value:<{wide}}  {other:<{further}}" for value, other in zip(values, others, strict=True)]
    return [str(Metric(metric["task"], metric["key"])), *cells]


def _in_lines(columns: list[list[str]], room: int) -> list[list[list[str]]]:
    """Columns in groups that fit beside each other."""
    groups: list[list[list[str]]] = []
    used = room
    for column in columns:
        width = max(map(len, column)) + 2
        if used + width > room:
            groups.append([])
            used = 0
        groups[-1].append(column)
        used += width
    return groups


def _width(columns: list[list[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in columns)


def _flips(done: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["model", "answers", "flipped from the first", "near ties", "from the one before", "texts", "differ", "before"]]
    for one in done:
        first, previous = one["flips"].get("first"), one["flips"].get("previous")
        texts = [_count(flips["texts_differing"]) if flips and flips["texts"] else "" for flips in (first, previous)]
        counts = [_count(first[name]) if first else "" for name in ("answers", "answers_flipped", "near_ties")]
        number = _count(first["texts"]) if first and first["texts"] else ""
        rows.append([one["name"], *counts, _count(previous["answers_flipped"]) if previous else "", number, *texts])
    return rows


def _legend(compared: dict[str, Any], done: list[dict[str, Any]]) -> list[str]:
    against = "the best model in each metric" if compared["against"] == BEST else done[0]["name"]
    return [
        f"differences from {against}, paired by document; p by McNemar's exact test, where it applies, or by bootstrap;",
        f"* {explain_stars(compared)}",
        f"near ties: flipped answers whose choices lie within {compared['near_tie_nats']:g} nats in both runs",
        "",
    ]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
