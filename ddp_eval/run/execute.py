"""Run a plan on all ranks: each its share of the packs, then every result to every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ddp_eval.distributed import collectives, watchdog
from ddp_eval.distributed.messages import Journals, Work
from ddp_eval.distributed.progress import Progress
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine, OnProgress
from ddp_eval.engines.ops import onednn_linear
from ddp_eval.errors import OutOfStep, UserError, is_out_of_memory, one_line
from ddp_eval.output import journal
from ddp_eval.packs.batches import Batch, build_batch
from ddp_eval.packs.plan import Pack, build_pack, halve
from ddp_eval.packs.results import NO_RESULTS, Results
from ddp_eval.run import preflight
from ddp_eval.system import machine

log = logging.getLogger("ddp_eval")


class Gathered(NamedTuple):
    """What all ranks have brought.

    results: (n,) RESULT; items that ran on two ranks are in it twice.
    splits:  (k, 2) int64, packs that did not fit the memory of their rank and the number of pieces they ran in.
    lengths: (n, 2) int64, items of generation and the tokens of their answers; (sum, 1) int64 `answers`: these tokens.
    """

    results: Results
    splits: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray


def _nothing(columns: int) -> list[np.ndarray]:
    return [np.zeros((0, columns), dtype=np.int64)]


def run_plan(world: World, engine: Engine, work: Work, check: Callable[[], None] = lambda: None) -> Gathered:
    """Run this rank's batches of generation and packs, and gather everyone's results.

    check: called after each pack and batch where ranks agree on what fails; may raise to end the plan on all of them.
    """
    check = check if world.agrees_on_failures else lambda: None
    phases = world.meter.phases
    engine.is_probe = work.phase == "trial"
    if work.attention == engine.plain_attention:  # a caller's ranks may each have come with another
        engine.tree_attention = work.attention
    journals = work.journals if engine.capabilities.reports_results else None
    num_requests = np.concatenate([work.plan.num_requests, work.texts.num_requests])
    left = int(num_requests[work.left].sum())
    with (
        _own_journal(world, work, journals) as own,
        Progress(world, work.name, left, silent=work.is_silent, done=int(num_requests.sum()) - left) as progress,
    ):
        try:
            with phases(work.phase), engine.together():
                mine = _run_mine(world, engine, work, check, progress, own)
        except BaseException as error:
            _share_failure(world, progress, error)
            raise
        watchdog.step(watchdog.WAITING)
        with phases("gather"):
            try:
                return Gathered(*(collectives.all_gather_rows(world, part) for part in mine))
            except collectives.RankFailed:
                if not world.agrees_on_failures:
                    raise
                raise collectives.fail_together(world, None) from None


def _run_mine(
    world: World, engine: Engine, work: Work, check: Callable[[], None], progress: Progress, own: journal.Journal | None
) -> list[np.ndarray]:
    """This rank's columns of Gathered: results, splits, lengths, answers; empty where another rank reports for it."""
    results, splits, lengths, answers = [NO_RESULTS], _nothing(2), _nothing(2), _nothing(1)
    reports = engine.capabilities.reports_results
    packs, batches = _my_units(world, work)
    if work.asks:
        getattr(engine, work.asks)
    for index, batch, texts, divided in _run_batches(world, engine, work, batches, progress, own):
        check()
        _raise_if_stopped(progress)
        if not reports:
            continue
        if divided > 1:
            splits.append(np.array([[index, divided]]))
        lengths.append(np.stack([np.array(batch.items), [len(text) for text in texts]], axis=1))
        answers += [np.array(text, dtype=np.int64)[:, None] for text in texts]
    for index, found, pieces in _run_packs(world, engine, work, packs, progress, own):
        check()
        _raise_if_stopped(progress)
        if not reports:
            continue
        results.append(found)
        if pieces > 1:
            splits.append(np.array([[index, pieces]]))
    progress.push()
    return [np.concatenate(part) for part in (results, splits, lengths, answers)]


def _share_failure(world: World, progress: Progress, error: BaseException) -> None:
    """Let the other ranks know of `error`, which has ended this rank's part; raises the one that all agree on, if they do."""
    is_in_step = not isinstance(error, OutOfStep)
    if is_in_step and (world.borrowed or world.agrees_on_failures):  # leave a group that works; otherwise exiting is faster
        with contextlib.suppress(collectives.LostContact):
            progress.stop()
        with contextlib.suppress(collectives.LostContact):
            collectives.all_gather_rows(world, NO_RESULTS, failed=True)
    if world.agrees_on_failures and isinstance(error, Exception):
        why = None if isinstance(error, _Stopped) else _describe_failure(world, error)
        raise collectives.fail_together(world, why) from error


class _Stopped(Exception):
    """Another rank has failed, and says why."""


def _raise_if_stopped(progress: Progress) -> None:
    if progress.is_stopped:
        raise _Stopped


def _describe_failure(world: World, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    log.error("rank %d failed while it ran its packs", world.rank, exc_info=error)
    return f"rank {world.rank} failed while it ran its packs ({type(error).__name__}: {one_line(error, 200)})"


def _my_units(world: World, work: Work) -> tuple[list[int], list[int]]:
    """This rank's packs, and its batches of generation, which are numbered behind them; the most expensive first."""
    mine = work.left[collectives.shard(world, len(work.left))][::-1]
    is_pack = mine < work.plan.num_packs
    return mine[is_pack].tolist(), (mine[~is_pack] - work.plan.num_packs).tolist()


def _run_batches(
    world: World, engine: Engine, work: Work, mine: list[int], progress: Progress, own: journal.Journal | None
) -> Iterator[tuple[int, Batch, list[list[int]], int]]:
    """This rank's batches of generation; each is in the journal when it comes out.

    Yields its number behind the packs, the batch, the tokens of its answers, and by what its slots were divided.
    """

    def on_progress(requests: int, tokens: int) -> None:
        watchdog.step(watchdog.PACKS)
        for what in ("computed_tokens", "text_tokens"):
            world.meter.count(what, tokens)
        if engine.capabilities.reports_results:
            progress.add(requests, tokens)

    for index in mine:
        unit = work.plan.num_packs + index
        watchdog.step(watchdog.PACKS, unit)
        batch = build_batch(work.texts, index)
        texts, pieces = _generate(world, engine, batch, work.tokenizer, on_progress)
        if own is not None:
            own.append_texts(unit, texts, pieces)
        requests = int(work.texts.num_requests[index])
        on_progress(requests - len(batch), 0)  # requests that share an answer
        for what, amount in {"requests": requests, "batches": 1, "generated_tokens": sum(map(len, texts))}.items():
            world.meter.count(what, amount)
        yield unit, batch, texts, pieces


def _generate(world: World, engine: Engine, batch: Batch, tokenizer: Any, on_progress: OnProgress) -> tuple[list[list[int]], int]:
    """A batch's answers. One that does not fit the memory goes again with half the slots, and half of these."""
    pieces = 1
    while True:
        try:
            return engine.generate(batch, tokenizer, on_progress), pieces
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch.slots < 2 or world.ranks_per_replica > 1:
                longest = max(len(prompt) + limit for prompt, limit in zip(batch.prompts, batch.limits, strict=True))
                raise UserError(
                    f"rank {world.rank} ran out of memory on {world.device} with {max(1, batch.slots)} prompts and answers of "
                    f"up to {longest} tokens: give a smaller max_gen_toks in --gen_kwargs, or a device with more memory"
                ) from None
        # Only here, outside of the handler, is the failed forward's memory free.
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        batch, pieces = dataclasses.replace(batch, slots=batch.slots // 2), pieces * 2


def _run_packs(
    world: World, engine: Engine, work: Work, mine: list[int], progress: Progress, own: journal.Journal | None
) -> Iterator[tuple[int, Results, int]]:
    """This rank's packs, the most expensive first, so that what does not fit shows at once; each is journaled when it comes out.

    Where a launch returns at once, the next is launched before one is collected. On the CPU, where it computes, that would keep a
    finished pack out of the journal for the length of another.
    Yields the pack's number, the results of its items, and in how many pieces it had to run.
    """
    plan, ahead = work.plan, engine.capabilities.launches_ahead

    def collect(index: int, pieces: list[Any]) -> tuple[int, Results, int]:
        results = np.concatenate([engine.collect(piece) for piece in pieces])
        if own is not None:
            own.append(index, results, len(pieces))
        requests, tokens = int(plan.num_requests[index]), sum(len(piece.pack) for piece in pieces)
        if work.phase == "forward":
            packs = [piece.pack for piece in pieces]
            pairs, reads = sum(int((pack.depth + 1).sum()) for pack in packs), sum(len(pack.reads) for pack in packs)
            counts = {"requests": requests, "computed_tokens": tokens, "visible_pairs": pairs, "reads": reads, "packs": 1}
            for what, amount in counts.items():
                world.meter.count(what, amount)
        if engine.capabilities.reports_results:
            progress.add(requests, tokens)
        return index, results, len(pieces)

    under_way = None
    for index in mine:
        watchdog.step(watchdog.PACKS, index)
        launched = index, _launch(world, engine, build_pack(plan, index))
        if not ahead:
            yield collect(*launched)
            continue
        if under_way is not None:
            yield collect(*under_way)
        under_way = launched
    if under_way is not None:
        yield collect(*under_way)


@contextlib.contextmanager
def _own_journal(world: World, work: Work, journals: Journals | None) -> Iterator[journal.Journal | None]:
    """This rank's file among the journals; None where none are kept, or where this machine does not see the run directory."""
    if journals is None or not preflight.sees(str(journals.directory)):
        if journals is not None:
            watchdog.say(f"rank {world.rank} does not see {journals.directory}: its packs are not kept for a resume")
        yield None
        return
    path = journals.directory / f"{work.name}-{world.rank:05d}{journal.SUFFIX}"
    own = journal.Journal(path, journals.key, describe_origin(world))
    watchdog.use_journal(own)
    try:
        yield own
        watchdog.step("closing the journal")
        own.close()
        watchdog.step(watchdog.WAITING)
    finally:
        watchdog.use_journal(None)


def describe_origin(world: World) -> str:
    """The hardware that decides the last bits of this rank's numbers."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    library = ", oneDNN" if onednn_linear.is_wanted() else ""
    return f"{machine.cpu_name()}, {torch.get_num_threads()} threads{library}"


def _launch(world: World, engine: Engine, pack: Pack) -> list[Any]:
    """Start a pack. One that does not fit the memory is halved, and halved again, always at the same items."""
    try:
        return [engine.launch(pack)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(pack.items) == 1:
            raise UserError(
                f"rank {world.rank} ran out of memory on {world.device} with a single request of {len(pack)} tokens, "
                f"{len(pack.reads)} of them scored: give a smaller max_length in --model_args, or a device with more memory"
            ) from None
    # Only here, outside of the handler, are the failed forward's tensors free.
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return [piece for half in halve(pack) for piece in _launch(world, engine, half)]


def fill_texts(lengths: np.ndarray, answers: np.ndarray, count: int) -> tuple[list[list[int]], int]:
    """Put gathered answers into their slots; arguments as in `Gathered`.

    Returns the tokens of `count` answers, and how many of those that ran on two ranks differ: none unless the ranks' hardware or
    thread counts do; the lowest rank's answer stands. Raises RuntimeError if an item has none.
    """
    found: dict[int, list[int]] = {}
    differing, start, tokens = 0, 0, answers[:, 0].tolist()
    for item, length in lengths.tolist():
        answer = tokens[start : start + length]
        start += length
        differing += found.setdefault(item, answer) != answer
    if len(found) < count:
        lost = [item for item in range(count) if item not in found]
        raise RuntimeError(f"{len(lost)} of {count} answers came back from no rank, the first of them answer {lost[0]}")
    return [found[item] for item in range(count)], differing
