"""Loads the rows that ship beside these task files.

`datasets` resolves relative `data_files` against the working directory, so the tasks load through lm_eval's `custom_dataset`
key. The rows are read here rather than by the `json` builder: nothing is written to a cache and nothing is fetched.
"""

import json
from pathlib import Path
from typing import Any

import datasets

_HERE = Path(__file__).resolve().parent


def load_json(data_files: dict[str, str], **_unused: Any) -> datasets.DatasetDict:
    """Return a DatasetDict. `data_files` maps each split to a path relative to this folder.

    lm_eval calls this with the task's `metadata` and `dataset_kwargs`; the former isn't needed here.
    """
    return datasets.DatasetDict({split: datasets.Dataset.from_list(read_rows(path)) for split, path in data_files.items()})


def read_rows(path: str) -> list[dict[str, Any]]:
    with (_HERE / path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
