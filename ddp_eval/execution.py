"""Run a plan on all ranks: each its share of the packs, then every result to every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ddp_eval import distributed
from ddp_eval.distributed import World
from ddp_eval.engines import Engine
from ddp_eval.errors import UserError
from ddp_eval.packing import Pack, Plan, build_pack
from ddp_eval.protocol import Work
from ddp_eval.telemetry import Phases, Progress


def run_plan(world: World, engine: Engine, work: Work, phases: Phases) -> np.ndarray:
    """Run this rank's packs and gather everyone's `_result_rows`."""
    plan = work.plan
    engine.on_trial = work.trial
    with Progress(world, work.name, int(plan.num_requests.sum()), silent=work.silent) as progress:
        try:
            with phases("forward"):
                done = _run_packs(world, engine, plan, progress)
                blocks = [_result_rows(*result) for result in done if engine.bears_results]
                progress.push()
        except BaseException:
            if world.borrowed:  # leave the caller a group that works; in a run of our own, exiting is quicker
                with contextlib.suppress(distributed.LostContact):
                    distributed.all_gather_rows(world, np.zeros((0, 3), dtype=np.int64), failed=True)
            raise
        with phases("gather"):
            mine = np.concatenate([np.zeros((0, 3), dtype=np.int64), *blocks])
            return distributed.all_gather_rows(world, mine)


def _run_packs(world: World, engine: Engine, plan: Plan, progress: Progress) -> Iterator[tuple[Pack, np.ndarray, np.ndarray]]:
    """This rank's packs, dearest first, so that what does not fit shows at once; the next is launched before one is collected."""

    def collect(index: int, pack: Pack, launched: Any) -> tuple[Pack, np.ndarray, np.ndarray]:
        with _naming_pack(world, pack):
            sums, greedy = engine.collect(launched)
        if engine.bears_results:
            progress.add(int(plan.num_requests[index]), len(pack))
        return pack, sums, greedy

    under_way = None
    for index in reversed(distributed.shard(world, plan.num_packs)):
        pack = build_pack(plan, index)
        with _naming_pack(world, pack):
            launched = index, pack, engine.launch(pack)
        if under_way is not None:
            yield collect(*under_way)
        under_way = launched
    if under_way is not None:
        yield collect(*under_way)


@contextlib.contextmanager
def _naming_pack(world: World, pack: Pack) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"rank {world.rank} ran out of memory on {world.device} in a pack of {len(pack)} tokens, "
            f"{len(pack.reads)} of them scored: give --max_pack_tokens {max(1, len(pack) // 2)}"
        ) from None


def _result_rows(pack: Pack, sums: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """(items, 3) int64: item, the bits of its float64 sum, its flag. One type, so that one collective carries all of it."""
    return np.stack([np.arange(pack.items.start, pack.items.stop), sums.view(np.int64), greedy.astype(np.int64)], axis=1)


def fill_slots(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Put gathered rows into their slots.

    Returns (count,) sums, (count,) flags, and by how many nats items that ran twice differ: 0 unless the ranks' hardware or
    thread counts do; the lowest rank's result stands. Raises RuntimeError if an item has no result.
    """
    items, bits = rows[:, 0], rows[:, 1].copy()
    seen = np.zeros(count, dtype=bool)
    seen[items] = True
    if not seen.all():
        lost = np.flatnonzero(~seen)
        raise RuntimeError(f"{len(lost)} of {count} items came back from no rank, the first of them item {lost[0]}")
    first = np.unique(items, return_index=True)[1]
    sums, greedy = bits[first].view(np.float64), rows[first, 2].astype(bool)
    differing = bits[first][items] != bits  # the bits: a NaN equals itself
    return sums, greedy, float(np.abs(sums[items[differing]] - bits[differing].view(np.float64)).max(initial=0.0))
