"""lm_eval's LM: it hands over all requests at once, and gets their answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2
import lm_eval
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from ddp_eval.config import ENGINES, Config
from ddp_eval.distributed import watchdog
from ddp_eval.errors import OutOfRange, UserError, one_line
from ddp_eval.output import irregular
from ddp_eval.tasks import request_types
from ddp_eval.tasks.fingerprints import describe_prompts
from ddp_eval.tasks.kept_setup import KeptSetup
from ddp_eval.tasks.reasoning import template_arguments
from ddp_eval.tasks.request_types import Answers, Asked, RunOptions
from ddp_eval.tasks.task_errors import Stage, errors_pass_through
from ddp_eval.tasks.templates import TemplateCache
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

log = logging.getLogger("ddp_eval")


class RequestCollector(TemplateLM):
    """The LM object that lm_eval sees: tokenises, hands all requests over at once, gives the answers back one kind at a time."""

    def __init__(
        self,
        encoder: Encoder,
        model_config: Any,
        answer: Callable[[Asked], Answers],
        config: Config,
        phases: Phases,
        kept: KeptSetup | None = None,
    ) -> None:
        """answer: called once for all requests. phases: where the time goes, switched between building, scoring and metrics.

        kept: what was encoded before.
        """
        super().__init__()
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.config = model_config  # simple_evaluate reads the model's name from here
        self.fingerprints: dict[str, Any] = {}
        self.irregular: irregular.Irregular = {}
        self.stage = Stage.LOADING
        self.tasks: dict[str, Any] = {}
        self.templates = TemplateCache(lm_eval.utils.env)
        self.settings = config
        self._options = RunOptions(
            encoder,
            self.tasks,
            {task: sorted(set(indices)) for task, indices in (config.samples or {}).items()},
            config.seed[2],
            config.model_args.get("think_end_token"),
            config.model_args.get("max_gen_toks"),
            ENGINES[config.model].stops_behind_thinking,
        )
        self._answer = answer
        self._phases = phases
        self._kept = kept
        self._chat_template_args = template_arguments(config.model_args)
        if isinstance(config.apply_chat_template, str):  # lm_eval records the named template and applies the default one
            self._chat_template_args["chat_template"] = config.apply_chat_template
        self._refuses_system_turns = False
        self._answers: dict[int, list[Any]] | None = None

    @property
    def chosen(self) -> Mapping[str, Sequence[int]]:
        """{task: ascending document numbers}, of tasks of which --samples evaluates some documents."""
        return self._options.chosen

    def begin_building(self, tasks: Mapping[str, Any]) -> None:
        """To be called with the loaded tasks, by name, before lm_eval builds their requests."""
        self.tasks.update(tasks)
        self.stage = Stage.BUILDING

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

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answer_each("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._answer_each("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answer_each("generate_until", requests)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise AssertionError("all requests go through the plan")

    def _answer_each(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        """The answers to one type of requests, of which lm_eval names each as often as it repeats."""
        answers = self._answer_all(requests)
        repeats: dict[int, int] = {}
        found = []
        for request in requests:
            own = answers[id(request)]
            repeat = repeats[id(request)] = repeats.get(id(request), -1) + 1
            found.append(own[repeat] if len(own) > 1 else own[0])
        return found

    def _answer_all(self, requests: Sequence[Instance]) -> dict[int, list[Any]]:
        """Answer every request of every task at the first call; look the answers up at the others."""
        if self._answers is None:
            instances = [instance for task in self.tasks.values() for instance in task.instances] or [*requests]
            self.templates.forget_documents()  # their memory goes; and a task's metrics might change them
            with errors_pass_through():
                self._answers = self._score_instances(instances)
            self.stage = Stage.METRICS
            self._phases.switch("score")
        return self._answers

    def _score_instances(self, instances: Sequence[Instance]) -> dict[int, list[Any]]:
        """The answers of each instance, by its id."""
        if self.settings.model_args.get("enable_thinking"):
            scored = next((one for one in instances if not request_types.makes_text(one.request_type)), None)
            if scored is not None:  # of a task of several types, which shows them only now
                raise UserError(
                    f"enable_thinking=True is for tasks that generate text, and {scored.task_name} makes {scored.request_type} "
                    "requests too: leave it out"
                )
        asked = self._encode(instances)
        self.fingerprints = asked.fingerprints
        self._note_irregular(asked)
        windows = [text for part in asked.parts if (text := part.describe_windows())]
        if windows:
            log.warning("%s requests, of them %s", f"{len(asked.requests) + len(asked.prompts):,}", ", ".join(windows))
        try:
            answers = self._answer(asked)
        except OutOfRange as found:
            raise self._explain(found, asked.instance_of(found)) from None
        return asked.by_instance(answers)

    def _encode(self, instances: Sequence[Instance]) -> Asked:
        watchdog.step("encoding the prompts")

        def encode() -> Asked:
            with ThreadPoolExecutor(1) as aside:  # SHA-256 leaves the interpreter to others
                described = aside.submit(describe_prompts, instances, self.tasks)
                return Asked.join(request_types.encode(instances, self._options), instances, described.result())

        with self._phases("tokenize"):
            if self._kept is None:
                return encode()
            return self._kept.encode(instances, self.tasks, self._options, encode)

    def _explain(self, found: OutOfRange, one: Instance) -> UserError:
        """The sentence for what the model has no row for. one: whose request or prompt it is."""
        document = self._options.document(one.task_name, one.doc_id)
        where = f"the task {one.task_name} holds it in document {document}, choice {one.idx}"
        if found.token is None:
            return UserError(f"{found.sentence} ({where})")
        name = one_line(repr(self.tokenizer.convert_ids_to_tokens(found.token)), 60)
        return UserError(
            f"{found.sentence} for {name}: {where}; give the model's own tokenizer, or one that fits it as tokenizer=NAME in "
            "--model_args"
        )

    def _note_irregular(self, asked: Asked) -> None:
        """Count and name what could not be scored, or not as it came."""
        requests: dict[str, list[tuple[Any, Any, Any]]] = {kind: [] for kind in irregular.REQUESTS}
        documents: dict[str, list[tuple[Any, Any]]] = {kind: [] for kind in irregular.DOCUMENTS}
        for part in asked.parts:
            for kind, instances in part.irregular().items():
                distinct = {id(one): one for one in instances}.values()  # a repeated prompt is one request
                requests[kind] += [
                    (one.task_name, self._options.document(one.task_name, one.doc_id), one.idx) for one in distinct
                ]
            for kind, places in part.irregular_documents().items():
                documents[kind] += [(task, self._options.document(task, doc_id)) for task, doc_id in places]
        self.irregular = {**irregular.count_requests(requests), **irregular.count_documents(documents)}
        irregular.log_irregular(self.irregular)
