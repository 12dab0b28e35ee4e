"""The models of a sweep against the first, or against the best in each metric, and each against the one before it.

Runs are read one by one; those that others are compared with stay in memory, the others are gone when the next one comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ddp_eval.analysis.difference import NEAR_TIE_NATS, compare_scores, count_flips, differences
from ddp_eval.analysis.matching import align
from ddp_eval.analysis.paired import LEAST_P
from ddp_eval.analysis.read import Run, read_run
from ddp_eval.analysis.sweep import Metric, Model, Score, Sweep, describe
from ddp_eval.errors import UserError

FIRST, BEST = "first", "best"
AGAINST = (FIRST, BEST)
SIGNIFICANT = 0.05
_OWN = ("model", "layout")  # groups of differences that each model of a sweep may have from the others


def compare_sweep(sweep: Sweep, against: str = FIRST, near_tie_nats: float = NEAR_TIE_NATS) -> dict[str, Any]:
    """A plain dict, ready for JSON, tables and the page.

    {"path", "against", "near_tie_nats", "metrics": [{"task", "key", "reference", "comparisons": how many Holm's correction
    counts}], "models": [what `sweep.describe` says of each, and by metric what `_judge` adds; "flips": {"first" and "previous":
    counts with the name of the other model}; "differences" in what was run from the first}]}.
    """
    references = _references(sweep, against)
    kept: dict[str, Run] = {}
    models: list[dict[str, Any]] = []
    first: tuple[str, Run] | None = None
    previous: dict[str, tuple[str, Run]] = {}  # by series
    for model, run in _read(sweep, kept, set(references.values())):
        shown = {**describe(model), "flips": {}, "differences": []}
        models.append(shown)
        if run is None:
            continue
        first = first or (model.name, run)
        series = model.series if model.step is not None else ""
        before = {FIRST: first, "previous": previous.get(series)}
        others = {name: other for name, other in before.items() if other and other[0] != model.name}
        shown["flips"] = {name: _flips(other, run, near_tie_nats) for name, other in others.items()}
        shown["differences"] = [one for one in differences(first[1], run) if one["group"] not in _OWN]
        _add_paired(shown, model, run, references, kept)
        previous[series] = model.name, run
    metrics = []
    for metric in sweep.metrics:
        scores = [score for one in models if (score := one["metrics"].get(metric.task, {}).get(metric.key)) is not None]
        comparisons = _judge(scores, against)
        metrics.append({"task": metric.task, "key": metric.key, "reference": references.get(metric), "comparisons": comparisons})
    return {
        "path": str(sweep.path), "against": against, "near_tie_nats": near_tie_nats, "metrics": metrics, "models": models,
    }  # fmt: skip


def _read(sweep: Sweep, kept: dict[str, Run], needed: set[str]) -> Iterator[tuple[Model, Run | None]]:
    """Each model with its run, None where there is none to be read; runs that are `needed` are in `kept` before the first."""
    broken: dict[str, Model] = {}
    for model in sweep.done:
        if model.name in needed:
            try:
                kept[model.name] = read_run(sweep.place_of(model))
            except UserError as error:
                broken[model.name] = model.unreadable(str(error))
    for model in sweep.models:
        model = broken.get(model.name, model)
        run = kept.get(model.name)
        if model.is_done and run is None:
            try:
                run = read_run(sweep.place_of(model))
            except UserError as error:
                model = model.unreadable(str(error))
        yield model, run


def _references(sweep: Sweep, against: str) -> dict[Metric, str]:
    """The name of the model that others are compared with, by metric; none where lm_eval does not say what is better."""
    found: dict[Metric, str] = {}
    for metric in sweep.metrics:
        having = [(model.name, model.scores[metric]) for model in sweep.done if metric in model.scores]
        if against == FIRST:
            found[metric] = having[0][0]
        elif (best := best_of(having)) is not None:
            found[metric] = best
    return found


def best_of(scores: list[tuple[str, Score]]) -> str | None:
    """The first name of the best score; None where it is not known which way is better, or nothing is a number."""
    numbers = [(name, score) for name, score in scores if math.isfinite(score.value)]
    directions = {score.higher_is_better for _, score in numbers}
    if len(directions) != 1 or None in directions:
        return None
    return max(numbers, key=lambda one: one[1].value if one[1].higher_is_better else -one[1].value)[0]


def _flips(other: tuple[str, Run], run: Run, near_tie_nats: float) -> dict[str, Any]:
    return {"name": other[0], **count_flips(other[1], align(other[1], run)[0], near_tie_nats)}


def _add_paired(shown: dict[str, Any], model: Model, run: Run, references: Mapping[Metric, str], kept: Mapping[str, Run]) -> None:
    """Into each metric of one model: its reference, and the paired difference from that."""
    for metric, name in references.items():
        if metric in model.scores:
            shown["metrics"][metric.task][metric.key]["reference"] = name
    for name in dict.fromkeys(references.values()):
        if name == model.name or name not in kept:
            continue
        own = {metric for metric, reference in references.items() if reference == name}
        found = compare_scores(kept[name], align(kept[name], run)[0], own)
        for (task, key), paired in found.items():
            if key in shown["metrics"].get(task, {}):
                shown["metrics"][task][key]["paired"] = paired


def _judge(scores: list[dict[str, Any]], against: str) -> int:
    """Add to each paired difference of one metric "p", "p_holm" over the comparisons, "significant" and "better".

    p is McNemar's where there is one, else the bootstrap's. better: None where it is not known which way is.
    Returns how many comparisons were corrected for: the models compared with the first, but all pairs of models where the best on
    these very documents is the reference, since any of them might have become it.
    """
    paired = [(score, score["paired"]) for score in scores if "paired" in score]
    for score, one in paired:
        one["p"] = one["p_mcnemar"] if one["p_mcnemar"] is not None else one["p_bootstrap"]
        way = score["higher_is_better"]
        one["better"] = None if way is None or not one["difference"] else (one["difference"] > 0) == way
    known = [one for _, one in paired if one["p"] is not None]
    candidates = sum(math.isfinite(score["value"]) for score in scores)
    comparisons = max(len(known), math.comb(candidates, 2)) if against == BEST and known else len(known)
    for one, adjusted in zip(known, holm([one["p"] for one in known], comparisons), strict=True):
        one["p_holm"] = adjusted
    for _, one in paired:
        one.setdefault("p_holm", None)
        one["significant"] = one["p_holm"] is not None and one["p_holm"] < SIGNIFICANT
    return comparisons


def holm(p_values: list[float], comparisons: int | None = None) -> list[float]:
    """Holm's correction for several comparisons: the k-th smallest of n times n - k + 1, never below a smaller one's, at most 1.

    comparisons: n, where the p-values of some of them are not known (default: all are).

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    total = len(p_values) if comparisons is None else comparisons
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (total - rank)))
        adjusted[place] = largest
    return adjusted


def explain_stars(compared: dict[str, Any]) -> str:
    """What a star behind a p-value means, in one sentence, and where no p-value by bootstrap can have one."""
    corrected = "all pairs of models" if compared["against"] == BEST else "the models compared"
    sentence = f"p below {SIGNIFICANT} after Holm's correction for {corrected} in that metric"
    sentence += ", as the best is chosen on the same documents" if compared["against"] == BEST else ""
    largest = max((metric["comparisons"] for metric in compared["metrics"]), default=0)
    if largest * LEAST_P < SIGNIFICANT:
        return sentence
    most = int(SIGNIFICANT / LEAST_P)
    return f"{sentence}; of more than {most} comparisons (here up to {largest}) the least p by bootstrap, {LEAST_P:.2g}, has none"
