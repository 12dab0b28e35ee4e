"""What comes out NaN in a pack is run again in a row of its own: it may have it from others of its pack.

Masked attention multiplies what a token does not see with zero, and zero times NaN is NaN. So a request that overflows can spoil
all that share its forward pass; where each has its own row, as in lm_eval, it spoils none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from ddp_eval.engines import Engine
from ddp_eval.packs.plan import PACKS, Plan
from ddp_eval.packs.requests import IntArray, Requests
from ddp_eval.packs.results import Results
from ddp_eval.packs.rows import plan_rows
from ddp_eval.run.planning import Decision

log = logging.getLogger("ddp_eval")

SAMPLE = 256  # items that are run again at first: where none of them comes out right, the model itself is broken, and no more are


def rescore_nan(
    results: Results, requests: Requests, decision: Decision, engine: Engine, run: Callable[[Plan], Results]
) -> tuple[Results, int]:
    """Score the items that came out NaN in packs again, each in a row of its own.

    results: (items,) RESULT, in their order. decision: how `requests` were cut. run: scores a plan on all ranks.
    Returns all items' results, and how many of them are numbers now.
    """
    broken = np.flatnonzero(np.isnan(results["logprob"]))
    if decision.plan.kind != PACKS or engine.capabilities.rows_are_independent or not len(broken):
        return results, 0
    results = results.copy()
    log.warning(
        "%d of %d distinct requests came out NaN in packs with others: trying them by themselves", len(broken), len(results)
    )
    request_of_item = np.unique(decision.item_of_request, return_index=True)[1]

    def again(items: IntArray) -> None:
        chosen = requests.select(request_of_item[items])
        plan, item_of_request = plan_rows(chosen, engine.max_tokens(), engine.max_reads(), isolate=True)
        found = run(plan)[item_of_request]
        found["item"] = items  # of that plan, they had other numbers
        results[items] = found

    some = broken[np.linspace(0, len(broken) - 1, min(SAMPLE, len(broken))).astype(np.int64)]
    again(some)
    rest = np.setdiff1d(broken, some)
    if len(rest) and np.isnan(results["logprob"][some]).all():
        log.warning(
            "none of %d came out otherwise: the model is at fault, and %d others are left as they are", len(some), len(rest)
        )
    elif len(rest):
        again(rest)
    saved = int((~np.isnan(results["logprob"][broken])).sum())
    if saved:
        log.warning("%d of them have numbers by themselves", saved)
    return results, saved
