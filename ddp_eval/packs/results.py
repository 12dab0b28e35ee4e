"""What comes of packs: one record for each item, in the form in which engines return it, journals keep it and ranks send it.

A new column of the model's: a field here, and its values where `make_results` is called.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ddp_eval.packs.plan import Pack

# item: its number in the plan. logprob: summed over its scored tokens, in nats. greedy: whether each of them was the argmax.
# The bytes are the same on every machine.
RESULT = np.dtype([("item", "<i8"), ("logprob", "<f8"), ("greedy", "?")])
Results = npt.NDArray[np.void]  # (n,) of RESULT
NO_RESULTS: Results = np.zeros(0, dtype=RESULT)


def make_results(pack: Pack, logprobs: npt.NDArray[np.floating], is_greedy: npt.NDArray[np.bool_]) -> Results:
    """(items,) RESULT of a pack; sums in float64.

    logprobs, is_greedy: (A,) of each scored token its log-probability, and whether it was the argmax.
    """
    owner, count = pack.answer_items, len(pack.items)
    results = np.zeros(count, dtype=RESULT)
    results["item"] = np.arange(pack.items.start, pack.items.stop)
    results["logprob"] = np.bincount(owner, weights=logprobs, minlength=count)
    results["greedy"] = np.bincount(owner, weights=~is_greedy, minlength=count) == 0
    return results


def fill_slots(results: Results, count: int) -> tuple[Results, float]:
    """Put gathered results into their slots.

    Returns (count,) RESULT, in the order of items, and by how many nats items that ran twice differ: 0 unless the ranks' hardware
    or thread counts do; the lowest rank's result stands. Raises RuntimeError if an item has none.
    """
    items, bits = results["item"], results["logprob"].view(np.int64)
    seen = np.zeros(count, dtype=bool)
    seen[items] = True
    if not seen.all():
        lost = np.flatnonzero(~seen)
        raise RuntimeError(f"{len(lost)} of {count} items came back from no rank, the first of them item {lost[0]}")
    filled = results[np.unique(items, return_index=True)[1]]
    differing = filled["logprob"].view(np.int64)[items] != bits  # the bits: a NaN equals itself
    drift = np.abs(filled["logprob"][items[differing]] - results["logprob"][differing])
    return filled, float(drift.max(initial=0.0))
