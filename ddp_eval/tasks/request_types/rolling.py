"""Requests for the log-probability of a whole text, scored in windows of the model's length."""

from __future__ import annotations

from lm_eval.api.instance import Instance

from ddp_eval.tasks.request_types.base import Answers, Scored, ScoredType, sum_by_owner


class LoglikelihoodRolling(ScoredType):
    """(text,) -> nats. A text without tokens adds 0."""

    name = "loglikelihood_rolling"
    output_types = ("loglikelihood_rolling",)

    def encode(self, instances: list[Instance]) -> None:
        self.instances = instances
        self.encoded = self.options.encoder.encode_rolling([one.args[0] for one in instances])
        self.requests = self.encoded.requests

    def read(self, answers: Answers) -> Scored:
        scored = sum_by_owner(self.encoded, answers.results, len(self.instances))
        return scored._replace(greedy=[None] * len(self.instances))

    def answers(self, result: Scored) -> list[float]:
        found: list[float] = result.logprobs.tolist()
        return found

    def irregular(self) -> dict[str, list[Instance]]:
        return {"text_without_tokens": [self.instances[index] for index in self.encoded.empty]}

    def describe_windows(self) -> str | None:
        num_windows, num_texts = len(self.requests), len(self.instances)
        return None if num_windows == num_texts else f"{num_windows:,} windows of {num_texts:,} documents"
