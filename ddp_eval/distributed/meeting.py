"""How ranks find each other: the store that all reach, who has come to it, and notices for whoever waits.

Each meeting has an id of its own, which rank 0 draws and sends to the others through the store. All keys of a process group stand
under it, so that neither an earlier attempt of torchrun's nor an earlier group of the same processes is mistaken for this one.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from ddp_eval.distributed import watchdog
from ddp_eval.distributed.launch_environment import LaunchEnvironment
from ddp_eval.errors import LostContact, UserError
from ddp_eval.system import processes

_CONNECT_S = 5.0  # for one try to reach the store
_HANDSHAKE_S = 10.0  # for what listens there to answer as a store does
_LOOK_S = 0.2
_SILENT_S = 2.0  # a store that has not answered for so long is not about to
_ASK_S = 2.0
_stores: dict[tuple[str, int], Any] = {}  # kept: a second group of this process, or the others' last words, need them

Notify = Callable[[list[int], float], None]  # given the ranks that are missing (only rank 0 knows all), and seconds waited


class TwoOfOneRank(Exception):
    """Two processes have the same rank."""


class FewerRanks(Exception):
    """Rank 0 counts so few ranks that this one is none of them. The text is their number."""


class NotMet(UserError):
    """This rank cannot meet the others, who may know nothing of it."""


class Met(NamedTuple):
    """id: of this meeting. pids: of all ranks. local_ranks: those on this machine, this one among them."""

    id: str
    pids: tuple[int, ...]
    local_ranks: tuple[int, ...]


def open_store(launch: LaunchEnvironment, timeout_s: float, what: str = "the ranks meet") -> Any:
    """The store at the launcher's address, which torchrun or rank 0 opens. One connection for the life of the process.

    Raises UserError if rank 0 cannot open it; and, after `timeout_s`, what `missing` makes of nobody there.
    """
    place = launch.address, launch.port
    if place not in _stores:
        if launch.rank == 0 and not launch.agent_store:
            _stores[place] = _host_store(launch)
        else:
            _stores[place] = _reach_store(launch, timeout_s, what)
    return _stores[place]


def agent_store(launch: LaunchEnvironment) -> Any:
    """The store of torchrun's own, if there is one that can be reached at once; else None."""
    if not launch.agent_store or launch.world_size == 1:
        return _stores.get((launch.address, launch.port))
    with contextlib.suppress(Exception):
        return open_store(launch, _CONNECT_S)
    return None


def _host_store(launch: LaunchEnvironment) -> Any:
    """As torch's own `env://` does it, but without a wait for the others."""
    try:
        return within(
            _HANDSHAKE_S,
            lambda: dist.TCPStore(
                launch.address,
                launch.port,
                launch.world_size,
                is_master=True,
                timeout=datetime.timedelta(seconds=_HANDSHAKE_S / 2),
                wait_for_workers=False,
                multi_tenant=True,
            ),
        )
    except (RuntimeError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            raise NotMet(
                f"rank 0 cannot open port {launch.port} (MASTER_PORT): another program listens there, or another process with "
                f"RANK=0; give a free MASTER_PORT to all ranks{_or(launch)}"
            ) from None
        if "EACCES" in str(error):
            raise NotMet(f"rank 0 may not open port {launch.port} (MASTER_PORT): give one above 1023 to all ranks") from None
        raise NotMet(
            f"rank 0 opens port {launch.port} here and does not find it at {launch.address}: MASTER_ADDR must be an address of "
            f"the machine of rank 0, the same on all ranks{_or(launch)}"
        ) from None


def _reach_store(launch: LaunchEnvironment, timeout_s: float, what: str) -> Any:
    """Connect to a store that may open minutes later. Tries with plain sockets: torch would log each one."""
    started, patience = time.monotonic(), watchdog.Patience()
    while True:
        why = _why_unreachable(launch.address, launch.port)
        left_s = timeout_s - (time.monotonic() - started)
        if not why:
            try:
                return within(
                    max(1.0, min(left_s, _HANDSHAKE_S)),
                    lambda: dist.TCPStore(
                        launch.address, launch.port, is_master=False, timeout=datetime.timedelta(seconds=_CONNECT_S)
                    ),
                )
            except TimeoutError:
                raise NotMet(
                    f"what listens at {launch.address}:{launch.port} (MASTER_ADDR, MASTER_PORT) is no store of torch's, or "
                    f"{'torchrun' if launch.agent_store else 'rank 0'} is frozen: give the address and port at which rank 0 or "
                    f"torchrun waits, or look after that process{_or(launch)}"
                ) from None
            except RuntimeError as error:  # it has gone again
                why = str(error).partition("\n")[0]
        waited_s = time.monotonic() - started
        whom = "torchrun's store" if launch.agent_store else "rank 0"
        nobody = f"{whom} at {launch.address}:{launch.port} ({why})"
        if waited_s > timeout_s:
            raise missing(launch, f"{nobody} did not answer within {waited_s:.0f} s")
        if _speaks(launch) and patience.is_due(waited_s):
            watchdog.notice(_with_cause(launch, f"waiting for {nobody}, where {what} (at most {timeout_s:.0f} s)"), waited_s)
        time.sleep(min(1.0, 0.05 + waited_s / 20))


def _speaks(launch: LaunchEnvironment) -> bool:
    """Whether this rank says for whom it waits: rank 0; and, who may wait for rank 0, rank 1 and the first of each machine.

    By hand every rank: it may be the only one there, and each has a terminal of its own.
    """
    return not launch.by_torchrun or launch.rank < 2 or launch.local_rank == 0


def _why_unreachable(address: str, port: int) -> str:
    """Why nobody is there; "" if somebody is."""
    try:
        socket.create_connection((address, port), _CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError:
        return "no such host name"
    return ""


def within(limit_s: float, make: Callable[[], Any], on_wait: Callable[[], None] = lambda: None) -> Any:
    """What `make` returns or raises. TimeoutError if it takes longer: torch waits for ever for a port or a store that is mute.

    on_wait: called every second while it takes.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((make(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="ddp_eval store")
    thread.start()
    deadline = time.monotonic() + limit_s
    thread.join(min(limit_s, 1.0))
    while thread.is_alive():
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        on_wait()
        thread.join(min(left_s, 1.0))
    made, error = outcome[0]
    if error is not None:
        raise error
    return made


def meet(launch: LaunchEnvironment, timeout_s: float) -> tuple[Any, Met]:
    """Wait until all ranks of the launch have come. Returns the store that all reach, and what they say of themselves.

    Raises, after `timeout_s`, LostContact under torchrun and UserError elsewhere, naming those who have not come; UserError when
    ranks contradict each other.
    """
    started, patience = time.monotonic(), watchdog.Patience()
    first = launch.rank - launch.local_rank
    me = {
        "id": uuid.uuid4().hex,
        "ranks": launch.world_size,
        "host": socket.gethostname(),
        "machine": processes.machine(),
        "pid": os.getpid(),
        "local": [first, first + (launch.local_world_size or 1)],
    }
    known: dict[int, str] = {}

    def notify(missing_ranks: list[int], _: float) -> None:
        waited_s = time.monotonic() - started
        if (launch.by_torchrun and not missing_ranks) or not _speaks(launch) or not patience.is_due(waited_s):
            return
        absent = name_ranks(missing_ranks, known, launch) if missing_ranks else "the ranks that rank 0 names"
        watchdog.notice(_with_cause(launch, f"waiting for {absent} to join (at most {timeout_s:.0f} s)"), waited_s)

    while True:
        left_s = max(0.5, timeout_s - (time.monotonic() - started))
        store = open_store(launch, left_s)
        try:
            texts = exchange_through(
                store, launch.rank, launch.world_size, "ddp_eval/join", json.dumps(me), left_s, notify, known,
                alone=not launch.by_torchrun,
            )  # fmt: skip
            facts = _agreed(launch, texts, me, started)
            break
        except TwoOfOneRank:
            raise NotMet(
                f"two processes have RANK={launch.rank}, one of them {me['pid']} on {me['host']}: give each a number of its own"
            ) from None
        except FewerRanks as size:
            raise NotMet(f"WORLD_SIZE is {launch.world_size} on rank {launch.rank} and {size} on rank 0{_or(launch)}") from None
        except LostContact:
            raise
        except RuntimeError:
            # A store of rank 0's own may be that of an earlier group, or rank 0 is started again.
            if launch.rank == 0 or launch.agent_store or time.monotonic() - started > timeout_s:
                raise
            del _stores[launch.address, launch.port]
            time.sleep(0.2)
    here = [rank for rank, one in enumerate(facts) if me["machine"] and one["machine"] == me["machine"]]
    return store, Met(facts[0]["id"], tuple(one["pid"] for one in facts), tuple(here or [launch.rank]))


def _agreed(
    launch: LaunchEnvironment, texts: Sequence[str | None], me: dict[str, Any], started: float
) -> Sequence[dict[str, Any]]:
    """What all ranks have said. Raises what `missing` makes of absent ones; NotMet and TwoOfOneRank for contradictions."""
    absent = [rank for rank, text in enumerate(texts) if text is None]
    if absent:
        # A rank without rank 0's text knows nothing of the others.
        named = name_ranks(absent if launch.rank == 0 or 0 not in absent else [0], dict(enumerate(texts)), launch)
        raise missing(launch, f"{named} did not come to join the process group within {time.monotonic() - started:.0f} s")
    facts = [json.loads(text) for text in texts if text is not None]
    for rank, one in enumerate(facts):
        if one["ranks"] != launch.world_size:
            raise NotMet(f"WORLD_SIZE is {launch.world_size} on rank {launch.rank} and {one['ranks']} on rank {rank}")
    if facts[launch.rank]["id"] != me["id"]:
        raise TwoOfOneRank
    return facts


def missing(launch: LaunchEnvironment, sentence: str) -> Exception:
    """Who did not come, and what to do."""
    if launch.by_torchrun:
        return LostContact(
            f"{sentence}: look after that machine, then start it again, or give a longer --timeout if starting may take so long"
            f"{_or(launch)}"
        )
    everyone = f"start all {launch.world_size} ranks, each with MASTER_ADDR={launch.address} and MASTER_PORT={launch.port}"
    return NotMet(f"{sentence}: {everyone}, or use torchrun{_or(launch)}")


def _or(launch: LaunchEnvironment) -> str:
    return f"; {launch.way_out()}" if launch.way_out() else ""


def _with_cause(launch: LaunchEnvironment, sentence: str) -> str:
    return sentence + _or(launch)


def name_ranks(ranks: Sequence[int], texts: dict[int, Any], launch: LaunchEnvironment) -> str:
    """Ranks, each with its machine as far as others there have said. texts: what ranks have given to `meet`."""
    first = launch.rank - launch.local_rank
    hosts = dict.fromkeys(range(first, first + (launch.local_world_size or 1)), socket.gethostname())
    for text in filter(None, texts.values()):
        told = json.loads(text)
        hosts.update(dict.fromkeys(range(*told["local"]), told["host"]))
    if len(ranks) > 8 and not any(rank in hosts for rank in ranks):
        return f"{len(ranks)} ranks, the first of them rank {ranks[0]}, on machines from which none has come"
    return ", ".join(f"rank {rank} on {hosts.get(rank, 'a machine from which none has come')}" for rank in ranks)


def exchange_through(
    store: Any,
    rank: int,
    world_size: int,
    name: str,
    text: str,
    timeout_s: float,
    notify: Notify = lambda ranks, waited_s: None,
    heard: dict[int, str] | None = None,
    alone: bool = False,
) -> list[str | None]:
    """Every rank's `text` in rank order, through any store, which may still hold what ranks of an earlier attempt said.

    None for a rank that has given none in that time. All ranks get the same, but those that give up before rank 0 does.

    Attempts are not counted alike on all nodes. So each rank asks rank 0 by a word of its own, never used before, and gets
    the common word under which this exchange goes; an earlier rank's question is answered too, and its answer read by nobody.
    A rank asks again and again while it waits: the rank 0 that has answered may be one of an earlier attempt, and gone.

    notify: called now and then. heard: filled, on rank 0, with what has come so far. alone: no launcher starts a rank again, so
    that TwoOfOneRank is raised when another process asks as this rank, and FewerRanks when rank 0 does not count this one.

    It looks again and again: torch logs each wait of its store that ends by a timeout. In a thread: torch waits for ever for a
    store whose host is stopped or cut off. What is known by then is known.
    """
    started = looked = time.monotonic()
    given_up = threading.Event()
    texts: list[str | None] = [None] * world_size
    texts[rank] = text
    heard = {} if heard is None else heard

    def look(missing: list[int], waited_s: float) -> None:
        nonlocal looked
        looked = time.monotonic()
        if given_up.is_set():
            raise TimeoutError
        notify(missing, waited_s)

    def notify_of_silence() -> None:
        if time.monotonic() - looked > _SILENT_S:
            absent = [other for other, one in enumerate(texts) if one is None]
            notify(absent if rank == 0 else [0], time.monotonic() - started)

    def exchange() -> list[str | None]:
        if rank == 0:
            return _collect(store, name, texts, started, timeout_s, look, heard)
        return _follow(store, rank, name, texts, started, timeout_s, look, alone)

    try:
        found: list[str | None] = within(timeout_s + _SILENT_S, exchange, notify_of_silence)
        return found
    except TimeoutError:
        return list(texts)
    finally:
        given_up.set()


def _follow(
    store: Any, rank: int, name: str, texts: list[str | None], started: float, timeout_s: float, notify: Notify, alone: bool
) -> list[str | None]:
    """The other ranks' part."""
    text, world_size = texts[rank], len(texts)
    asked, asked_at, common = "", float("-inf"), ""
    while (waited_s := time.monotonic() - started) < timeout_s:
        if time.monotonic() - asked_at > _ASK_S:
            asked, asked_at = uuid.uuid4().hex, time.monotonic()
            store.set(f"{name}/ask/{rank}", asked)
        if store.check([f"{name}/answer/{asked}"]) and (word := store.get(f"{name}/answer/{asked}").decode()) != common:
            common = word
            store.set(f"{name}/{common}/{rank}", text)
        if common and store.check([f"{name}/{common}/all"]):
            found: list[str | None] = json.loads(store.get(f"{name}/{common}/all").decode())
            if rank < len(found) and found[rank] is None:  # rank 0 gave up first
                found[rank] = text
            return found
        if alone and store.get(f"{name}/ask/{rank}").decode() != asked:
            raise TwoOfOneRank
        if alone and not common and store.check([f"{name}/size"]) and int(size := store.get(f"{name}/size")) <= rank:
            raise FewerRanks(int(size))
        notify([] if common else [0], waited_s)
        time.sleep(min(_LOOK_S, 0.005 + waited_s / 50))
    for other in range(world_size) if common else ():
        if other != rank and store.check([f"{name}/{common}/{other}"]):
            texts[other] = store.get(f"{name}/{common}/{other}").decode()
    return texts


def _collect(
    store: Any, name: str, texts: list[str | None], started: float, timeout_s: float, notify: Notify, heard: dict[int, str]
) -> list[str | None]:
    """Rank 0's part."""
    common, answered = uuid.uuid4().hex, set()
    store.set(f"{name}/size", str(len(texts)))
    store.set(f"{name}/{common}/0", texts[0])
    while True:
        for other in [other for other, text in enumerate(texts) if text is None]:
            if store.check([f"{name}/{common}/{other}"]):
                texts[other] = heard[other] = store.get(f"{name}/{common}/{other}").decode()
            elif store.check([f"{name}/ask/{other}"]) and (asked := store.get(f"{name}/ask/{other}").decode()) not in answered:
                store.set(f"{name}/answer/{asked}", common)
                answered.add(asked)
        absent = [other for other, text in enumerate(texts) if text is None]
        waited_s = time.monotonic() - started
        if not absent or waited_s > timeout_s:
            store.set(f"{name}/{common}/all", json.dumps(texts))
            return texts
        notify(absent, waited_s)
        time.sleep(min(_LOOK_S, 0.005 + waited_s / 50))
