"""lm_eval's side of the run: tasks in, scores out. Only the leader imports this module.

Of lm_eval's tasks and evaluator it is the sole importer, but for lm_eval_patches.py and task_sources.py, which list what is
replaced in them, and index_cache.py, which keeps its index of task files. asking.py takes lm_eval's rules for texts, trackers.py
its loggers; lm.py is the other way round: ddp_eval as a model of lm_eval.

lm_eval builds every prompt once, for one rank (`world_size=1`), asks our LM object for log-likelihoods, and computes metrics
from the answers. The first question it asks is answered for all requests of all tasks at once, so that one plan holds them all.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import difflib
import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import lm_eval
import lm_eval.utils
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import configure_pad_token, resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, hash_string, make_table, sanitize_model_name

from ddp_eval import demo
from ddp_eval.config import Config
from ddp_eval.distributed import watchdog
from ddp_eval.errors import OutOfRange, UserError, one_line
from ddp_eval.output import irregular
from ddp_eval.output.write import Scores, Texts
from ddp_eval.packs.batches import NO_TOKEN, Prompts
from ddp_eval.packs.requests import Requests, concatenate
from ddp_eval.system import environment, hub
from ddp_eval.system.digests import as_record, digest_strings
from ddp_eval.tasks.generation_requests import Asked
from ddp_eval.tasks.index import Leaf, check_once, drop_members, is_complete
from ddp_eval.tasks.index_cache import reuse_index
from ddp_eval.tasks.lm_eval_patches import describe_document, keep_examples, patched_lm_eval
from ddp_eval.tasks.reasoning import template_arguments
from ddp_eval.tasks.task_checks import check_output_type, check_spec, is_unsafe, refuse_multimodal, refuse_unsafe
from ddp_eval.tasks.task_sources import reading_anew
from ddp_eval.tasks.templates import TemplateCache
from ddp_eval.tasks.tokenization import Encoded, Encoder
from ddp_eval.telemetry.meter import Phases

log = logging.getLogger("ddp_eval")

# Of the requests: nats, whether greedy; of the prompts: the tokens of each answer, the most that it might have.
Answers = tuple[np.ndarray, np.ndarray, list[list[int]], Sequence[int]]
COMPUTING_METRICS = "compute the metrics"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """results: lm_eval's result dict, with "samples"; prompts: SHA-256 of the texts, see `describe_prompts`.

    task_files: SHA-256 of the files that the tasks were made of.
    irregular: what was counted and named of requests and documents, see irregular.py.
    """

    results: dict[str, Any]
    prompts: dict[str, Any]
    task_files: dict[str, str]
    irregular: irregular.Irregular


def max_length_of(model_args: dict[str, Any], model_config: Any, tokenizer: Any) -> int:
    """Tokens that the model attends to at once, by lm_eval's rule. Raises UserError where that is none."""
    given = model_args.get("max_length")
    if given:
        return int(given)
    try:
        found = int(resolve_max_length(model_config, tokenizer))
    except (TypeError, ValueError, OverflowError):
        found = 0
    if found < 1:
        raise UserError("neither the model's config nor its tokenizer has a window of 1 token or more: give max_length=N")
    return found


def evaluate_tasks(
    config: Config,
    encoder: Encoder,
    model_config: Any,
    score: Callable[[Requests, Prompts], Answers],
    keep: Callable[[Scores, Texts], None],
    phases: Phases,
    include_paths: Sequence[str] = (),
    inspect: Callable[[dict[str, Any]], None] | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Outcome:
    """Build the tasks' requests, have them scored, and return lm_eval's results.

    inspect: given `describe_prompts` before anything is scored; may raise UserError.
    score: given all requests and prompts at once, returns (N,) float64 summed log-probabilities, (N,) bool all-argmax, and the
        tokens of each prompt's answer.
    keep: given the scores and texts before metrics are computed, which run the tasks' own code and may fail.
    go_on: called for every task that is loaded and every document whose prompt is built; what it raises ends the run.
    Raises UserError for unknown tasks, tasks of kinds that are not served, and tasks that fail to load.
    """
    phases.switch("tasks")
    environment.start_collecting()
    _check_chat_template(config.apply_chat_template, encoder.tokenizer)
    lm = _LeaderLM(encoder, model_config, score, keep, inspect, config, phases)
    manager = _task_manager(config, include_paths)
    specs = _resolve_tasks(manager, config.tasks)
    _check_before_loading(specs, manager.task_index, config.confirm_run_unsafe_code)
    _watch_loading(manager, lm, config)
    # lm_eval takes the documents in their own order, whatever the order of the list, but numbers them by the list's.
    samples = lm.chosen or None
    pad_token = encoder.tokenizer.pad_token
    configure_pad_token(encoder.tokenizer, model_config=model_config)  # lm_eval names it in the results
    if config.write_out:
        logging.getLogger("lm_eval.evaluator_utils").setLevel(logging.INFO)  # where lm_eval shows prompts
    tracker = EvaluationTracker()
    try:
        with reading_anew() as sources, patched_lm_eval(phases, lm.templates, _unharmed(go_on)):
            results: Any = lm_eval.simple_evaluate(
                model=lm,
                model_args=config.model_args,
                tasks=specs,
                task_manager=manager,
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                samples=samples,
                bootstrap_iters=config.bootstrap_iters,
                write_out=config.write_out,
                delete_requests_cache=config.cache_requests == "delete",
                log_samples=True,
                evaluation_tracker=tracker,
                system_instruction=config.system_instruction,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
                gen_kwargs=config.gen_kwargs or None,
                predict_only=config.predict_only,
                random_seed=config.seed[0],
                numpy_random_seed=config.seed[1],
                torch_random_seed=config.seed[2],
                fewshot_random_seed=config.seed[3],
                confirm_run_unsafe_code=config.confirm_run_unsafe_code,
                metadata=config.metadata,
            )
    except _Scoring as scoring:
        raise scoring.error from None
    except UserError:
        raise
    except SystemExit as error:  # some tasks do, where a program of theirs is missing
        raise _ends_the_program(config.tasks) from error
    except Exception as error:
        if lm.phase == COMPUTING_METRICS:
            raise  # the scores are kept; what a task's own code did wrong shows in its traceback
        if isinstance(error, IndexError) and "size 0" in str(error):
            raise UserError(f"the task {_name_some(config.tasks)} has no documents to evaluate") from error
        if isinstance(error, jinja2.exceptions.TemplateError):
            raise UserError(f"a template in the task {_name_some(config.tasks)} does not work: {one_line(error)}") from error
        raise _failed(lm.phase, config.tasks, error) from error
    finally:
        encoder.tokenizer.pad_token = pad_token
    results["config"]["model"] = config.model
    tracker.general_config_tracker.log_end_time()
    results["task_hashes"] = _hash_samples(results["samples"]) if config.log_samples or config.predict_only else {}
    results.update(dataclasses.asdict(tracker.general_config_tracker))
    results["fewshot_as_multiturn"] = config.fewshot_as_multiturn
    results["config"].update(batch_size=config.batch_size, gen_kwargs=config.gen_kwargs)
    if config.trust_remote_code:
        results["config"]["model_args"] = {**config.model_args, "trust_remote_code": True}
    results["model_source"] = config.model
    results["model_name"] = config.model_name or str(getattr(model_config, "_name_or_path", "") or "model")
    results["model_name_sanitized"] = sanitize_model_name(results["model_name"])
    phases.switch("other")
    without_number = irregular.find_nan(results.get("samples", {}))
    irregular.log_irregular(without_number)
    return Outcome(results, lm.prompts, dict(sorted(sources.files.items())), {**lm.irregular, **without_number})


def _hash_samples(samples: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """By lm_eval's rule (`EvaluationTracker.save_results_aggregated`), one hash a task over documents, prompts and targets."""
    return {
        task: hash_string("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in rows))
        for task, rows in samples.items()
    }


def describe_prompts(instances: Sequence[Instance], tasks: dict[str, Any]) -> dict[str, Any]:
    """One SHA-256 over all texts, one for each task, one over each task's documents, and the tasks' versions.

    The right answers are among the documents, or made of them by `doc_to_target`, whose template counts with them.
    """
    everything = hashlib.sha256()
    by_task: dict[str, Any] = {}
    documents: dict[str, dict[int, Any]] = {}
    for one in instances:
        parts = b"".join(as_record(str(part)) for part in one.args)
        everything.update(as_record(str(one.task_name)) + parts)
        by_task.setdefault(one.task_name, hashlib.sha256()).update(parts)
        documents.setdefault(one.task_name, {})[one.doc_id] = one.doc
    return {
        "prompts_sha256": everything.hexdigest(),
        "prompts_by_task": {task: digest.hexdigest() for task, digest in sorted(by_task.items())},
        "documents_by_task": {
            name: digest_strings([_template_of_targets(tasks.get(name)), *map(_plain_text, found.values())])
            for name, found in sorted(documents.items())
        },
        "versions": {name: getattr(task, "VERSION", None) for name, task in sorted(tasks.items())},
    }


def _template_of_targets(task: Any) -> str:
    """ "" where a task has none, or makes its targets by code."""
    template = getattr(getattr(task, "config", None), "doc_to_target", None)
    return str(template) if isinstance(template, (str, int)) else ""


def _plain_text(document: Any) -> str:
    """A document as JSON, the same in every process: of what neither JSON nor numpy nor a calendar knows, only the kind."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray)):
            return value.tolist()
        return str(value) if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)) else type(value).__name__

    try:
        return json.dumps(document, skipkeys=True, default=plain)
    except (ValueError, RecursionError):  # it holds itself
        return ""


def format_tables(results: dict[str, Any]) -> str:
    """lm_eval's own tables of tasks and groups."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def format_results(results: dict[str, Any]) -> str:
    """The results and the settings of every task, as `lm-eval run --show_config` prints them; what results.json holds."""
    shown = {key: value for key, value in results.items() if key != "samples"}
    if "ddp_eval" in shown:
        shown["ddp_eval"] = {key: value for key, value in shown["ddp_eval"].items() if key != "telemetry"}
    return json.dumps(shown, indent=2, default=handle_non_serializable, ensure_ascii=False)


def list_tasks(what: str, include_path: str | None) -> str:
    """lm_eval's table of its tasks, groups, subtasks or tags, the demo's and those of `include_path` among them."""
    leave_out = {"tasks": (), "groups": ("subtasks", "tags"), "subtasks": ("groups", "tags"), "tags": ("groups", "subtasks")}
    with reuse_index():
        manager = TaskManager(include_path=_include_paths([demo.TASKS_PATH], include_path))
        return str(manager.list_all_tasks(**{f"list_{kind}": False for kind in leave_out[what]}))


def validate_tasks(tasks: Sequence[str], include_path: str | None) -> tuple[int, list[str]]:
    """How many tasks these names lead to, and those among them that a run has to allow by --confirm_run_unsafe_code.

    Their Python files are run, as a run does; no documents are fetched. Raises UserError, with a run's own sentence, for unknown
    tasks and those that could not run.
    """
    config = Config(tasks=list(tasks), include_path=include_path)
    manager = _task_manager(config, [demo.TASKS_PATH])
    specs = _resolve_tasks(manager, tasks)
    leaves = {leaf.trail[-1]: leaf for leaf in _check_before_loading(specs, manager.task_index, allows_unsafe=True)}
    names = {name for leaf in leaves.values() for name in leaf.trail}
    files = {spec for spec in specs if isinstance(spec, str) and spec not in manager.task_index}
    files |= {str(manager.task_index[name].yaml_path) for name in names if name in manager.task_index}
    try:
        with reading_anew():
            contents = [load_yaml(file, resolve_func=True) for file in sorted(files - {"None"})]
    except SystemExit as error:
        raise _ends_the_program(tasks) from error
    except Exception as error:
        raise _failed("load the documents", tasks, error) from error
    for content in contents:
        if "class" in content:
            _check_class(str(content.get("task")), content["class"])
    return len(leaves), sorted(name for name, leaf in leaves.items() if is_unsafe(leaf))


def _failed(phase: str, tasks: Sequence[Any], error: Exception) -> UserError:
    return UserError(f"lm_eval could not {phase} of {_name_some(tasks)}: {_describe(error)}")


def _ends_the_program(tasks: Sequence[Any]) -> UserError:
    return UserError(f"the code of {_name_some(tasks)} ends the program: what it has printed says why")


class _Scoring(Exception):
    """Carries an error of ours through lm_eval unharmed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def _unharmed(deed: Callable[[], None]) -> Callable[[], None]:
    """`deed` whose errors lm_eval cannot mistake for its own."""

    def do() -> None:
        try:
            deed()
        except BaseException as error:
            raise _Scoring(error) from error

    return do


def _behind(deed: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def do(*args: Any, **options: Any) -> Any:
        deed()
        return function(*args, **options)

    return do


class _LeaderLM(TemplateLM):
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
                raise _Scoring(error) from error
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
        pair_sums, pair_tokens = _sum_by_owner(encoded_pairs, sums[:num_pairs], len(pairs))
        text_sums, text_tokens = _sum_by_owner(encoded_texts, sums[num_pairs:], len(texts))
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


def _task_manager(config: Config, include_paths: Sequence[str]) -> TaskManager:
    paths = _include_paths(include_paths, config.include_path)
    metadata = {**config.model_args, **config.metadata}
    try:
        manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        # Reading lm_eval's own 14,000 task files takes seconds: only for those who ask for one of them.
        if is_complete(config.tasks, manager.task_index):
            return manager
        unknown = [name for name in config.tasks if isinstance(name, str) and name not in manager.task_index]
        with reuse_index() as takes_seconds:
            if unknown and takes_seconds:
                log.warning("looking %s up in lm_eval's index of tasks", _name_some(unknown))
            return TaskManager(include_path=paths, metadata=metadata)
    except Exception as error:
        raise UserError(f"lm_eval could not read the task files: {_describe(error)}") from error


def _include_paths(paths: Sequence[str], more: str | None) -> list[str]:
    found = [*paths, *([more] if more else [])]
    for path in found:
        if not os.path.isdir(path):
            raise UserError(f"--include_path must be a directory of task files, got {path}")
        for file in Path(path).rglob("*.yaml"):  # lm_eval opens all of them, and would wait for a pipe
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise UserError(f"--include_path must hold regular files, and {file} is none")
    return found


def _resolve_tasks(manager: TaskManager, tasks: Sequence[Any]) -> list[Any]:
    """Names, glob patterns, YAML files and directories of them -> what TaskManager.load takes, each once."""
    if not tasks:
        raise UserError("no tasks were given")
    found: list[Any] = []
    for task in tasks:
        if not isinstance(task, str):
            found.append(task)
            continue
        matches = drop_members(manager.match_tasks([task]), manager.task_index)
        if not matches and task.endswith((".yaml", ".yml")):
            matches = [os.path.abspath(path) for path in sorted(glob.glob(task)) if os.path.isfile(path)]
        elif not matches and os.path.isdir(task):
            matches = [os.path.abspath(path) for path in sorted(glob.glob(os.path.join(task, "*.yaml"))) if os.path.isfile(path)]
        if not matches:
            raise UserError(f"there is no task {task}: {_list_close(task, manager.all_tasks)}")
        found += [match for match in matches if match not in found]
    check_once([name for name in found if isinstance(name, str) and name in manager.task_index], manager.task_index)
    return found


def _check_before_loading(specs: Sequence[Any], index: Any, allows_unsafe: bool) -> list[Leaf]:
    """Refuse what could not run before documents are fetched, which may take hours. Returns the tasks, as far as files tell."""
    contents = [_read_task_file(spec) if isinstance(spec, str) and spec not in index else spec for spec in specs]
    # A program may also give tasks that it has made.
    named = (one for one in contents if isinstance(one, (str, Mapping)))
    leaves = [leaf for content in named for leaf in check_spec(content, index, allows_unsafe)]
    return leaves


def _read_task_file(path: str) -> dict[str, Any]:
    try:
        return load_yaml(path, resolve_func=False)
    except Exception as error:
        raise UserError(f"lm_eval could not read the task file {path}: {_describe(error)}") from error


def _check_chat_template(wanted: bool | str, tokenizer: Any) -> None:
    """A tokenizer has no chat template, one without a name, or several by name."""
    template = getattr(tokenizer, "chat_template", None)
    if not wanted:
        return
    if not template:
        raise UserError("--apply_chat_template needs a tokenizer with a chat template, and this one has none")
    names = sorted(template) if isinstance(template, dict) else []
    if isinstance(wanted, str) and not names:
        raise UserError(f"there is no chat template {wanted}: the tokenizer has a single one, give --apply_chat_template alone")
    if names and (wanted if isinstance(wanted, str) else "default") not in names:
        raise UserError(f"--apply_chat_template must name one of the tokenizer's templates: {', '.join(names)}")


def _list_close(task: str, known: Iterable[str]) -> str:
    return _find_close(task, known) or "`python -m ddp_eval ls tasks` lists all, --include_path DIR adds your own"


def _find_close(task: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(task, list(known), n=3, cutoff=0.75)
    return f"did you mean {' or '.join(close)}?" if close else None


def _watch_loading(manager: TaskManager, lm: _LeaderLM, config: Config) -> None:
    """Have the tasks that simple_evaluate loads checked and known to `lm` before their requests are built."""
    load = manager.load

    def load_and_check(specs: Any) -> Any:
        loaded = load(specs)
        for name, task in loaded["tasks"].items():
            _check_task(name, task, config.confirm_run_unsafe_code)
            _watch_metrics(name, task, lm.chosen.get(name, ()))
            _check_thinking(name, task.OUTPUT_TYPE, config)
        for name in lm.chosen:
            if name not in loaded["tasks"]:
                hint = _find_close(name, loaded["tasks"]) or "add it there"
                raise UserError(
                    f"--samples names the task {name}, which is not among --tasks ({_name_some(config.tasks)}): {hint}"
                )
            count = len(loaded["tasks"][name].eval_docs)
            if lm.chosen[name][-1] >= count:
                raise UserError(
                    f"--samples asks for document {lm.chosen[name][-1]} of the task {name}, whose documents are 0 to {count - 1}"
                )
        _say_what_is_ignored(loaded["tasks"], config)
        keep_examples(lm.templates, loaded["tasks"].values())
        lm.tasks = loaded["tasks"]
        lm.phase = "build the requests"
        return loaded

    manager.load = load_and_check


def _watch_metrics(name: str, task: Any, chosen: Sequence[int]) -> None:
    """Every document's metrics are progress, and the watch knows whose they are. chosen: numbers of the documents, if not all."""
    iterate = task.doc_iterator

    def iterate_and_name(**options: Any) -> Iterator[Any]:
        for number, document in iterate(**options):
            watchdog.renew(describe_document(name, chosen[number] if chosen else number))
            yield number, document
        watchdog.renew("")

    task.doc_iterator = iterate_and_name
    task.process_results = _behind(watchdog.renew, task.process_results)
    task.apply_filters = _behind(lambda: watchdog.renew(f"the filters of task {name}"), task.apply_filters)


def _check_task(name: str, task: Any, allows_unsafe: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        refuse_multimodal(name)
    check_output_type(name, getattr(task, "OUTPUT_TYPE", None))
    if getattr(task, "UNSAFE_CODE", False) and not allows_unsafe:
        refuse_unsafe(name)
    if not len(task.eval_docs):
        raise UserError(f"the task {name} has no documents to evaluate")


def _check_class(name: str, kind: type) -> None:
    """The same of a task that is written in Python and not made, as far as its class tells: a config decides in the others."""
    if getattr(kind, "MULTIMODAL", False):
        refuse_multimodal(name)
    if not issubclass(kind, ConfigurableTask):
        check_output_type(name, getattr(kind, "OUTPUT_TYPE", None))


def _check_thinking(name: str, kind: str, config: Config) -> None:
    if config.model_args.get("enable_thinking") and kind != "generate_until":
        raise UserError(f"enable_thinking=True is for tasks that generate text, and {name} is of the type {kind}: leave it out")


def _say_what_is_ignored(tasks: Mapping[str, Any], config: Config) -> None:
    """lm_eval drops these in silence. Of its cache of prompts, which knows a task by its name alone, none is ever read."""
    if config.cache_requests in ("true", "refresh"):
        log.warning("--cache_requests is ignored: prompts are built in every run, so that none is of an earlier task file")
    fixed = [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0]
    if config.num_fewshot and fixed:
        log.warning("--num_fewshot is ignored for tasks that are fixed at 0 examples: %s", _name_some(fixed))
    if config.gen_kwargs and not any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values()):
        log.warning("--gen_kwargs is ignored: no task generates text")


def _sum_by_owner(encoded: Encoded, sums: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count,) log-probabilities and (count,) scored tokens of each text request, its windows added up."""
    totals = np.bincount(encoded.owner, weights=sums, minlength=count).astype(np.float64)  # of nothing it makes whole numbers
    tokens = np.bincount(encoded.owner, weights=encoded.requests.num_targets, minlength=count)
    return totals, tokens.astype(np.int64)


def _name_some(tasks: Sequence[Any]) -> str:
    names = [task if isinstance(task, str) else "a task given as a config" for task in tasks]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _describe(error: BaseException) -> str:
    """An error of lm_eval or of a task's own code in one line."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # the other says no more than that there was an error
    return f"{type(error).__name__}: {one_line(error) or 'no message'}{hub.advice(error)}"
