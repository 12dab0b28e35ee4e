"""What is known of tasks from lm_eval's index of task files, before any of their documents is fetched.

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
        """As its file says, or lm_eval's default; None for a task written in Python, whose class decides."""
        return None if "class" in self.settings else str(self.settings.get("output_type", "generate_until"))


def find_leaves(spec: str | Mapping[str, Any], index: Mapping[str, Any]) -> Iterator[Leaf]:
    """The tasks that a name or a task file's content leads to: none for a name that the index lacks, unless a group lists it.

    Raises UserError for a group that holds itself.
    """
    yield from _walk(spec, index, {}, ())


def _walk(
    spec: str | Mapping[str, Any], index: Mapping[str, Any], above: dict[str, Any], trail: tuple[str, ...]
) -> Iterator[Leaf]:
    """above: what the groups on the way have set."""
    own = dict(spec) if isinstance(spec, Mapping) else {}
    is_group = "group" in own
    name = own.pop("group" if is_group else "task", None) if isinstance(spec, Mapping) else spec
    if not isinstance(name, str):  # lm_eval reports it
        return
    entry = index.get(name)
    if entry is None and isinstance(spec, str) and not trail:
        return
    if entry is not None and name in trail:
        raise UserError(f"the group {name} holds itself: {' > '.join((*trail[trail.index(name) :], name))}")
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
    elif not (is_group or (entry is not None and entry.kind.name == "GROUP")):  # a group that lists nothing
        yield Leaf(trail, {**settings, **above})


def is_complete(names: Sequence[Any], index: Mapping[str, Any], above: tuple[str, ...] = ()) -> bool:
    """Whether `index` holds all of `names` and what they lead to. No for patterns, which others may match.

    Others cannot add to a tag: one of a later folder takes the place of one of the same name (lm_eval 0.4.13).
    above: the groups on the way. One that holds itself is complete: `find_leaves` refuses it.
    """
    return all(isinstance(name, str) and name in index and _is_whole(index[name], index, (*above, name)) for name in names)


def _is_whole(entry: Any, index: Mapping[str, Any], trail: tuple[str, ...]) -> bool:
    if entry.kind.name == "TAG":
        return is_complete(sorted(entry.tags), index, trail)
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list) or trail[-1] in trail[:-1]:
        return True
    return is_complete([member.get("task") if isinstance(member, dict) else member for member in members], index, trail)


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
