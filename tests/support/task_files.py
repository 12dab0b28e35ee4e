"""Tasks that tests write: a directory with a YAML file and its rows, as --include_path takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LOADER = """\
import json, pathlib
import datasets
def load(**unused):
    rows = json.loads((pathlib.Path(__file__).parent / 'rows.json').read_text(encoding='utf-8'))
    return datasets.DatasetDict({'test': datasets.Dataset.from_list(rows)})
"""


def write_task(directory: Path, kind: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], **more: Any) -> str:
    """The task "odd" of the type `kind` over `rows`, each with the text `context`; returns its --include_path.

    rows: with `choices` and `gold` for multiple_choice, else with `target`. more: further fields of the task.
    """
    directory.mkdir(parents=True)
    (directory / "rows.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    (directory / "utils.py").write_text(_LOADER)
    fields: dict[str, Any] = {
        "task": "odd",
        "dataset_path": "json",
        "output_type": kind,
        "test_split": "test",
        "target_delimiter": "",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "metric_list": [{"metric": metric} for metric in metrics],
        **more,
    }
    if kind == "multiple_choice":
        fields |= {"doc_to_choice": "choices", "doc_to_target": "gold"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    (directory / "odd.yaml").write_text("\n".join([*lines, "custom_dataset: !function utils.load", ""]))
    return str(directory)


def write_pairs_task(directory: Path, rows: Sequence[Mapping[str, str]], more: str = "") -> str:
    """A task that scores `continuation` behind `context` for each of `rows`; returns its --include_path. more: lines of YAML."""
    directory.mkdir()
    (directory / "rows.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    (directory / "utils.py").write_text(_LOADER)
    (directory / "pairs.yaml").write_text(
        "task: pairs\n"
        "dataset_path: json\n"
        "custom_dataset: !function utils.load\n"
        "output_type: loglikelihood\n"
        "test_split: test\n"
        "target_delimiter: ''\n"
        "doc_to_text: '{{context}}'\n"
        "doc_to_target: '{{continuation}}'\n"
        "metric_list:\n"
        "  - metric: acc\n"
        "    aggregation: mean\n"
        "    higher_is_better: true\n" + more
    )
    return str(directory)


def write_generation_task(directory: Path, texts: Sequence[str], settings: dict[str, Any], more: str = "") -> str:
    """As `write_pairs_task`, a task that has an answer generated behind each of `texts`. settings: its generation_kwargs."""
    path = write_pairs_task(directory, [{"context": text, "continuation": "x"} for text in texts], more)
    task = directory / "pairs.yaml"
    text = task.read_text().replace("output_type: loglikelihood", "output_type: generate_until")
    task.write_text(text.replace("metric: acc", "metric: exact_match") + f"generation_kwargs: {json.dumps(settings)}\n")
    return path
