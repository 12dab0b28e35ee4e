"""Requests as tokens: those that lm_eval's HF backend would score, and those that our encoder makes."""

from __future__ import annotations

import itertools
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ddp_eval.tasks.tokenization import Encoded


class Recorder(HFLM):
    """lm_eval's HF backend that writes down which tokens it would score, and scores none."""

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.scored: list[Any] = [*getattr(self, "scored", []), *requests]
        return [(0.0, False)] * len(requests)


def encode_with_lm_eval(method: str, texts: list[Any], tokenizer: Any, model: Any, **options: Any) -> list[tuple[list, list]]:
    """(context, continuation) ids of each request, or of each window, before lm_eval cuts them to the model's window."""
    lm = Recorder(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    lm.scored = []
    arguments = [text if isinstance(text, tuple) else (text,) for text in texts]
    getattr(lm, method)([Instance("loglikelihood", {}, each, 0) for each in arguments], disable_tqdm=True)
    return [(list(context), list(continuation)) for _, context, continuation in lm.scored]


def rows_of(encoded: Encoded) -> list[tuple[int, list[int], int]]:
    """(owner, tokens, scored tokens) of each request."""
    bounds = itertools.pairwise(encoded.requests.starts.tolist())
    tokens = [encoded.requests.tokens[begin:stop].tolist() for begin, stop in bounds]
    return list(zip(encoded.owner.tolist(), tokens, encoded.requests.num_targets.tolist(), strict=True))
