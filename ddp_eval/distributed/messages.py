"""What the leader says to the other ranks: begin, load the model like this, run this plan, stop, or I have failed."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddp_eval.config import Config
from ddp_eval.distributed import collectives, watchdog
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout
from ddp_eval.packs.batches import NO_TEXTS, TextPlan
from ddp_eval.packs.plan import Plan
from ddp_eval.packs.requests import IntArray


@dataclasses.dataclass(frozen=True)
class Begin:
    """Message: there is something to do. directory: of the run, or None."""

    directory: Path | None


@dataclasses.dataclass(frozen=True)
class Journals:
    """Where finished packs are kept: each rank adds a file of its own. key: see journal.py."""

    directory: Path
    key: bytes


@dataclasses.dataclass(frozen=True)
class Load:
    """Message: load the model in this layout, in place of what is loaded.

    is_probe: it may fail; each rank reports how it went (`replica.load_together`).
    config: of another model than the last one; None: the same model.
    """

    layout: Layout
    is_probe: bool = False
    config: Config | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """Message: run a plan.

    left: ascending indices of the packs to run; the others are done. Batches of `texts` are numbered behind the packs.
    texts, tokenizer: what to generate, and what decodes it. name: unlike that of any other work, of these ranks or any.
    phase: what its time is counted as; all but "forward" is beside the run's own work. In a "trial", a question to the model,
    what fails comes back as NaN. attention: what trees run with, which the leader has tried; empty if there is no choice.
    asks: a property of the engine that is found out by forwards, which ranks that share weights must run at the same time.
    """

    plan: Plan
    left: IntArray
    name: str
    journals: Journals | None = None
    phase: str = "forward"
    texts: TextPlan = NO_TEXTS
    tokenizer: Any = None
    attention: str = ""
    asks: str = ""

    @property
    def is_silent(self) -> bool:
        """Whether no progress is shown."""
        return self.phase in ("trial", "measure")


@dataclasses.dataclass(frozen=True)
class NextModel:
    """Message, between the models of a sweep: what comes next.

    config: of the next model; None: nothing yet, wait on. ahead: files of the model after it, to be read meanwhile.
    """

    config: Config | None
    ahead: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Abort:
    """Message: the leader failed, by a user error or a bug."""

    reason: str
    of_user: bool


class Aborted(UserError):
    """On the other ranks: the leader failed by a user error, and goes on to something else if it can."""


class LeaderFailed(collectives.LostContact):
    """On the other ranks: the leader failed by a bug."""


@dataclasses.dataclass(frozen=True)
class CollectTelemetry:
    """The leader asks how each rank's time went."""


class Followers:
    """The other ranks, as the leader sees them: it sends them work, and a message to stop when the block ends, well or not.

    stays: this process goes on after a failure, so that its end does not tell them; if not given, as in a caller's group.
    """

    def __init__(self, world: World, stays: bool | None = None) -> None:
        self.world = world
        self._stays = world.borrowed if stays is None else stays
        self.layout: Layout | None = None  # in which the model was loaded last
        self._listening = True

    def load(self, layout: Layout, is_probe: bool = False, config: Config | None = None) -> None:
        """Have all ranks begin to load the model, another one if a `config` is given; the leader loads its own part."""
        self.layout = layout
        with watchdog.waiting():
            collectives.send_message(self.world, Load(layout, is_probe, config))

    def begin(self, directory: Path | None) -> None:
        """Have them load the model, and report to the run directory from now on."""
        with watchdog.waiting():
            collectives.send_message(self.world, Begin(directory))

    @contextlib.contextmanager
    def working_on(
        self,
        plan: Plan,
        left: IntArray | None = None,
        journals: Journals | None = None,
        phase: str = "forward",
        texts: TextPlan = NO_TEXTS,
        tokenizer: Any = None,
        attention: str = "",
        asks: str = "",
    ) -> Iterator[Work]:
        """Have all ranks run `plan` and `texts`, or what is `left` of them, while the leader runs it too."""
        left = np.arange(plan.num_packs + texts.num_batches) if left is None else left
        work = Work(plan, left, uuid.uuid4().hex, journals, phase, texts, tokenizer, attention, asks)
        collectives.send_message(self.world, work)
        self._listening = False
        try:
            yield work
        except collectives.FailedTogether:
            self._listening = True
            raise
        self._listening = True

    @property
    def listening(self) -> bool:
        """Whether the others wait for a message: not while they are in a plan, or after a failure there that they know not of."""
        return self._listening

    def lose(self) -> None:
        """They wait for this rank elsewhere, and for no message: the end of this process tells them."""
        self._listening = False

    def collect_telemetry(self) -> list[dict[str, Any]]:
        """Every rank's `Meter.report`, in the order of ranks."""
        with watchdog.waiting():
            collectives.send_message(self.world, CollectTelemetry())
            reports = collectives.gather_reports(self.world, self.world.meter.report())
        assert reports is not None, "the leader gets them"
        return reports

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Ranks that are in a collective receive no message: a leader that leaves, or all_gather_rows, tells them.
        if not self._listening or isinstance(error, collectives.LostContact):
            return
        # A message is out when all listen: the user would wait for the slowest to load. The end of this process tells them too.
        if error is not None and not self._stays:
            return
        message = None if error is None else Abort(str(error) or type(error).__name__, isinstance(error, UserError))
        collectives.send_message(self.world, message)


def await_begin(world: World) -> Begin | None:
    """On the other ranks: wait until the leader knows that there is something to do; None when there is not."""
    begin: Begin | None = _receive(world)
    return begin


def next_model(world: World) -> NextModel | None:
    """On the other ranks of a sweep: wait for the next model; None when there is none left."""
    message: NextModel | None = _receive(world)
    return message


def next_work(world: World) -> Load | Work | None:
    """On the other ranks: wait for what the leader says next; None is stop. Raises what the leader failed of."""
    word: Load | Work | None = _receive(world)
    return word


def _receive(world: World) -> Any:
    while isinstance(message := collectives.receive_message(world), CollectTelemetry):
        collectives.gather_reports(world, world.meter.report())
        world.meter.reset()
    if isinstance(message, Abort):
        if message.of_user:
            raise Aborted(message.reason)
        raise LeaderFailed("rank 0 has failed: its own error says why")
    return message
