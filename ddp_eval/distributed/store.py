"""Text that ranks exchange through a key-value store, before and beside the process group."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
import time
from typing import Any

import torch.distributed as dist

from ddp_eval.distributed import launch_environment, meeting, watchdog
from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.launch_environment import launch_local_rank, launch_rank, whole_number
from ddp_eval.distributed.meeting import exchange_through
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.telemetry.meter import process_age_s

_CLAIM_S = 5.0


def can_exchange() -> bool:
    """Whether `exchange` reaches all ranks: one rank, a joined group, or torchrun's store, unless it is set not to share it."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared or dist.is_initialized() or whole_number("WORLD_SIZE", 1) == 1


def exchange(name: str, text: str, timeout_s: float) -> list[str | None]:
    """Every rank's `text` in rank order, through the group's store, or the launcher's before the group is joined.

    None for a rank that has given none in that time. Raises NotMet when this rank does not reach the store, and LostContact when
    the store is lost with its host.
    """
    rank, world_size = launch_rank(), whole_number("WORLD_SIZE", 1)
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _agent_store()
    if store is None and world_size == 1:
        return [text]
    if store is None:
        raise meeting.NotMet(
            f"rank {rank} on {socket.gethostname()} cannot reach torchrun's store at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} for {name}: check that this machine reaches that address, and the firewall"
        )
    patience, first = watchdog.Patience(), rank == 1 or launch_local_rank() == 0

    def notify(missing: list[int], waited_s: float) -> None:
        if missing and first and patience.is_due(waited_s):
            watchdog.notice(f"{name}: waiting for rank {', '.join(map(str, missing))} (at most {timeout_s:.0f} s)", waited_s)

    with naming_lost_ranks(f"exchanging {name}"):
        return exchange_through(store, rank, world_size, name, text, timeout_s, notify)


def common_store(world: World) -> Any:
    """A key-value store that all ranks reach, for threads that must wait for nobody; None with one rank."""
    return dist.distributed_c10d._get_default_store() if world.world_size > 1 else None


def report_once(message: str, shared: bool = False) -> None:
    """Print `message` on stderr from exactly one of the ranks that fail with an error of their own.

    The first rank to claim the word prints. The others wait until it has: the launcher ends everybody as soon as one rank is
    gone, and might else end the speaker first. Never raises.

    shared: many ranks have this to say; if the store has died with its host, the first rank of each node prints, and rank 1, as
    rank 0 has gone with it. Where no store was ever reached, so it is for all messages; and by hand every rank prints: it may be
    the only one there, and each may have a terminal of its own.
    """
    store = _error_store()
    first = launch_local_rank() == 0 or (shared and launch_rank() == 1)
    place = ""
    if store is None:
        mine = first or not os.environ.get("TORCHELASTIC_RUN_ID")
    else:
        mine = first or not shared
        with contextlib.suppress(RuntimeError, TimeoutError):
            place, mine = meeting.within(_CLAIM_S, lambda: _claim(store))
    if mine:
        watchdog.say(message)
    with contextlib.suppress(Exception):
        if place and mine:
            store.set(f"{place}/printed", str(time.time()))
        elif place:
            store.wait([f"{place}/printed"], datetime.timedelta(seconds=_CLAIM_S))


def _claim(store: Any) -> tuple[str, bool]:
    """Where ranks compete for the word, in the store, and whether this one has it.

    A launch may run one command after the other: what was printed before this process began was printed by an earlier one.
    """
    began = time.time() - process_age_s()
    for number in itertools.count():
        place = f"ddp_eval/error/{number}"
        if store.add(f"{place}/claim", 1) == 1:
            return place, True
        if not store.check([f"{place}/printed"]) or float(store.get(f"{place}/printed")) >= began:
            return place, False
    raise AssertionError("numbers do not end")


def _error_store() -> Any:
    """The launcher's key-value store, joined group or not; None with one rank, or when it cannot be reached."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    agent = _agent_store()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"before_group/{attempt}", agent) if agent is not None else None


def _agent_store() -> Any:
    """The store at which the launch meets, if this process can reach it before it joins; None with one rank."""
    with contextlib.suppress(UserError):
        return meeting.agent_store(launch_environment.read())
    return None
