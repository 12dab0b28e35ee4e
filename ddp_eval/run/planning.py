"""From prompts to a plan of generation that the model at hand runs rightly: batches where it proves itself, else one by one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ddp_eval.engines import Engine
from ddp_eval.engines.hf import limits
from ddp_eval.errors import UserError, one_line
from ddp_eval.packs.batches import Prompts, Settings, TextPlan, plan_batches
from ddp_eval.packs.requests import IntArray

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


def plan_texts(engine: Engine, prompts: Prompts, pad: int | None, why_alone: str | None = None) -> TextDecision:
    """Cut `prompts` for `engine`.

    why_alone: what rules batches out from the start. pad: the tokenizer's padding token.
    Raises UserError for settings of generation that cannot be meant.
    """
    if not len(prompts):
        return TextDecision(*plan_batches(prompts, engine.generation_sizes(), ()), None, ())
    if not engine.capabilities.serves_generation:
        raise UserError(
            f"the task {prompts.tasks[0]} generates text, which the engine {engine.describe()['name']} does not serve"
        )
    most = engine.most_new_tokens
    if most is not None:
        log.warning(
            "the model's generation_config limits answers to %d tokens, before what the tasks ask for, as with lm_eval", most
        )
        prompts = dataclasses.replace(prompts, limits=[most] * len(prompts))
    is_pair = engine.capabilities.is_encoder_decoder
    prompts = limits.shorten_answers(prompts, limits.limits_of(engine.whole, is_pair), is_pair)
    tasks = {kind: task for kind, task in reversed(list(zip(prompts.kinds, prompts.tasks, strict=True)))}
    served = [_is_served(engine, settings, pad, tasks.get(kind)) for kind, settings in enumerate(prompts.settings)]
    why = why_alone or engine.why_not_batches
    plan, item_of_prompt = plan_batches(prompts, engine.generation_sizes(), [bool(why) or not one for one in served])
    if why is None and not all(served):
        odd = next(kind for kind, one in enumerate(served) if not one)
        why = f"the task {tasks.get(odd)} asks for {prompts.settings[odd].options}"
    return TextDecision(plan, item_of_prompt, why, prompts.limits)


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
