"""The types of requests that lm_eval makes, each a class of its own.

A new type is a module with a class, a line in REQUEST_TYPES, and a method of its name in collector.py, which lm_eval calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.api.instance import Instance

from ddp_eval.errors import UserError, one_line
from ddp_eval.tasks.request_types.asked import Asked
from ddp_eval.tasks.request_types.base import Answers, RequestType, RunOptions, sum_by_owner
from ddp_eval.tasks.request_types.generate_until import GenerateUntil
from ddp_eval.tasks.request_types.loglikelihood import Loglikelihood
from ddp_eval.tasks.request_types.rolling import LoglikelihoodRolling

__all__ = ["REQUEST_TYPES", "Answers", "Asked", "RunOptions", "encode", "makes_text", "served_output_types", "sum_by_owner"]

# In the order in which a run encodes and packs them.
REQUEST_TYPES: tuple[type[RequestType], ...] = (Loglikelihood, LoglikelihoodRolling, GenerateUntil)


def served_output_types() -> tuple[str, ...]:
    """Which OUTPUT_TYPEs of tasks can be evaluated."""
    return tuple(name for kind in REQUEST_TYPES for name in kind.output_types)


def makes_text(output_type: str | None) -> bool:
    """Whether tasks of this OUTPUT_TYPE have the model write."""
    return any(kind.makes_text for kind in REQUEST_TYPES if output_type in kind.output_types)


def _check_texts(instances: Sequence[Instance], options: RunOptions) -> None:
    """Raise UserError, with the task and the document, for what is to be encoded and is no text: lm_eval encodes only text."""
    for one in instances:
        texts = one.args if one.request_type == Loglikelihood.name else one.args[:1]
        for text in texts:
            if not isinstance(text, str):
                raise UserError(
                    f"the task {one.task_name} makes a request of {one_line(repr(text), 60)} in document "
                    f"{options.document(one.task_name, one.doc_id)}, {type(text).__name__} instead of text: doc_to_text and "
                    "doc_to_target must give text"
                )


def encode(instances: Sequence[Instance], options: RunOptions) -> list[RequestType]:
    """The types that any of the instances are of, each with its own encoded. Raises UserError for what is not served."""
    by_name: dict[str, list[Instance]] = {}
    for one in instances:
        by_name.setdefault(one.request_type, []).append(one)
    served = {kind.name for kind in REQUEST_TYPES}
    for name, some in by_name.items():
        if name not in served:
            raise UserError(f"the task {some[0].task_name} makes {name} requests, which are not supported yet")
        _check_texts(some, options)
    parts = [kind(options) for kind in REQUEST_TYPES if kind.name in by_name]
    for part in parts:
        part.encode(by_name[part.name])
    return parts
