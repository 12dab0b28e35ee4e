"""Which document of one run is which of another: by number where the numbers agree with what the documents hold, else by content.

lm_eval numbers what `--samples` chooses by its place in that list, and takes the documents in their own order: numbers of a list
out of order, or with repeats, stand for other documents. The same task may hold its documents in another order, or repeat some.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddp_eval.analysis.read import Documents, Run, sort_requests


class Identity(NamedTuple):
    """What is known of a document: hashes of all it holds and of its first prompt, None where a run does not tell."""

    content: str | None
    prompt: str | None


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The pairs of one task, and what is to be said of them.

    number_in_a:    {number in B: number in A} of the documents that both runs have.
    renumbered:     pairs whose numbers differ.
    other_content:  pairs of one number and one prompt whose documents hold something else besides.
    not_paired:     numbers that stand for different documents in the two runs.
    by_number:      whether no document has the same content in both runs, so that numbers are all that pairs them.
    """

    number_in_a: dict[int, int]
    renumbered: int = 0
    other_content: int = 0
    not_paired: int = 0
    by_number: bool = False

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "number_in_a"}


def align(a: Run, b: Run) -> tuple[Run, dict[str, Pairing]]:
    """B with A's numbers for the documents that both have, and how the documents of each task were paired.

    Documents of B that A lacks keep their numbers, unless another document has them in A.
    """
    pairings = {task: pair(_identities(a, task), _identities(b, task)) for task in numbered_tasks(a) if task in numbered_tasks(b)}
    renamed = {task: _renaming(a, b, task, pairing) for task, pairing in pairings.items()}
    renamed = {task: names for task, names in renamed.items() if any(old != new for old, new in names.items())}
    return (_renumber(b, renamed) if renamed else b), pairings


def pair(a: Mapping[int, Identity], b: Mapping[int, Identity]) -> Pairing:
    """Pair the documents of one task, each at most once. a, b: {number: what is known of the document}."""
    left, right = dict(a), dict(b)
    pairs: dict[int, int] = {}

    def take(found: Iterable[tuple[int, int]]) -> int:
        count = 0
        for one, other in found:
            pairs[other] = one
            del left[one], right[other]
            count += 1
        return count

    def alike(one: Identity, other: Identity) -> bool:
        if None in (one.content, other.content):
            return one.prompt is not None and one.prompt == other.prompt
        return one.content == other.content

    def same_numbers(agree: Callable[[Identity, Identity], bool]) -> list[tuple[int, int]]:
        return [(number, number) for number in sorted(left.keys() & right.keys()) if agree(left[number], right[number])]

    kept = take(same_numbers(alike))
    moved = take(_by_key(left, right, lambda one: None if None in one else one))
    moved += take(_by_key(left, right, lambda one: one.content))
    # A prompt tells documents apart only where no other has it: BLiMP's are all empty.
    single = _single_prompts(a) & _single_prompts(b)
    other_content = take(same_numbers(lambda one, other: one.prompt == other.prompt and one.prompt in single))
    unknown = [side if any(one.content is None for one in side.values()) else {} for side in (left, right)]
    if any(unknown):
        moved += take(
            (one, other)
            for one, other in _by_key(left, right, lambda one: one.prompt if one.prompt in single else None)
            if None in (left[one].content, right[other].content)
        )
    by_number = not pairs and bool(same_numbers(lambda one, other: None not in (one.content, other.content)))
    if by_number:
        take(same_numbers(lambda *_: True))
    elif moved <= kept:  # what is told of neither side: prompts may differ by their examples alone
        take(same_numbers(lambda one, other: None in (one.content, other.content)))
    return Pairing(pairs, moved, other_content, len(left.keys() & right.keys()), by_number)


def numbered_tasks(run: Run) -> list[str]:
    """Tasks of whose documents the run tells anything."""
    return list(dict.fromkeys((*run.requests, *run.texts, *run.metrics)))


def _by_key(
    left: Mapping[int, Identity], right: Mapping[int, Identity], key: Callable[[Identity], Hashable | None]
) -> list[tuple[int, int]]:
    """Numbers of equal keys, in order; None is no key."""
    places: dict[Hashable, collections.deque[int]] = {}
    for number in sorted(left):
        if (name := key(left[number])) is not None:
            places.setdefault(name, collections.deque()).append(number)
    found = []
    for number in sorted(right):
        waiting = places.get(key(right[number]))
        if waiting:
            found.append((waiting.popleft(), number))
    return found


def _single_prompts(documents: Mapping[int, Identity]) -> set[str]:
    counts = collections.Counter(one.prompt for one in documents.values() if one.prompt is not None)
    return {prompt for prompt, count in counts.items() if count == 1}


def _identities(run: Run, task: str) -> dict[int, Identity]:
    contents, prompts = run.documents.get(task, {}), run.prompts.get(task, {})
    return {number: Identity(contents.get(number), prompts.get(number)) for number in _numbers(run, task)}


def _numbers(run: Run, task: str) -> list[int]:
    found = {number for number, _, _ in run.texts.get(task, {})}
    if task in run.requests:
        found.update(run.requests[task].doc_id.tolist())
    for documents in run.metrics.get(task, {}).values():
        found.update(documents.doc_id.tolist())
    return sorted(found | run.prompts.get(task, {}).keys())


def _renaming(a: Run, b: Run, task: str, pairing: Pairing) -> dict[int, int]:
    """{number in B: the number to compare it by}. A document that A lacks must not take the number of one that it has."""
    taken, names = set(_numbers(a, task)), dict(pairing.number_in_a)
    free = min([0, *taken, *(numbers := _numbers(b, task))]) - 1
    for number in numbers:
        if number not in names:
            names[number] = number if number not in taken else free
            free -= number in taken
    return names


def _renumber(run: Run, renamed: Mapping[str, Mapping[int, int]]) -> Run:
    changed = dataclasses.replace(run)
    for name in _BY_TASK:
        setattr(changed, name, dict(getattr(run, name)))
    for task, names in renamed.items():
        if task in run.requests:
            old = run.requests[task]
            doc_id = np.array([names[number] for number in old.doc_id.tolist()], dtype=np.int64)
            changed.requests[task] = sort_requests(run.path, doc_id, old.idx, old.loglikelihood, old.is_greedy)
        for name in ("prompts", "contexts", "documents"):
            of_task = getattr(run, name).get(task, {})
            getattr(changed, name)[task] = {names[number]: value for number, value in of_task.items() if number in names}
        if task in run.texts:
            changed.texts[task] = {(names[number], *rest): text for (number, *rest), text in run.texts[task].items()}  # type: ignore[misc]
        if task in run.metrics:
            changed.metrics[task] = {key: _sort_documents(one, names) for key, one in run.metrics[task].items()}
    return changed


def _sort_documents(documents: Documents, names: Mapping[int, int]) -> Documents:
    doc_id = np.array([names[number] for number in documents.doc_id.tolist()], dtype=np.int64)
    order = np.argsort(doc_id, kind="stable")
    return Documents(doc_id[order], documents.value[order], documents.weight[order])


_BY_TASK = ("requests", "metrics", "prompts", "contexts", "documents", "texts")
