"""SHA-256 of prompts and documents."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from ddp_eval.system.digests import as_record, digest_strings

_BLOCK = 1024  # pieces


def describe_prompts(instances: Sequence[Instance], tasks: dict[str, Any]) -> dict[str, Any]:
    """One SHA-256 over all texts, one for each task, one over each task's documents, and the tasks' versions.

    The right answers are among the documents, or made of them by `doc_to_target`, whose template counts with them.
    """
    everything = _Digest()
    by_task: dict[str, _Digest] = {}
    documents: dict[str, dict[int, Any]] = {}
    context, record = "", as_record("")  # that of the last one: the choices of a document have one context
    for one in instances:
        task = str(one.task_name)
        first, *others = (str(part) for part in one.args)
        if first is not context:
            context, record = first, as_record(first)
        parts = [record, *map(as_record, others)]
        everything.update([as_record(task), *parts])
        by_task.setdefault(task, _Digest()).update(parts)
        documents.setdefault(task, {})[one.doc_id] = one.doc
    return {
        "prompts_sha256": everything.hexdigest(),
        "prompts_by_task": {task: digest.hexdigest() for task, digest in sorted(by_task.items())},
        "documents_by_task": {
            name: digest_strings([_template_of_targets(tasks.get(name)), *map(_plain_text, found.values())])
            for name, found in sorted(documents.items())
        },
        "versions": {name: getattr(task, "VERSION", None) for name, task in sorted(tasks.items())},
    }


class _Digest:
    """SHA-256 of many pieces, taken in large blocks: other threads run while one is hashed."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: list[bytes] = []

    def update(self, pieces: Iterable[bytes]) -> None:
        self._pieces += pieces
        if len(self._pieces) >= _BLOCK:
            self._take()

    def hexdigest(self) -> str:
        self._take()
        return self._digest.hexdigest()

    def _take(self) -> None:
        self._digest.update(b"".join(self._pieces))
        self._pieces = []


def _template_of_targets(task: Any) -> str:
    """ "" where a task has none, or makes its targets by code."""
    template = getattr(getattr(task, "config", None), "doc_to_target", None)
    return str(template) if isinstance(template, (str, int)) else ""


def _plain_text(document: Any) -> str:
    """A document as JSON, the same in every process: of what neither JSON nor numpy nor a calendar knows, only the kind."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray)):
            return value.tolist()
        return str(value) if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)) else type(value).__name__

    try:
        return json.dumps(document, skipkeys=True, default=plain)
    except (ValueError, RecursionError):  # it holds itself
        return ""
