"""Who a rank is: World, made by joining torchrun's group or a caller's."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import unittest.mock
import uuid
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional

from ddp_eval.distributed import launch_environment, meeting, watchdog
from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.launch_environment import whole_number
from ddp_eval.distributed.leader_signs import LeaderSigns
from ddp_eval.distributed.meeting import exchange_through
from ddp_eval.errors import UserError, one_line
from ddp_eval.system.text import read_count
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
    goes_on: what fails is one model of several: where ranks compute by themselves, they agree on it and go on.
    ranks_per_node: how many ranks share this machine.
    ranks_per_replica: how many neighbouring ranks run the same packs on one copy of the model (layout.py).
    ranks_per_shard: how many ranks share the weights of one copy while each runs packs of its own; forwards in lockstep.
    global_ranks: of a caller's group that is not all of its ranks: what torch calls each rank; () where they are the same.
    call: in a borrowed group, a name for this one of the caller's calls. signs: of rank 0's life, where ranks wait for it there.
    pids: the process of each rank on its machine; () in a borrowed group. neighbours: the ranks of this machine.
    meter: where this rank's time and bytes go.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    messages: OwnGroup = dataclasses.field(default_factory=OwnGroup, compare=False, repr=False)
    borrowed: bool = False
    goes_on: bool = False
    ranks_per_node: int = 1
    ranks_per_replica: int = 1
    ranks_per_shard: int = 1
    global_ranks: tuple[int, ...] = ()
    call: str = ""
    signs: LeaderSigns | None = dataclasses.field(default=None, compare=False, repr=False)
    pids: tuple[int, ...] = ()
    neighbours: tuple[int, ...] = ()
    meter: Meter = dataclasses.field(default_factory=Meter, compare=False, repr=False)

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def agrees_on_failures(self) -> bool:
        """Not where ranks share a model: the others wait in its collectives for the one that fails."""
        return self.goes_on and self.ranks_per_replica == 1 and self.ranks_per_shard == 1

    @property
    def replicas(self) -> int:
        return self.world_size // self.ranks_per_replica

    @property
    def replica(self) -> int:
        """Which copy of the model this rank holds, or a part of it."""
        return self.rank // self.ranks_per_replica

    @property
    def shard_index(self) -> int:
        """Which part of its copy."""
        return self.rank % self.ranks_per_replica


def has_group() -> bool:
    """Whether this process is in a process group: of its caller, before `join_group`."""
    return dist.is_available() and dist.is_initialized()


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
    watchdog.step("looking for this rank's device")  # a driver may hang
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
    with naming_lost_ranks("joining the process group"), meter.collective("all_gather (processes)", 8, 8 * (world_size - 1)):
        watchdog.step(watchdog.WAITING)
        store, met = meeting.meet(launch, timeout_s)
        watchdog.step("joining the process group")
        timeout = datetime.timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        group_store = dist.PrefixStore(f"ddp_eval/{met.id}", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=timeout)
        # A rank that died on the way here is noticed now; setting up the next group would wait for LEADER_TIMEOUT.
        dist.all_gather(pids, torch.tensor([os.getpid()]))
        message_group = _message_group(timeout)
    ranks_per_node = launch.local_world_size or world_size
    world = World(
        rank,
        local_rank,
        world_size,
        chosen,
        message_group,
        ranks_per_node=ranks_per_node,
        pids=tuple(map(int, pids)),
        neighbours=met.local_ranks,
        meter=meter,
    )
    meter.phases.switch("other")
    return world


def adopt_group(device: torch.device, caller: str, arguments: dict[str, Any], ranks: Sequence[int] = ()) -> World:
    """A World over the process group that the caller already has, if any. Collective; undo with `release_group`.

    caller: the function that every rank must have called. arguments: by name, as texts; those that all ranks must give alike.
    ranks: the global ranks that take part, ascending, this one among them; all of the default group if not given.
    Raises UserError, within the group's own time-out, where a rank has not called, or with other arguments; LostContact where one
    does not take part any more.
    """
    _check_free()
    if not has_group():
        return World(0, 0, 1, device)
    own = dist.get_rank()
    everyone = tuple(range(dist.get_world_size()))
    taking_part = tuple(ranks) or everyone
    some = () if taking_part == everyone else taking_part
    rank, world_size = taking_part.index(own), len(taking_part)
    call = check_in(rank, world_size, caller, arguments, some)
    local_rank = whole_number("LOCAL_RANK", rank)
    with naming_lost_ranks("setting up a group of ranks"), watchdog.speaking(aloud=rank < 2):
        watchdog.step(watchdog.WAITING)
        group = _message_group(datetime.timedelta(seconds=group_timeout_s()), some, f"messages/{call}")
    store = dist.distributed_c10d._get_default_store()
    signs = LeaderSigns(store, call, rank, group_timeout_s()) if world_size > 1 else None
    return World(rank, local_rank, world_size, device, group, borrowed=True, global_ranks=some, call=call, signs=signs)


def ranks_of_group(group: Any) -> list[int]:
    """The global ranks of a process group, or of a device mesh of any number of dimensions, ascending.

    Raises UserError for something else, and where this rank is not among them.
    """
    if hasattr(group, "mesh") and hasattr(group, "mesh_dim_names"):
        ranks = sorted(int(rank) for rank in group.mesh.flatten())
    elif isinstance(group, dist.ProcessGroup):
        ranks = sorted(dist.get_process_group_ranks(group))
    else:
        raise UserError(f"group must be a process group or a device mesh of torch.distributed, got {type(group).__name__}")
    if dist.get_rank() not in ranks:
        raise UserError(f"rank {dist.get_rank()} is not in the group that evaluate was given, whose {name_some(ranks)} take part")
    return ranks


def from_first_rank(value: Any) -> Any:
    """What rank 0 of the default group, if there is one, has given: any picklable object."""
    if not has_group() or dist.get_world_size() == 1:
        return value
    box = [value]
    with naming_lost_ranks("receiving from rank 0"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def global_rank(world: World, rank: int) -> int:
    """What torch calls a rank of `world`."""
    return world.global_ranks[rank] if world.global_ranks else rank


def warn_of_no_group(output_path: str | None) -> None:
    """A launcher has started several ranks, and this one is in no process group: it does everything by itself, as may others.

    Raises UserError where they would write to the same place.
    """
    try:
        launch = launch_environment.read()
    except UserError:  # variables of a launch that this process takes no part in
        return
    if launch.world_size == 1 or has_group():
        return
    alone = f"WORLD_SIZE is {launch.world_size}, but this process is in no process group and evaluates everything by itself"
    if output_path is not None and launch.rank > 0:
        raise UserError(
            f"{alone}: only rank 0 may write to output_path {output_path}, and this is rank {launch.rank}; call "
            "torch.distributed.init_process_group first"
        )
    if launch.rank == 0:
        log.warning("%s, as will any rank that calls it: torch.distributed.init_process_group first shares the work", alone)


def check_in(rank: int, world_size: int, caller: str, arguments: dict[str, Any], some: Sequence[int] = ()) -> str:
    """Wait until all ranks have called, for less long than they would wait for this one elsewhere. As for `adopt_group`.

    some: the global ranks, where they are not all there are. Returns a name for this call that all of them have.
    """
    call = uuid.uuid4().hex
    if world_size == 1:
        return call
    group_s = group_timeout_s()
    limit_s = max(0.6 * group_s, group_s - 60)
    # Each other rank may be the only one that has called. It speaks late: usually rank 0 or 1 has said it all by then.
    patience = watchdog.Patience(min(watchdog.NOTICE_S, limit_s / 2) if rank < 2 else limit_s / 2)

    def notify(missing: list[int], waited_s: float) -> None:
        if missing and patience.is_due(waited_s):
            absent = name_some(missing)
            watchdog.notice(f"rank {rank} is waiting for {absent} to call {caller} too (at most {limit_s:.0f} s)", waited_s)

    store = dist.distributed_c10d._get_default_store()
    with naming_lost_ranks(f"waiting for all ranks to call {caller}"):
        name = f"ddp_eval/call/{caller}" + "".join(f"/{one}" for one in some)
        texts = exchange_through(store, rank, world_size, name, json.dumps([call, arguments]), limit_s, notify)
    absent = [other for other, text in enumerate(texts) if text is None]
    if absent:
        # A rank without rank 0's text knows nothing of the others.
        named = name_some([0] if absent[0] == 0 else absent)
        raise UserError(
            f"every rank of the process group must call {caller}, at the same time: {named} did not within {limit_s:.0f} s of "
            f"rank {rank}'s call (the group's timeout is {group_s:.0f} s)"
        )
    names, calls = zip(*(json.loads(text) for text in texts if text is not None), strict=True)
    for other, given in enumerate(calls):
        for name, value in calls[0].items():
            if given.get(name) != value:
                raise UserError(
                    f"every rank must call {caller} with the same arguments: {name} is {one_line(value)} on rank 0 and "
                    f"{one_line(given.get(name))} on rank {other}"
                )
    return str(names[0])


def name_some(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:8])) + more


def group_timeout_s() -> float:
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
    if world.signs is not None:
        world.signs.stop()
    group, world.messages.group = world.messages.group, None
    if group is not None:
        dist.destroy_process_group(group)


def leave_group(world: World) -> None:
    """Tear the process group down; never raises, since peers may be gone already."""
    if world.world_size > 1 and dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    world.messages.group = None


def local_ranks(world: World) -> tuple[int, ...]:
    """The ranks on this node, this one included."""
    return world.neighbours or (world.rank,)


def _message_group(setup: datetime.timedelta, some: Sequence[int] = (), name: str = "") -> OwnGroup:
    """The group for messages, which may take LEADER_TIMEOUT. setup: how long to wait for ranks that do not come to set it up.

    some, name: as for `new_group`; all ranks if not given.
    """
    if some:
        return OwnGroup(new_group(some, LEADER_TIMEOUT, name))
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:  # torch then wraps the group, and the wrapper keeps its first timeout
        return OwnGroup(dist.new_group(backend="gloo", timeout=LEADER_TIMEOUT))
    group = dist.new_group(backend="gloo", timeout=setup)
    dist.distributed_c10d._set_pg_timeout(LEADER_TIMEOUT, group)
    return OwnGroup(group)


def new_group(ranks: Sequence[int], timeout: datetime.timedelta, name: str) -> Any:
    """A gloo group of these global ranks. Collective over them alone.

    name: never used before, the same on all of them. torch (2.13) names such a group by its ranks and the number of groups that
    there are, so that the second of two would find the addresses of the first in the store.
    """
    with unittest.mock.patch.object(dist.distributed_c10d, "_process_group_name", lambda *args, **kwargs: f"ddp_eval/{name}"):
        return dist.new_group(list(ranks), backend="gloo", timeout=timeout, use_local_synchronization=True)


def choose_device(asked: str | None, local_rank: int) -> torch.device:
    """The device of a local rank; `asked` as for `join_group`. Raises UserError when there is none."""
    kind, _, number = (asked or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind not in ("cuda", "cpu") or (":" in (asked or "") and read_count(number) is None):
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
