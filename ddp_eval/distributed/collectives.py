"""Ranks: who I am, joining and leaving, sending the plan, dealing packs, gathering results.

The only module that uses torch.distributed. Every helper works with no process group (one rank), with gloo and with NCCL.

On CUDA the process group has NCCL for tensors on GPUs and gloo for those on CPUs. Results, a few bytes for each request, travel
over gloo: its sockets close when a process dies, so that the others learn of it within a second, with any launcher, where an
NCCL collective would wait for its time-out. Messages from the leader have a gloo group of their own, with a longer time-out: a
follower may wait there for hours while the leader builds prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its functions keep for good the group that there is at their import: none of ours
from torch.utils.data import DistributedSampler

from ddp_eval.distributed import launch_environment, meeting, watchdog
from ddp_eval.distributed.launch_environment import whole_number
from ddp_eval.distributed.meeting import LostContact, exchange_through
from ddp_eval.errors import UserError, one_line, printable
from ddp_eval.telemetry.meter import Meter, process_age_s

log = logging.getLogger("ddp_eval")

JOIN_TIMEOUT_S = 1800.0
JOIN_TIMEOUT = datetime.timedelta(seconds=JOIN_TIMEOUT_S)
# For a leader that builds prompts, and for ranks with dearer packs. A dead one is noticed at once, a stuck one by watch.py.
LEADER_TIMEOUT = datetime.timedelta(hours=24)


@dataclasses.dataclass
class OwnGroup:
    """The one reference to a process group.

    Its threads live as long as there is one. They must be gone when the interpreter ends: one that lets go of a tensor of
    Python's then would abort the process.
    """

    group: Any = None


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all.

    messages: the group for words from the leader; holds None when there is one rank, or none any more.
    borrowed: the process group belongs to the caller, and must be usable after a failure of ours.
    ranks_per_node: how many ranks share this machine.
    ranks_per_replica: how many neighbouring ranks hold one copy of the model (layout.py).
    pids: the process of each rank on its machine; () in a borrowed group. neighbours: the ranks of this machine.
    meter: where this rank's time and bytes go.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    messages: OwnGroup = dataclasses.field(default_factory=OwnGroup, compare=False, repr=False)
    borrowed: bool = False
    ranks_per_node: int = 1
    ranks_per_replica: int = 1
    pids: tuple[int, ...] = ()
    neighbours: tuple[int, ...] = ()
    meter: Meter = dataclasses.field(default_factory=Meter, compare=False, repr=False)

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        return self.world_size // self.ranks_per_replica

    @property
    def replica(self) -> int:
        """Which copy of the model this rank holds, or a part of it."""
        return self.rank // self.ranks_per_replica

    @property
    def place(self) -> int:
        """Which part of its copy."""
        return self.rank % self.ranks_per_replica


def launch_rank() -> int:
    """This process's rank as the launcher set it; 0 without a launcher. Needs no process group."""
    return whole_number("RANK", 0)


def launch_local_rank() -> int:
    """This process's rank on its node as the launcher set it; 0 without a launcher. Needs no process group."""
    return whole_number("LOCAL_RANK", 0)


def spans_nodes() -> bool:
    """Whether torchrun started ranks on several nodes. Needs no process group."""
    return whole_number("GROUP_WORLD_SIZE", 1) > 1


def can_exchange() -> bool:
    """Whether `exchange` reaches all ranks: one rank, a joined group, or torchrun's store, which it may be told not to share."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared or dist.is_initialized() or whole_number("WORLD_SIZE", 1) == 1


def exchange(name: str, text: str, timeout_s: float) -> list[str | None]:
    """Every rank's `text` in rank order, through the group's store, or the launcher's before the group is joined.

    None for a rank that has given none in that time, and for all others where there is no common store. Raises LostContact when
    the store is lost with its host.
    """
    rank, world_size = launch_rank(), whole_number("WORLD_SIZE", 1)
    texts: list[str | None] = [None] * world_size
    texts[rank] = text
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _agent_store()
    if store is None:
        return texts
    patience, first = watchdog.Patience(), rank == 1 or launch_local_rank() == 0

    def notify(missing: list[int], waited_s: float) -> None:
        if missing and first and patience.is_due(waited_s):
            watchdog.notice(f"{name}: waiting for rank {', '.join(map(str, missing))} (at most {timeout_s:.0f} s)", waited_s)

    with _naming_lost_ranks(f"exchanging {name}"):
        return exchange_through(store, rank, world_size, name, text, timeout_s, notify)


def join_group(device: str | None = None, timeout_s: float = JOIN_TIMEOUT_S) -> World:
    """Join the process group that the launcher describes, or none for a plain `python -m ddp_eval`.

    device: "cpu", "cuda" or None for CUDA where there is any. Each local rank takes the CUDA device of its number.
    timeout_s: how long to wait for the other ranks.
    Raises UserError when the launcher's environment makes no sense or there are more local ranks than GPUs; LostContact when
    another rank dies on its way here or does not come in time, naming it (UserError where it is not torchrun that starts them).
    """
    _check_free()
    launch = launch_environment.read()
    rank, world_size, local_rank = launch.rank, launch.world_size, launch.local_rank
    chosen = choose_device(device, local_rank)
    meter = Meter("start", process_age_s())
    if world_size == 1:
        meter.phases.switch("other")
        return World(rank, local_rank, world_size, chosen, pids=(os.getpid(),), meter=meter)
    meter.phases.switch("join")
    if chosen.type == "cuda":
        if not os.environ.get("LOCAL_RANK"):
            raise UserError(
                f"WORLD_SIZE is {world_size} but LOCAL_RANK is not set, which says which GPU is this rank's: start with torchrun"
            )
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    with _naming_lost_ranks("joining the process group"), meter.collective("all_gather (processes)", 8, 8 * (world_size - 1)):
        store, met = meeting.meet(launch, timeout_s)
        watchdog.step("joining the process group")
        timeout = datetime.timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        group_store = dist.PrefixStore(f"ddp_eval/{met.id}", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout)
        # A rank that died on the way here is noticed now; setting up the next group would wait for LEADER_TIMEOUT.
        dist.all_gather(pids, torch.tensor([os.getpid()]))
    ranks_per_node = whole_number("LOCAL_WORLD_SIZE", world_size)
    world = World(
        rank,
        local_rank,
        world_size,
        chosen,
        _message_group(),
        ranks_per_node=ranks_per_node,
        pids=tuple(map(int, pids)),
        neighbours=met.local_ranks,
        meter=meter,
    )
    meter.phases.switch("other")
    return world


def adopt_group(device: torch.device, caller: str, arguments: dict[str, Any]) -> World:
    """A World over the process group that the caller already has, if any. Collective; undo with `release_group`.

    caller: the function that every rank must have called. arguments: by name, as texts; those that all ranks must give alike.
    Raises UserError, within the group's own time-out, where a rank has not called, or with other arguments.
    """
    _check_free()
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 0, 1, device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    check_in(rank, world_size, caller, arguments)
    return World(rank, whole_number("LOCAL_RANK", rank), world_size, device, _message_group(), borrowed=True)


def warn_of_no_group(output_path: str | None) -> None:
    """A launcher has started several ranks, and this one is in no process group: it does everything by itself, as may others.

    Raises UserError where they would write to the same place.
    """
    try:
        launch = launch_environment.read()
    except UserError:  # variables of a launch that this process takes no part in
        return
    if launch.world_size == 1 or (dist.is_available() and dist.is_initialized()):
        return
    alone = f"WORLD_SIZE is {launch.world_size}, but this process is in no process group and evaluates everything by itself"
    if output_path is not None and launch.rank > 0:
        raise UserError(
            f"{alone}: only rank 0 may write to output_path {output_path}, and this is rank {launch.rank}; call "
            "torch.distributed.init_process_group first"
        )
    if launch.rank == 0:
        log.warning("%s, as will any rank that calls it: torch.distributed.init_process_group first shares the work", alone)


def check_in(rank: int, world_size: int, caller: str, arguments: dict[str, Any]) -> None:
    """Wait until all ranks have called, for less long than they would wait for this one elsewhere. As for `adopt_group`."""
    if world_size == 1:
        return
    group_s = _group_timeout_s()
    limit_s = max(0.6 * group_s, group_s - 60)
    patience = watchdog.Patience(min(watchdog.NOTICE_S, limit_s / 2))

    def notify(missing: list[int], waited_s: float) -> None:
        if missing and rank < 2 and patience.is_due(waited_s):
            absent = _name_some(missing)
            watchdog.notice(f"rank {rank} is waiting for {absent} to call {caller} too (at most {limit_s:.0f} s)", waited_s)

    store = dist.distributed_c10d._get_default_store()
    with _naming_lost_ranks(f"waiting for all ranks to call {caller}"):
        texts = exchange_through(store, rank, world_size, f"ddp_eval/call/{caller}", json.dumps(arguments), limit_s, notify)
    absent = [other for other, text in enumerate(texts) if text is None]
    if absent:
        # A rank that has not heard of rank 0 knows nothing of the others.
        named = _name_some([0] if absent[0] == 0 else absent)
        raise UserError(
            f"every rank of the process group must call {caller}, at the same time: {named} did not within {limit_s:.0f} s of "
            f"rank {rank}'s call (the group's timeout is {group_s:.0f} s)"
        )
    calls = [json.loads(text) for text in texts if text is not None]
    for other, call in enumerate(calls):
        for name, value in calls[0].items():
            if call.get(name) != value:
                raise UserError(
                    f"every rank must call {caller} with the same arguments: {name} is {one_line(value)} on rank 0 and "
                    f"{one_line(call.get(name))} on rank {other}"
                )


def _name_some(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:8])) + more


def _group_timeout_s() -> float:
    """After how long the caller's own collectives give up."""
    group, store = dist.distributed_c10d._get_default_group(), dist.distributed_c10d._get_default_store()
    found: list[Any] = [getattr(store, "timeout", JOIN_TIMEOUT)]
    for kind in ("cpu", "cuda"):
        with contextlib.suppress(Exception):  # it has no backend for these
            found.append(group._get_backend(torch.device(kind)).options._timeout)
    return float(min(found).total_seconds())


_occupied: str | None = None


def occupy(why: str | None) -> None:
    """From now on the other ranks can take part in nothing else, for a reason that is a sentence; None: they are free."""
    global _occupied
    _occupied = why


def _check_free() -> None:
    if _occupied is not None:
        raise UserError(_occupied)


def release_group(world: World) -> None:
    """Leave the caller's process group as `adopt_group` found it."""
    group, world.messages.group = world.messages.group, None
    if group is not None:
        dist.destroy_process_group(group)


def leave_group(world: World) -> None:
    """Tear the process group down; never raises, since peers may be gone already."""
    if world.world_size > 1 and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    world.messages.group = None


def send_message(world: World, message: Any) -> None:
    """From the leader to all: any picklable object whose large parts are numpy arrays."""
    if world.world_size > 1:
        with _naming_lost_ranks("sending to the other ranks"), world.meter.phases("send"):
            buffer = io.BytesIO()
            pickle.dump(message, buffer)
            data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
            with world.meter.collective("broadcast (size)", 8, 0):
                dist.broadcast(torch.tensor([len(data)]), src=0, group=world.messages.group)
            with world.meter.collective("broadcast (message)", len(data), 0):
                dist.broadcast(data, src=0, group=world.messages.group)


def receive_message(world: World) -> Any:
    """Wait, for hours if need be, for what the leader sends. Raises LostContact when the leader is gone."""
    with _naming_lost_ranks("waiting for rank 0"), world.meter.phases("wait"):
        size = torch.zeros(1, dtype=torch.int64)
        with world.meter.collective("broadcast (size)", 0, 8):
            dist.broadcast(size, src=0, group=world.messages.group)
        data = torch.empty(int(size), dtype=torch.uint8)
        with world.meter.collective("broadcast (message)", 0, len(data)):
            dist.broadcast(data, src=0, group=world.messages.group)
    return pickle.loads(data.numpy().data)  # from rank 0 of this very launch


def gather_reports(world: World, report: Any) -> list[Any] | None:
    """What every rank says of itself, in the order of ranks, on the leader; None on the others. Not measured itself."""
    if world.world_size == 1:
        return [report]
    everyone: list[Any] | None = [None] * world.world_size if world.is_leader else None
    with _naming_lost_ranks("gathering reports"):
        dist.gather_object(report, everyone, dst=0, group=world.messages.group)
    return everyone


def broadcast_object(world: World, value: Any) -> Any:
    """The leader's `value` on all ranks: any picklable object."""
    box = [value]
    with _naming_lost_ranks("receiving the model from rank 0"):
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_tensors(world: World, tensors: list[torch.Tensor]) -> None:
    """Fill every rank's tensors, of equal shapes and types, with the leader's. Over NCCL for those on GPUs."""
    with _naming_lost_ranks("receiving the model from rank 0"):
        for tensor in tensors:
            payload = (tensor.nbytes, 0) if world.is_leader else (0, tensor.nbytes)
            with world.meter.collective("broadcast (weights)", *payload):
                dist.broadcast(tensor, src=0)


def shard(world: World, count: int) -> list[int]:
    """Which of `count` packs this rank's replica runs, as DistributedSampler deals them; some repeat when they do not divide
    evenly.

    >>> [list(DistributedSampler(range(5), 2, rank, shuffle=False)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3, 0]]
    """
    if count == 0:
        return []
    packs: Any = range(count)
    return list(DistributedSampler(packs, world.replicas, world.replica, shuffle=False, drop_last=False))


class Incoming:
    """A tensor under way from another rank; several come in the order in which they are sent. `wait` returns it."""

    def __init__(self, world: World, tensor: torch.Tensor, source: int) -> None:
        self._meter, self._tensor, self._source = world.meter, tensor, source
        with _naming_lost_ranks(f"receiving from rank {source}"):
            self._work: Any = dist.irecv(tensor, src=source)

    def wait(self) -> torch.Tensor:
        received = self._meter.collective("receive", 0, self._tensor.nbytes)
        with _naming_lost_ranks(f"receiving from rank {self._source}"), self._meter.phases("wait"), received:
            self._work.wait()
        return self._tensor


class Outgoing:
    """A tensor under way to another rank: it must not be written to before `wait` has returned."""

    def __init__(self, world: World, tensor: torch.Tensor, target: int) -> None:
        self._meter, self._tensor, self._target = world.meter, tensor, target
        with _naming_lost_ranks(f"sending to rank {target}"), self._meter.collective("send", tensor.nbytes, 0):
            self._work: Any = dist.isend(tensor, dst=target)
        self._done = torch.cuda.Event() if tensor.is_cuda else None
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until the tensor is on its way; on CUDA also until it has been computed, which bounds how far the host runs ahead."""
        with _naming_lost_ranks(f"sending to rank {self._target}"), self._meter.phases("wait"):
            self._work.wait()
        if self._done is not None:
            self._done.synchronize()


def all_gather_rows(world: World, rows: npt.NDArray[np.int64], failed: bool = False) -> npt.NDArray[np.int64]:
    """Bring the (n, C) rows of every rank, n differing, to all of them, in the order of ranks.

    A rank that has nothing to give because it failed says so, and LostContact is raised on all: nobody waits for it.
    """
    if world.world_size == 1:
        return rows
    with _naming_lost_ranks("gathering results"):
        with world.meter.phases("wait"):
            sizes = _all_gather(world, torch.tensor([-1 if failed else len(rows)]), "size")
        if int(sizes.min()) < 0:
            raise LostContact(f"rank {int(sizes.argmin())} failed while it ran its packs")
        padded = torch.zeros((int(sizes.max()), rows.shape[1]), dtype=torch.int64)
        padded[: len(rows)] = torch.from_numpy(rows)
        with world.meter.phases("gather"):
            blocks = _all_gather(world, padded, "rows").numpy()
    return np.concatenate([block[:size] for block, size in zip(blocks, sizes.flatten().tolist(), strict=True)])


def _all_gather(world: World, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """(ranks, *shape): every rank's CPU tensor of one common shape."""
    everyone = [torch.empty_like(tensor) for _ in range(world.world_size)]
    with world.meter.collective(f"all_gather ({what})", tensor.nbytes, tensor.nbytes * (world.world_size - 1)):
        # A borrowed group may have no backend for the CPU, and ranks may wait here for longer than in a computation.
        dist.all_gather(everyone, tensor, group=world.messages.group)
    return torch.stack(everyone)


def time_all_reduce(world: World) -> float:
    """Seconds of the second of two all-reduces on every rank's own device. Raises LostContact, RuntimeError for a wrong sum."""
    if world.world_size == 1:
        return 0.0
    with _naming_lost_ranks("trying an all-reduce"):
        for _ in range(2):  # the first one sets up NCCL
            started = time.monotonic()
            total = torch.ones(1, device=world.device)
            dist.all_reduce(total)
            reached = int(total.item())
    if reached != world.world_size:
        raise RuntimeError(f"an all-reduce of ones over {world.world_size} ranks came to {reached}")
    return time.monotonic() - started


def common_store(world: World) -> Any:
    """A key-value store that all ranks reach, for threads that must wait for nobody; None with one rank."""
    return dist.distributed_c10d._get_default_store() if world.world_size > 1 else None


def local_ranks(world: World) -> tuple[int, ...]:
    """The ranks on this node, this one included."""
    return world.neighbours or (world.rank,)


class Tally:
    """A count that all ranks add to and the leader reads, without any rank waiting for another."""

    def __init__(self, world: World, name: str) -> None:
        self._key = f"ddp_eval/tally/{name}"
        self._store = common_store(world)
        self._total = 0

    def add(self, amount: int) -> None:
        with _naming_lost_ranks("telling its progress"):
            self._total = self._store.add(self._key, amount) if self._store is not None else self._total + amount

    def read(self) -> int:
        with contextlib.suppress(RuntimeError):  # a store that is gone ends the run elsewhere
            self._total = self._store.add(self._key, 0) if self._store is not None else self._total
        return int(self._total)


def report_once(message: str, shared: bool = False) -> None:
    """Print `message` on stderr from exactly one of the ranks that fail with an error of their own.

    The first rank to claim the word prints. The others wait until it has: the launcher ends everybody as soon as one rank is
    gone, and might else end the speaker first. Never raises.

    shared: many ranks have this to say; if the store has died with its host, the first rank of each node does. Where no store was
    ever reached, rank 1 does too: it may be the only one there.
    """
    store = _error_store()
    if store is None and not shared and 0 < launch_rank() < whole_number("WORLD_SIZE", 1):
        return  # no common store: what is wrong with the command is wrong on rank 0 too
    mine = not shared or launch_local_rank() == 0 or (store is None and launch_rank() == 1)
    try:
        mine = store.add("ddp_eval/error/claim", 1) == 1 if store is not None else mine
    except RuntimeError:
        store = None
    if mine:
        print(f"ddp_eval: {printable(message)}", file=sys.stderr, flush=True)
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


def _message_group() -> OwnGroup:
    return OwnGroup(dist.new_group(backend="gloo", timeout=LEADER_TIMEOUT))


@contextlib.contextmanager
def _naming_lost_ranks(doing: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except LostContact:
        raise
    except RuntimeError as error:
        rank = dist.get_rank() if dist.is_initialized() else launch_rank()
        elapsed_s = time.monotonic() - started
        reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
        raise LostContact(
            f"rank {rank} lost contact with another rank while {doing}, after {elapsed_s:.0f} s: {reason}"
        ) from error


def choose_device(asked: str | None, local_rank: int) -> torch.device:
    """The device of a local rank; `asked` as for `join_group`. Raises UserError when there is none."""
    kind, _, number = (asked or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind not in ("cuda", "cpu") or (":" in (asked or "") and not number.isdecimal()):
        raise UserError(f"--device must be cuda or cpu, got {asked}")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {asked} was asked for, but torch sees no CUDA device here: leave it out, or give --device cpu")
    if number and whole_number("WORLD_SIZE", 1) > 1:
        raise UserError(
            f"--device {asked} cannot be shared by several ranks: give --device cuda, one GPU goes to each local rank"
        )
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
            f"start at most that many ranks (torchrun --nproc_per_node), or add --device cpu"
        )
    return torch.device("cuda", index)
