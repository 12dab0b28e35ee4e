"""From requests to a plan that the model at hand runs rightly: packs where it proves itself on them, else padded rows."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ddp_eval.distributed.collectives import LostContact
from ddp_eval.engines import ROUNDING, Engine
from ddp_eval.errors import UserError, is_out_of_memory, one_line
from ddp_eval.packs.cut import plan_one_tree
from ddp_eval.packs.plan import Plan, build_pack
from ddp_eval.packs.requests import Requests, requests_from_lists
from ddp_eval.packs.rows import plan_rows

log = logging.getLogger("ddp_eval")


_SAMPLE = 2**18  # tokens of a run that are looked at: all of MMLU's 35 million take half a second

# Runs a plan, on whatever ranks that takes, and returns the (items,) sums in nats.
ScorePlan = Callable[[Plan], npt.NDArray[np.float64]]


def trial_requests(requests: Requests, vocab_size: int, reach: int | None) -> Requests:
    """A small tree out of the run's own tokens that has every shape a pack can have.

    prefix ─┬─ a ─┬─ x        two tails of one branch
            │     └─ y
            ├─ b              a second branch, behind a gap
            └ (half) ─ c      a return to a shorter prefix
    d                         a stranger

    reach: the window or chunk of sliding layers, in tokens; the prefix is longer than it, up to 512 tokens.
    """
    random = np.random.default_rng(0)
    own = np.unique(requests.tokens[:: max(1, len(requests.tokens) // _SAMPLE)])
    pool = own if len(own) >= 64 else np.arange(vocab_size)
    tokens = iter(random.permutation(np.resize(pool, 1024)).tolist())

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    prefix, a = take(min(reach + 8, 512) if reach else 24), take(9)
    sequences = [prefix + a + take(4), prefix + a + take(6), prefix + take(11), prefix[: len(prefix) // 2] + take(7), take(13)]
    return requests_from_lists(sequences, [3, 5, 4, 6, 12])


def choose_trees(engine: Engine, requests: Requests, score_plan: ScorePlan | None = None) -> str | None:
    """`check_packs` with the attention that is fastest for trees, and where that fails with the model's own, which then stays.

    flex_attention needs a C compiler, which slim containers lack; of a model's own attention no more is known than it says.
    """
    fastest = engine.tree_attention
    why = check_packs(engine, requests, score_plan)
    if why is None or fastest == engine.plain_attention:
        return why
    engine.tree_attention = engine.plain_attention
    if check_packs(engine, requests, score_plan) is not None:
        engine.tree_attention = fastest
        return why
    log.warning("packs run with %s attention, not with %s, the fastest here: %s", engine.tree_attention, fastest, why)
    return None


def check_packs(engine: Engine, requests: Requests, score_plan: ScorePlan | None = None) -> str | None:
    """Try `requests` packed against plain rows. Returns None when they agree, else one phrase that says how far off.

    A model that takes a tree mask and yet ignores part of it (positions by index, a running state) gives wrong numbers without
    an error: only its own answers show it. What rounding may do is known from the dtype and from two rows run by themselves.
    """

    def score(plan: Plan, item_of_request: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        try:
            sums = score_plan(plan) if score_plan is not None else score_alone(engine, plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"rank 0 ran out of memory when it tried the model on {len(plan.tokens)} tokens: "
                "give devices with more memory, or spread the model over several (--layout)"
            ) from None
        return sums[item_of_request]

    try:
        packed = score(*plan_one_tree(requests))
    except (LostContact, UserError):
        raise  # no word on packs
    except Exception as error:
        return f"it fails on packs ({type(error).__name__}: {one_line(error, 200)})"
    plain = score(*plan_rows(requests, max_tokens=2**30))
    some = requests.select(np.arange(min(2, len(requests))))
    rounding = np.abs(score(*plan_rows(some, max_tokens=1)) - plain[: len(some)]) / some.num_targets
    drift = np.abs(packed - plain) / requests.num_targets
    allowed = max(ROUNDING.get(engine.dtype, 1e-4), 5 * float(rounding.mean()))
    # A NaN is not "at most" anything either.
    if float(drift.mean()) <= allowed and float(drift.max()) <= 4 * allowed:
        return None
    if not np.isfinite(plain).all():
        return "its scores are not finite"
    if not np.isfinite(packed).all():
        return "it fails on packs, or its scores there are not finite"
    return f"packed and plain runs differ by {float(drift.max()):.2g} nats per token, where {allowed:.2g} on average is allowed"


def score_alone(engine: Engine, plan: Plan) -> npt.NDArray[np.float64]:
    sums = [engine.collect(engine.launch(build_pack(plan, index)))["logprob"] for index in range(plan.num_packs)]
    scores: npt.NDArray[np.float64] = np.concatenate(sums)
    return scores
