"""Slots for rows that decode together through the model's own cache: what kv_slots.py is for models whose attention it replaces.

    row 0   . . . t t t t t  │ t          .  padding, masked: rows are as long as the longest, counted from the right
    row 1   t t t t t t t t  │ t          states of layers that keep one stand beside, and know no padding
    row 2   . t t t t t t t  │ t

A step is one forward of all rows, as in transformers' own generation of prompts padded on the left. Prompts that come in run in
batches of one length behind a copy of the common prefix's cache, and are joined to the others. Where a layer's cache cannot be
padded (`model_cache.can_pad`), nothing is joined: a step takes one forward for each of those batches.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ddp_eval.engines.hf.cache_sizes import CacheSizes
from ddp_eval.engines.hf.model_cache import attends, can_pad, copy_rows, join_rows, most_copies, row_bytes
from ddp_eval.packs.requests import IntArray


class DecodingModel(Protocol):
    """See engine.py, which is one."""

    device: torch.device

    @property
    def cache_sizes(self) -> CacheSizes | None: ...
    def max_tokens(self) -> int: ...
    def next_with_cache(
        self, tokens: torch.Tensor, cache: Any, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]: ...


@dataclasses.dataclass(eq=False)
class _Row:
    """length: its tokens, the common prefix included. has_left: its slot is another's, while the cache still holds it."""

    length: int
    has_left: bool = False


@dataclasses.dataclass(eq=False)
class _Joined:
    """Rows in one cache, in its order. width: tokens that it holds of each, padding included."""

    cache: Any
    width: int
    rows: list[_Row]


class CacheSlots:
    """Members and methods as of `KVSlots`; rows stand in slots 0 ... B-1 without a gap.

    slots: how many rows there may be: fewer than asked for where the common prefix, which each row has a copy of, is long, or
    where the states of a row are large.
    """

    def __init__(self, engine: DecodingModel, prefix: IntArray, slots: int, width: int) -> None:
        self._engine, self._prefix_length = engine, len(prefix)
        self._prefix: Any = None
        self._joined: list[_Joined] = []  # one at most where caches can be padded
        self._in_slot: list[_Row] = []
        self.slots = slots
        first = self._run([prefix if len(prefix) else np.zeros(1, dtype=np.int64)], None, 0)[1]
        if len(prefix):
            self._prefix = first
        self._pads = can_pad(first)
        if engine.cache_sizes is not None:
            of_row = engine.cache_sizes.row_bytes(len(prefix) + width)
        elif len(prefix):
            of_row = row_bytes(first, 1) * (len(prefix) + width) // len(prefix)
        else:  # keys and values are counted in the slots asked for, states are not
            of_row = row_bytes(first, 1)
        self.slots = max(1, min(slots, most_copies(engine.device, of_row)))

    def __len__(self) -> int:
        return len(self._in_slot)

    def admit(self, prompts: Sequence[IntArray]) -> tuple[int, torch.Tensor]:
        """Put `prompts`, without the common prefix, into the next slots.

        Returns the tokens computed and (len(prompts), V) logits of what comes next.
        """
        rows = [_Row(self._prefix_length + len(prompt)) for prompt in prompts]
        self._joined = [one for one in self._joined if not all(row.has_left for row in one.rows)]  # before the forwards
        fresh, logits = [], []
        for members in self._groups(prompts):
            source = None
            if self._prefix is not None:
                source = copy_rows(self._prefix, [0] * len(members), self._engine.device)
            found, cache = self._run([prompts[index] for index in members], source, self._prefix_length)
            fresh.append(_Joined(cache, rows[members[0]].length, [rows[index] for index in members]))
            logits.append(found)
        self._forget_left()
        self._joined += fresh
        if self._pads and len(self._joined) > 1:
            cache = join_rows([one.cache for one in self._joined], [one.width for one in self._joined])
            width, together = max(one.width for one in self._joined), [row for one in self._joined for row in one.rows]
            self._joined = [_Joined(cache, width, together)]
        self._in_slot += rows
        return sum(map(len, prompts)), self._in_order(logits, [row for one in fresh for row in one.rows], rows)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to every row. Returns (B, V) logits of what comes next."""
        self._forget_left()
        token_of = dict(zip(self._in_slot, tokens, strict=True))
        logits = [self._step_joined(one, [token_of[row] for row in one.rows]) for one in self._joined]
        return self._in_order(logits, [row for one in self._joined for row in one.rows], self._in_slot)

    def _step_joined(self, joined: _Joined, tokens: list[int]) -> torch.Tensor:
        """(rows, V)"""
        device, lengths = self._engine.device, [row.length for row in joined.rows]
        positions = torch.tensor(lengths, device=device)[:, None]
        mask = None
        if attends(joined.cache) and min(lengths) < joined.width:
            mask = (torch.arange(joined.width + 1, device=device) >= joined.width - positions).to(torch.int64)
        fed = torch.tensor(tokens, device=device)[:, None]
        logits, joined.cache = self._engine.next_with_cache(fed, joined.cache, positions, mask)
        joined.width += 1
        for row in joined.rows:
            row.length += 1
        return logits

    def drop(self, slot: int, is_broken: bool) -> None:
        """Free a slot: the last row moves into it. What the row kept goes with it, NaN or not."""
        self._in_slot[slot].has_left = True
        self._in_slot[slot] = self._in_slot[-1]
        self._in_slot.pop()

    def _forget_left(self) -> None:
        """Leave rows that have left out of the caches, and padding that the others no longer need."""
        for joined in self._joined:
            stay = [index for index, row in enumerate(joined.rows) if not row.has_left]
            rows = [joined.rows[index] for index in stay]
            longest = max((row.length for row in rows), default=0)
            if rows and (len(stay) < len(joined.rows) or longest < joined.width):
                joined.cache = copy_rows(joined.cache, stay, self._engine.device, longest if self._pads else None)
            joined.rows, joined.width = rows, longest
        self._joined = [joined for joined in self._joined if joined.rows]

    def _in_order(self, logits: list[torch.Tensor], found: list[_Row], wanted: list[_Row]) -> torch.Tensor:
        """(rows, V) logits of the rows `found`, one part after the other, in the order of `wanted`."""
        together = logits[0] if len(logits) == 1 else torch.cat(logits)
        if found == wanted:
            return together
        place = {row: index for index, row in enumerate(found)}
        return together[torch.tensor([place[row] for row in wanted], device=together.device)]

    def _run(self, prompts: Sequence[IntArray], source: Any, depth: int) -> tuple[torch.Tensor, Any]:
        """(len(prompts), V) logits behind prompts of one length, and their cache."""
        device = self._engine.device
        tokens = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(device)
        positions = torch.arange(depth, depth + tokens.shape[1], device=device).expand(len(prompts), -1)
        return self._engine.next_with_cache(tokens, source, positions, None)

    def _groups(self, prompts: Sequence[IntArray]) -> Iterator[list[int]]:
        """Prompts of one length, no more together than a forward holds."""
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        for length, members in sorted(by_length.items()):
            most = max(1, self._engine.max_tokens() // (length + self._prefix_length))
            yield from (members[start : start + most] for start in range(0, len(members), most))
