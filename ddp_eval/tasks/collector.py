"""lm_eval's LM: it hands over all requests at once, and gets their answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2
import lm_eval
import lm_eval.utils
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from ddp_eval.config import Config
from ddp_eval.distributed import watchdog
from ddp_eval.errors import OutOfRange, UserError, one_line
from ddp_eval.output import irregular
from ddp_eval.output.tables import Scores, Texts
from ddp_eval.packs.batches import NO_TOKEN, Prompts
from ddp_eval.packs.requests import Requests, concatenate
from ddp_eval.tasks.fingerprints import describe_prompts
from ddp_eval.tasks.generation_requests import Asked
from ddp_eval.tasks.reasoning import template_arguments
from ddp_eval.tasks.templates import TemplateCache
from ddp_eval.tasks.tokenization import Encoded, Encoder
from ddp_eval.telemetry.meter import Phases

log = logging.getLogger("ddp_eval")


# Of the requests: nats, whether greedy; of the prompts: the tokens of each answer, the most that it might have.
Answers = tuple[np.ndarray, np.ndarray, list[list[int]], Sequence[int]]


COMPUTING_METRICS = "compute the metrics"


class ScoringFailed(Exception):
    """Carries an error of ours through lm_eval unharmed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def as_scoring_error(deed: Callable[[], None]) -> Callable[[], None]:
    """`deed` whose errors lm_eval cannot mistake for its own."""

    def do() -> None:
        try:
            deed()
        except BaseException as error:
            raise ScoringFailed(error) from error

    return do


def calling_first(deed: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def do(*args: Any, **options: Any) -> Any:
        deed()
        return function(*args, **options)

    return do


class RequestCollector(TemplateLM):
    """The LM object that lm_eval sees: tokenises, hands all requests over at once, gives the answers back one kind at a time."""

    def __init__(
        self,
        encoder: Encoder,
        model_config: Any,
        score: Callable[[Requests, Prompts], Answers],
        keep: Callable[[Scores, Texts], None],
        inspect: Callable[[dict[str, Any]], None] | None,
        config: Config,
        phases: Phases,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.config = model_config  # simple_evaluate reads the model's name from here
        self.prompts: dict[str, Any] = {}
        self.irregular: irregular.Irregular = {}
        self.phase = "load the documents"
        self.tasks: dict[str, Any] = {}
        self._seed = config.seed[2]
        self._think_end_token = config.model_args.get("think_end_token")
        self._max_gen_toks = config.model_args.get("max_gen_toks")
        self._score = score
        self._keep = keep
        self._inspect = inspect
        self._phases = phases
        self.templates = TemplateCache(lm_eval.utils.env)
        self.chosen = {task: sorted(set(indices)) for task, indices in (config.samples or {}).items()}
        self._chat_template_args = template_arguments(config.model_args)
        if isinstance(config.apply_chat_template, str):  # lm_eval records the named template and applies the default one
            self._chat_template_args["chat_template"] = config.apply_chat_template
        self._refuses_system_turns = False
        self._answers: dict[int, Any] | None = None

    @property
    def eot_token_id(self) -> int | None:
        """None where the tokenizer has no EOS token."""
        return None if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix_token_id

    @property
    def max_length(self) -> int:
        return self.encoder.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self.encoder.encode([string], add_special_tokens)[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self._chat_template_args,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except jinja2.exceptions.TemplateError as error:
            history = [message for message in chat_history if message["role"] != "system"]
            if len(history) == len(chat_history):
                raise UserError(f"the tokenizer's chat template refuses a prompt: {one_line(error)}") from error
            if not self._refuses_system_turns:
                log.warning("the chat template refuses prompts with a system turn (%s): they go without it", one_line(error))
                self._refuses_system_turns = True
            return self.apply_chat_template(history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = self._answer_all(requests)
        return [answers[id(request)] for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        answers = self._answer_all(requests)
        return [answers[id(request)][0] for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = self._answer_all(requests)
        given: dict[int, int] = {}  # lm_eval asks for the same request as often as it repeats
        texts = []
        for request in requests:
            repeat = given.get(id(request), 0)
            given[id(request)] = repeat + 1
            texts.append(answers[id(request)][repeat])
        return texts

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise AssertionError("all requests go through the plan")

    def _answer_all(self, requests: list[Instance]) -> dict[int, Any]:
        """Score every request of every task at the first call; look the answers up at the others."""
        if self._answers is None:
            instances = [instance for task in self.tasks.values() for instance in task.instances] or requests
            self.templates.forget_documents()  # their memory goes; and a task's metrics might change them
            try:
                self._answers = self._score_instances(instances)
            except BaseException as error:
                raise ScoringFailed(error) from error
            self.phase = COMPUTING_METRICS
            self._phases.switch("score")
        return self._answers

    def _score_instances(self, instances: list[Instance]) -> dict[int, Any]:
        pairs = [instance for instance in instances if instance.request_type == "loglikelihood"]
        texts = [instance for instance in instances if instance.request_type == "loglikelihood_rolling"]
        asking = [instance for instance in instances if instance.request_type == "generate_until"]
        served = ("loglikelihood", "loglikelihood_rolling", "generate_until")
        others = [instance for instance in instances if instance.request_type not in served]
        if others:
            raise UserError(
                f"the task {others[0].task_name} makes {others[0].request_type} requests, which are not supported yet"
            )
        watchdog.step("encoding the prompts")
        with self._phases("tokenize"), ThreadPoolExecutor(1) as aside:  # SHA-256 leaves the interpreter to others
            described = aside.submit(describe_prompts, instances, self.tasks)
            encoded_pairs = self.encoder.encode_pairs([instance.args for instance in pairs])
            encoded_texts = self.encoder.encode_rolling([instance.args[0] for instance in texts])
            repeated = [instance for instance in asking for _ in range(instance.repeats or 1)]
            asked = Asked(
                self.encoder,
                [instance.args for instance in repeated],
                [instance.task_name for instance in repeated],
                self._seed,
                self._think_end_token,
                self._max_gen_toks,
            )
            self.prompts = described.result()
        if self._inspect is not None:
            self._inspect(self.prompts)
        unconditional = irregular.find_unconditional(pairs, encoded_pairs.empty, self._mutual)
        unscorable = sorted({*encoded_pairs.empty}.difference(unconditional))
        self._note_irregular(pairs, encoded_pairs, unscorable, texts, encoded_texts, repeated, asked)

        num_pairs, num_windows = len(encoded_pairs.requests), len(encoded_texts.requests)
        if num_windows != len(texts):
            total = num_pairs + num_windows + len(repeated)
            log.warning("%s requests, of them %s windows of %s documents", f"{total:,}", f"{num_windows:,}", f"{len(texts):,}")
        requests = concatenate(encoded_pairs.requests, encoded_texts.requests)
        try:
            sums, greedy, generated, limits = self._score(requests, asked.prompts)
        except OutOfRange as found:
            owners = [pairs[index] for index in encoded_pairs.owner] + [texts[index] for index in encoded_texts.owner]
            raise self._name(found, repeated if found.is_prompt else owners) from None
        pair_sums, pair_tokens = sum_by_owner(encoded_pairs, sums[:num_pairs], len(pairs))
        text_sums, text_tokens = sum_by_owner(encoded_texts, sums[num_pairs:], len(texts))
        all_greedy = np.ones(len(pairs), dtype=bool)
        all_greedy[encoded_pairs.owner[~greedy[:num_pairs]]] = False
        all_greedy[encoded_pairs.empty] = False
        pair_sums[unscorable] = -np.inf

        answers: dict[int, Any] = {id(one): (float(s), bool(g)) for one, s, g in zip(pairs, pair_sums, all_greedy, strict=True)}
        answers.update({id(one): (float(s), None) for one, s in zip(texts, text_sums, strict=True)})
        counts = dict(zip(map(id, pairs), pair_tokens.tolist(), strict=True)) | dict(
            zip(map(id, texts), text_tokens.tolist(), strict=True)
        )
        scored = [one for one in instances if one.request_type != "generate_until"]
        scores = Scores(
            task=[one.task_name for one in scored],
            doc_id=[self._document(one) for one in scored],
            idx=[one.idx for one in scored],
            loglikelihood=[answers[id(one)][0] for one in scored],
            is_greedy=[answers[id(one)][1] for one in scored],
            num_tokens=[counts[id(one)] for one in scored],
        )
        broken = [answer[-1:] == [NO_TOKEN] for answer in generated]
        generated = [answer[:-1] if end else answer for answer, end in zip(generated, broken, strict=True)]
        read = [asked.read(kind, answer) for kind, answer in zip(asked.prompts.kinds, generated, strict=True)]
        for one, text in zip(repeated, read, strict=True):
            answers.setdefault(id(one), []).append(text)
        texts_kept = Texts(
            task=[one.task_name for one in repeated],
            doc_id=[self._document(one) for one in repeated],
            idx=[one.idx for one in repeated],
            repeat=[repeat for one in asking for repeat in range(one.repeats or 1)],
            text=read,
            num_tokens=[len(answer) for answer in generated],
            at_limit=[len(answer) >= limit for answer, limit in zip(generated, limits, strict=True)],
            not_finite=broken,
        )
        self._keep(scores, texts_kept)
        return answers

    def _name(self, found: OutOfRange, instances: list[Instance]) -> UserError:
        """The sentence for what a model has no row for. instances: of each request or prompt."""
        one = instances[found.index]
        where = f"the task {one.task_name} holds it in document {self._document(one)}, choice {one.idx}"
        if found.token is None:
            return UserError(f"{found.sentence} ({where})")
        name = one_line(repr(self.tokenizer.convert_ids_to_tokens(found.token)), 60)
        return UserError(
            f"{found.sentence} for {name}: {where}; give the model's own tokenizer, or one that fits it as tokenizer=NAME in "
            "--model_args"
        )

    @property
    def _mutual(self) -> set[str]:
        """Tasks that ask for each choice without its context as well."""
        return {name for name, task in self.tasks.items() if "acc_mutual_info" in getattr(task, "_metric_fn_list", ())}

    def _note_irregular(
        self,
        pairs: list[Instance],
        encoded_pairs: Encoded,
        unscorable: list[int],
        texts: list[Instance],
        encoded_texts: Encoded,
        prompts: list[Instance],
        asked: Asked,
    ) -> None:
        """Count and name what could not be scored, or not as it came. prompts: those of `asked`."""

        def places(instances: list[Instance], indices: Iterable[int]) -> list[tuple[Any, Any, Any]]:
            chosen = {id(instances[index]): instances[index] for index in indices}  # a repeated prompt is one request
            return [(one.task_name, self._document(one), one.idx) for one in chosen.values()]

        found = irregular.count_requests(
            {
                "context_cut": places(pairs, encoded_pairs.truncated),
                "continuation_in_windows": places(pairs, encoded_pairs.cut),
                "continuation_encoded_alone": places(pairs, encoded_pairs.alone),
                "nothing_to_score": places(pairs, unscorable),
                "text_without_tokens": places(texts, encoded_texts.empty),
                "context_without_tokens": places(pairs, encoded_pairs.bare) + places(prompts, asked.bare),
                "prompt_cut": places(prompts, asked.truncated),
            }
        )
        identical = irregular.find_identical(pairs, self._mutual)
        self.irregular = {**found, **irregular.count_documents({"identical_choices": map(self._number, identical)})}
        irregular.log_irregular(self.irregular)

    def _number(self, place: tuple[Any, Any]) -> tuple[Any, Any]:
        task, document = place
        return task, self.chosen[task][document] if task in self.chosen else document

    def _document(self, one: Instance) -> int:
        """The document's number in its split, whatever was chosen of it."""
        return self.chosen[one.task_name][one.doc_id] if one.task_name in self.chosen else one.doc_id


def sum_by_owner(encoded: Encoded, sums: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count,) log-probabilities and (count,) scored tokens of each text request, its windows added up."""
    totals = np.bincount(encoded.owner, weights=sums, minlength=count).astype(np.float64)  # of nothing it makes whole numbers
    tokens = np.bincount(encoded.owner, weights=encoded.requests.num_targets, minlength=count)
    return totals, tokens.astype(np.int64)
