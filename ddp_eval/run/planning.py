"""From prompts to a plan of generation that the model at hand runs rightly: batches where it proves itself, else one by one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ddp_eval.engines import DYNAMIC_ROTARY, ROUNDING, Engine
from ddp_eval.engines.hf import limits
from ddp_eval.errors import UserError, one_line
from ddp_eval.packs.batches import Prompts, Settings, TextPlan, plan_batches
from ddp_eval.packs.cut import plan_packs
from ddp_eval.packs.pairs import plan_pairs
from ddp_eval.packs.plan import Plan
from ddp_eval.packs.requests import IntArray, Requests
from ddp_eval.packs.rows import plan_rows
from ddp_eval.packs.states import pays, plan_states
from ddp_eval.run.self_check import (
    ScorePlan,
    check_rows,
    check_states,
    choose_trees,
    in_one_sentence,
    needs_equal_lengths,
    score_alone,
    trial_requests,
)
from ddp_eval.tasks.plan_memo import PlanMemo

log = logging.getLogger("ddp_eval")


class TextDecision(NamedTuple):
    """How `prompts` are answered.

    item_of_prompt: (N,) the item that answers each prompt. why_alone: why the model's own `generate` runs, or None.
    limits: (N,) most tokens of an answer: the prompts' own, or what the checkpoint sets.
    """

    plan: TextPlan
    item_of_prompt: IntArray
    why_alone: str | None
    limits: Sequence[int]


def plan_texts(
    engine: Engine, prompts: Prompts, pad: int | None, why_alone: str | None = None, memo: PlanMemo | None = None
) -> TextDecision:
    """Cut `prompts` for `engine`.

    why_alone: what rules batches out from the start. pad: the tokenizer's padding token. memo: of plans cut before.
    Raises UserError for settings of generation that cannot be meant.
    """
    if not len(prompts):
        return TextDecision(*plan_batches(prompts, engine.generation_sizes(), ()), None, ())
    if not engine.capabilities.serves_generation:
        raise UserError(
            f"the task {prompts.tasks[0]} generates text, which the engine {engine.describe()['name']} does not serve"
        )
    memo, asked, most = memo or PlanMemo(), prompts, engine.most_new_tokens
    if most is not None:
        log.warning(
            "the model's generation_config limits answers to %d tokens, before what the tasks ask for, as with lm_eval", most
        )
        prompts = dataclasses.replace(prompts, limits=[most] * len(prompts))
    is_pair = engine.capabilities.is_encoder_decoder
    prompts = limits.shorten_answers(prompts, limits.limits_of(engine.whole, is_pair), is_pair)
    tasks = {kind: task for kind, task in reversed(list(zip(prompts.kinds, prompts.tasks, strict=True)))}
    served = [_is_served(engine, settings, pad, tasks.get(kind)) for kind, settings in enumerate(prompts.settings)]
    why = why_alone or engine.why_not_batches or _why_not_so_long(engine, prompts)
    sizes, alone = engine.generation_sizes(), tuple(bool(why) or not one for one in served)
    key = sizes, alone, tuple(prompts.limits)
    plan, item_of_prompt = memo.get("texts", asked, key, lambda: plan_batches(prompts, sizes, alone))
    if why is None and not all(served):
        odd = next(kind for kind, one in enumerate(served) if not one)
        why = f"the task {tasks.get(odd)} asks for {prompts.settings[odd].options}"
    return TextDecision(plan, item_of_prompt, why, prompts.limits)


def _why_not_so_long(engine: Engine, prompts: Prompts) -> str | None:
    """Why texts of these lengths are not decoded in batches: the model counts tokens of a forward, not positions."""
    most = engine.capabilities.max_tree_tokens
    if most is None:
        return None
    longest = max(len(tokens) + limit for tokens, limit in zip(prompts.tokens, prompts.limits, strict=True))
    if longest <= most:
        return None
    return (
        f"the model goes by a token's index in the forward from {most:,} tokens on, and a prompt with its answer has {longest:,}"
    )


def _is_served(engine: Engine, settings: Settings, pad: int | None, task: str | None) -> bool:
    try:
        return engine.check_settings(settings, pad)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the task {task} cannot generate with {dict(sorted(settings.options.items()))}: {one_line(error, 300)}"
        ) from None


def describe_texts(decision: TextDecision, prompts: Prompts) -> dict[str, Any]:
    """What the manifest says of the plan. Tokens: of all prompts, and the fewest that must be computed of them, where rows of a
    batch never repeat what they share; one by one, all of each distinct prompt.
    """
    plan = decision.plan
    alone = np.repeat(plan.slots == 0, np.diff(plan.item_starts))
    return {
        "plan_sha256": plan.digest(),
        "why_one_by_one": decision.why_alone,
        "requests": len(decision.item_of_prompt),
        "distinct_requests": plan.num_items,
        "batches": plan.num_batches,
        "slots": int(plan.slots.max(initial=0)),
        "asked_tokens": sum(map(len, prompts.tokens)),
        "prompt_tokens": len(plan.tokens) + int(plan.shared[alone].sum()),
    }


class WorkPlan(NamedTuple):
    """All work of a run. Its units are the packs of `scoring`, then the batches of `generation`, numbered behind them."""

    scoring: Decision
    generation: TextDecision

    @property
    def num_requests(self) -> IntArray:
        """(units,) requests that each pack and batch answers."""
        return np.concatenate([self.scoring.plan.num_requests, self.generation.plan.num_requests])

    @property
    def num_units(self) -> int:
        return self.scoring.plan.num_packs + self.generation.plan.num_batches


PADDED, SINGLE = "padded rows", "each request by itself"
SHARED = "each shared prefix once, with copies of the model's cache"


class Decision(NamedTuple):
    """plan; item_of_request: (N,) the item that answers each request; why_rows: why there are no packs, None when there are.

    instead: what runs where there are no packs.
    """

    plan: Plan
    item_of_request: IntArray
    why_rows: str | None
    instead: str = PADDED

    @property
    def mode(self) -> str:
        """How requests are run, in words."""
        return "packs" if self.why_rows is None else self.instead


def make_plan(
    engine: Engine,
    requests: Requests,
    packing: bool,
    max_pack_tokens: int | None,
    alone: bool = False,
    score_plan: ScorePlan | None = None,
    memo: PlanMemo | None = None,
) -> Decision:
    """Decide between packs, trees that share caches, and rows, and cut the requests.

    alone: a forward for each distinct input, whatever else is asked.
    score_plan: how to put a trial plan to the model where a copy of it lies on several ranks; `engine` alone if not given.
    memo: of plans cut before.
    """
    memo = memo or PlanMemo()
    can = engine.capabilities
    if alone and can.is_encoder_decoder:
        return Decision(*plan_pairs(requests, 1, share=False), "--numerics alone was given")
    if alone:
        return Decision(*cut_single(engine, requests), "--numerics alone was given", SINGLE)
    if can.is_encoder_decoder:
        return _plan_pairs(engine, requests, max_pack_tokens or engine.max_tokens(), packing)
    why_rows = engine.why_not_packs if packing else "--no_packing was given"
    if why_rows is None and needs_equal_lengths(engine, requests):
        why_rows = DYNAMIC_ROTARY
    trial = _trial_of(engine, requests) if len(requests) else requests
    if why_rows is None and len(trial):
        why_rows = choose_trees(engine, trial, score_plan)
    max_tokens = max_pack_tokens or engine.max_tokens()  # which goes by the attention that was chosen
    if why_rows is None:
        return Decision(*cut_packs(engine, requests, max_tokens, memo), None)
    if packing and why_rows != DYNAMIC_ROTARY and engine.why_not_rows is None and len(trial):
        shared, why_not = _share_caches(engine, requests, trial, max_tokens, score_plan, memo)
        if shared is not None:
            return Decision(*shared, why_rows, SHARED)
        why_rows = f"{why_rows}; {why_not}" if why_not else why_rows
    why_single = engine.why_not_rows or (check_rows(engine, trial, score_plan) if len(trial) else None)
    if why_single is not None:
        return Decision(*cut_single(engine, requests), f"{why_rows}; {why_single}", SINGLE)
    return Decision(*cut_rows(engine, requests, max_tokens, memo), why_rows)


def _share_caches(
    engine: Engine, requests: Requests, trial: Requests, max_tokens: int, score_plan: ScorePlan | None, memo: PlanMemo
) -> tuple[tuple[Plan, IntArray] | None, str | None]:
    """Packs of trees that share caches, as of `plan_packs`; or none, and why not: None where there is little to share."""
    if engine.why_not_states is not None:
        return None, None
    plan, item_of_request = cut_states(engine, requests, max_tokens, memo)
    if not pays(plan):
        return None, None
    why_not = check_states(engine, trial, score_plan)
    return ((plan, item_of_request) if why_not is None else None), why_not


def cut_states(engine: Engine, requests: Requests, max_tokens: int, memo: PlanMemo | None = None) -> tuple[Plan, IntArray]:
    """Packs of trees that share caches. Returns as `plan_packs`."""
    how = engine.cost_model(), max_tokens, engine.max_reads()
    return (memo or PlanMemo()).get("states", requests, how, lambda: plan_states(requests, *how))


def _trial_of(engine: Engine, requests: Requests) -> Requests:
    """A small tree that the engine can run: within its positions, and within what the run's own requests do not leave either."""
    beyond = None if needs_equal_lengths(engine, requests) else engine.capabilities.equal_lengths_beyond
    positions = limits.limits_of(engine.whole).positions if getattr(engine, "whole", None) is not None else None
    most = min((count for count in (beyond, positions) if count is not None), default=None)
    return trial_requests(requests, engine.vocab_size, engine.capabilities.reaches, most)


def cut_packs(engine: Engine, requests: Requests, max_tokens: int, memo: PlanMemo | None = None) -> tuple[Plan, IntArray]:
    """Packs as the engine takes them. Returns as `plan_packs`."""
    in_tree = min(max_tokens, engine.capabilities.max_tree_tokens or max_tokens)
    how = engine.cost_model(), in_tree, engine.max_reads()
    return (memo or PlanMemo()).get("packs", requests, how, lambda: plan_packs(requests, *how))


def cut_without_trial(engine: Engine, requests: Requests, packing: bool, max_tokens: int) -> tuple[Plan, str]:
    """The plan of a model that has no weights yet, as if it passed its self-check; and how it runs, in words."""
    why = engine.why_not_packs if packing else "--no_packing was given"
    if packing and needs_equal_lengths(engine, requests):
        return cut_rows(engine, requests, max_tokens)[0], f"{PADDED}: {DYNAMIC_ROTARY}"
    if why is None:
        return cut_packs(engine, requests, max_tokens)[0], "prefix trees in packs"
    if packing and engine.why_not_states is None:
        plan, _ = cut_states(engine, requests, max_tokens)
        if pays(plan):
            return plan, f"{SHARED}: {why}"
    return cut_rows(engine, requests, max_tokens)[0], f"{PADDED}: {why}"


def cut_single(engine: Engine, requests: Requests) -> tuple[Plan, IntArray]:
    """A forward for each distinct input. Returns as `plan_packs`."""
    return plan_rows(requests, 1, engine.max_reads(), isolate=True)


def cut_rows(engine: Engine, requests: Requests, max_tokens: int, memo: PlanMemo | None = None) -> tuple[Plan, IntArray]:
    """Batches of plain rows, as few and as little padded as pays. Returns as `plan_rows`."""
    most_padding = None if engine.capabilities.rows_are_independent else engine.cost_model().most_padding
    how = max_tokens, engine.max_reads(), needs_equal_lengths(engine, requests), most_padding
    return (memo or PlanMemo()).get("rows", requests, how, lambda: plan_rows(requests, *how))


def _plan_pairs(engine: Engine, requests: Requests, max_tokens: int, share: bool) -> Decision:
    """For encoder-decoders: batches of pairs, unless neighbours in a batch change an answer by more than rounding."""
    batches = plan_pairs(requests, max_tokens, engine.max_reads(), share)
    if not len(requests):
        return Decision(*batches, None)
    tables = limits.limits_of(engine.whole, is_pair=True)
    most = min((count for count in (tables.positions, tables.answer) if count is not None), default=None)
    trial = trial_requests(requests, engine.vocab_size, most=most)
    with in_one_sentence("the model cannot score pairs of a context and a continuation"):
        together, alone = (
            score_alone(engine, plan)[item_of_request]
            for plan, item_of_request in (plan_pairs(trial, 2**30), plan_pairs(trial, 1, share=False))
        )
    drift, allowed = np.abs(together - alone) / trial.num_targets, ROUNDING.get(engine.dtype, 1e-4)
    if float(drift.mean()) <= allowed:  # a NaN is not
        return Decision(*batches, None if share else "--no_packing was given")
    why = f"batches and single pairs differ by {float(drift.max()):.2g} nats per token"
    return Decision(*plan_pairs(requests, 1, share=False), why)
