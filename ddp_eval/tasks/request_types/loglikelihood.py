"""Requests for the log-probability of a continuation behind a context. multiple_choice tasks make one for each choice."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from lm_eval.api.instance import Instance

from ddp_eval.output.irregular import find_identical, find_unconditional
from ddp_eval.tasks.request_types.base import Answers, Scored, ScoredType, sum_by_owner


class Loglikelihood(ScoredType):
    """(context, continuation) -> (nats, whether greedy). What nothing can score has -inf, see irregular.py."""

    name = "loglikelihood"
    output_types: ClassVar[tuple[str, ...]] = ("loglikelihood", "multiple_choice")

    def encode(self, instances: list[Instance]) -> None:
        self.instances = instances
        self.encoded = self.options.encoder.encode_pairs([one.args for one in instances])
        self.requests = self.encoded.requests
        unconditional = find_unconditional(instances, self.encoded.empty, self.options.mutual)
        self._unscorable = sorted({*self.encoded.empty}.difference(unconditional))

    def read(self, answers: Answers) -> Scored:
        scored = sum_by_owner(self.encoded, answers.results, len(self.instances))
        scored.logprobs[self._unscorable] = -np.inf
        for index in self.encoded.empty:
            scored.greedy[index] = False
        return scored

    def answers(self, result: Scored) -> list[tuple[float, bool | None]]:
        return list(zip(result.logprobs.tolist(), result.greedy, strict=True))

    def irregular(self) -> dict[str, list[Instance]]:
        found = {
            "context_cut": self.encoded.truncated,
            "continuation_in_windows": self.encoded.cut,
            "continuation_encoded_alone": self.encoded.alone,
            "nothing_to_score": self._unscorable,
            "context_without_tokens": self.encoded.bare,
        }
        return {kind: [self.instances[index] for index in indices] for kind, indices in found.items()}

    def irregular_documents(self) -> dict[str, list[tuple[object, object]]]:
        return {"identical_choices": find_identical(self.instances, self.options.mutual)}
