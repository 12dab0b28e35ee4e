"""`--layout measure`: a slice of the real work under each layout that fits, then the rest under the fastest.

A layout that a rank cannot load is left out. One that fails later, in a pack of the slice, ends the run: other ranks may wait
for the one that failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddp_eval.distributed.messages import Followers
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout
from ddp_eval.packs.plan import Plan, take_packs
from ddp_eval.placement.choose import Candidate
from ddp_eval.placement.memory import ModelSizes
from ddp_eval.run.execute import run_plan
from ddp_eval.run.replica import Replica

log = logging.getLogger("ddp_eval")

PACKS_PER_RANK = 4  # of the slice


class LayoutTrial(NamedTuple):
    """seconds: of the slice; flops: of the model's matrices, per second and rank; sent: bytes per second and replica."""

    layout: Layout
    seconds: float
    flops: float
    sent: float
    predicted_s: float


def measure_layouts(
    followers: Followers,
    seated: Replica,
    plan: Plan,
    candidates: list[Candidate],
    sizes: ModelSizes,
    load: Callable[[World, Layout], Engine],
) -> list[LayoutTrial]:
    """Run a slice of `plan` under each candidate that fits, beginning with what is loaded; leave the fastest in `seated`.

    Says a line for each, also for those that cannot be loaded.
    """
    world = followers.world
    count = min(plan.num_packs, PACKS_PER_RANK * world.world_size)
    piece = take_packs(plan, np.linspace(0, plan.num_packs - 1, count).round().astype(int).tolist())
    first = take_packs(plan, list(range(min(plan.num_packs, world.world_size))))

    def move_to(layout: Layout) -> str | None:
        if layout == seated.layout:
            return None
        followers.load(layout, is_probe=True)
        return seated.move(world, layout, load)

    found: list[LayoutTrial] = []
    tried = [one for one in candidates if one.fits or one.layout == seated.layout]
    for candidate in sorted(tried, key=lambda one: one.layout != seated.layout):
        if failure := move_to(candidate.layout):
            log.warning("layout %s is left out: %s", candidate.layout, failure)
            continue
        for part in (first, piece):  # the first forwards of a process are slow
            started = time.perf_counter()
            with followers.working_on(part, phase="measure", attention=seated.engine.tree_attention) as work:
                run_plan(seated.world, seated.engine, work)
            seconds = time.perf_counter() - started
        flops = 2.0 * (sum(sizes.active) * len(piece.tokens) + sizes.hidden * sizes.vocab * len(piece.targets))
        assert candidate.prediction is not None
        sent = candidate.prediction.link_bytes_per_token * len(piece.tokens) / candidate.layout.replicas(world.world_size)
        found.append(
            LayoutTrial(candidate.layout, seconds, flops / seconds / world.world_size, sent / seconds, candidate.prediction.run_s)
        )
    best = min(found, key=lambda one: one.seconds)
    _report(found, best)
    if failure := move_to(best.layout):
        raise UserError(f"layout {best.layout} was measured and could not be loaded again: {failure}")
    return found


def _report(found: list[LayoutTrial], best: LayoutTrial) -> None:
    """One line each: what came out, and how far the prediction was off once the first layout has set its scale."""
    scale = found[0].seconds / found[0].predicted_s
    for one in found:
        expected = one.predicted_s * scale
        log.warning(
            "layout %s: %.2f s for the slice, %.1f GFLOP/s a rank, %.1f MB/s within a copy; predicted %.2f s (%+.0f%%)%s",
            one.layout, one.seconds, one.flops / 1e9, one.sent / 1e6, expected, 100 * (expected / one.seconds - 1),
            ": taken" if one is best else "",
        )  # fmt: skip
