"""Losing other ranks, and errors that the launcher hears of."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from ddp_eval.distributed.launch_environment import launch_rank
from ddp_eval.errors import LostContact, is_out_of_memory


@contextlib.contextmanager
def naming_lost_ranks(doing: str) -> Iterator[None]:
    """Errors of a collective, as LostContact that says what this rank was doing. Its own lack of memory is raised unchanged."""
    started = time.monotonic()
    try:
        yield
    except LostContact:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        rank = dist.get_rank() if dist.is_initialized() else launch_rank()
        elapsed_s = time.monotonic() - started
        reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)
        raise LostContact(
            f"rank {rank} lost contact with another rank while {doing}, after {elapsed_s:.0f} s: {reason}"
        ) from error


def reporting_to_launcher(function: Callable[..., int]) -> Callable[..., int | None]:
    """`function`, whose unexpected errors torchrun is handed: it prints the one that came first."""
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)
