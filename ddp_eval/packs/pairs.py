"""Cut requests for encoder-decoders: a pack holds (context, continuation) pairs, those with one context side by side.

The encoder sees contexts, the decoder continuations, so that nothing but a whole context can be shared. A pack is written down as
in plan.py, each context once with its continuations as branches:

    requests  A B | x y      (context | continuation)      A─B─x
              A B | z                                        (z is predicted, not fed)
              C   | x                                       C

Pure numpy, no model, no ranks: the same requests and limits give the same plan everywhere.
"""

from __future__ import annotations

import itertools

import numpy as np

from ddp_eval.packs.plan import PACKS, Pack, Plan, assemble
from ddp_eval.packs.requests import IntArray, Requests


def plan_pairs(requests: Requests, max_tokens: int, max_reads: int | None = None, share: bool = True) -> tuple[Plan, IntArray]:
    """Cut `requests` into batches of pairs of near-equal length; identical requests are run once.

    max_tokens: the most that a batch holds, contexts and continuations each padded to their longest; a pair beyond it goes alone.
    max_reads: likewise for the continuations by themselves. share: run a context once for all of its continuations in a batch.
    Returns the plan, its batches from short to long, and (N,) int64: the item that answers each request.
    """
    view = np.ascontiguousarray(requests.tokens, dtype="<i4")
    bounds, num_targets = requests.starts.tolist(), requests.num_targets.tolist()
    keys = [
        (stop - begin - count, view[begin : stop - count].tobytes(), count, view[stop - count : stop].tobytes())
        for (begin, stop), count in zip(itertools.pairwise(bounds), num_targets, strict=True)
    ]
    order: list[int] = []
    item_of_request = np.empty(len(keys), dtype=np.int64)
    for request in sorted(range(len(keys)), key=keys.__getitem__):
        if not order or keys[request] != keys[order[-1]]:
            order.append(request)
        item_of_request[request] = len(order) - 1

    shared, starts = np.zeros(len(order), dtype=np.int64), [0]
    contexts = longest_context = continuations = longest = 0
    for item, request in enumerate(order):
        length, context, count, _ = keys[request]
        repeats = share and item > starts[-1] and context == keys[order[item - 1]][1]
        rows = contexts + (not repeats), continuations + 1
        padded = rows[0] * max(longest_context, length), rows[1] * max(longest, count)
        if item > starts[-1] and (sum(padded) > max_tokens or (max_reads is not None and padded[1] > max_reads)):
            starts.append(item)
            repeats, rows, longest_context, longest = False, (1, 1), 0, 0
        shared[item] = length if repeats else 0
        (contexts, continuations), longest_context, longest = rows, max(longest_context, length), max(longest, count)
    packs = [*starts, len(order)] if order else [0]
    return assemble(
        requests, np.array(order, dtype=np.int64), item_of_request, shared, np.array(packs), np.arange(len(packs) - 1), PACKS
    )


def contexts_of(pack: Pack) -> tuple[list[IntArray], IntArray, list[IntArray]]:
    """What an encoder-decoder is fed for a pack.

    Returns the token ids of each context that is to be encoded, (items,) int64: which of them is the item's, and the token ids of
    each item's continuation.
    """
    starts = np.flatnonzero(np.diff(pack.answer_items, prepend=-1))
    last_of_context = pack.reads[pack.answer_reads[starts]]
    ends, context_of_item = np.unique(last_of_context, return_inverse=True)
    index = np.arange(len(pack))
    contexts = [pack.tokens[(index <= end) & (end < pack.end)] for end in ends.tolist()]
    return contexts, context_of_item, np.split(pack.answer_targets, starts[1:])
