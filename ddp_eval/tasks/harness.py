"""lm_eval's side of the run: tasks in, scores out. Only the leader imports this module.

Of lm_eval's tasks and evaluator it is the sole importer, but for lm_eval_patches.py and task_sources.py, which list what is
replaced in them, and index_cache.py, which keeps its index of task files. asking.py takes lm_eval's rules for texts, trackers.py
its loggers; lm.py is the other way round: ddp_eval as a model of lm_eval.

lm_eval builds every prompt once, for one rank (`world_size=1`), asks our LM object for log-likelihoods, and computes metrics
from the answers. The first question it asks is answered for all requests of all tasks at once, so that one plan holds them all.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import lm_eval
import lm_eval.utils
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import configure_pad_token, resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string, make_table, sanitize_model_name

from ddp_eval.config import Config
from ddp_eval.distributed import watchdog
from ddp_eval.errors import UserError, one_line
from ddp_eval.output import irregular
from ddp_eval.output.tables import Scores, Texts
from ddp_eval.packs.batches import Prompts
from ddp_eval.packs.requests import Requests
from ddp_eval.system import environment
from ddp_eval.tasks.collector import COMPUTING_METRICS, Answers, RequestCollector, ScoringFailed, as_scoring_error, calling_first
from ddp_eval.tasks.lm_eval_patches import describe_document, keep_examples, patched_lm_eval
from ddp_eval.tasks.select import (
    check_before_loading,
    check_chat_template,
    check_task,
    check_thinking,
    ends_the_program,
    find_close,
    make_task_manager,
    name_some,
    resolve_tasks,
    task_failed,
    warn_of_ignored_flags,
)
from ddp_eval.tasks.task_sources import reading_anew
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

log = logging.getLogger("ddp_eval")


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
    check_chat_template(config.apply_chat_template, encoder.tokenizer)
    lm = RequestCollector(encoder, model_config, score, keep, inspect, config, phases)
    manager = make_task_manager(config, include_paths)
    specs = resolve_tasks(manager, config.tasks)
    check_before_loading(specs, manager.task_index, config.confirm_run_unsafe_code)
    _watch_loading(manager, lm, config)
    # lm_eval takes the documents in their own order, whatever the order of the list, but numbers them by the list's.
    samples = lm.chosen or None
    pad_token = encoder.tokenizer.pad_token
    configure_pad_token(encoder.tokenizer, model_config=model_config)  # lm_eval names it in the results
    if config.write_out:
        logging.getLogger("lm_eval.evaluator_utils").setLevel(logging.INFO)  # where lm_eval shows prompts
    tracker = EvaluationTracker()
    try:
        with reading_anew() as sources, patched_lm_eval(phases, lm.templates, as_scoring_error(go_on)):
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
    except ScoringFailed as scoring:
        raise scoring.error from None
    except UserError:
        raise
    except SystemExit as error:  # some tasks do, where a program of theirs is missing
        raise ends_the_program(config.tasks) from error
    except Exception as error:
        if lm.phase == COMPUTING_METRICS:
            raise  # the scores are kept; what a task's own code did wrong shows in its traceback
        if isinstance(error, IndexError) and "size 0" in str(error):
            raise UserError(f"the task {name_some(config.tasks)} has no documents to evaluate") from error
        if isinstance(error, jinja2.exceptions.TemplateError):
            raise UserError(f"a template in the task {name_some(config.tasks)} does not work: {one_line(error)}") from error
        raise task_failed(lm.phase, config.tasks, error) from error
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


def _watch_loading(manager: TaskManager, lm: RequestCollector, config: Config) -> None:
    """Have the tasks that simple_evaluate loads checked and known to `lm` before their requests are built."""
    load = manager.load

    def load_and_check(specs: Any) -> Any:
        loaded = load(specs)
        for name, task in loaded["tasks"].items():
            check_task(name, task, config.confirm_run_unsafe_code)
            _watch_metrics(name, task, lm.chosen.get(name, ()))
            check_thinking(name, task.OUTPUT_TYPE, config)
        for name in lm.chosen:
            if name not in loaded["tasks"]:
                hint = find_close(name, loaded["tasks"]) or "add it there"
                raise UserError(
                    f"--samples names the task {name}, which is not among --tasks ({name_some(config.tasks)}): {hint}"
                )
            count = len(loaded["tasks"][name].eval_docs)
            if lm.chosen[name][-1] >= count:
                raise UserError(
                    f"--samples asks for document {lm.chosen[name][-1]} of the task {name}, whose documents are 0 to {count - 1}"
                )
        warn_of_ignored_flags(loaded["tasks"], config)
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
    task.process_results = calling_first(watchdog.renew, task.process_results)
    task.apply_filters = calling_first(lambda: watchdog.renew(f"the filters of task {name}"), task.apply_filters)
