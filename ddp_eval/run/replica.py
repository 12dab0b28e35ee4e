"""A rank's part of the model, and loading it on all ranks."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from ddp_eval.distributed import collectives, watchdog
from ddp_eval.distributed.world import World
from ddp_eval.engines import Engine
from ddp_eval.errors import UserError, describe
from ddp_eval.layout import Layout
from ddp_eval.placement.kinds import kind_of
from ddp_eval.placement.load import lay_out

log = logging.getLogger("ddp_eval")

# What transformers raises over a model, on all ranks alike; memory and files may fail one rank alone.
_REFUSALS = (ValueError, TypeError, AttributeError, KeyError, NotImplementedError)


def load_together(
    world: World, layout: Layout, load: Callable[[World, Layout], Engine]
) -> tuple[Engine | None, list[str | None] | None]:
    """Load on all ranks what may fail on some. Collective.

    Returns the engine, None where it failed; and, on the leader, why it failed on each rank, None where it did not.
    Raises UserError where a rank fails alone, and the others of its replica wait for it in a collective, not here.
    """
    engine, why = None, None
    try:
        engine = load(world, layout)
    except Exception as error:
        if not (isinstance(error, UserError) or world.goes_on):
            raise
        if kind_of(layout).fails_together and not isinstance(error.__cause__, _REFUSALS):
            raise
        why = describe(error)
        if not isinstance(error, UserError):
            log.error("loading the model failed", exc_info=error)
    return engine, collectives.gather_reports(world, why)


def load_on_all(world: World, layout: Layout, load: Callable[[World, Layout], Engine], on_alone: Callable[[], None]) -> Engine:
    """On the leader: `load_together`. Raises UserError, where any rank failed, once all have come so far.

    on_alone: called where this rank fails, and the others wait for it elsewhere.
    """
    try:
        engine, failures = load_together(world, layout, load)
    except BaseException:
        on_alone()
        raise
    assert failures is not None, "the leader gets them"
    rank = next((rank for rank, why in enumerate(failures) if why), None)
    if engine is None or rank is not None:
        if engine is not None:
            engine.close()
        raise UserError(str(failures[0] or f"rank {rank}: {failures[rank or 0]}"))
    return engine


@dataclasses.dataclass
class Replica:
    """A rank with its part of the model, which changes when the layout does.

    world: grouped into the replicas of `layout`. why: of that layout, to be said; empty where there was no choice.
    """

    world: World
    layout: Layout
    engine: Engine
    why: str = ""
    attention: str = ""  # of trees, of the engine that gave way to this one

    def close(self) -> None:
        """Let go of the engine, if there is one: its memory is free when nothing else refers to it."""
        if loaded := vars(self).pop("engine", None):
            self.attention = loaded.tree_attention
            loaded.close()

    def move(self, world: World, layout: Layout, load: Callable[[World, Layout], Engine]) -> str | None:
        """Load the model again, in another layout, with the same attention. The memory of what was loaded goes first.

        Returns None, or why a rank could not; then nothing is loaded until the next move.
        """
        self.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.world, self.layout = lay_out(world, layout), layout
        engine, failures = load_together(self.world, layout, load)
        if engine is not None:
            self.engine = engine
            self.engine.tree_attention = self.attention
        assert failures is not None, "the leader gets them"
        return next((f"rank {rank}: {why}" for rank, why in enumerate(failures) if why), None)

    def log_choice(self) -> None:
        """Say once, where several ranks had a choice of layouts, which was taken and why."""
        if self.why and self.world.world_size > 1:
            log.warning("layout %s: %s (%s)", self.layout, kind_of(self.layout).sentence(self.world.world_size), self.why)
        self.why = ""


class PendingReplica:
    """A replica that may still be loading, in a thread of its own, while lm_eval builds the prompts.

    digests: the model's files, as the manifest has them; asked for once they are needed, it waits for them.
    source: where the model comes from, for those who wait for it.
    """

    def __init__(self, load: Callable[[], Replica], digests: Callable[[], dict[str, Any]], source: str = "") -> None:
        self.source = source
        self._replica: Future[Replica] = Future()
        self._digests: Future[dict[str, Any]] = Future()
        self._load, self._describe = load, digests

    def start(self) -> threading.Thread:
        """Begin to load; the digests are computed when the model is loaded."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def wait(self) -> Replica:
        """Raises what the loading failed of."""
        return self._replica.result()

    def digests(self) -> dict[str, Any]:
        return self._digests.result()

    def check(self) -> None:
        """A sign of life from those who build prompts meanwhile. Raises what the loading failed of, if it has."""
        watchdog.touch()
        if self._replica.done():
            self._replica.result()

    def release(self) -> None:
        """Let go of the model, if it was loaded. To be called when nothing loads any more."""
        if self._replica.done() and self._replica.exception() is None:
            self._replica.result().close()

    def _run(self) -> None:
        _fulfil(self._replica, self._load)
        _fulfil(self._digests, self._describe)


class LoadedReplica:
    """A replica that is there: of a caller. digests: describes it; called where it is asked for, as that may take long."""

    source = ""

    def __init__(self, replica: Replica, digests: Callable[[], dict[str, Any]]) -> None:
        self._replica = replica
        self.digests = digests

    def wait(self) -> Replica:
        return self._replica

    def check(self) -> None:
        watchdog.touch()


def _fulfil(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:  # the waiting thread raises it
        future.set_exception(error)
