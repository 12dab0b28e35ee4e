"""Everything that lm_eval asks in a run, encoded, and what becomes of the answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance

from ddp_eval.errors import OutOfRange
from ddp_eval.output.tables import Scores, Texts
from ddp_eval.packs.batches import NO_PROMPTS, Prompts
from ddp_eval.packs.requests import Requests, concatenate
from ddp_eval.tasks.request_types.base import NO_REQUESTS, Answers, RequestType

Table = TypeVar("Table", Scores, Texts)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """All requests of all tasks.

    requests:      to be scored, of one type behind another.
    prompts:       to be continued, the same.
    fingerprints:  SHA-256 of texts and documents, see `describe_prompts`.
    parts:         the types that have any, which `requests` and `prompts` consist of.
    instances:     lm_eval's own, in its order.
    """

    requests: Requests
    prompts: Prompts = NO_PROMPTS
    fingerprints: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: Sequence[RequestType] = ()
    instances: Sequence[Instance] = ()
    _results: dict[Answers, list[Any]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def join(cls, parts: Sequence[RequestType], instances: Sequence[Instance], fingerprints: dict[str, Any]) -> Asked:
        requests = functools.reduce(concatenate, [part.requests for part in parts], NO_REQUESTS)
        return cls(requests, _join_prompts([part.prompts for part in parts]), fingerprints, parts, instances)

    def tables(self, answers: Answers) -> tuple[Scores, Texts]:
        """What the run directory keeps, in lm_eval's order. For before metrics are computed: a task's own code may fail."""
        rows = [(part, part.rows(result)) for part, result in zip(self.parts, self._read(answers), strict=True)]
        scores = [(part, table) for part, table in rows if isinstance(table, Scores)]
        texts = [(part, table) for part, table in rows if isinstance(table, Texts)]
        return self._in_order(Scores, scores), self._in_order(Texts, texts)

    def by_instance(self, answers: Answers) -> dict[int, list[Any]]:
        """What lm_eval takes, by the id of the instance; several answers where it asks for repeats."""
        found: dict[int, list[Any]] = {}
        for part, result in zip(self.parts, self._read(answers), strict=True):
            for one, answer in zip(part.instances, part.answers(result), strict=True):
                found.setdefault(id(one), []).append(answer)
        return found

    def instance_of(self, found: OutOfRange) -> Instance:
        """The one that a request or prompt belongs to."""
        index = found.index
        for part in self.parts:
            count = len(part.prompts) if found.is_prompt else len(part.requests)
            if index < count:
                return part.instance_of(index)
            index -= count
        raise IndexError(found.index)

    def _read(self, answers: Answers) -> list[Any]:
        """Each part's result. Kept, since making texts of tokens takes time."""
        if answers not in self._results:
            results = self._results[answers] = []
            requests, prompts = slice(0), slice(0)
            for part in self.parts:
                requests = slice(requests.stop, requests.stop + len(part.requests))
                prompts = slice(prompts.stop, prompts.stop + len(part.prompts))
                results.append(part.read(answers.select(requests, prompts)))
        return self._results[answers]

    def _in_order(self, kind: type[Table], tables: Sequence[tuple[RequestType, Table]]) -> Table:
        """One table of the rows of several types, in the order of their instances."""
        if len(tables) == 1:
            return tables[0][1]
        place = {id(one): index for index, one in enumerate(self.instances)}
        places = [place[id(one)] for part, _ in tables for one in part.instances]
        order = sorted(range(len(places)), key=places.__getitem__)
        columns = {
            field.name: [value for _, table in tables for value in getattr(table, field.name)]
            for field in dataclasses.fields(kind)
        }
        return kind(**{name: [column[row] for row in order] for name, column in columns.items()})


def _join_prompts(several: Sequence[Prompts]) -> Prompts:
    """Prompts of one type behind another. Copies nothing where one type alone has any."""
    some = [prompts for prompts in several if len(prompts)]
    if len(some) < 2:
        return some[0] if some else NO_PROMPTS
    first_kind = 0
    kinds: list[int] = []
    for prompts in some:
        kinds += [first_kind + kind for kind in prompts.kinds]
        first_kind += len(prompts.settings)
    columns = {
        name: [value for prompts in some for value in getattr(prompts, name)]
        for name in ("tokens", "limits", "seeds", "settings", "tasks")
    }
    return Prompts(kinds=kinds, **columns)
