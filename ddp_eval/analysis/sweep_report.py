"""`python -m ddp_eval report DIR` over a sweep: one self-contained page of metrics against step, or against model."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from typing import Any

from ddp_eval.analysis import plots
from ddp_eval.analysis.report import REPORT, template
from ddp_eval.analysis.sweep import Metric, Model, Sweep
from ddp_eval.analysis.sweep_compare import BEST, FIRST, compare_sweep, explain_stars
from ddp_eval.analysis.sweep_text import show_difference, show_score

_MOST_CHARTS = 60  # of one part of the page; the tables have all metrics
_MOST_COLUMNS = 200
_TOO_LARGE = 1e200


def render_sweep(sweep: Sweep, against: str = FIRST) -> str:
    """The page. against: what models are compared with, "first" or "best"."""
    compared = compare_sweep(sweep, against)
    done = [one for one in compared["models"] if one["metrics"]]
    metrics = compared["metrics"][:_MOST_COLUMNS]
    drawn = [model for model in sweep.done if model.step is not None]
    with_steps = len(drawn) > 1
    with_texts = any(flips["texts"] for one in done for flips in one["flips"].values())
    left = len(compared["metrics"]) - len(metrics)
    return template("sweep.html.jinja").render(
        title=sweep.path.absolute().name,
        path=str(sweep.path),
        facts=_facts(sweep, done),
        missing=[one for one in compared["models"] if not one["metrics"]],
        heading="Metrics against step" if with_steps else "Metrics by model",
        charts=_charts(sweep, drawn if with_steps else sweep.done, with_steps),
        with_steps=with_steps,
        not_drawn=len(sweep.done) - len(drawn) if with_steps else 0,
        metrics=[str(Metric(one["task"], one["key"])) for one in metrics] + ([f"({left:,} more: sweep.csv)"] if left else []),
        rows=[_row(sweep, one, metrics, against, left) for one in done],
        reference="the best model in each metric" if against == BEST else f"the first, {done[0]['name']}" if done else "",
        stars=explain_stars(compared),
        with_texts=with_texts,
        differing=[one for one in done if one["differences"]],
    )


def _facts(sweep: Sweep, done: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures at the top of the page."""
    states = [one.state for one in sweep.models]
    steps = [one["step"] for one in done if one["step"] is not None]
    seconds = sum(one["seconds"] or 0.0 for one in done)
    facts = [("models evaluated", f"{len(done)} of {len(states)}")]
    facts += [(state, str(states.count(state))) for state in dict.fromkeys(states) if state != "done"]
    facts += [("steps", f"{min(steps):,} to {max(steps):,}")] if steps else []
    facts += [("tasks", str(len({metric.task for metric in sweep.metrics} - sweep.in_group)))]
    return [*facts, ("seconds", f"{seconds:,.0f}")] if seconds else facts


def _charts(sweep: Sweep, models: Sequence[Model], with_steps: bool) -> list[dict[str, Any]]:
    """Parts of the page: tasks and groups, then, folded, the tasks of groups."""
    parts = []
    for in_group in (False, True):
        metrics = [metric for metric in sweep.metrics if (metric.task in sweep.in_group) is in_group]
        charts = [
            {"name": str(metric), "plot": plot}
            for metric in metrics[:_MOST_CHARTS]
            if (plot := _chart(models, metric, with_steps)) is not None
        ]
        left = f"; the first {_MOST_CHARTS} of {len(metrics)} metrics" if len(metrics) > _MOST_CHARTS else ""
        if charts:
            parts.append({"charts": charts, "summary": f"Tasks of groups{left}" if in_group else left.strip("; ")})
    return parts


def _chart(models: Sequence[Model], metric: Metric, with_steps: bool) -> str | None:
    """None where no model has a number to draw."""
    having = [model for model in models if metric in model.scores and _finite(model.scores[metric].value) is not None]
    if not having:
        return None
    if not with_steps:
        rows = [(model.name, model.scores[metric].value, _finite(model.scores[metric].stderr)) for model in having]
        return plots.intervals(rows, "95% interval")
    series = []
    for name in dict.fromkeys(model.series for model in having):
        own = [model for model in having if model.series == name]
        scores = [model.scores[metric] for model in own]
        steps = [model.step for model in own if model.step is not None]
        series.append((name, steps, [score.value for score in scores], [_finite(score.stderr) for score in scores]))
    return plots.curves(series)


def _finite(value: float | None) -> float | None:
    """None for what has no place on an axis."""
    return value if value is not None and abs(value) < _TOO_LARGE else None


def _row(sweep: Sweep, one: dict[str, Any], metrics: Sequence[dict[str, Any]], against: str, left: int) -> dict[str, Any]:
    cells = [_cell(one, metric, against) for metric in metrics]
    cells += [{"value": "", "difference": "", "kind": ""}] if left else []
    page = sweep.path / one["name"] / REPORT
    link = f"./{urllib.parse.quote(one['name'])}/{REPORT}" if os.path.isfile(page) else None
    return {**one, "cells": cells, "link": link}


def _cell(one: dict[str, Any], metric: dict[str, Any], against: str) -> dict[str, str]:
    score = one["metrics"].get(metric["task"], {}).get(metric["key"])
    if against == BEST and score is not None and metric["reference"] == one["name"]:
        return {"value": show_score(score), "difference": "best", "kind": "right"}
    paired = (score or {}).get("paired") or {}
    judged = paired.get("better") if paired.get("significant") else None
    kind = {True: "right", False: "wrong", None: ""}[judged]
    return {"value": show_score(score), "difference": show_difference(score), "kind": kind}
