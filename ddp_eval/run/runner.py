"""A run from start to end: who does what, in order. Read this first.

rank 0                                             ranks 1 … N-1
  choose the layout (placement) ────────────────────► receive it
  load the replica (tasks and prompts meanwhile)     load the replica, or this rank's part of one
  lm_eval builds every request once                  wait
  tokenise, check packs, plan                        wait
  send the plan ────────────────────────────────────► receive it
  DistributedSampler -> my packs, run them           DistributedSampler -> my packs, run them
  all_gather (item, log-probability, greedy) ◄──────► all_gather
  coverage check; lm_eval scores; write              wait
  say stop ─────────────────────────────────────────► leave
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ddp_eval.config import Config
from ddp_eval.distributed import store, watchdog
from ddp_eval.distributed.messages import Followers, await_begin
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, limits
from ddp_eval.output import directory as run_directory
from ddp_eval.output import lock, status
from ddp_eval.output.directory import Directory, NoDirectory
from ddp_eval.output.irregular import log_irregular
from ddp_eval.placement.choose import choose_layout
from ddp_eval.placement.load import brings_code, lay_out, load_replica
from ddp_eval.run.follower import follow
from ddp_eval.run.leader import Inspect, Job, lead, make_encoder
from ddp_eval.run.manifest import (
    describe_steady_model,
    is_same_model,
    look_at_model,
)
from ddp_eval.run.replica import PendingReplica, Replica, load_on_all
from ddp_eval.run.resume import warn_nonfinite
from ddp_eval.system import hub
from ddp_eval.tasks import trackers
from ddp_eval.telemetry.sampler import Sampler

if TYPE_CHECKING:
    from ddp_eval.tasks.kept_setup import KeptSetup

log = logging.getLogger("ddp_eval")


@dataclasses.dataclass(frozen=True)
class Swept:
    """Of one model among several of this process: ranks agree on what fails, and nothing of it is left behind.

    kept: the set-up that the models share. on_loaded: called when this rank has loaded its part of the model.
    """

    kept: KeptSetup
    on_loaded: Callable[[], None]


def run(config: Config, world: World, inspect: Inspect | None = None) -> dict[str, Any] | None:
    """Evaluate as a command does: load the model, evaluate, write the run directory.

    inspect: given, before anything is scored, digests of the model and fingerprints of the prompts; may raise UserError.
    Returns the results on rank 0, None elsewhere. Raises UserError on the rank that finds what the user must fix.
    """
    with Sampler(world.meter, world.device):
        if not world.is_leader:
            watchdog.step(watchdog.WAITING)
            if (begin := await_begin(world)) is None:
                return None
            watchdog.set_run_directory(begin.directory)
            watchdog.step("loading the model", detail=_source(config))
            with world.meter.phases("load"):
                model_config = checkpoint.load_config(config.loader_args)
            follow(world, lambda world, layout: load_replica(config, model_config, world, layout))
            return None
        watchdog.step("opening what the results are logged to")
        with Followers(world) as followers, trackers.tracking(config) as track:
            outcome = lead_run(config, world, followers, inspect)
            watchdog.step("logging the results")
            track(outcome)
            return outcome


def lead_run(
    config: Config, world: World, followers: Followers, inspect: Inspect | None = None, swept: Swept | None = None
) -> dict[str, Any]:
    """The leader's part of `run`: see what the run directory holds, then begin, or go on, unless all is done."""
    watchdog.step(f"looking into the run directory {config.output_path or ''}".rstrip())
    finished = run_directory.find_finished(config, lambda manifest: is_same_model(manifest, config.loader_args), watchdog.touch)
    if finished is not None:
        log.warning("%s holds this very run, complete: nothing is left to do (--fresh starts over)", config.output_path)
        warn_nonfinite(finished["ddp_eval"].get("not_finite", {}))
        log_irregular(finished["ddp_eval"].get("irregular", {}))
        return finished
    if not config.output_path:
        followers.begin(None)
        return _load_and_lead(config, NoDirectory(), world, followers, inspect, swept)
    lose = functools.partial(_lose_directory, Path(config.output_path), swept is not None)
    directory = run_directory.open_directory(config, lose, watchdog.touch)
    watchdog.set_run_directory(directory.path)
    watchdog.on_exit(directory.close)
    with contextlib.closing(directory):
        followers.begin(directory.path)
        return _load_and_lead(config, directory, world, followers, inspect, swept)


def _lose_directory(path: Path, is_swept: bool) -> None:
    """From the thread that keeps the lock: the run directory is no longer ours to write to.

    A sweep ends this model's run, at its next look, and goes on; unless SLURM has started it again elsewhere.
    """
    watchdog.set_run_directory(None, resumes=is_swept)
    if is_swept and not lock.gave_way_to_restart(path / lock.LOCK):
        return
    store.report_once(f"{run_directory.lost_sentence(path)}: this one ends; start it again")
    watchdog.leave(2, status.FAILED, "")


def _load_and_lead(
    config: Config, directory: Directory, world: World, followers: Followers, inspect: Inspect | None, swept: Swept | None
) -> dict[str, Any]:
    """Weights load in a thread of their own while lm_eval builds the prompts."""
    source = _source(config)
    watchdog.step("reading the model's config and tokenizer", detail=source)
    with world.meter.phases("load"):
        model_config = checkpoint.load_config(config.loader_args)
        limits.check_window(config.loader_args, model_config)
        layout, why = choose_layout(config, model_config, world, directory.layout)
        tokenizer = checkpoint.load_tokenizer(config.loader_args)
    before = look_at_model(config.loader_args)
    followers.load(layout, is_probe=swept is not None)

    def load() -> Replica:
        laid_out = lay_out(world, layout)
        with world.meter.background("load"):
            if swept is None:
                return Replica(laid_out, layout, load_replica(config, model_config, laid_out, layout), why)
            engine = load_on_all(laid_out, layout, functools.partial(load_replica, config, model_config), followers.lose)
            swept.on_loaded()
            return Replica(laid_out, layout, engine, why)

    def digests() -> dict[str, Any]:
        return describe_steady_model(config.loader_args, getattr(model_config, "_commit_hash", None), before)

    replica = PendingReplica(load, digests, source)
    try:
        # lm_eval's imports come first: two threads that import the same packages can meet half-made modules.
        with world.meter.phases("start"):
            from ddp_eval.tasks import harness  # noqa: F401

        loader = replica.start()
    except Exception as error:
        if swept is not None:  # the other ranks load already, and report
            load_on_all(lay_out(world, layout), layout, functools.partial(_fail, error), followers.lose)
        raise
    try:
        if brings_code(config, model_config):  # which may draw from, or seed, what prompts are drawn from
            watchdog.step("loading the model", detail=source)
            loader.join()
        watchdog.step("building the prompts")
        encoder, kept = make_encoder(config, model_config, tokenizer), swept.kept if swept is not None else None
        return lead(Job(config, followers, directory, model_config, encoder, replica, inspect, kept))
    finally:
        if swept is not None:
            loader.join()  # the other ranks load, too, and report
            replica.release()


def _fail(error: Exception, *_: object) -> NoReturn:
    raise error


def _source(config: Config) -> str:
    """Where the model comes from, for those who wait for it."""
    name = str(config.model_args.get("pretrained") or "")
    return name if not name or name == "demo" or os.path.isabs(name) else hub.describe_source(name)
