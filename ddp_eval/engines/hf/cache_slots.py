"""Slots for rows that decode together through the model's own cache: what kv_slots.py is for models whose attention it replaces.

    row 0   . . . t t t t t  │ t          .  padding, masked: rows are as long as the longest, counted from the right
    row 1   t t t t t t t t  │ t          states of layers that keep one stand beside, and know no padding
    row 2   . t t t t t t t  │ t

A step is one forward of all rows, as in transformers' own generation of prompts padded on the left. Prompts that come in run in
batches of one length behind a copy of the common prefix's cache, and are joined to the others.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ddp_eval.engines.hf.model_cache import attends, copy_rows, join_rows, most_copies, row_bytes
from ddp_eval.packs.requests import IntArray


class DecodingModel(Protocol):
    """See engine.py, which is one."""

    device: torch.device

    def max_tokens(self) -> int: ...
    def next_with_cache(
        self, tokens: torch.Tensor, cache: Any, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]: ...


class CacheSlots:
    """Members and methods as of `KVSlots`; rows stand in slots 0 ... B-1 without a gap.

    slots: how many rows there may be: fewer than asked for where the common prefix, which each row has a copy of, is long, or
    where the states of a row are large.
    """

    def __init__(self, engine: DecodingModel, prefix: IntArray, slots: int, width: int) -> None:
        self._engine, self._prefix_length = engine, len(prefix)
        self._prefix: Any = None
        self._cache: Any = None
        self._row_in_slot: list[int] = []  # of the cache, which may have rows that have left
        self._lengths: list[int] = []  # tokens of each row, the prefix included
        self._rows = self._width = 0  # of the cache; width in tokens
        self.slots = slots
        if len(prefix):
            self._prefix = self._run([prefix], None, 0)[1]
            of_row = row_bytes(self._prefix, 1) * (len(prefix) + width) // len(prefix)
        else:  # keys and values are counted in the slots asked for, states are not
            of_row = row_bytes(self._run([np.zeros(1, dtype=np.int64)], None, 0)[1], 1)
        self.slots = max(1, min(slots, most_copies(engine.device, of_row)))

    def __len__(self) -> int:
        return len(self._lengths)

    def admit(self, prompts: Sequence[IntArray]) -> tuple[int, torch.Tensor]:
        """Put `prompts`, without the common prefix, into the next slots.

        Returns the tokens computed and (len(prompts), V) logits of what comes next.
        """
        caches, widths, logits, order = [], [], [], []
        if len(self):
            caches, widths = [self._select()], [self._width]
        for members in self._groups(prompts):
            source = None
            if self._prefix is not None:
                source = copy_rows(self._prefix, [0] * len(members), self._engine.device)
            found, cache = self._run([prompts[index] for index in members], source, self._prefix_length)
            caches.append(cache)
            widths.append(self._prefix_length + len(prompts[members[0]]))
            logits.append(found)
            order += members
        before, place = len(self), np.argsort(order)
        self._cache, self._width = join_rows(caches, widths), max(widths)
        self._row_in_slot, self._rows = [*range(before), *(before + place).tolist()], before + len(prompts)
        self._lengths += [self._prefix_length + len(prompt) for prompt in prompts]
        return sum(map(len, prompts)), torch.cat(logits)[torch.from_numpy(place).to(self._engine.device)]

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to every row. Returns (B, V) logits of what comes next."""
        device = self._engine.device
        cache = self._select()
        lengths = torch.tensor(self._lengths, device=device)[:, None]
        mask = None
        if attends(cache) and min(self._lengths) < self._width:
            mask = (torch.arange(self._width + 1, device=device) >= self._width - lengths).to(torch.int64)
        logits, self._cache = self._engine.next_with_cache(torch.tensor(tokens, device=device)[:, None], cache, lengths, mask)
        self._lengths = [length + 1 for length in self._lengths]
        self._width += 1
        return logits

    def drop(self, slot: int, is_broken: bool) -> None:
        """Free a slot: the last row moves into it. What the row kept goes with it, NaN or not."""
        for members in (self._row_in_slot, self._lengths):
            members[slot] = members[-1]
            members.pop()

    def _select(self) -> Any:
        """The cache with its rows in the order of slots, and no more padding than they need."""
        longest = max(self._lengths)
        if self._row_in_slot != list(range(self._rows)) or longest < self._width:
            self._cache = join_rows([copy_rows(self._cache, self._row_in_slot, self._engine.device)], [longest])
            self._row_in_slot, self._rows, self._width = list(range(len(self))), len(self), longest
        return self._cache

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
