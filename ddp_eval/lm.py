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
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import configure_pad_token

from ddp_eval import cli, contagion, distributed, watch
from ddp_eval.chatter import less_chatter, one_rank_speaks
from ddp_eval.choice import choose_layout
from ddp_eval.config import Config
from ddp_eval.engines import checkpoint
from ddp_eval.engines.load import lay_out, load_replica
from ddp_eval.errors import UserError
from ddp_eval.execution import fill_slots, fill_texts, run_plan
from ddp_eval.generation import Prompts
from ddp_eval.harness import Answers, _LeaderLM, max_length_of
from ddp_eval.measuring import Seated
from ddp_eval.meter import Phases
from ddp_eval.packing import Requests
from ddp_eval.planning import make_plan
from ddp_eval.protocol import Followers
from ddp_eval.runner import follow, run_aside, trial_of
from ddp_eval.text_planning import plan_texts
from ddp_eval.tokenization import Encoder

log = logging.getLogger("ddp_eval")

_OPTIONS = ("layout", "load", "numerics", "packing", "max_pack_tokens", "seed", "timeout")  # of Config


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


class Served(SystemExit):
    """On a rank other than 0: it has done its part, and rank 0 has closed the model."""


def launch(**arguments: Any) -> DDPEvalLM | None:
    """On every rank: an LM for lm_eval on rank 0; None on the others, once rank 0 has closed it.

    arguments: as in --model_args, and of the command's flags device, layout, load, numerics, packing, max_pack_tokens, seed and
    timeout. A chat template of the tokenizer's is named in chat_template_args={"chat_template": NAME}.
    Raises UserError on every rank for what cannot be done.
    """
    try:
        return DDPEvalLM(**arguments)
    except Served:
        return None


@register_model("ddp_eval")
class DDPEvalLM(_LeaderLM):
    """A model whose requests all ranks of torchrun answer. To be closed, by `close`, a with block, or the end of the program.

    Arguments as of `launch`. On ranks other than 0 the constructor serves until the model is closed, and raises Served.
    by_name: it is lm_eval that opens it and nobody closes it: another one, opened later, takes its place on all ranks.
    """

    def __init__(self, device: str | None = None, by_name: bool = False, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
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
                speaking = watch.speaking("rank 0, which has the model open") if world.rank == 1 else contextlib.nullcontext()
                with one_rank_speaks(False), speaking:
                    follow(world, lambda world, layout: load_replica(config, checkpoint.load_config(model_args), world, layout))
                raise Served(0)
            for note in notes:
                log.warning("%s", note)
            self._settings = config
            with one_rank_speaks(True), watch.speaking():
                watch.step("loading the model")
                self._load(model_args)
            self._quiet.enter_context(less_chatter())
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
            distributed.occupy(_OPEN_BY_NAME if self._by_name else _OPEN)
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
        borrowed = dist.is_available() and dist.is_initialized()
        if borrowed:
            world = distributed.adopt_group(distributed.choose_device(device, distributed.launch_local_rank()), caller, call)
        else:
            world = distributed.join_group(device, config.timeout)
        self._world, self._borrowed, self._followers = world, borrowed, Followers(world, stays=True)
        try:
            if not borrowed:
                distributed.check_in(world.rank, world.world_size, caller, call)
        except UserError:  # on all ranks
            distributed.leave_group(world)
            raise

    def _take_over(self, device: str | None) -> bool:
        """Take the other ranks over from a model that lm_eval has opened by name before, and left open. Closes that one."""
        before = _open_model
        if before is None or not before._by_name:
            return False
        chosen = distributed.choose_device(device, before._world.local_rank)
        if chosen.type != before._world.device.type:
            raise UserError(
                f"all models that lm_eval opens by name run on the first one's device, {before._world.device.type}, got {device}"
            )
        self._world, self._borrowed, self._followers = before._world, before._borrowed, before._followers
        self._by_name = True
        before._followers = None  # type: ignore[assignment]
        before._quiet.close()
        with contextlib.suppress(AttributeError):  # one that failed to load
            del before._seated  # its memory
        atexit.unregister(before.close)
        return True

    def _load(self, model_args: dict[str, Any]) -> None:
        config, world = self._settings, self._world
        model_config = checkpoint.load_config(model_args)
        layout, why = choose_layout(config, model_config, world)
        tokenizer = checkpoint.load_tokenizer(model_args)
        configure_pad_token(tokenizer, model_config=model_config)
        try:
            encoder = Encoder(
                tokenizer,
                max_length_of(model_args, model_config, tokenizer),
                model_args.get("add_bos_token"),
                model_args.get("prefix_token_id"),
                separate=checkpoint.is_seq2seq(model_args, model_config),
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        self._load_sent = True
        self._followers.load(layout, config=self._anew)
        laid_out = lay_out(world, layout)
        self._seated = Seated(laid_out, layout, load_replica(config, model_config, laid_out, layout), why)
        super().__init__(encoder, model_config, self._run, lambda scores, texts: None, None, config, Phases())

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
            distributed.occupy(_ENDED if self._by_name else None)
        if self._world.is_leader:
            followers.__exit__(type(error), error, None)
        if self._borrowed:
            distributed.release_group(self._world)
        else:
            distributed.leave_group(self._world)

    def __enter__(self) -> DDPEvalLM:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval adds to results["config"]."""
        engine = self._seated.engine.describe()
        return {
            "model_num_parameters": engine["parameters"],
            "model_dtype": engine["dtype"],
            "model_revision": self._settings.model_args.get("revision", "main"),
            "model_sha": getattr(self.config, "_commit_hash", None) or "",
        }

    def _answer_all(self, requests: list[Instance]) -> dict[int, Any]:
        """lm_eval gives all requests of a kind at once, those to be repeated as often as they are."""
        if self._followers is None:
            raise UserError("the model is closed")
        with watch.speaking():
            return self._answer(requests)

    def _answer(self, requests: list[Instance]) -> dict[int, Any]:
        kinds = {request.request_type for request in requests} - {"generate_until"}
        if self._settings.model_args.get("enable_thinking") and kinds:
            raise UserError(f"enable_thinking=True is for tasks that generate text, and these are of the type {min(kinds)}")
        return self._score_instances(list({id(request): request for request in requests}.values()))

    def _run(self, requests: Requests, prompts: Prompts) -> Answers:
        """As `runner` does it, without a run directory."""
        config, followers, seated = self._settings, self._followers, self._seated
        alone = config.numerics == "alone"
        trial = trial_of(followers, seated)
        decision = make_plan(seated.engine, requests, config.packing, config.max_pack_tokens, alone, trial)
        why = "--numerics alone was given" if alone else None if config.packing else "--no_packing was given"
        generation = plan_texts(seated.engine, prompts, self.tokenizer.pad_token_id, why)
        if decision.why_rows and config.packing and not alone:
            log.warning("packs are off for this model: %s; running padded rows instead", decision.why_rows)
        decoder = self.tokenizer if len(prompts) else None
        trees = seated.engine.tree_attention
        with followers.working_on(decision.plan, texts=generation.plan, tokenizer=decoder, attention=trees) as work:
            gathered = run_plan(seated.world, seated.engine, work)
        sums, greedy, differing = fill_slots(gathered.rows, decision.plan.num_items)
        (sums, greedy), _ = contagion.isolate(
            (sums, greedy), requests, decision, seated.engine, lambda plan: run_aside(followers, seated, plan, "again")
        )
        texts, texts_differing = fill_texts(gathered.lengths, gathered.answers, generation.plan.num_items)
        if differing or texts_differing:
            log.warning("work that ran on two ranks differs: are the ranks' GPUs or threads not alike?")
        answers = [texts[item] for item in np.asarray(generation.item_of_prompt).tolist()]
        return sums[decision.item_of_request], greedy[decision.item_of_request], answers, generation.limits
