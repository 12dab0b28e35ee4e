"""Text that ranks exchange through a key-value store, before and beside the process group."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from typing import Any

import torch.distributed as dist

from ddp_eval.distributed import launch_environment, meeting, watchdog
from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.launch_environment import launch_local_rank, launch_rank, whole_number
from ddp_eval.distributed.meeting import exchange_through
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError, printable


def can_exchange() -> bool:
    """Whether `exchange` reaches all ranks: one rank, a joined group, or torchrun's store, unless it is set not to share it."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared or dist.is_initialized() or whole_number("WORLD_SIZE", 1) == 1


def exchange(name: str, text: str, timeout_s: float) -> list[str | None] | None:
    """Every rank's `text` in rank order, through the group's store, or the launcher's before the group is joined.

    None for a rank that has given none in that time, and for the whole where there is no common store. Raises LostContact when
    the store is lost with its host.
    """
    rank, world_size = launch_rank(), whole_number("WORLD_SIZE", 1)
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _agent_store()
    if store is None:
        return [text] if world_size == 1 else None
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

    shared: many ranks have this to say; if the store has died with its host, the first rank of each node does. Where no store was
    ever reached, rank 1 does too: it may be the only one there.
    """
    store = _error_store()
    by_hand = not os.environ.get("TORCHELASTIC_RUN_ID")  # each rank may have a terminal of its own, and be the only one there
    first = launch_local_rank() == 0 or launch_rank() == 1 and shared
    mine = by_hand or first if store is None else not shared or first
    try:
        claims = meeting._within(5.0, lambda: store.add("ddp_eval/error/claim", 1)) if store is not None else 0
        mine = claims == 1 if store is not None else mine
    except (RuntimeError, TimeoutError):
        store, mine = None, by_hand or first
    if mine:
        watchdog.say(message)
    with contextlib.suppress(Exception):
        if store is not None and mine:
            store.set("ddp_eval/error/printed", "yes")
        elif store is not None:
            store.wait(["ddp_eval/error/printed"], datetime.timedelta(seconds=5))


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
