"""Run a pack of prefix trees with the model's own cache: each shared part once, its cache copied for what goes on from it.

    batch of roots ── forward ── cache ─┬─ copy of some rows ── forward ── cache ── …
                                        └─ copy of some rows ── forward             (leaves: their cache is not needed)

All rows of a batch begin at one depth, and those that others go on from end at one, so no row with a future is padded. What is
read of a batch is picked from its output at once; the head runs on all reads of the pack in the end. What a batch holds follows
from the pack, the model's shape and constants alone.

Letters: B rows, L tokens of the longest, C columns that are read, H hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines.hf.model_cache import copy_rows, most_copies, row_bytes
from ddp_eval.packs.plan import Pack
from ddp_eval.packs.requests import IntArray
from ddp_eval.packs.states import ForwardLimits, batch_segments, find_segments


class CachingModel(Protocol):
    """See engine.py, which is one."""

    device: torch.device

    @property
    def most_positions(self) -> int | None: ...
    def forward_limits(self) -> ForwardLimits: ...
    def call_with_cache(
        self, tokens: npt.NDArray[Any], columns: npt.NDArray[Any], depth: int, cache: Any, keep: bool
    ) -> tuple[torch.Tensor, Any]: ...
    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor: ...


class _Batch(NamedTuple):
    """members: segments of the pack. source: the cache that they go on from, by `rows` of it; None for roots."""

    members: IntArray
    source: Any
    rows: IntArray


class StateTree:
    """A pack under way, one forward at a time; depth first, so that few caches are alive at once.

    values: (R, H) hidden states (or (R, V) logits) at the pack's reads, once `is_done`.
    """

    def __init__(self, model: CachingModel, pack: Pack) -> None:
        self._model, self._pack = model, pack
        self._segments = find_segments(pack)
        self._segment_of_read = np.searchsorted(self._segments.starts, pack.reads, side="right") - 1
        self._limits = model.forward_limits()
        roots = np.flatnonzero(self._segments.parents < 0)
        self._todo = [_Batch(members, None, members) for members in batch_segments(self._segments, roots, self._limits)][::-1]
        self.values: torch.Tensor | None = None

    @property
    def is_done(self) -> bool:
        return not self._todo

    def advance(self) -> None:
        """The next forward."""
        batch, segments = self._todo.pop(), self._segments
        children = np.flatnonzero(np.isin(segments.parents, batch.members))
        tokens = self._lay_down(batch)
        reads, rows, columns, column_of_read = self._find_reads(batch, tokens.shape[1])
        cache = None if batch.source is None else copy_rows(batch.source, batch.rows.tolist(), self._model.device)
        depth = int(segments.depths[batch.members[0]])
        output, cache = self._model.call_with_cache(tokens, columns, depth, cache, keep=len(children) > 0)
        if self.values is None:
            self.values = output.new_empty((len(self._pack.reads), output.shape[-1]))
        if len(reads):
            picked = output[self._model.to_device(rows), self._model.to_device(column_of_read)]
            self.values[self._model.to_device(reads)] = picked
        if len(children):
            self._go_on(batch, children, cache)

    def _lay_down(self, batch: _Batch) -> IntArray:
        """(B, L) token ids, padded with zeros on the right.

        One token at a time runs by other code in many layers, whose numbers are further off: leaves have two or more, unless
        there is no position for the second.
        """
        starts, lengths = self._segments.starts[batch.members], self._segments.lengths[batch.members]
        index = np.arange(max(int(lengths.max()), 2 if self._can_pad(batch) else 1))
        inside = index < lengths[:, None]
        tokens = np.zeros(inside.shape, dtype=np.int64)
        tokens[inside] = self._pack.tokens[(starts[:, None] + index)[inside]]
        return tokens

    def _can_pad(self, batch: _Batch) -> bool:
        """Whether leaves of one token may be given another."""
        most, depth = self._model.most_positions, int(self._segments.depths[batch.members[0]])
        fits = most is None or depth + 2 <= most
        return fits and batch.source is not None and bool(self._segments.is_leaf[batch.members].all())

    def _find_reads(self, batch: _Batch, width: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Which of the pack's reads lie in a batch, the row of each, the columns that are read, and which of these each is."""
        reads = np.flatnonzero(np.isin(self._segment_of_read, batch.members))
        place = np.zeros(len(self._segments.starts), dtype=np.int64)
        place[batch.members] = np.arange(len(batch.members))
        owners = self._segment_of_read[reads]
        columns, column_of_read = np.unique(self._pack.reads[reads] - self._segments.starts[owners], return_inverse=True)
        return reads, place[owners], columns if len(reads) else np.array([width - 1]), column_of_read

    def _go_on(self, batch: _Batch, children: IntArray, cache: Any) -> None:
        """Put what goes on from a batch next."""
        limits = self._limits
        if limits.rows_that_fit is None:
            of_row = 2 * row_bytes(cache, len(batch.members))  # copies are appended to
            limits = limits._replace(max_rows=min(limits.max_rows, most_copies(self._model.device, of_row)))
        row_of = {int(segment): row for row, segment in enumerate(batch.members)}
        for members in reversed(batch_segments(self._segments, children, limits)):
            members = members[np.argsort(self._segments.parents[members], kind="stable")]
            parents = np.array([row_of[int(parent)] for parent in self._segments.parents[members]], dtype=np.int64)
            self._todo.append(_Batch(members, cache, parents))
