"""What a type of lm_eval's requests does: it turns texts into work for the ranks, and their answers into results and rows."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance

from ddp_eval.output.tables import Scores, Texts
from ddp_eval.packs.batches import NO_PROMPTS, Prompts
from ddp_eval.packs.requests import Requests
from ddp_eval.packs.results import Results
from ddp_eval.tasks.tokenization import Encoded, Encoder

NO_REQUESTS = Requests(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What the ranks have computed, for N requests and P prompts.

    results:      (N,) RESULT, of each request's scored tokens; their items are of no meaning here.
    generations:  P lists of token ids; NO_TOKEN stands last where the model's scores were NaN or infinite.
    limits:       P maximum lengths of these.
    """

    results: Results
    generations: Sequence[list[int]]
    limits: Sequence[int]

    def select(self, requests: slice, prompts: slice) -> Answers:
        return Answers(self.results[requests], self.generations[prompts], self.limits[prompts])


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What the requests of a run are encoded by, beside their texts.

    tasks:   lm_eval's, by name.
    chosen:  {task: ascending document numbers}, of the tasks of which --samples evaluates some documents.
    seed:    of generated text; None draws one.
    think_end_token, max_gen_toks: as in lm_eval's model_args.
    stops_behind_thinking: as of `config.EngineName`.
    """

    encoder: Encoder
    tasks: Mapping[str, Any]
    chosen: Mapping[str, Sequence[int]]
    seed: int | None
    think_end_token: str | int | None
    max_gen_toks: int | None
    stops_behind_thinking: bool = False

    def document(self, task: str, doc_id: Any) -> Any:
        """The document's number in its split, where lm_eval counts those that were chosen."""
        return self.chosen[task][doc_id] if task in self.chosen else doc_id

    @property
    def mutual(self) -> set[str]:
        """Tasks that ask for each choice without its context as well."""
        return {name for name, task in self.tasks.items() if "acc_mutual_info" in getattr(task, "_metric_fn_list", ())}


class RequestType(abc.ABC):
    """All requests of one type in a run, in lm_eval's order.

    name:          lm_eval's, of its `Instance.request_type` and of the LM's method.
    output_types:  OUTPUT_TYPE of the tasks that make such requests.
    makes_text:    whether the model writes the answer.

    `encode` comes first and sets these:
    instances:  for each answer the instance that it belongs to; one that is to be answered several times is there as often.
    requests:   what is to be scored.
    prompts:    what is to be continued.
    """

    name: ClassVar[str]
    output_types: ClassVar[tuple[str, ...]]
    makes_text: ClassVar[bool] = False

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.instances: list[Instance] = []
        self.requests: Requests = NO_REQUESTS
        self.prompts: Prompts = NO_PROMPTS

    @abc.abstractmethod
    def encode(self, instances: list[Instance]) -> None:
        """Tokenise the instances. Raises UserError for what cannot be meant."""

    def renew(self, options: RunOptions, swap: Mapping[int, Instance]) -> None:
        """For the next model. options: equal to those before. swap: {id of an instance: the same one, built anew}."""
        self.options = options
        self.instances = [swap.get(id(one), one) for one in self.instances]

    @abc.abstractmethod
    def read(self, answers: Answers) -> Any:
        """The result that the other methods take. answers: to this type's own requests and prompts."""

    @abc.abstractmethod
    def answers(self, result: Any) -> Sequence[Any]:
        """What lm_eval takes, for each of `instances`."""

    @abc.abstractmethod
    def rows(self, result: Any) -> Scores | Texts:
        """What the run directory keeps, a row for each of `instances`."""

    @abc.abstractmethod
    def instance_of(self, index: int) -> Instance:
        """The instance of a request, or of a prompt."""

    def irregular(self) -> dict[str, list[Instance]]:
        """Instances that could not be scored, or not as they came. Keys are those of `irregular.REQUESTS`."""
        return {}

    def irregular_documents(self) -> dict[str, list[tuple[Any, Any]]]:
        """(task, doc_id) of documents that are out of the ordinary. Keys are those of `irregular.DOCUMENTS`."""
        return {}

    def describe_windows(self) -> str | None:
        """How many requests the texts were cut into, for a message; None where each text is one."""
        return None


class Scored(NamedTuple):
    """For each instance: nats, whether greedy (None: it has no such thing), and how many tokens were scored."""

    logprobs: np.ndarray
    greedy: list[bool | None]
    num_tokens: np.ndarray


class ScoredType(RequestType):
    """A type whose answers are log-probabilities: `encode` sets `encoded` as well, and rows are those of scores.parquet."""

    encoded: Encoded

    def instance_of(self, index: int) -> Instance:
        return self.instances[self.encoded.owner[index]]

    def rows(self, result: Scored) -> Scores:
        return Scores(
            task=[one.task_name for one in self.instances],
            doc_id=[self.options.document(one.task_name, one.doc_id) for one in self.instances],
            idx=[one.idx for one in self.instances],
            loglikelihood=result.logprobs.tolist(),
            is_greedy=result.greedy,
            num_tokens=result.num_tokens.tolist(),
        )


def sum_by_owner(encoded: Encoded, results: Results, count: int) -> Scored:
    """Of each of `count` text requests, its windows added up; greedy where all of them are, and where there is none."""
    owner = encoded.owner
    totals = np.bincount(owner, weights=results["logprob"], minlength=count)
    tokens = np.bincount(owner, weights=encoded.requests.num_targets, minlength=count)
    greedy = np.ones(count, dtype=bool)
    greedy[owner[~results["greedy"]]] = False
    # Of no requests at all bincount makes whole numbers.
    return Scored(totals.astype(np.float64), greedy.tolist(), tokens.astype(np.int64))
