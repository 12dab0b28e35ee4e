"""A sweep's directory, read: which models it has, how each of them stands, and the scores of those that are done.

    DIR/sweep.json      how each model stands
    DIR/NAME/…          an ordinary run directory for each

A run that cannot be read is a model with a reason, like one that failed: it does not keep the others from being shown.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddp_eval.analysis.read import result_rows
from ddp_eval.errors import UserError
from ddp_eval.output import sweep_file, write
from ddp_eval.output.documents import TRANSFORMS
from ddp_eval.output.sweep_file import DONE, SWEEP
from ddp_eval.system import read_back

UNREADABLE = "unreadable"  # a state beside those that the sweep itself writes


class Metric(NamedTuple):
    """key: "metric,filter", as in results.json."""

    task: str
    key: str

    def __str__(self) -> str:
        return f"{self.task} {self.key.removesuffix(',none')}"


@dataclasses.dataclass(frozen=True)
class Score:
    """What one model reaches in one metric. higher_is_better: None where lm_eval does not say."""

    value: float
    stderr: float | None
    documents: int | None
    higher_is_better: bool | None


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of a sweep. scores: of one that is done, by metric in the order of its results; in_group: tasks of a group."""

    name: str
    model: str | None
    revision: str | None
    step: int | None
    state: str
    reason: str | None
    seconds: float | None
    scores: dict[Metric, Score] = dataclasses.field(default_factory=dict)
    in_group: frozenset[str] = frozenset()

    @property
    def is_done(self) -> bool:
        return self.state == DONE

    @property
    def series(self) -> str:
        """What its step is a step of: the model where it is a revision of that, else its path without the step."""
        path = self.model or self.name
        if self.revision is not None or self.step is None:
            return path
        *_, last = [None, *re.finditer(rf"(?<!\d)0*{self.step}(?!\d)", path)]
        return path if last is None else f"{path[: last.start()]}#{path[last.end() :]}"

    def unreadable(self, reason: str) -> Model:
        return dataclasses.replace(self, state=UNREADABLE, reason=reason, scores={})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """models: each series in the order of its steps, series and models without steps in the order of sweep.json."""

    path: Path
    models: Sequence[Model]

    @property
    def done(self) -> list[Model]:
        return [model for model in self.models if model.is_done]

    @property
    def metrics(self) -> list[Metric]:
        """Those that any model has; tasks of a group come behind all others."""
        found = dict.fromkeys(metric for model in self.models for metric in model.scores)
        return sorted(found, key=lambda metric: metric.task in self.in_group)

    @property
    def in_group(self) -> frozenset[str]:
        return frozenset().union(*(model.in_group for model in self.models))

    def place_of(self, model: Model) -> Path:
        return self.path / model.name


def is_sweep(path: str | Path) -> bool:
    """Whether a directory is a sweep's, and not a run's."""
    place = Path(path)
    return os.path.lexists(place / SWEEP) and not os.path.lexists(place / write.MANIFEST)


def refuse_among_runs(paths: Sequence[str | Path], command: str) -> None:
    """Raise UserError for a sweep where runs are to be named."""
    for path in paths:
        if is_sweep(path):
            raise UserError(f"{path} is a sweep: {command} takes one alone; to set runs side by side, name them, as {path}/NAME")


def read_sweep(path: str | Path) -> Sweep:
    """Read sweep.json, and the results of each model that is done. Raises UserError, naming the file, for a sweep.json
    that cannot be read."""
    place = Path(path)
    fields = ("name", "model", "revision", "step", "state", "reason", "seconds")
    models = [Model(**{name: one[name] for name in fields}) for one in sweep_file.read_sweep(place)]
    series = list(dict.fromkeys(model.series for model in models))
    models.sort(key=lambda model: (series.index(model.series), -1 if model.step is None else model.step))
    return Sweep(place, [_with_scores(place, model) for model in models])


def _with_scores(place: Path, model: Model) -> Model:
    from ddp_eval.output import shapes

    if not model.is_done:
        return model
    run, whole = place / model.name, os.path.realpath(place)
    if os.path.dirname(os.path.realpath(run)) != whole:
        return model.unreadable(f"{run} must be a directory in {place}, and is a symbolic link to {os.path.realpath(run)}")
    try:
        results = read_back.read_json(run / write.RESULTS, shapes.RESULTS, run)
    except UserError as error:
        return model.unreadable(str(error))
    scores = {}
    for row in result_rows(results):
        better = results.get("higher_is_better", {}).get(row["task"], {}).get(row["metric"])
        better = False if better is None and row["metric"] in TRANSFORMS else better
        metric = Metric(row["task"], f"{row['metric']},{row['filter']}")
        scores[metric] = Score(float(row["value"]), row["stderr"], row["documents"], better)
    members = {task for tasks in results.get("group_subtasks", {}).values() for task in tasks}
    return dataclasses.replace(model, scores=scores, in_group=frozenset(members))


def describe(model: Model) -> dict[str, Any]:
    """What sweep.json says of a model, and its scores by task, for JSON."""
    scores: dict[str, dict[str, Any]] = {}
    for (task, key), score in model.scores.items():
        scores.setdefault(task, {})[key] = dataclasses.asdict(score)
    facts = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: value for name, value in facts.items() if name not in ("scores", "in_group")} | {"metrics": scores}
