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

from ddp_eval import cli, contagion, distributed
from ddp_eval.chatter import less_chatter, one_rank_speaks
from ddp_eval.choice import choose_layout
from ddp_eval.engines import checkpoint
from ddp_eval.engines.load import lay_out, load_replica
from ddp_eval.errors import UserError
from ddp_eval.execution import fill_slots, fill_texts, run_plan
from ddp_eval.generation import Prompts
from ddp_eval.harness import Answers, _LeaderLM, max_length_of
from ddp_eval.manifest import model_info
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
    """

    def __init__(self, device: str | None = None, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        config, notes = cli.config_of_model(arguments, device=device, **options)
        borrowed = dist.is_available() and dist.is_initialized()
        if borrowed:
            world = distributed.adopt_group(distributed.choose_device(device, distributed.launch_local_rank()))
        else:
            world = distributed.join_group(device, config.timeout)
        self._world, self._borrowed, self._followers = world, borrowed, Followers(world, stays=True)
        model_args = config.loader_args
        self._quiet = contextlib.ExitStack()
        try:
            if not world.is_leader:
                with one_rank_speaks(False):
                    follow(world, lambda world, layout: load_replica(config, checkpoint.load_config(model_args), world, layout))
                raise Served(0)
            for note in notes:
                log.warning("%s", note)
            self._settings = config
            with one_rank_speaks(True):
                self._load(model_args)
            self._quiet.enter_context(less_chatter())
        except BaseException as error:
            self._leave(error)
            raise
        atexit.register(self.close)

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
        self._followers.load(layout)
        laid_out = lay_out(world, layout)
        self._seated = Seated(laid_out, layout, load_replica(config, model_config, laid_out, layout), why)
        super().__init__(encoder, model_config, self._run, lambda scores, texts: None, None, config, Phases())

    def close(self) -> None:
        """Let the other ranks go. The model answers no more."""
        atexit.unregister(self.close)
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        followers, self._followers = self._followers, None  # type: ignore[assignment]
        if followers is None:
            return
        self._quiet.close()
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
        return model_info(self._settings, self.config, self._seated.engine.describe())

    def _answer_all(self, requests: list[Instance]) -> dict[int, Any]:
        """lm_eval gives all requests of a kind at once, those to be repeated as often as they are."""
        if self._followers is None:
            raise UserError("the model is closed")
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
