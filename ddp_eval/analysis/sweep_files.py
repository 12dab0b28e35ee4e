"""sweep.csv and sweep_metrics.json: the scores of a sweep's models for other programs.

Called after each model of a sweep, so it reads results.json alone: no document and no statistics, which `compare` and `report`
have. It never writes sweep.json, which belongs to the sweep that runs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from ddp_eval.analysis.sweep import Sweep, describe, read_sweep
from ddp_eval.analysis.verdict import jsonable
from ddp_eval.system.files import replace_file

CSV, JSON = "sweep.csv", "sweep_metrics.json"
_FACTS = ("name", "model", "revision", "step", "state", "reason", "seconds")
_COLUMNS = (*_FACTS, "task", "metric", "filter", "value", "stderr", "documents")


def write_tables(directory: str | Path) -> None:
    """Write both files of a sweep's directory anew, each whole or not at all.

    A model that is not done has one row, without a task. Raises UserError where sweep.json cannot be read, OSError where the
    disk refuses.
    """
    from ddp_eval.output import shapes

    sweep = read_sweep(directory)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(sweep))
    replace_file(sweep.path / CSV, [stream.getvalue().encode("utf-8", "backslashreplace")])
    table = jsonable({"version": shapes.SWEEP_VERSION, "models": [describe(model) for model in sweep.models]})
    replace_file(sweep.path / JSON, [json.dumps(table, indent=1).encode() + b"\n"])


def _rows(sweep: Sweep) -> Iterator[list[object]]:
    for model in sweep.models:
        facts = [getattr(model, name) for name in _FACTS]
        if not model.scores:
            yield [*facts, *[None] * (len(_COLUMNS) - len(_FACTS))]
        for (task, key), score in model.scores.items():
            name, _, kept = key.partition(",")
            yield [*facts, task, name, kept, score.value, score.stderr, score.documents]
