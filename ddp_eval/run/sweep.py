"""Many models in one launch: each as a run of its own in a directory of its own, with the set-up made once.

rank 0                                              ranks 1 … N-1
  look which models there are                         wait
  next model: ────────────────────────────────────────► its flags
  a run as in runner.py, but that all ranks agree on what fails; the model after it is read into the page cache meanwhile
  sweep.json                                          wait
  no more models ─────────────────────────────────────► leave
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ddp_eval import demo
from ddp_eval.config import Config
from ddp_eval.distributed import collectives, watchdog
from ddp_eval.distributed.messages import Aborted, Followers, LeaderFailed, NextModel, await_begin, next_model
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import model_files
from ddp_eval.errors import UserError, describe
from ddp_eval.layout import Layout
from ddp_eval.output import directory as run_directory
from ddp_eval.output import status, sweep_file, write
from ddp_eval.output.directory import AtWork, Lost, already_replaced_by_this_launch
from ddp_eval.output.sweep_file import DONE, FAILED, GONE, WAITING
from ddp_eval.run.follower import follow, load_anew
from ddp_eval.run.manifest import look_at_model, own_commit
from ddp_eval.run.runner import Swept, lead_run
from ddp_eval.run.sweep_models import SweptModel, is_missing, is_removed, list_models
from ddp_eval.run.sweep_options import SweepOptions
from ddp_eval.run.sweep_states import REMOVED, SweepStates, entry_of, summarize
from ddp_eval.run.sweep_watch import Watcher
from ddp_eval.system.read_ahead import ReadAhead
from ddp_eval.system.whole_files import why_broken
from ddp_eval.tasks import trackers
from ddp_eval.telemetry.sampler import Sampler

if TYPE_CHECKING:
    from ddp_eval.engines import Engine

log = logging.getLogger("ddp_eval")

Show = Callable[[Config, dict[str, Any]], None]


class SweepEnd(NamedTuple):
    """entries: of sweep.json, of the models of this launch. held: names of those that are left to another launch, at work now.
    is_written: whether sweep.json says so, too."""

    entries: list[dict[str, Any]]
    held: list[str]
    is_written: bool

    def count(self, state: str) -> int:
        return sum(one["state"] == state for one in self.entries)

    def describe(self) -> str:
        return summarize([one["state"] for one in self.entries], len(self.held))


def run_sweep(config: Config, options: SweepOptions, world: World, show: Show) -> SweepEnd | None:
    """Evaluate all models that `options` name, each with the settings of `config`.

    show: called on rank 0 with each model's settings and results. Returns how they stand on rank 0, None elsewhere.
    Raises UserError where there is nothing to evaluate, and LostContact where a failure cannot be agreed on.
    """
    world = dataclasses.replace(world, goes_on=True)
    if not world.is_leader:
        _follow_sweep(world)
        return None
    return _Sweep(config, options, world, show).lead()


def _follow_sweep(world: World) -> None:
    """Every other rank's part."""
    ahead = ReadAhead()
    watchdog.step(watchdog.WAITING)
    while (message := next_model(world)) is not None:
        if message.config is None:
            continue
        # The leader goes on to another model, and this rank knows it.
        with contextlib.suppress(Aborted, LeaderFailed, collectives.FailedTogether):
            _follow_one(message.config, message.ahead, world, ahead)
        _leave_nothing(world)
        gc.collect()
        watchdog.step(watchdog.WAITING)
    ahead.stop()


def _follow_one(config: Config, next_files: tuple[Path, ...], world: World, ahead: ReadAhead) -> None:
    with Sampler(world.meter, world.device):
        if (begin := await_begin(world)) is None:
            return
        watchdog.set_run_directory(begin.directory)

        def load(world: World, layout: Layout) -> Engine:
            ahead.stop()
            engine = load_anew(config, world, layout)
            if world.local_rank == 0:
                ahead.start(next_files)
            return engine

        follow(world, load)


def _leave_nothing(world: World) -> None:
    """Of the model that was evaluated last, or failed."""
    world.meter.reset()
    watchdog.on_exit(lambda: None)
    watchdog.set_run_directory(None, resumes=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Sweep:
    """The leader's part."""

    def __init__(self, config: Config, options: SweepOptions, world: World, show: Show) -> None:
        from ddp_eval.tasks.kept_setup import KeptSetup

        self._config, self._options, self._world, self._show = config, options, world, show
        self._directory = write.make_directory(options.output_path)
        self._kept, self._ahead = KeptSetup(), ReadAhead()
        self._states = SweepStates(self._directory, options)
        self._watcher = Watcher(options)
        earlier = self._states.read()
        self._failed_before = {name for name, one in earlier.items() if one["state"] == FAILED}  # the last to be tried again
        self._is_frozen = False

    def lead(self) -> SweepEnd:
        watchdog.set_run_directory(None, resumes=True)
        watchdog.step("opening what the results are logged to")
        with trackers.tracking(self._config) as self._track:
            return self._lead()

    def _lead(self) -> SweepEnd:
        models = self._list()
        if not models and not self._options.watch:
            raise UserError(f"there is no model that --models {','.join(self._options.models)} names")
        self._refuse_at_once(models)
        if self._options.watch:
            self._say_what_is_watched(bool(models))
        while True:
            settled = self._states.settled
            self._watcher.look([one for one in models if settled.get(one.name) != DONE], settled)
            self._write(models)
            if self._watcher.is_over(self._states.count_settled(self._is_to_stay)):
                break
            if ready := sorted(self._watcher.ready, key=lambda one: one.name in self._failed_before):
                self._evaluate(ready[0], ready[1] if len(ready) > 1 else None)
            elif self._options.watch or self._watcher.tries_again():
                self._watcher.wait(self._keep_in_touch)
            else:
                break
            models = self._list()
        entries = self._write(models)
        if self._states.has_news:
            entries = self._write(models)
        collectives.send_message(self._world, None)
        self._ahead.stop()
        names = {*self._states.own, *(one.name for one in models)}
        held = self._states.held_by_others(self._is_to_stay) if self._watcher.wants_all else []
        end = SweepEnd([one for one in entries if one["name"] in names], held, not self._states.has_news)
        log.warning("the sweep is over: %s", end.describe())  # slurm/eval.sh reads it
        if not end.is_written:
            log.warning("%s lacks what this launch did last: the same command adds it", self._directory / sweep_file.SWEEP)
        return end

    def _refuse_at_once(self, models: list[SweptModel]) -> None:
        """Raise UserError for what every model would fail of: tasks that there are not, a directory of runs with other flags."""
        from ddp_eval.tasks import select

        own_commit()
        watchdog.step("looking for the tasks")
        manager = select.make_task_manager(self._config, [demo.TASKS_PATH])
        select.resolve_tasks(manager, self._config.tasks)
        finished = next((one for one in models if os.path.isfile(self._directory / one.name / write.MANIFEST)), None)
        if finished is not None:
            with contextlib.suppress(AtWork):
                run_directory.find_finished(config_of(self._config, finished), lambda manifest: True)

    def _say_what_is_watched(self, finds_any: bool) -> None:
        options = self._options
        names = ",".join(options.models)
        found = "" if finds_any else ", of which there is none yet"
        log.warning("watching %s%s: looks every %g s, %s", names, found, options.every_s, options.until.describe())

    def _list(self) -> list[SweptModel]:
        self._watcher.look_for_end()
        entries = self._states.read().values()
        return list_models(self._options, {(one["model"] or "", one["revision"]): one["name"] for one in entries})

    def _is_to_stay(self, name: str) -> bool:
        """Whether a finished run is not one that --fresh or --overwrite is to replace."""
        replaces = self._config.fresh or self._config.overwrite
        return not replaces or already_replaced_by_this_launch(self._directory / name)

    def _keep_in_touch(self) -> None:
        """The other ranks' time-outs begin anew."""
        watchdog.touch()
        collectives.send_message(self._world, NextModel(None))

    def _write(self, models: list[SweptModel]) -> list[dict[str, Any]]:
        return self._states.write(models, self._watcher.reasons)

    def _evaluate(self, model: SweptModel, following: SweptModel | None) -> None:
        """One model, whatever comes of it. Raises what no other model could be evaluated after."""
        log.warning("%s: %s", model.name, model.model + (f" at {model.revision}" if model.revision else ""))
        began, was_there = time.monotonic(), model.is_local
        followers = Followers(self._world, stays=True)
        try:
            config = config_of(self._config, model)
            _refuse_broken(config, model)
            results, logged = self._run(model, config, self._files_of(following), followers)
            seconds = round(time.monotonic() - began, 3) if _is_new(results) else None
            found = entry_of(model, DONE, seconds=seconds, logged=logged)
            with contextlib.suppress(BrokenPipeError):  # whoever read it has gone
                self._show(config, results)
        except AtWork as error:
            found = self._leave_alone(model, error)
        except Exception as error:
            found = self._fail(model, error, was_there, time.monotonic() - began, followers)
        self._states.note(found)
        self._tidy()

    def _leave_alone(self, model: SweptModel, why: AtWork) -> dict[str, Any]:
        """A model that another launch is at, or whose directory this one has lost: it is looked at again later."""
        if isinstance(why, Lost) or model.name not in self._states.own:
            log.warning("%s is left alone for now: %s", model.name, why)
        self._watcher.leave_alone(model)
        return entry_of(model, WAITING, str(why))

    def _fail(self, model: SweptModel, error: Exception, was_there: bool, seconds: float, followers: Followers) -> dict[str, Any]:
        """The entry of a model that failed. Raises the error where no other model could be evaluated after it."""
        found = entry_of(model, FAILED, describe(error), round(seconds, 3))
        status.note_end(self._directory / model.name, status.FAILED, str(error), first_hand=False)
        if isinstance(error, collectives.LostContact) or not followers.listening:
            self._states.note(found)
            self._write(self._list())
            raise error
        if (was_there and is_missing(model.model)) or is_removed(self._options, model.model):
            watchdog.say(f"{model.name} is gone: {REMOVED}")
            return found | {"state": GONE, "reason": REMOVED}
        if not isinstance(error, UserError):
            log.error("%s failed", model.name, exc_info=error)
        watchdog.say(f"{model.name} failed: {found['reason']}")
        return found

    def _run(
        self, model: SweptModel, config: Config, next_files: tuple[Path, ...], followers: Followers
    ) -> tuple[dict[str, Any], list[str]]:
        """The results, and the marks of the trackers that have them. What was found complete is logged where it is not yet."""
        world = self._world
        world.meter.reset()
        self._ahead.stop()
        collectives.send_message(world, NextModel(config, next_files))
        with Sampler(world.meter, world.device), followers:
            swept = Swept(self._kept, lambda: self._ahead.start(next_files))
            results = lead_run(config, world, followers, None, swept)
            watchdog.step("logging the results")
            before = {} if _is_new(results) else self._states.read().get(model.name, {})
            return results, self._track(results, model.step, before.get("logged", ()))

    def _files_of(self, model: SweptModel | None) -> tuple[Path, ...]:
        """What loading it will read, as far as it is on this machine."""
        if model is None:
            return ()
        with contextlib.suppress(UserError):
            looks = look_at_model(config_of(self._config, model).loader_args)
            return tuple(Path(path) for path in looks or () if model_files.is_loaded(path))
        return ()

    def _tidy(self) -> None:
        """Nothing is left of a model. What is kept of the set-up, millions of objects, is not looked through again each time."""
        _leave_nothing(self._world)
        if self._kept.is_new:
            gc.unfreeze()
            self._is_frozen = False
        gc.collect()
        if not self._is_frozen:
            gc.freeze()
            self._is_frozen = True


def _is_new(results: dict[str, Any]) -> bool:
    """Whether a run has just come to them, and they were not found complete."""
    return "telemetry" in results["ddp_eval"]


def _refuse_broken(config: Config, model: SweptModel) -> None:
    """Raise UserError for files that no rank could load, before any tries: ranks that share a model fail there one by one."""
    if model.is_local and not config.model_args.get("subfolder"):
        why = why_broken(os.path.expanduser(model.model))
        if why is not None:
            raise UserError(f"the checkpoint {model.model} is broken: {why}")


def config_of(config: Config, model: SweptModel) -> Config:
    """The settings of a run of its own. With `pretrained` in those of the sweep, its models are adapters."""
    kind = "peft" if "pretrained" in config.model_args else "pretrained"
    model_args = {**config.model_args, kind: model.model}
    if model.revision is not None:
        model_args["revision"] = model.revision
    return dataclasses.replace(config, model_args=model_args, output_path=os.path.join(str(config.output_path), model.name))
