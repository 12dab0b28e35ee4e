"""From requests to a plan that the model at hand runs rightly: packs where it proves itself on them, else rows."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ddp_eval.engines import LARGEST_ROUNDING, ROUNDING, Engine
from ddp_eval.errors import LostContact, UserError, is_out_of_memory, one_line
from ddp_eval.packs.cut import plan_one_tree
from ddp_eval.packs.plan import Plan, build_pack
from ddp_eval.packs.requests import Requests, concatenate, requests_from_lists
from ddp_eval.packs.rows import plan_rows
from ddp_eval.packs.states import plan_one_forest

log = logging.getLogger("ddp_eval")


MOST_REACH = 4096  # tokens: a trial beyond it would cost more than it can find
_SAMPLE = 2**18  # tokens of a run that are looked at: all of MMLU's 35 million take half a second

# Runs a plan, on whatever ranks that takes, and returns the (items,) sums in nats.
ScorePlan = Callable[[Plan], npt.NDArray[np.float64]]


def trial_requests(requests: Requests, vocab_size: int, reaches: Sequence[int] = (), most: int | None = None) -> Requests:
    """A small tree out of the run's own tokens that has every shape a pack can have.

    prefix ─┬─ a ─┬─ x        two tails of one branch
            │     └─ y
            ├─ b              a second branch, behind a gap
            └ (half) ─ c      a return to a shorter prefix
    d                         a stranger

    reaches: lengths at which a layer begins to compute otherwise (windows, chunks, top-k of an indexer, ...), in tokens. The
        prefix is longer than all that the run's own requests are longer than.
    most: tokens that a forward may be given, if that is limited.
    """
    longest = int(np.diff(requests.starts).max(initial=1)) - 1
    reach = max((reach for reach in reaches if reach < min(longest, MOST_REACH + 1)), default=0)
    length = min(max(24, reach + 8), max(24, longest - 16))
    length = length if most is None else min(length, max(4, most - 16))
    random = np.random.default_rng(0)
    own = np.unique(requests.tokens[:: max(1, len(requests.tokens) // _SAMPLE)])
    pool = own if len(own) >= 64 else np.arange(vocab_size)
    tokens = iter(random.permutation(np.resize(pool, length + 64)).tolist())

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    prefix, a = take(length), take(9)
    sequences = [prefix + a + take(4), prefix + a + take(6), prefix + take(11), prefix[: len(prefix) // 2] + take(7), take(13)]
    sequences = sequences if most is None else [sequence[: most + 1] for sequence in sequences]
    return requests_from_lists(
        sequences, [min(count, len(one) - 1) for count, one in zip((3, 5, 4, 6, 12), sequences, strict=True)]
    )


def trial_forest(requests: Requests) -> Requests:
    """`requests`, as `trial_requests` makes them, and a tree of the same shape with other tokens, to run beside them.

    The second lacks y: so some rows that run together come from both trees, and some are copies of one row alone.
    """
    known, place = np.unique(requests.tokens, return_inverse=True)
    others = dataclasses.replace(requests, tokens=np.roll(known, 1)[place].astype(requests.tokens.dtype))
    return concatenate(requests, others.select(np.flatnonzero(np.arange(len(requests)) != 1)))


def needs_equal_lengths(engine: Engine, requests: Requests) -> bool:
    """Whether rows must be of one length, and no pack will do, for a request among these is too long for anything else."""
    beyond = engine.capabilities.equal_lengths_beyond
    return beyond is not None and int(np.diff(requests.starts).max(initial=1)) - 1 > beyond


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
    """Try `requests` packed against each by itself. Returns None when they agree, else one phrase that says how far off.

    A model that takes a tree mask and yet ignores part of it (positions by index, a running state) gives wrong numbers without
    an error: only its own answers show it. What rounding may do is known from the dtype and from padded rows, up to a limit:
    rows of a model that sees its padding differ by more than rounding does.
    """
    try:
        packed = _score(engine, score_plan, *plan_one_tree(requests))
    except (LostContact, UserError):
        raise  # no word on packs
    except Exception as error:
        return f"it fails on packs ({type(error).__name__}: {one_line(error, 200)})"
    alone = _score_single(engine, score_plan, requests)
    drift, allowed = np.abs(packed - alone) / requests.num_targets, ROUNDING.get(engine.dtype, 1e-4)
    if _within(drift, allowed):
        return None
    if not np.isfinite(alone).all():
        return "its scores are not finite"
    if not np.isfinite(packed).all():
        return "it fails on packs, or its scores there are not finite"
    rows = _score(engine, score_plan, *plan_rows(requests, 2**30, isolate=needs_equal_lengths(engine, requests)))
    rounding = float((np.abs(rows - alone) / requests.num_targets).mean())
    allowed = max(allowed, min(5 * rounding, LARGEST_ROUNDING.get(engine.dtype, 1e-3)))
    if _within(drift, allowed):
        return None
    return f"packed and plain runs differ by {float(drift.max()):.2g} nats per token, where {allowed:.2g} on average is allowed"


def check_states(engine: Engine, requests: Requests, score_plan: ScorePlan | None = None) -> str | None:
    """Try `requests` as trees that share caches against each by itself. Returns as `check_packs`.

    Every branching point is taken, however little it saves, and two trees run side by side.
    """
    forest = trial_forest(requests)
    try:
        shared = _score(engine, score_plan, *plan_one_forest(forest))
    except (LostContact, UserError):
        raise
    except Exception as error:
        return f"it fails on copies of its cache ({type(error).__name__}: {one_line(error, 200)})"
    alone = _score_single(engine, score_plan, forest)
    if not np.isfinite(alone).all():
        return "its scores are not finite"
    if not np.isfinite(shared).all():
        return "it fails on copies of its cache, or its scores there are not finite"
    drift, allowed = np.abs(shared - alone) / forest.num_targets, LARGEST_ROUNDING.get(engine.dtype, 1e-3)
    if _within(drift, allowed):
        if not _within(drift, ROUNDING.get(engine.dtype, 1e-4)):
            log.warning(
                "copies of the model's cache move scores by up to %.2g nats per token, more than rounding mostly does; "
                "--no_packing runs without them",
                drift.max(),
            )
        return None
    return (
        f"runs with copies of its cache and plain ones differ by {float(drift.max()):.2g} nats per token, "
        f"where {allowed:.2g} on average is allowed"
    )


def check_rows(engine: Engine, requests: Requests, score_plan: ScorePlan | None = None) -> str | None:
    """Try `requests` in padded rows against each by itself. Returns None when they agree, else one phrase that says how far off.

    Models that are not causal (BERT and its like) see the padding, and what is mixed by the length of a row differs, too.
    """
    isolate = needs_equal_lengths(engine, requests)
    alone = _score_single(engine, score_plan, requests)
    try:
        rows = _score(engine, score_plan, *plan_rows(requests, 2**30, isolate=isolate))
    except (LostContact, UserError):
        raise
    except Exception as error:
        return f"it fails on padded rows ({type(error).__name__}: {one_line(error, 200)})"
    both = np.isfinite(alone) | np.isfinite(rows)  # NaN is reported where it ends up
    drift = (np.abs(rows - alone) / requests.num_targets)[both]
    allowed = LARGEST_ROUNDING.get(engine.dtype, 1e-3)
    if not both.any() or _within(drift, allowed):
        return None
    largest = float(drift.max())
    return f"padded rows and single ones differ by {largest:.2g} nats per token, where {allowed:.2g} on average is allowed"


def _within(drift: npt.NDArray[np.float64], allowed: float) -> bool:
    """Whether errors per token are no more than rounding. A NaN is not "at most" anything."""
    return float(drift.mean()) <= allowed and float(drift.max()) <= 4 * allowed


def _score_single(engine: Engine, score_plan: ScorePlan | None, requests: Requests) -> npt.NDArray[np.float64]:
    """(requests,) sums in nats, each of a forward of its own. Raises UserError where the model cannot do even that."""
    with in_one_sentence("the model cannot score text, one request at a time"):
        return _score(engine, score_plan, *plan_rows(requests, 1, isolate=True))


@contextlib.contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Turn what a model raises in the block into a UserError that begins with `what`: there is no other way to run it."""
    try:
        yield
    except (LostContact, UserError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what}: {type(error).__name__}: {one_line(error, 200)}") from error


def _score(
    engine: Engine, score_plan: ScorePlan | None, plan: Plan, item_of_request: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """(requests,) sums in nats. Raises UserError where memory is short."""
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


def score_alone(engine: Engine, plan: Plan) -> npt.NDArray[np.float64]:
    sums = [engine.collect(engine.launch(build_pack(plan, index)))["logprob"] for index in range(plan.num_packs)]
    scores: npt.NDArray[np.float64] = np.concatenate(sums)
    return scores
