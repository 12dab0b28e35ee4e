"""Answer by transformers' own `generate`, one prompt at a time: what decode.py does not batch, and encoder-decoders."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddp_eval.engines import OnProgress
from ddp_eval.engines.stop_strings import StopRule
from ddp_eval.errors import UserError, is_out_of_memory, one_line
from ddp_eval.packs.batches import NO_TOKEN, Batch, Settings

if TYPE_CHECKING:
    from ddp_eval.engines.hf.causal_model import CausalModel


def prepare_config(model: Any, settings: Settings, max_length: int, pad: int | None) -> tuple[Any, dict[str, Any]]:
    """The GenerationConfig that lm_eval's HF backend generates with, the checkpoint's settings included, and what is left over.

    Raises ValueError for settings that transformers refuses.
    """
    options = _greedy_or_not(settings.options)
    config, rest = model._prepare_generation_config(None, max_length=max_length, pad_token_id=pad, use_cache=True, **options)
    if config.stop_strings is not None:
        raise ValueError("stop_strings, which its generation_config or the task asks for, need a tokenizer: give them as until")
    model._validate_model_kwargs(dict(rest))
    model._prepare_special_tokens(config, True, device=model.device, batch_size=1)
    return config, rest


def most_new_tokens(model: Any) -> int | None:
    """Of the checkpoint's generation_config; transformers lets it go before the max_length that lm_eval passes."""
    most: int | None = model.generation_config.max_new_tokens
    return most


def _greedy_or_not(options: dict[str, Any]) -> dict[str, Any]:
    """What `HFLM._model_generate` passes on: a temperature of 0 is none."""
    passed = dict(options)
    if passed.get("do_sample") is False and passed.get("temperature", 0.0) == 0.0:
        passed.pop("temperature", None)
    return passed


def answer_all(engine: CausalModel, batch: Batch, rule: StopRule, pad: int | None, on_progress: OnProgress) -> list[list[int]]:
    """Every answer of a causal model.

    Of several beams, the first alone is looked at for stop strings and ends all of them: lm_eval's rule, not ours.
    """
    answers = []
    for prompt, limit, seed in zip(batch.prompts, batch.limits, batch.seeds, strict=True):
        start = len(prompt)

        def ends(rows: list[list[int]]) -> list[bool]:
            return rule.ends(rows[:1]) * len(rows)

        context = torch.from_numpy(prompt.astype(np.int64))[None].to(engine.device)
        inputs = {"input_ids": context, "attention_mask": torch.ones_like(context)}
        with engine.inference(None):
            answers.append(answer(engine.model, inputs, start, limit, seed, batch.settings, ends, pad))
        on_progress(1, start + len(answers[-1]))
    return answers


def answer(
    model: Any,
    inputs: dict[str, torch.Tensor],
    start: int,
    limit: int,
    seed: int,
    settings: Settings,
    ends: Callable[[list[list[int]]], list[bool]],
    pad: int | None,
) -> list[int]:
    """The tokens of one answer, what ends it included.

    inputs: for `generate`, one row. start: tokens of its output before the answer. limit: most tokens.
    ends: whether the answers, one a beam, end here.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    guard = _Guard(bool(prepare_config(model, settings, start + limit, pad)[0].do_sample))

    def stop(tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = tokens.tolist()
        ended = ends([row[start:] for row in rows])
        broken = [guard.end_of(row) is not None for row in rows]
        return torch.tensor([end or lost for end, lost in zip(ended, broken, strict=True)], device=tokens.device)

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed % 2**63)
        try:
            output = model.generate(
                **inputs,
                max_length=start + limit,
                logits_processor=LogitsProcessorList([guard]),
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=pad,
                use_cache=True,
                synced_gpus=False,  # ranks that share weights keep pace by themselves: engines/hf/lockstep.py
                **_greedy_or_not(settings.options),
            )
        except Exception as error:
            if not _is_of_model(error, model):
                raise
            what = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"the model cannot generate, one prompt at a time: {what}") from error
    row: list[int] = output[0].tolist()
    end = guard.end_of(row)
    return row[start:] if end is None else [*row[start:end], NO_TOKEN]


def _is_of_model(error: Exception, model: Any) -> bool:
    """Whether what `generate` raised is the model's own inability, as with lm_eval: nothing of devices, memory or other ranks."""
    if isinstance(error, (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)):
        return True
    if type(error) is not RuntimeError or is_out_of_memory(error):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_in = str(frame.f_globals.get("__name__"))
    return raised_in.startswith(("transformers.", "torch.nn.", "ddp_eval.engines.ops.")) or raised_in == type(model).__module__


def is_lost(scores: torch.Tensor, by_chance: bool) -> torch.Tensor:
    """(rows,) where nothing can be chosen of (rows, V) scores. Greedily, an infinite one can: transformers takes it."""
    highest = scores.amax(dim=-1)  # NaN where there is one
    return ~highest.isfinite() if by_chance else highest.isnan()


class _Guard:
    """A logits processor that lets scores pass, and where nothing can be chosen of them makes all tokens as unlikely."""

    def __init__(self, by_chance: bool) -> None:
        self._by_chance = by_chance
        self._broken: list[list[int]] = []

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """tokens: (rows, so far), scores: (rows, V)."""
        lost = is_lost(scores, self._by_chance)
        if not lost.any():
            return scores
        self._broken += tokens[lost].tolist()
        return scores.masked_fill(lost[:, None], -1e9)  # a beam that ends here loses to one that does not

    def end_of(self, row: list[int]) -> int | None:
        """How many of its tokens stand before the place where nothing could be chosen; None if there is no such place."""
        return min((len(broken) for broken in self._broken if row[: len(broken)] == broken), default=None)
