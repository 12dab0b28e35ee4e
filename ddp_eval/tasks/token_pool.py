"""Token ids of many texts that repeat each other: what they share is encoded once.

A text becomes the numbers of its parts (text_cuts.py); `fill` encodes the distinct parts together; `ids_of` gives the ids of
parts. A text that cannot be cut is one part, encoded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddp_eval.tasks.text_cuts import Cuts

Ids = npt.NDArray[np.int32]
Text = tuple[str, bool | None]  # and its `special`, see TokenPool

BATCH = 2048  # texts per call of the tokenizer: enough for its threads, little enough that Python lists stay small
_NONE = np.zeros(0, dtype=np.int32)
_PROBES = ("A probe, 12 words.", "Other words: 345")  # encoded with and without special tokens, to see which they are


class PartsDiffer(Exception):
    """A tokenizer gives the parts of a text other ids than the whole: its texts must not be cut."""


class _Part(NamedTuple):
    """anchor: of a part of a text, see text_cuts.py; "" at the text's start. None: a whole text, encoded as `special` says."""

    text: str
    anchor: str | None
    special: bool | None


class TokenPool:
    """The distinct parts of texts and their ids.

    encode: (texts, special) -> ids of each text by the tokenizer itself. special: as `add_special_tokens`; None: its default.
    cuts: where texts can be cut; None encodes each text whole.
    """

    def __init__(self, encode: Callable[[list[str], bool | None], list[list[int]]], cuts: Cuts | None) -> None:
        self._encode = encode
        self._cuts = cuts
        self._numbers: dict[_Part, int] = {}
        self._ids: list[Ids] = []
        self._missing: list[_Part] = []
        self._around: dict[bool | None, tuple[list[int], list[int]] | None] = {}
        self.num_characters = 0  # of all parts: what the pool's memory goes by

    def add(self, text: str, special: bool | None) -> list[int]:
        """The numbers of a text's parts."""
        around = self._special_tokens(special)
        if around is None or self._cuts is None:
            return [self.add_part(text, None, special)]
        return [*around[0], *(self.add_part(part, anchor) for anchor, part in self._cuts.split(text)), *around[1]]

    def add_part(self, text: str, anchor: str | None, special: bool | None = None) -> int:
        """The number of one part, see `_Part`."""
        part = _Part(text, anchor, special)
        number = self._numbers.setdefault(part, len(self._ids))
        if number == len(self._ids):
            self._ids.append(_NONE)
            self._missing.append(part)
            self.num_characters += len(text)
        return number

    def add_context(self, context: str, special: bool | None) -> PairMaker:
        """A context that continuations are added to."""
        around = self._special_tokens(special)
        # Tokens behind a text would stand between the context and what follows it.
        if around is None or around[1] or self._cuts is None:
            return PairMaker(self, None, [], _Part(context, None, special))
        *parts, (anchor, last) = self._cuts.split(context)
        before = [*around[0], *(self.add_part(part, anchor) for anchor, part in parts)]
        return PairMaker(self, self._cuts, before, _Part(last, anchor, None))

    def add_whole_pair(self, context: Text | None, whole: Text) -> Pair:
        """A context, and itself with its continuation behind, each encoded whole. None: there is no context."""
        head = None if context is None else self.add_part(context[0], None, context[1])
        return Pair(Context([] if head is None else [head]), head, self.add_part(whole[0], None, whole[1]))

    def add_two(self, context: Text | None, continuation: Text) -> Pair:
        """A context and a continuation that are encoded apart."""
        return Pair(Context(self.add(*context) if context else []), None, self.add_part(continuation[0], None, continuation[1]))

    def fill(self) -> None:
        """Encode the parts that were added and are not known yet. Raises PartsDiffer."""
        missing, self._missing = self._missing, []
        alike: dict[tuple[str | None, bool | None], list[_Part]] = {}
        for part in missing:
            alike.setdefault((part.anchor, part.special), []).append(part)
        for (anchor, special), parts in alike.items():
            for start in range(0, len(parts), BATCH):
                batch = parts[start : start + BATCH]
                texts = [part.text for part in batch]
                found = self._encode(texts, special) if anchor is None else self._encode_behind(anchor, texts)
                for part, ids in zip(batch, found, strict=True):
                    self._ids[self._numbers[part]] = np.array(ids, dtype=np.int32)

    def ids_of(self, numbers: Sequence[int]) -> list[Ids]:
        """The ids of parts, in order. Call `fill` before."""
        return [self._ids[number] for number in numbers]

    def _encode_behind(self, anchor: str, texts: list[str]) -> list[list[int]]:
        stem = self._encode([anchor], False)[0] if anchor else []
        found = self._encode([anchor + text for text in texts], False)
        if any(ids[: len(stem)] != stem for ids in found):
            raise PartsDiffer
        return [ids[len(stem) :] for ids in found]

    def _special_tokens(self, special: bool | None) -> tuple[list[int], list[int]] | None:
        """The parts that hold the tokens before and behind any text; None where texts are encoded whole."""
        if special not in self._around:
            self._around[special] = self._find_special_tokens(special) if self._cuts else None
        return self._around[special]

    def _find_special_tokens(self, special: bool | None) -> tuple[list[int], list[int]] | None:
        found = []
        for probe in _PROBES:
            bare, whole = self._encode([probe], False)[0], self._encode([probe], special)[0]
            starts = [start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare]
            if not bare or not starts:
                return None
            found.append((whole[: starts[0]], whole[starts[0] + len(bare) :]))
        if found[0] != found[1]:
            return None
        before, behind = found[0]
        return self._keep(before), self._keep(behind)

    def _keep(self, ids: list[int]) -> list[int]:
        """A part of known ids; no part where there are none."""
        if not ids:
            return []
        self._ids.append(np.array(ids, dtype=np.int32))
        return [len(self._ids) - 1]


class Context:
    """The parts of a context, and their ids once they are known."""

    def __init__(self, parts: list[int]) -> None:
        self._parts = parts
        self._ids: Ids | None = None

    def ids(self, pool: TokenPool) -> Ids:
        if self._ids is None:
            self._ids = np.concatenate([_NONE, *pool.ids_of(self._parts)])
        return self._ids


class PairMaker:
    """A context, to which continuations are added: what both share is one part."""

    def __init__(self, pool: TokenPool, cuts: Cuts | None, before: list[int], last: _Part) -> None:
        """before: the parts of the context but for the last."""
        self._pool = pool
        self._cuts = cuts
        self._before = before
        self._last = last
        self._whole: Context | None = None
        self._narrow: tuple[Context, int, _Part] | None = None

    def add(self, continuation: str) -> Pair:
        anchor = self._cuts.anchor_between(self._last.text, continuation) if self._cuts else None
        if anchor is not None:
            self._whole = self._whole or Context([*self._before, self._pool.add_part(*self._last)])
            return Pair(self._whole, None, self._pool.add_part(continuation, anchor))
        # A word may go on across the end of the context: its last words are encoded by themselves and with the continuation.
        context, head, last = self._narrow = self._narrow or self._split_off_last_words()
        return Pair(context, head, self._pool.add_part(*last._replace(text=last.text + continuation)))

    def _split_off_last_words(self) -> tuple[Context, int, _Part]:
        """The context, and its last words as a part of it."""
        found = self._cuts.split_last_words(self._last.text) if self._cuts else None
        if found is None:
            before, last = self._before, self._last
        else:
            first, anchor, words = found
            before, last = [*self._before, self._pool.add_part(*self._last._replace(text=first))], _Part(words, anchor, None)
        head = self._pool.add_part(*last)
        return Context([*before, head]), head, last


class Pair:
    """A context and a continuation as parts. head: the context's last part where `last` holds it too, to be cut off."""

    def __init__(self, context: Context, head: int | None, last: int) -> None:
        self._context = context
        self._head = head
        self._last = last

    def ids(self, pool: TokenPool) -> tuple[Ids, Ids]:
        """Of the context and of the continuation: what both together have behind as many tokens as the context."""
        [last] = pool.ids_of([self._last])
        if self._head is not None:
            [head] = pool.ids_of([self._head])
            last = last[len(head) :].copy()  # a view would keep all of it
        return self._context.ids(pool), last
