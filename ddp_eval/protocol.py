"""What the leader says to the other ranks: load the model like this, run this plan, stop, or I have failed."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

from ddp_eval import distributed
from ddp_eval.distributed import World
from ddp_eval.errors import UserError
from ddp_eval.layout import Layout
from ddp_eval.packing import Plan


@dataclasses.dataclass(frozen=True)
class Load:
    """The leader's word to load the model in this layout, in place of what is loaded."""

    layout: Layout


@dataclasses.dataclass(frozen=True)
class Work:
    """The leader's word to run a plan. name: unlike that of any other work of these ranks.

    trial: the plan is a question to the model, and what fails comes back as NaN. silent: no progress is shown.
    """

    plan: Plan
    name: str
    trial: bool = False
    silent: bool = False


@dataclasses.dataclass(frozen=True)
class Abort:
    """The leader's word that it has failed, over what the user can mend or by a defect."""

    reason: str
    of_user: bool


class Followers:
    """The other ranks, as the leader sees them: told what to do, and told to stop when the block ends, well or not."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._listening = True

    def load(self, layout: Layout) -> None:
        """Have all ranks begin to load the model; the leader loads its own part."""
        distributed.send_message(self.world, Load(layout))

    @contextlib.contextmanager
    def working_on(self, plan: Plan, trial: bool = False, silent: bool = False) -> Iterator[Work]:
        """Have all ranks run `plan` while the leader runs it too."""
        work = Work(plan, uuid.uuid4().hex, trial, silent or trial)
        distributed.send_message(self.world, work)
        self._listening = False
        yield work
        self._listening = True

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Ranks that are in a collective hear no message: a leader that leaves, or all_gather_rows, tells them.
        if not self._listening or isinstance(error, distributed.LostContact):
            return
        message = None if error is None else Abort(str(error) or type(error).__name__, isinstance(error, UserError))
        distributed.send_message(self.world, message)


def next_work(world: World) -> Load | Work | None:
    """On the other ranks: wait for what the leader says next; None is stop. Raises what the leader failed of."""
    message = distributed.receive_message(world)
    if isinstance(message, Abort):
        if message.of_user:
            raise UserError(message.reason)
        raise distributed.LostContact("rank 0 has failed: its own error says why")
    word: Load | Work | None = message
    return word
