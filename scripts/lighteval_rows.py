"""lighteval's custom tasks over rows that bench_peers.py has written: one for each folder in $PEER_ROWS, by its name.

A row has the prompt as lm_eval builds it, few-shot examples included, the choices as continuations, and the right one:
{"query": …, "choices": […], "gold": …}. lighteval so scores the same requests and builds no prompt of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def to_document(row: dict[str, Any], task_name: str) -> Any:
    return Doc(task_name=task_name, query=row["query"], choices=row["choices"], gold_index=row["gold"])


TASKS_TABLE = [
    LightevalTaskConfig(
        name=folder.name,
        prompt_function=to_document,
        hf_repo=str(folder),
        hf_subset="default",
        hf_avail_splits=["validation"],
        evaluation_splits=["validation"],
        few_shots_split="validation",
        metrics=[Metrics.loglikelihood_acc],
    )
    for folder in sorted(Path(os.environ["PEER_ROWS"]).iterdir())
]
