"""Plain rows: one request each, batched by length, without a shared prefix."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddp_eval.packs.cut import sort_and_share
from ddp_eval.packs.plan import ROWS, Plan, assemble, empty_plan
from ddp_eval.packs.requests import IntArray, Requests, offsets_of


def plan_rows(
    requests: Requests,
    max_tokens: int,
    max_reads: int | None = None,
    isolate: bool = False,
    most_padding: int | None = None,
) -> tuple[Plan, IntArray]:
    """Cut `requests` into batches of plain rows of near-equal length, for models that cannot take a tree.

    A request that continues or lies within the one before it shares its row; nothing else is shared.
    max_tokens: the most that a batch holds once every row is padded to its longest, max_reads: likewise for its reads.
    isolate: batch only rows of one length, with no longer request in a row, for models whose numbers depend on the longest.
    most_padding: tokens by which all rows of a batch together may be lengthened, if that matters.
    Returns as `plan_packs`.
    """
    order, item_of_request, shared = sort_and_share(requests)
    if not len(order):
        return empty_plan(ROWS), item_of_request
    lengths = (np.diff(requests.starts)[order] - 1).astype(np.int64)

    # The row laid so far ends where the latest item with tokens of its own ends.
    latest = np.maximum.accumulate(np.where(lengths > shared, np.arange(len(order)), 0))
    continues = (lengths == shared) | (shared == np.concatenate([[-1], lengths[latest[:-1]]]))
    if isolate:
        continues &= lengths == np.concatenate([[-1], lengths[:-1]])
    continues[0] = False
    shared[~continues] = 0
    row_bounds = np.append(np.flatnonzero(~continues), len(order))
    row_lengths = np.maximum.reduceat(lengths, row_bounds[:-1])
    row_reads = np.add.reduceat(requests.num_targets[order].astype(np.int64), row_bounds[:-1])

    by_length = np.argsort(row_lengths, kind="stable")
    limits = RowLimits(max_tokens, max_reads, isolate, most_padding)
    batch_bounds = batch_rows(row_lengths[by_length], row_reads[by_length], limits)
    item_order = np.concatenate([np.arange(row_bounds[row], row_bounds[row + 1]) for row in by_length])
    rank_of_item = np.empty_like(item_order)
    rank_of_item[item_order] = np.arange(len(item_order))
    items_per_row = np.diff(row_bounds)[by_length]
    bounds = offsets_of(items_per_row)[batch_bounds]
    return assemble(
        requests, order[item_order], rank_of_item[item_of_request], shared[item_order], bounds,
        np.arange(len(bounds) - 1), ROWS,
    )  # fmt: skip


class RowLimits(NamedTuple):
    """Of a batch of rows: its tokens once every row is padded to the longest, and its reads; None: any number.

    one_length: no padding at all. most_padding: tokens by which all rows together may be lengthened; None: any number.
    """

    max_tokens: int
    max_reads: int | None = None
    one_length: bool = False
    most_padding: int | None = None


def batch_rows(row_lengths: IntArray, row_reads: IntArray, limits: RowLimits) -> IntArray:
    """Split rows of ascending length into batches within the limits. Returns the bounds, in rows.

    A batch's logits are computed for every row at every column where any row is read: about rows times the columns from the
    first read to the longest row's end.
    """
    max_tokens, max_reads, one_length, most_padding = limits
    bounds, tokens, reads, first_read = [0], 0, 0, 0
    for row, (length, count) in enumerate(zip(row_lengths.tolist(), row_reads.tolist(), strict=True)):
        rows = row + 1 - bounds[-1]
        too_long = rows * length > max_tokens
        too_padded = most_padding is not None and rows * length - (tokens + length) > most_padding
        columns = min(reads + count, length - min(first_read, length - count)) if rows > 1 else count
        too_many = max_reads is not None and rows * columns > max_reads
        other_length = one_length and row > 0 and length != row_lengths[row - 1]
        if row > bounds[-1] and (too_long or too_padded or too_many or other_length):
            bounds.append(row)
            tokens = reads = 0
        first_read = length - count if row == bounds[-1] else min(first_read, length - count)
        tokens += length
        reads += count
    return np.array([*bounds, len(row_lengths)], dtype=np.int64)
