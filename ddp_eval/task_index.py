"""What lm_eval's index of task files says of tasks before any of their documents is fetched.

The index maps a name to an entry: a task or a group with the content of its file (`cfg`), or a tag with the names of its tasks
(`tags`). Groups and tags lead to further names; whatever a group sets, it sets for all tasks below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ddp_eval.errors import UserError


class Leaf(NamedTuple):
    """A task as it will be built. trail: the names from the one that was asked for to the task's own; settings: of its file."""

    trail: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def output_type(self) -> str | None:
        """As its file says, or lm_eval's default; None for a task written in Python, which says so only once it is made."""
        return None if "class" in self.settings else str(self.settings.get("output_type", "generate_until"))


def find_leaves(spec: str | Mapping[str, Any], index: Mapping[str, Any]) -> Iterator[Leaf]:
    """The tasks that a name or a task file's content leads to. A name that the index lacks leads nowhere."""
    yield from _walk(spec, index, {}, ())


def _walk(
    spec: str | Mapping[str, Any], index: Mapping[str, Any], above: dict[str, Any], trail: tuple[str, ...]
) -> Iterator[Leaf]:
    """above: what the groups on the way have set."""
    own = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else own.pop("group") if "group" in own else own.pop("task")
    entry = index.get(name)
    if entry is None and isinstance(spec, str):
        return
    if entry is None and trail:
        name = f"{trail[-1]}::{name}"  # lm_eval's name for what a group's file itself describes
    trail = (*trail, name)
    if entry is not None and entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _walk(task, index, {**above, **own}, trail)
        return
    settings, above = (own, above) if entry is None else (entry.cfg or {}, {**above, **own})
    members = settings.get("task")
    if isinstance(members, list):
        shared = {key: value for key, value in settings.items() if key not in ("group", "task")}
        for member in members:
            yield from _walk(member, index, {**shared, **above}, trail)
    else:
        yield Leaf(trail, {**settings, **above})


def drop_members(names: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """Those of `names` that no group or tag among them brings along: a pattern matches a group and its members alike."""
    brought = {inner for name in names for leaf in find_leaves(name, index) for inner in leaf.trail[1:]}
    return [name for name in names if name not in brought]


def check_once(names: Sequence[str], index: Mapping[str, Any]) -> None:
    """Raise UserError where two of `names` lead to one task: its scores have one place in the results."""
    asked_by: dict[str, str] = {}
    for name in names:
        for leaf in find_leaves(name, index):
            task = leaf.trail[-1]
            source = task if index[name].kind.name == "TAG" else name
            if asked_by.setdefault(task, source) != source:
                raise UserError(
                    f"the task {task} is asked for twice, as {asked_by[task]} and as {name}: give only one of the two"
                )
