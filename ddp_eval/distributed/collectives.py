"""Ranks: who I am, joining and leaving, sending the plan, dealing packs, gathering results.

The only module that uses torch.distributed. Every helper works with no process group (one rank), with gloo and with NCCL.

On CUDA the process group has NCCL for tensors on GPUs and gloo for those on CPUs. Results, a few bytes for each request, travel
over gloo: its sockets close when a process dies, so that the others learn of it within a second, with any launcher, where an
NCCL collective would wait for its time-out. Messages from the leader have a gloo group of their own, with a longer time-out: a
follower may wait there for hours while the leader builds prompts.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import time
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its functions keep for good the group that there is at their import: none of ours
from torch.utils.data import DistributedSampler

from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.world import World
from ddp_eval.errors import LostContact, UserError

log = logging.getLogger("ddp_eval")


def send_message(world: World, message: Any) -> None:
    """From the leader to all: any picklable object whose large parts are numpy arrays."""
    if world.world_size > 1:
        with naming_lost_ranks("sending to the other ranks"), world.meter.phases("send"):
            buffer = io.BytesIO()
            pickle.dump(message, buffer)
            if world.signs is not None:
                world.signs.announce()
            data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
            with world.meter.collective("broadcast (size)", 8, 0):
                dist.broadcast(torch.tensor([len(data)]), group_src=0, group=world.messages.group)
            with world.meter.collective("broadcast (message)", len(data), 0):
                dist.broadcast(data, group_src=0, group=world.messages.group)


def receive_message(world: World) -> Any:
    """Wait, for hours if need be, for what the leader sends. Raises LostContact when the leader is gone."""
    with naming_lost_ranks("waiting for rank 0"), world.meter.phases("wait"):
        if world.signs is not None:
            world.signs.await_message()
        size = torch.zeros(1, dtype=torch.int64)
        with world.meter.collective("broadcast (size)", 0, 8):
            dist.broadcast(size, group_src=0, group=world.messages.group)
        data = torch.empty(int(size), dtype=torch.uint8)
        with world.meter.collective("broadcast (message)", 0, len(data)):
            dist.broadcast(data, group_src=0, group=world.messages.group)
    return pickle.loads(data.numpy().data)  # from rank 0 of this very launch


def gather_reports(world: World, report: Any) -> list[Any] | None:
    """Every rank's `report`, in the order of ranks, on the leader; None on the others. Not measured itself."""
    if world.world_size == 1:
        return [report]
    everyone: list[Any] | None = [None] * world.world_size if world.is_leader else None
    with naming_lost_ranks("gathering reports"):
        dist.gather_object(report, everyone, group_dst=0, group=world.messages.group)
    return everyone


def broadcast_object(world: World, value: Any) -> Any:
    """The leader's `value` on all ranks: any picklable object."""
    box = [value]
    with naming_lost_ranks("receiving the model from rank 0"):
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_tensors(world: World, tensors: list[torch.Tensor]) -> None:
    """Fill every rank's tensors, of equal shapes and types, with the leader's. Over NCCL for those on GPUs."""
    with naming_lost_ranks("receiving the model from rank 0"):
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
        with naming_lost_ranks(f"receiving from rank {source}"):
            self._work: Any = dist.irecv(tensor, src=source)

    def wait(self) -> torch.Tensor:
        received = self._meter.collective("receive", 0, self._tensor.nbytes)
        with naming_lost_ranks(f"receiving from rank {self._source}"), self._meter.phases("wait"), received:
            self._work.wait()
        return self._tensor


class Outgoing:
    """A tensor under way to another rank: it must not be written to before `wait` has returned."""

    def __init__(self, world: World, tensor: torch.Tensor, target: int) -> None:
        self._meter, self._tensor, self._target = world.meter, tensor, target
        with naming_lost_ranks(f"sending to rank {target}"), self._meter.collective("send", tensor.nbytes, 0):
            self._work: Any = dist.isend(tensor, dst=target)
        self._done = torch.cuda.Event() if tensor.is_cuda else None
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until the tensor is on its way; on CUDA also until it has been computed, which bounds how far the host runs ahead."""
        with naming_lost_ranks(f"sending to rank {self._target}"), self._meter.phases("wait"):
            self._work.wait()
        if self._done is not None:
            self._done.synchronize()


class RankFailed(LostContact):
    """Another rank failed while it ran its packs, and has said so."""


class FailedTogether(UserError):
    """A rank failed, and all ranks know: they are ready for something else. The text says which and why."""


def fail_together(world: World, why: str | None) -> FailedTogether:
    """Have all ranks know of a failure that some had. Collective. why: of this rank, None where it has not failed."""
    reports = gather_reports(world, why)
    reason = why if reports is None else next((one for one in reports if one), None)
    return FailedTogether(reason or "another rank failed")


Rows = TypeVar("Rows", bound=npt.NDArray[Any])


def all_gather_rows(world: World, rows: Rows, failed: bool = False) -> Rows:
    """Bring the rows of every rank, their number differing, to all of them, in the order of ranks.

    rows: (n, …) of any type that is plain bytes, structured ones included, the same on all ranks.
    A rank that has nothing to give because it failed sends that instead, and LostContact is raised on all: nobody waits for it.
    """
    if world.world_size == 1:
        return rows
    with naming_lost_ranks("gathering results"):
        with world.meter.phases("wait"):
            sizes = _all_gather(world, torch.tensor([-1 if failed else len(rows)]), "size")
        if int(sizes.min()) < 0:
            raise RankFailed(f"rank {int(sizes.argmin())} failed while it ran its packs")
        row_bytes = rows.dtype.itemsize * math.prod(rows.shape[1:])
        padded = np.zeros((int(sizes.max()), row_bytes), dtype=np.uint8)
        padded[: len(rows)] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).reshape(-1, row_bytes)
        with world.meter.phases("gather"):
            blocks = _all_gather(world, torch.from_numpy(padded), "rows").numpy()
    gathered = np.concatenate([block[:size] for block, size in zip(blocks, sizes.flatten().tolist(), strict=True)])
    return gathered.reshape(-1).view(rows.dtype).reshape(-1, *rows.shape[1:])  # type: ignore[return-value]


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
    with naming_lost_ranks("trying an all-reduce"):
        for _ in range(2):  # the first one sets up NCCL
            started = time.monotonic()
            total = torch.ones(1, device=world.device)
            dist.all_reduce(total)
            reached = int(total.item())
    if reached != world.world_size:
        raise RuntimeError(f"an all-reduce of ones over {world.world_size} ranks came to {reached}")
    return time.monotonic() - started
