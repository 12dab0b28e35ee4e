"""Which tasks are refused by their files alone, before documents are fetched: one sentence for a run and for `validate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddp_eval.errors import UserError, one_line
from ddp_eval.tasks.index import Leaf, find_leaves
from ddp_eval.tasks.request_types import served_output_types


def check_spec(spec: str | Mapping[str, Any], index: Mapping[str, Any], allows_unsafe: bool = False) -> list[Leaf]:
    """The tasks that a name in the index, or a task file's content, leads to.

    allows_unsafe: --confirm_run_unsafe_code.
    Raises UserError where there are none, or where one of them could not run.
    """
    if not isinstance(spec, str):
        name = spec.get("group", spec.get("task"))
        if not isinstance(name, str):
            raise UserError(f"a task or group must have a name, under task or group, got {one_line(repr(dict(spec)))}")
    leaves = list(find_leaves(spec, index))
    if not leaves:
        name = spec if isinstance(spec, str) else spec.get("group", spec.get("task"))
        raise UserError(f"the group {name} holds no tasks: its file must list some under task")
    for leaf in leaves:
        _check_leaf(leaf, allows_unsafe)
    return leaves


def _check_leaf(leaf: Leaf, allows_unsafe: bool) -> None:
    name, settings = leaf.trail[-1], leaf.settings
    check_output_type(name, leaf.output_type)
    if settings.get("doc_to_image") is not None or settings.get("doc_to_audio"):
        refuse_multimodal(name)
    if "class" not in settings and not settings.get("dataset_path") and settings.get("custom_dataset") is None:
        bare = name.rpartition("::")[2]
        where = f"the task {bare}, which the group {leaf.trail[-2]} names," if "::" in name else f"the task {name}"
        raise UserError(f"{where} is in no task file, or its file gives neither dataset_path nor custom_dataset")
    if is_unsafe(leaf) and not allows_unsafe:
        refuse_unsafe(name)


def is_unsafe(leaf: Leaf) -> bool:
    """Whether the task runs code that a model writes. lm_eval takes anything but false for a yes."""
    return leaf.settings.get("unsafe_code", False) is not False


def check_output_type(name: str, kind: str | None) -> None:
    """kind: None where it is not known yet."""
    served = served_output_types()
    if kind is not None and kind not in served:
        raise UserError(f"the task {name} is of the type {kind}, which is not supported yet: served are {', '.join(served)}")


def refuse_multimodal(name: str) -> None:
    raise UserError(f"the task {name} shows images or sound to the model, which is not supported")


def refuse_unsafe(name: str) -> None:
    raise UserError(f"the task {name} runs code that a model writes, which is unsafe: --confirm_run_unsafe_code allows it")
