"""Rows of the demo's data as documents of tasks that generate."""

import json
from pathlib import Path
from typing import Any

import datasets

from ddp_eval import demo

_DATA = Path(demo.TASKS_PATH).parent / "data"


def load(files: dict[str, str], **settings: Any) -> datasets.DatasetDict:
    """A DatasetDict of {split: file name}."""
    return datasets.DatasetDict({split: datasets.Dataset.from_list(read(name)) for split, name in files.items()})


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_DATA / name).read_text(encoding="utf-8").splitlines()]
