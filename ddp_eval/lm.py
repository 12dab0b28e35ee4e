"""`ddp_eval` as a model of lm_eval, for Python programs under torchrun: lm_eval leads, all ranks compute.

    from ddp_eval.lm import launch

    lm = launch(pretrained="…", dtype="bfloat16")     # on every rank; rank 0 gets an LM, the others work until it is closed: None
    if lm is not None:
        with lm:
            results = lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

Once this module is imported, `lm_eval.simple_evaluate(model="ddp_eval", model_args="pretrained=…", …)` does the same: ranks other
than 0 end, with exit code 0, when rank 0 does. lm_eval asks for one kind of request at a time, so each kind has a plan of its
own; there is no run directory, no journal, and no watch over ranks that hang.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import configure_pad_token

from ddp_eval import layout as layouts
from ddp_eval.cli import flags as cli
from ddp_eval.config import Config
from ddp_eval.distributed import launch_environment, watchdog
from ddp_eval.distributed.messages import Followers
from ddp_eval.distributed.world import (
    adopt_group,
    check_in,
    choose_device,
    has_group,
    join_group,
    leave_group,
    occupy,
    release_group,
)
from ddp_eval.engines.hf import checkpoint, limits
from ddp_eval.errors import UserError
from ddp_eval.output import tables
from ddp_eval.output.directory import NoDirectory
from ddp_eval.placement.choose import choose_layout
from ddp_eval.placement.load import lay_out, load_replica
from ddp_eval.run.follower import follow
from ddp_eval.run.leader import Job, answer, make_encoder
from ddp_eval.run.manifest import model_info
from ddp_eval.run.record import NoFacts
from ddp_eval.run.replica import LoadedReplica, Replica
from ddp_eval.run.resume import warn_nonfinite
from ddp_eval.system.quiet import only_rank_zero_logs, quiet_libraries
from ddp_eval.tasks.collector import RequestCollector
from ddp_eval.tasks.hflm_members import HFLMMembers
from ddp_eval.tasks.request_types import Answers, Asked, sum_by_owner
from ddp_eval.telemetry.meter import Phases

log = logging.getLogger("ddp_eval")

_OPTIONS = ("layout", "load", "numerics", "packing", "max_pack_tokens", "seed", "timeout")  # of Config


_NO_TASK = "without a name"  # of requests that belong to no task, in messages
# Why the other ranks can do nothing else.
_OPEN = "a model of ddp_eval.lm.launch is still open, and the other ranks serve it: close it first, as a with block does"
_OPEN_BY_NAME = (
    'the other ranks serve the model that lm_eval opened by its name "ddp_eval", until this program ends: open it with '
    "ddp_eval.lm.launch instead, and close it before anything else that all ranks take part in"
)
_ENDED = (
    'the other ranks have ended, as they do when a model that lm_eval opened by its name "ddp_eval" is closed: open it with '
    "ddp_eval.lm.launch instead, which lets them go on"
)
_open_model: DDPEvalLM | None = None  # on rank 0 of several


class WorkerExit(SystemExit):
    """On a rank other than 0: it has done its part, and rank 0 has closed the model."""


def launch(**arguments: Any) -> DDPEvalLM | None:
    """On every rank: an LM for lm_eval on rank 0; None on the others, once rank 0 has closed it.

    arguments: as in --model_args, and of the command's flags device, layout, load, numerics, packing, max_pack_tokens, seed and
    timeout. A chat template of the tokenizer's is named in chat_template_args={"chat_template": NAME}.
    Raises UserError on every rank for what cannot be done.
    """
    try:
        return DDPEvalLM(**arguments)
    except WorkerExit:
        return None


@register_model("ddp_eval")
class DDPEvalLM(HFLMMembers, RequestCollector):
    """A model whose requests all ranks of torchrun answer. To be closed, by `close`, a with block, or the end of the program.

    It has the members of lm_eval's HFLM (hflm_members.py), and answers requests that lm_eval or anybody else has made, in any
    order of calls. Arguments as of `launch`. On ranks other than 0 the constructor serves until the model is closed, and raises
    WorkerExit.
    by_name: it is lm_eval that opens it and nobody closes it: another one, opened later, takes its place on all ranks.
    """

    def __init__(self, device: str | None = None, by_name: bool = False, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        if options.get("layout") == layouts.MEASURE:
            raise UserError("--layout measure is for the command, which knows all of the work: name a layout")
        self._given = dict(arguments)
        config, notes = cli.config_of_model(arguments, device=device, **options)
        self._by_name, self._load_sent = by_name, False
        self._anew = config if self._take_over(device) else None
        if self._anew is None:
            self._join(device, config)
        world = self._world
        model_args = config.loader_args
        self._quiet = contextlib.ExitStack()
        try:
            if not world.is_leader:
                with only_rank_zero_logs(False), watchdog.speaking("rank 0, which has the model open", world.rank == 1):
                    follow(world, lambda world, layout: load_replica(config, checkpoint.load_config(model_args), world, layout))
                raise WorkerExit(0)
            for note in notes:
                log.warning("%s", note)
            self._settings = config
            with only_rank_zero_logs(True), watchdog.speaking():
                watchdog.step("loading the model")
                self._load(model_args)
            self._quiet.enter_context(quiet_libraries())
        except BaseException as error:
            if self._anew is not None and not self._load_sent:  # the other ranks know nothing of it: the next model may be right
                self._keep_open()
            else:
                self._leave(error)
            raise
        self._keep_open()

    def _keep_open(self) -> None:
        global _open_model
        if self._world.world_size > 1:
            _open_model = self
            occupy(_OPEN_BY_NAME if self._by_name else _OPEN)
        atexit.register(self.close)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DDPEvalLM:
        """As lm_eval opens a model that is given by name."""
        return super().create_from_arg_string(arg_string, {**(additional_config or {}), "by_name": True})

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> DDPEvalLM:
        """The same for arguments in a mapping."""
        return super().create_from_arg_obj(arg_dict, {**(additional_config or {}), "by_name": True})

    def _join(self, device: str | None, config: Config) -> None:
        """Meet the other ranks, all of which open the same model."""
        caller = 'lm_eval.simple_evaluate(model="ddp_eval")' if self._by_name else "ddp_eval.lm.launch"
        call = {name: repr(getattr(config, name)) for name in ("loader_args", "layout", "load", "device")}
        borrowed = has_group()
        if borrowed:
            world = adopt_group(choose_device(device, launch_environment.launch_local_rank()), caller, call)
        else:
            world = join_group(device, config.timeout)
        self._world, self._borrowed, self._followers = world, borrowed, Followers(world, stays=True)
        try:
            if not borrowed:
                check_in(world.rank, world.world_size, caller, call)
        except UserError:  # on all ranks
            leave_group(world)
            raise

    def _take_over(self, device: str | None) -> bool:
        """Take the other ranks over from a model that lm_eval has opened by name before, and left open. Closes that one."""
        before = _open_model
        if before is None or not before._by_name:
            return False
        chosen = choose_device(device, before._world.local_rank)
        if chosen.type != before._world.device.type:
            raise UserError(
                f"all models that lm_eval opens by name run on the first one's device, {before._world.device.type}, got {device}"
            )
        self._world, self._borrowed, self._followers = before._world, before._borrowed, before._followers
        self._by_name = True
        before._followers = None  # type: ignore[assignment]
        before._quiet.close()
        with contextlib.suppress(AttributeError):  # one that failed to load
            del before._replica, before._job  # its memory
        atexit.unregister(before.close)
        return True

    def _load(self, model_args: dict[str, Any]) -> None:
        config, world = self._settings, self._world
        model_config = checkpoint.load_config(model_args)
        limits.check_window(model_args, model_config)
        layout, why = choose_layout(config, model_config, world)
        tokenizer = checkpoint.load_tokenizer(model_args)
        configure_pad_token(tokenizer, model_config=model_config)
        encoder = make_encoder(config, model_config, tokenizer)
        self._load_sent = True
        self._followers.load(layout, config=self._anew)
        laid_out = lay_out(world, layout)
        self._replica = Replica(laid_out, layout, load_replica(config, model_config, laid_out, layout), why)
        self._replica.log_choice()
        replica = LoadedReplica(self._replica, dict)  # whose files nobody asks for
        self._job = Job(config, self._followers, NoDirectory(), model_config, encoder, replica)
        super().__init__(encoder, model_config, self._run, config, Phases())
        self._keep_members(config, model_config, laid_out.device, self._given)

    def close(self) -> None:
        """Let the other ranks go. The model answers no more."""
        atexit.unregister(self.close)
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        global _open_model
        followers, self._followers = self._followers, None  # type: ignore[assignment]
        if followers is None:
            return
        self._quiet.close()
        if _open_model is not None:
            _open_model = None
            occupy(_ENDED if self._by_name else None)
        if self._world.is_leader:
            with watchdog.speaking():
                watchdog.step(watchdog.WAITING)
                followers.__exit__(type(error), error, None)
        if self._borrowed:
            release_group(self._world)
        else:
            leave_group(self._world)

    def __enter__(self) -> DDPEvalLM:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval adds to results["config"]."""
        return model_info(self._settings, self.config, self._replica.engine.describe())

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self._settings.model_args.get("enable_thinking"):
            raise UserError("enable_thinking=True is for tasks that generate text, and these are of the type loglikelihood")
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As HFLM's: of (anything, ids of the context, ids of the continuation), the latter's log-probability."""
        self._check_open()
        encoded = self.encoder.collect((context, continuation) for _, context, continuation in requests)
        if not len(encoded.requests):
            return [(-np.inf, False) for _ in requests]
        with watchdog.speaking():
            answers = self._run(Asked(encoded.requests))
        scored = sum_by_owner(encoded, answers.results, len(requests))
        found = [(float(total), bool(flag)) for total, flag in zip(scored.logprobs, scored.greedy, strict=True)]
        for index in encoded.empty:  # nothing to predict never wins
            found[index] = (-np.inf, False)
        return found

    def _answer_each(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """An answer for every place in the list: a request that stands there twice is asked twice.

        Of a request only `args` must be there. lm_eval gives all of a kind at once, repeats as often as they are to be answered.
        """
        self._check_open()
        asked = [
            Instance(
                request_type=kind,
                doc={},
                arguments=one.args,
                idx=getattr(one, "idx", None) or 0,
                metadata=(
                    getattr(one, "task_name", None) or _NO_TASK,
                    place if getattr(one, "doc_id", None) is None else one.doc_id,
                    1,
                ),
            )
            for place, one in enumerate(requests)
        ]
        if not asked:
            return []
        with watchdog.speaking():
            answers = self._score_instances(asked)
        return [answers[id(one)][0] for one in asked]

    def _check_open(self) -> None:
        if self._followers is None:
            raise UserError("the model is closed")

    def _run(self, asked: Asked) -> Answers:
        answers = answer(self._job, asked.requests, asked.prompts, NoFacts())
        warn_nonfinite(tables.find_not_finite(*asked.tables(answers)))
        return answers
