"""Token ids of many texts that repeat each other: what they share is encoded once.

A text becomes the numbers of its parts (text_cuts.py); `fill` encodes the distinct parts together; `ids_of` puts a text's ids
together again. A text that cannot be cut is one part, encoded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ddp_eval.text_cuts import Cuts

Ids = npt.NDArray[np.int32]
Text = tuple[str, bool | None]  # and its `special`, see TokenPool
BATCH = 2048  # texts per call of the tokenizer: enough for its threads, little enough that Python lists stay small
_NONE = np.zeros(0, dtype=np.int32)
_PROBE = "A probe, 12 words."  # encoded with and without special tokens, to see which they are


class TokenPool:
    """The distinct parts of texts and their ids.

    encode: (texts, special) -> ids of each text by the tokenizer itself. special: as `add_special_tokens`; None: its default.
    cuts: where texts can be cut; None encodes each text whole.
    """

    def __init__(self, encode: Callable[[list[str], bool | None], list[list[int]]], cuts: Cuts | None) -> None:
        self._encode = encode
        self._cuts = cuts
        self._numbers: dict[tuple[str, str | bool | None], int] = {}
        self._ids: list[Ids] = []
        self._missing: list[tuple[str, str | bool | None]] = []
        self._around: dict[bool | None, tuple[list[int], list[int]] | None] = {}

    def add(self, text: str, special: bool | None) -> list[int]:
        """The numbers of a text's parts."""
        around = self._special_tokens(special)
        if around is None or self._cuts is None:
            return [self._number(text, special)]
        return [*around[0], *(self._number(part, anchor) for anchor, part in self._cuts.split(text)), *around[1]]

    def add_context(self, context: str, special: bool | None) -> PairMaker:
        """A context that continuations are added to."""
        around = self._special_tokens(special)
        # Tokens behind a text would stand between the context and what follows it.
        if around is None or around[1] or self._cuts is None:
            return PairMaker(self, None, [], special, context)
        *parts, (anchor, last) = self._cuts.split(context)
        numbers = [*around[0], *(self._number(part, anchor) for anchor, part in parts)]
        return PairMaker(self, self._cuts, numbers, anchor, last)

    def add_whole_pair(self, context: Text | None, whole: Text) -> Pair:
        """A context, and itself with its continuation behind, each encoded whole. None: there is no context."""
        return Pair([], context and self._number(*context), self._number(*whole))

    def add_two(self, context: Text | None, continuation: Text) -> Pair:
        """A context and a continuation that are encoded apart."""
        return Pair(self.add(*context) if context else [], None, self._number(*continuation))

    def fill(self) -> None:
        """Encode the parts that were added and are not known yet."""
        missing, self._missing = self._missing, []
        for how in dict.fromkeys(how for _, how in missing):
            group = [part for part, one in missing if one == how]
            for start in range(0, len(group), BATCH):
                batch = group[start : start + BATCH]
                for part, ids in zip(batch, self._encode_alike(batch, how), strict=True):
                    self._ids[self._numbers[part, how]] = np.array(ids, dtype=np.int32)

    def ids_of(self, numbers: Sequence[int]) -> list[Ids]:
        """The ids of parts, in order. Call `fill` before."""
        return [self._ids[number] for number in numbers]

    def _number(self, part: str, how: str | bool | None) -> int:
        """how: the part's anchor, or, for a whole text, its `special`."""
        number = self._numbers.setdefault((part, how), len(self._ids))
        if number == len(self._ids):
            self._ids.append(_NONE)
            self._missing.append((part, how))
        return number

    def _encode_alike(self, parts: list[str], how: str | bool | None) -> list[list[int]]:
        if not isinstance(how, str):
            return self._encode(parts, how)
        stem = self._encode([how], False)[0] if how else []
        found = self._encode([how + part for part in parts], False)
        if any(ids[: len(stem)] != stem for ids in found):
            raise AssertionError(f"a text of this tokenizer depends on what follows it, {how!r}, and must not be cut")
        return [ids[len(stem) :] for ids in found]

    def _special_tokens(self, special: bool | None) -> tuple[list[int], list[int]] | None:
        """The parts that hold the tokens before and behind any text; None where texts are encoded whole."""
        if special not in self._around:
            self._around[special] = self._find_special_tokens(special) if self._cuts else None
        return self._around[special]

    def _find_special_tokens(self, special: bool | None) -> tuple[list[int], list[int]] | None:
        bare, whole = self._encode([_PROBE], False)[0], self._encode([_PROBE], special)[0]
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return self._keep(whole[:start]), self._keep(whole[start + len(bare) :])
        return None

    def _keep(self, ids: list[int]) -> list[int]:
        """A part of known ids; no part where there are none."""
        if not ids:
            return []
        self._ids.append(np.array(ids, dtype=np.int32))
        return [len(self._ids) - 1]


class PairMaker:
    """A context, to which continuations are added: what both share is one part."""

    def __init__(self, pool: TokenPool, cuts: Cuts | None, before: list[int], how: str | bool | None, last: str) -> None:
        """before: the parts of the context but for the last, `last`, which is encoded as `how` says."""
        self._pool = pool
        self._cuts = cuts
        self._before = before
        self._how = how
        self._last = last
        self._narrow: tuple[list[int], str | bool | None, str] | None = None

    def add(self, continuation: str) -> Pair:
        anchor = self._cuts.anchor_between(self._last, continuation) if self._cuts else None
        if anchor is not None:
            head = self._pool._number(self._last, self._how)
            return Pair([*self._before, head], None, self._pool._number(continuation, anchor))
        # A word may go on across the end of the context: its last words are encoded by themselves and with the continuation.
        if self._narrow is None:
            self._narrow = self._before, self._how, self._last
            found = self._cuts.split_last_word(self._last) if self._cuts else None
            if found:
                first, anchor, words = found
                self._narrow = [*self._before, self._pool._number(first, self._how)], anchor, words
        before, how, words = self._narrow
        return Pair(before, self._pool._number(words, how), self._pool._number(words + continuation, how))


class Pair:
    """A context and a continuation as parts. head: the context's last part where `last` holds it too, to be cut off."""

    def __init__(self, context: list[int], head: int | None, last: int) -> None:
        self._context = context
        self._head = head
        self._last = last

    def ids(self, pool: TokenPool) -> tuple[list[Ids], Ids]:
        """Of the context, in parts, and of the continuation: what both together have behind as many tokens as the context."""
        context = pool.ids_of(self._context)
        last = pool.ids_of([self._last])[0]
        if self._head is None:
            return context, last
        head = pool.ids_of([self._head])[0]
        return [*context, head], last[len(head) :]
