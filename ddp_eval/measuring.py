"""`--layout measure`: a slice of the real work under each layout that fits, then the rest under the quickest."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ddp_eval.choice import Candidate
from ddp_eval.distributed import World
from ddp_eval.engines import Engine
from ddp_eval.engines.load import lay_out
from ddp_eval.execution import run_plan
from ddp_eval.layout import Layout
from ddp_eval.packing import Plan
from ddp_eval.protocol import Followers
from ddp_eval.sizing import ModelSizes

log = logging.getLogger("ddp_eval")

PACKS_PER_RANK = 4  # of the slice


@dataclasses.dataclass
class Seated:
    """A rank with its part of the model, which changes when the layout does.

    world: grouped into the replicas of `layout`. why: of that layout, to be said; empty where there was no choice.
    """

    world: World
    layout: Layout
    engine: Engine
    why: str = ""

    def move(self, world: World, layout: Layout, load: Callable[[World, Layout], Engine]) -> None:
        """Load the model anew, in another layout. The memory of what was loaded goes first."""
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.world, self.layout = lay_out(world, layout), layout
        self.engine = load(self.world, layout)


class Measured(NamedTuple):
    """seconds: of the slice; flops: of the model's matrices, per second and rank; sent: bytes per second and replica."""

    layout: Layout
    seconds: float
    flops: float
    sent: float
    predicted_s: float


def take_packs(plan: Plan, indices: list[int]) -> Plan:
    """A plan of only those packs, in that order."""

    def runs(values: Any, starts: Any) -> Any:
        return np.concatenate([values[starts[index] : starts[index + 1]] for index in indices])

    def offsets(starts: Any) -> Any:
        return np.concatenate([[0], np.cumsum(np.diff(starts)[indices])]).astype(np.int64)

    return Plan(
        tokens=runs(plan.tokens, plan.token_starts),
        token_starts=offsets(plan.token_starts),
        item_starts=offsets(plan.item_starts),
        target_starts=offsets(plan.target_starts),
        shared=runs(plan.shared, plan.item_starts),
        lengths=runs(plan.lengths, plan.item_starts),
        num_targets=runs(plan.num_targets, plan.item_starts),
        targets=runs(plan.targets, plan.target_starts),
        num_requests=plan.num_requests[indices],
        rows=plan.rows,
    )


def measure_layouts(
    followers: Followers,
    seated: Seated,
    plan: Plan,
    candidates: list[Candidate],
    sizes: ModelSizes,
    load: Callable[[World, Layout], Engine],
) -> list[Measured]:
    """Run a slice of `plan` under each candidate that fits, beginning with what is loaded; leave the quickest in `seated`.

    Says a line for each.
    """
    world = followers.world
    count = min(plan.num_packs, PACKS_PER_RANK * world.world_size)
    piece = take_packs(plan, np.linspace(0, plan.num_packs - 1, count).round().astype(int).tolist())
    first = take_packs(plan, list(range(min(plan.num_packs, world.world_size))))

    def move_to(layout: Layout) -> None:
        if layout != seated.layout:
            followers.load(layout)
            seated.move(world, layout, load)

    found: list[Measured] = []
    for candidate in sorted((one for one in candidates if one.fits), key=lambda one: one.layout != seated.layout):
        move_to(candidate.layout)
        for part in (first, piece):  # the first forwards of a process are slow
            started = time.perf_counter()
            with followers.working_on(part, silent=True) as work:
                run_plan(seated.world, seated.engine, work)
            seconds = time.perf_counter() - started
        flops = 2.0 * (sum(sizes.active) * len(piece.tokens) + sizes.hidden * sizes.vocab * len(piece.targets))
        assert candidate.prediction is not None
        sent = candidate.prediction.link_bytes_per_token * len(piece.tokens) / candidate.layout.replicas(world.world_size)
        found.append(
            Measured(candidate.layout, seconds, flops / seconds / world.world_size, sent / seconds, candidate.prediction.run_s)
        )
    best = min(found, key=lambda one: one.seconds)
    _report(found, best)
    move_to(best.layout)
    return found


def _report(found: list[Measured], best: Measured) -> None:
    """One line each: what came out, and how far the prediction was off once the first layout has set its scale."""
    scale = found[0].seconds / found[0].predicted_s
    for one in found:
        expected = one.predicted_s * scale
        log.warning(
            "layout %s: %.2f s for the slice, %.1f GFLOP/s a rank, %.1f MB/s within a copy; predicted %.2f s (%+.0f%%)%s",
            one.layout, one.seconds, one.flops / 1e9, one.sent / 1e6, expected, 100 * (expected / one.seconds - 1),
            ": taken" if one is best else "",
        )  # fmt: skip
