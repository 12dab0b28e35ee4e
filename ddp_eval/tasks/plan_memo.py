"""Plans that were cut before, for callers who cut the same requests again and again: one checkpoint after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


class PlanMemo:
    """The last plan of each kind. Plans are never changed once they are cut."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, tuple[Any, ...], Any]] = {}

    def get(self, kind: str, source: Any, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave for this very `source` and an equal `key`.

        source: what is cut; known by identity, since nobody writes to requests either. key: all else that decides the plan.
        """
        known = self._known.get(kind)
        if known is None or known[0] is not source or known[1] != key:
            known = self._known[kind] = (source, key, make())
        made: Made = known[2]
        return made

    def forget(self) -> None:
        self._known.clear()
