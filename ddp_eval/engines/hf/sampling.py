"""The next token of an answer: greedy or drawn, with lm_eval's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines.hf import generate_one
from ddp_eval.packs.batches import NO_TOKEN, Settings
from ddp_eval.packs.requests import IntArray


class TokenSampler:
    """From logits to tokens, as transformers' greedy search and sampling do, but that chance comes from outside.

    Raises ValueError for settings that transformers refuses.
    """

    def __init__(self, model: Any, settings: Settings, pad: int | None) -> None:
        self._model, self._settings, self._pad = model, settings, pad
        config, processors = self._prepare(1, 1)
        self.eos = set() if config._eos_token_tensor is None else set(config._eos_token_tensor.tolist())
        self._sample = bool(config.do_sample)
        self._lets_nan_pass = bool(config.remove_invalid_values)  # one of the processors sees to it
        self._shared = processors if all(type(one).__name__ in _STATELESS for one in processors) else None
        self._own: dict[tuple[int, int], Any] = {}
        mode = config.get_generation_mode()
        self.mode = str(getattr(mode, "value", mode))
        self.num_returned = int(config.num_return_sequences or 1)

    @property
    def is_served(self) -> bool:
        """Whether `choose` does all that the settings ask for."""
        return self.mode in ("greedy_search", "sample") and self.num_returned == 1 and not self._asks_for_more

    def _prepare(self, prompt_length: int, limit: int) -> tuple[Any, Any]:
        config, rest = generate_one.prepare_config(self._model, self._settings, prompt_length + limit, self._pad)
        penalised = config.encoder_repetition_penalty not in (None, 1.0)
        self._asks_for_more = bool(rest) or penalised or any(getattr(config, name, None) for name in _NOT_SERVED)
        if config.min_new_tokens is not None:
            config.min_length = config.min_new_tokens + prompt_length
        device = self._model.device
        nothing = torch.zeros((1, prompt_length), dtype=torch.long, device=device)
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt_length,
            encoder_input_ids=nothing,
            device=device,
            model_kwargs={},
        )
        return config, processors

    def choose(
        self,
        logits: torch.Tensor,
        prompts: Sequence[IntArray],
        answers: Sequence[list[int]],
        limits: Sequence[int],
        draws: Sequence[float],
    ) -> list[int]:
        """The next token of each row; NO_TOKEN where a score is NaN, or infinite where there is chance.

        logits: (rows, V). draws: numbers in [0, 1), used where there is chance.
        """
        scores = logits.float()
        lost = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        if not self._lets_nan_pass and (lost := generate_one.is_lost(scores, self._sample)).any():
            scores = scores.masked_fill(lost[:, None], 0.0)
        if self._shared is None:
            rows = zip(scores, prompts, answers, limits, strict=True)
            scores = torch.cat([self._process(*row) for row in rows])
        elif len(self._shared):
            scores = self._shared(None, scores)
        if self._sample:
            weights = scores.softmax(dim=-1).double().cumsum(dim=-1)
            target = torch.tensor(draws, dtype=torch.float64, device=scores.device)[:, None] * weights[:, -1:]
            tokens = torch.searchsorted(weights, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
        else:
            tokens = scores.argmax(dim=-1)
        chosen: list[int] = torch.where(lost, NO_TOKEN, tokens).tolist()
        return chosen

    def _process(self, scores: torch.Tensor, prompt: IntArray, answer: list[int], limit: int) -> torch.Tensor:
        """(1, V) of one row, by processors that look at what it has so far."""
        shape = len(prompt), limit
        if shape not in self._own:
            self._own[shape] = self._prepare(*shape)[1]
        tokens = torch.tensor([[*prompt.tolist(), *answer]], device=scores.device)
        processed: torch.Tensor = self._own[shape](tokens, scores[None])
        return processed


# Logits processors that look at one row's scores alone.
_STATELESS = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization",
)  # fmt: skip


_NOT_SERVED = (
    "encoder_no_repeat_ngram_size", "watermarking_config", "cache_implementation", "token_healing",
    "max_time", "prompt_lookup_num_tokens", "assistant_early_exit", "output_scores", "guidance_scale",
)  # fmt: skip


def draws_of(seed: int, count: int) -> npt.NDArray[np.float64]:
    """(count,) numbers in [0, 1 - 2^-33), of a generator that gives the same everywhere; zeros for the seed 0."""
    if not seed:
        return np.zeros(count)
    raw = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2**32 - 1, count, dtype=np.uint32)
    return raw.astype(np.float64) / 2**32
