"""Requests for text that the model writes behind a prompt, up to a stop string."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lm_eval.api.instance import Instance

from ddp_eval.output.tables import Texts
from ddp_eval.packs.batches import NO_TOKEN
from ddp_eval.tasks.generation_requests import GenerationRequests
from ddp_eval.tasks.request_types.base import Answers, RequestType, RunOptions


class Generated(NamedTuple):
    """For each answer: its text as the task's filters get it, and the columns of `Texts` of the same names."""

    texts: list[str]
    num_tokens: list[int]
    at_limit: list[bool]
    not_finite: list[bool]


class GenerateUntil(RequestType):
    """(prompt, generation settings) -> text. Instances with `repeats` are answered as often."""

    name = "generate_until"
    output_types = ("generate_until",)
    makes_text = True

    def encode(self, instances: list[Instance]) -> None:
        options = self.options
        repeats = [(one, repeat) for one in instances for repeat in range(one.repeats or 1)]
        self.instances = [one for one, _ in repeats]
        self._repeats = [repeat for _, repeat in repeats]
        self._generation = GenerationRequests(
            options.encoder,
            [one.args for one in self.instances],
            [one.task_name for one in self.instances],
            options.seed,
            options.think_end_token,
            options.max_gen_toks,
            options.stops_behind_thinking,
        )
        self.prompts = self._generation.prompts

    def renew(self, options: RunOptions, swap: Mapping[int, Instance]) -> None:
        super().renew(options, swap)
        self._generation.decode_with(options.encoder.tokenizer)

    def read(self, answers: Answers) -> Generated:
        not_finite = [tokens[-1:] == [NO_TOKEN] for tokens in answers.generations]
        tokens = [own[:-1] if broken else own for own, broken in zip(answers.generations, not_finite, strict=True)]
        return Generated(
            texts=[self._generation.read(kind, own) for kind, own in zip(self.prompts.kinds, tokens, strict=True)],
            num_tokens=[len(own) for own in tokens],
            at_limit=[len(own) >= limit for own, limit in zip(tokens, answers.limits, strict=True)],
            not_finite=not_finite,
        )

    def answers(self, result: Generated) -> list[str]:
        return result.texts

    def rows(self, result: Generated) -> Texts:
        return Texts(
            task=[one.task_name for one in self.instances],
            doc_id=[self.options.document(one.task_name, one.doc_id) for one in self.instances],
            idx=[one.idx for one in self.instances],
            repeat=self._repeats,
            text=result.texts,
            num_tokens=result.num_tokens,
            at_limit=result.at_limit,
            not_finite=result.not_finite,
        )

    def instance_of(self, index: int) -> Instance:
        return self.instances[index]

    def irregular(self) -> dict[str, list[Instance]]:
        found = {"context_without_tokens": self._generation.bare, "prompt_cut": self._generation.truncated}
        return {kind: [self.instances[index] for index in indices] for kind, indices in found.items()}
