"""SHA-256 of prompts and documents."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from ddp_eval.system.digests import as_record, digest_strings


def describe_prompts(instances: Sequence[Instance], tasks: dict[str, Any]) -> dict[str, Any]:
    """One SHA-256 over all texts, one for each task, one over each task's documents, and the tasks' versions.

    The right answers are among the documents, or made of them by `doc_to_target`, whose template counts with them.
    """
    everything = hashlib.sha256()
    by_task: dict[str, Any] = {}
    documents: dict[str, dict[int, Any]] = {}
    context, record = "", as_record("")  # that of the last one: the choices of a document have one context
    for one in instances:
        first, *others = (str(part) for part in one.args)
        if first is not context:
            context, record = first, as_record(first)
        parts = b"".join([record, *map(as_record, others)])
        everything.update(as_record(str(one.task_name)) + parts)
        by_task.setdefault(one.task_name, hashlib.sha256()).update(parts)
        documents.setdefault(one.task_name, {})[one.doc_id] = one.doc
    return {
        "prompts_sha256": everything.hexdigest(),
        "prompts_by_task": {task: digest.hexdigest() for task, digest in sorted(by_task.items())},
        "documents_by_task": {
            name: digest_strings([_template_of_targets(tasks.get(name)), *map(_plain_text, found.values())])
            for name, found in sorted(documents.items())
        },
        "versions": {name: getattr(task, "VERSION", None) for name, task in sorted(tasks.items())},
    }


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
