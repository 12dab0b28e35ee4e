"""`ddp_eval.evaluate`: the evaluation of a loaded model, called on every rank of a training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddp_eval import layout as layouts
from ddp_eval.cli import flags
from ddp_eval.config import TRACKER_FLAGS, Config
from ddp_eval.distributed import sharding, watchdog
from ddp_eval.distributed.messages import Followers
from ddp_eval.distributed.world import World, adopt_group, name_some, ranks_of_group, release_group, warn_of_no_group
from ddp_eval.engines.hf import adapters, checkpoint
from ddp_eval.engines.hf.draws import loading_for
from ddp_eval.engines.hf.load import wrap_model
from ddp_eval.engines.hf.wrappers import uncompiled
from ddp_eval.errors import UserError
from ddp_eval.output import write
from ddp_eval.output.directory import NoDirectory
from ddp_eval.run.follower import follow
from ddp_eval.run.leader import Job, lead, make_encoder
from ddp_eval.run.manifest import (
    describe_loaded_model,
)
from ddp_eval.run.replica import LoadedReplica, Replica
from ddp_eval.telemetry.sampler import Sampler

if TYPE_CHECKING:
    from ddp_eval.tasks.kept_setup import KeptSetup

log = logging.getLogger("ddp_eval")


def evaluate(model: Any, tokenizer: Any, tasks: list[Any] | str, *, group: Any = None, **options: Any) -> dict[str, Any] | None:
    """Evaluate a loaded model on lm_eval tasks, on all ranks of the process group that the caller is in (or on none).

    Every rank calls it with its own copy of the model (plain, DDP-wrapped or compiled), or with its part of a model that torch's
    `fully_shard` (FSDP2) has spread over ranks. The model's training flags, gradients, the random state and the process group
    are left as they were, and a sharded model is sharded.

    model:      a transformers model, causal or an encoder-decoder, on this rank's device.
    tokenizer:  its tokenizer; only rank 0 uses it.
    tasks:      lm_eval task names or task configs.
    group:      a process group or device mesh whose ranks take part; all ranks if not given. Rank 0 is then its first.
    options:    fields of `Config` that are not about loading a model or resuming: num_fewshot, limit, output_path, include_path,
                model_args={"max_length": …}, … They are the command's flags, and errors call them so. log_samples=True puts
                the samples into the result, too.

    Returns lm_eval's result dict on rank 0, None on the others. Raises UserError on every rank when it cannot be done.
    """
    return _evaluate(model, tokenizer, tasks, group, options, None)


class Evaluator:
    """`evaluate`, again and again: prompts, token ids and plans are made at the first call and used at all others.

        evaluator = ddp_eval.Evaluator(tokenizer, ["hellaswag"], limit=500)
        for step, batch in enumerate(batches):
            …
            if step % 1000 == 0:
                results = evaluator.evaluate(model)

    Each call gives what `ddp_eval.evaluate` would, to the bit. Rank 0 keeps all prompts in memory while the object lives.
    Whatever prompts depend on may change between calls (files of tasks, the tokenizer, the model's window): they are built anew.

    tokenizer, tasks, group, options: as for `evaluate`. Raises UserError for options that cannot be meant; tasks are looked up
    at the first call.
    """

    def __init__(self, tokenizer: Any, tasks: list[Any] | str, *, group: Any = None, **options: Any) -> None:
        _settings_of(tasks, options)
        self._tokenizer, self._tasks, self._group, self._options = tokenizer, tasks, group, options
        self._kept: KeptSetup | None = None

    def evaluate(self, model: Any, **options: Any) -> dict[str, Any] | None:
        """On every rank, as `ddp_eval.evaluate`. options: for this call, such as output_path; they go before the object's."""
        return _evaluate(model, self._tokenizer, self._tasks, self._group, {**self._options, **options}, self._setup)

    def _setup(self) -> KeptSetup:
        from ddp_eval.tasks.kept_setup import KeptSetup  # with lm_eval, which only rank 0 pays for

        self._kept = self._kept or KeptSetup()
        return self._kept


def _evaluate(
    model: Any,
    tokenizer: Any,
    tasks: list[Any] | str,
    group: Any,
    options: dict[str, Any],
    kept: Callable[[], KeptSetup] | None,
) -> dict[str, Any] | None:
    config, notes = _settings_of(tasks, options)
    bare, root = _unwrap(model)
    warn_of_no_group(config.output_path)
    with _garbage_collected():
        return _evaluate_together(bare, root, tokenizer, config, notes, group, kept)


def _settings_of(tasks: list[Any] | str, options: dict[str, Any]) -> tuple[Config, list[str]]:
    """The settings that a caller gave, and what is to be said of them. Raises UserError for those that cannot be meant."""
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    settings, notes = flags.read_options(options)
    return config_from_options(names, **settings), notes


def _evaluate_together(
    model: Any, root: Any, tokenizer: Any, config: Config, notes: list[str], group: Any, kept: Callable[[], KeptSetup] | None
) -> dict[str, Any] | None:
    """`evaluate` by settings that hold. model, root: as `_unwrap` returns them."""
    world = _join(model, root, config, group)
    try:
        with (
            _evaluating(model),
            uncompiled(root),
            loading_for(config.seed, world.is_leader),
            contextlib.closing(wrap_model(model, world, root)) as engine,
            Sampler(world.meter, world.device),
            watchdog.speaking("the other ranks" if world.is_leader else "rank 0", world.rank < 2),
        ):
            if not world.is_leader:
                follow(world, lambda world, layout: engine)
                return None
            for note in notes:
                log.warning("%s", note)
            with Followers(world) as followers:
                watchdog.step("preparing the output directory")
                _prepare_output(config)
                followers.load(layouts.WHOLE_COPIES)
                replica = LoadedReplica(Replica(world, layouts.WHOLE_COPIES, engine), lambda: describe_loaded_model(model))
                watchdog.step("building the prompts")
                encoder, setup = make_encoder(config, model.config, tokenizer), kept() if kept is not None else None
                return lead(Job(config, followers, NoDirectory(), model.config, encoder, replica, kept=setup))
    finally:
        release_group(world)


def _join(model: Any, root: Any, config: Config, group: Any) -> World:
    """The ranks that take part. Raises UserError where some of those that share the model's weights do not.

    model, root: as `_unwrap` returns them.
    """
    call = _describe_call(model, config)
    ranks = ranks_of_group(group) if group is not None else ()
    if not sharding.is_sharded(model):
        return adopt_group(next(model.parameters()).device, "ddp_eval.evaluate", call, ranks)
    sharers = sharding.shard_ranks(root)
    if group is not None and (absent := sorted(set(sharers) - set(ranks))):
        raise UserError(
            f"the model is sharded over {name_some(sharers)}, of which {name_some(absent)} are not in the group that evaluate "
            "was given: all of them must take part"
        )
    world = adopt_group(sharding.device_of(root), "ddp_eval.evaluate", call, ranks)
    if world.is_leader and (dtype := sharding.compute_dtype(root)) != model.dtype:
        log.warning("the model's mixed-precision policy computes in %s: so do the scores", dtype)
    return dataclasses.replace(world, ranks_per_shard=len(sharers))


def _describe_call(model: Any, config: Config) -> dict[str, str]:
    """What all ranks must give alike to `evaluate`, as texts. Where results go is rank 0's own matter."""

    def name_of(task: Any) -> str:
        if isinstance(task, (str, Path)):
            return str(task)
        return str(task.get("task") if isinstance(task, dict) else getattr(task, "task_name", type(task).__name__))

    own = ("tasks", "output_path", "overwrite", "include_path", "log_samples", "write_out", "cache_requests")
    options = {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config) if field.name not in own}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": f"{sharding.class_name(model)} with {parameters:,} parameters in {getattr(model, 'dtype', 'no one type')}",
        "tasks": ", ".join(map(name_of, config.tasks)),
        **options,
    }


def _prepare_output(config: Config) -> None:
    if config.output_path:
        write.prepare_directory(config.output_path, config.overwrite)


def _unwrap(model: Any) -> tuple[Any, Any]:
    """The transformers model inside DDP, torch.compile or PEFT wrappers, and its root: the outermost module that is sharded.

    The root is the model itself where nothing around it is sharded. Raises UserError for what cannot be evaluated.
    """
    root = None
    while True:
        root = model if root is None and sharding.is_fsdp_module(model) else root
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        elif sharding.own_class(model).__module__.startswith("peft."):
            model = adapters.unwrap(model)
        else:
            break
    root = model if root is None else root
    sharding.check_kind(root)
    if sharding.is_sharded(root) and checkpoint.is_seq2seq({}, model.config):
        raise UserError("evaluate does not serve encoder-decoders that fully_shard has sharded: pass a whole copy on every rank")
    return model, root


@contextlib.contextmanager
def _garbage_collected() -> Iterator[None]:
    """At the end free what was made meanwhile: lm_eval's tasks refer to each other in circles, and a training loop comes again.

    A caller has millions of objects; only the new ones are looked through, which takes a hundredth of the time.
    """
    is_frozen = gc.get_freeze_count() > 0  # by the caller, whose objects `unfreeze` would not tell from ours
    if not is_frozen:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not is_frozen:
            gc.unfreeze()


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode; at the end put back every module's training flag and the random state of Python, numpy and torch."""
    training = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for module, flag in training:
                module.training = flag


def config_from_options(tasks: list[Any], **options: Any) -> Config:
    """A Config from the options that a caller of `evaluate` gave. Raises UserError for one that does not exist there."""
    known = [field.name for field in dataclasses.fields(Config) if field.name not in {"tasks", *_OF_COMMANDS}]
    for name in options:
        if name in _OF_COMMANDS:
            raise UserError(f"evaluate takes no option {name}, which is for the command: the model is loaded, the ranks have met")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"evaluate takes no option {name}: {hint}")
    from ddp_eval.cli import flags  # which knows Config

    return Config(tasks=tasks, **flags.convert_options(options))


# Of no use to a caller of the API, who has a loaded model and a process of his own.
_OF_COMMANDS = (
    "model", "device", "fresh", "show_config", "trust_remote_code", "layout", "load", "preflight", "timeout", *TRACKER_FLAGS,
)  # fmt: skip
