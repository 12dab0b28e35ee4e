"""`quick_main` with a fault on one rank: FAULT_RANK has FAULT happen to it, unless torchrun has restarted it.

load_user_error    its checkpoint cannot be used
load_user_error_early  the same, while the others take a minute to load theirs
load_crash         a defect while it loads the model
forward_crash      a defect in its second pack
forward_no_memory  its second pack does not fit, nor any piece of it
forward_little_memory  from its second pack on, what has over 300 tokens does not fit, but single requests do
forward_stuck      it writes its process id to FAULT_FILE and stops in its second pack
killed_after       SIGKILL when its first batch of texts is in its journal; it writes its process id to FAULT_FILE before
journal_full       the disk has no room for its second pack
start_crash        a defect between its message to load the model and its own loading
directory_lost     its run directory is taken away in its first packs

no_compiler happens to every rank: the attention that is fastest for trees cannot run
"""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from quick_main import main

from ddp_eval.distributed import collectives
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import engine as hf
from ddp_eval.engines.ops import tree_attention
from ddp_eval.errors import UserError
from ddp_eval.output import directory as run_directory
from ddp_eval.output import journal, lock
from ddp_eval.run import leader
from ddp_eval.run.replica import PendingReplica


def fail_to_load(*args: object, **kwargs: object) -> NoReturn:
    if os.environ["FAULT"].startswith("load_user_error"):
        raise UserError("the checkpoint has fallen off the shelf")
    raise RuntimeError("a defect in the loader")


def fail_to_forward(pack: Any) -> None:
    fault = os.environ["FAULT"]
    if fault == "none":
        return
    if fault == "forward_little_memory":
        if len(pack) > 300 and len(pack.items) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return
    if fault == "forward_crash":
        raise RuntimeError("a defect in the forward pass")
    if fault == "forward_no_memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    tell_who()
    time.sleep(600)


def tell_who() -> None:
    path = Path(os.environ["FAULT_FILE"])
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)


def die_after_texts() -> None:
    append = journal.Journal.append_texts

    def append_and_die(own: journal.Journal, *texts: Any) -> None:
        append(own, *texts)
        tell_who()
        os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(journal.Journal, "append_texts", append_and_die).start()


def break_forward() -> None:
    """Fail in the second pack of the plan; the leader's trial of packs, which comes before, is left alone."""
    shard, launch = collectives.shard, hf.HFEngine.launch
    packs: list[Any] = []

    def count_from_here(world: World, count: int) -> list[int]:
        packs.append(None)
        return shard(world, count)

    def launch_or_fail(engine: hf.HFEngine, pack: Any) -> Any:
        if packs:
            packs.append(pack)
        if len(packs) > 2:
            fail_to_forward(pack)
        return launch(engine, pack)

    collectives.shard = count_from_here
    mock.patch.object(hf.HFEngine, "launch", launch_or_fail).start()


def fill_disk() -> None:
    """No room from the second pack on."""
    append = journal.Journal.append
    packs: list[None] = []

    def append_or_fail(own: journal.Journal, *pack: Any) -> None:
        if packs:
            mock.patch.object(os, "write", refuse).start()
        packs.append(None)
        append(own, *pack)

    def refuse(descriptor: int, data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mock.patch.object(journal.Journal, "append", append_or_fail).start()


def fail_to_start(replica: PendingReplica) -> NoReturn:
    raise ImportError("a module that is half made")


def lose_directory() -> None:
    run_plan, lost = leader.run_plan, []

    def run_and_lose(*args: Any) -> Any:
        if len(args) > 3:
            lost.append(args[3].__self__)
            (lost[-1].path / lock.LOCK).unlink()
        return run_plan(*args)

    mock.patch.object(leader, "run_plan", run_and_lose).start()
    is_lost = property(lambda directory: any(one is directory for one in lost))
    mock.patch.object(run_directory.RunDirectory, "is_lost", is_lost).start()


def refuse_to_compile(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("Failed to find C compiler")


def load_slowly(*args: object, **kwargs: object) -> Any:
    time.sleep(600)


if __name__ == "__main__":
    if os.environ["FAULT"] == "load_user_error_early":
        hf.load_engine = load_slowly
    if os.environ["FAULT"] == "no_compiler":
        tree_attention.with_keys = refuse_to_compile
    elif os.environ["RANK"] == os.environ["FAULT_RANK"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if os.environ["FAULT"] == "journal_full":
            fill_disk()
        elif os.environ["FAULT"] == "killed_after":
            die_after_texts()
        elif os.environ["FAULT"] == "start_crash":
            mock.patch.object(PendingReplica, "start", fail_to_start).start()
        elif os.environ["FAULT"] == "directory_lost":
            lose_directory()
        elif os.environ["FAULT"].startswith("load"):
            hf.load_engine = fail_to_load
        else:
            break_forward()
    main()
