"""lm_eval's side of the run: tasks in, scores out. Only the leader imports this module.

lm_eval builds every prompt once, for one rank (`world_size=1`), asks our LM object (collector.py) for answers, and computes
metrics from them. The first question it asks is answered for all requests of all tasks at once, so that one plan holds them all.
What is replaced inside lm_eval meanwhile is in lm_eval_patches.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import configure_pad_token, resolve_max_length
from lm_eval.utils import handle_non_serializable, hash_string, make_table, sanitize_model_name

from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.output import irregular
from ddp_eval.system import environment
from ddp_eval.tasks.collector import RequestCollector
from ddp_eval.tasks.kept_setup import KeptSetup
from ddp_eval.tasks.lm_eval_patches import Hooks, patched_lm_eval
from ddp_eval.tasks.reasoning import template_arguments
from ddp_eval.tasks.request_types import Answers, Asked
from ddp_eval.tasks.select import check_before_loading, check_chat_template, check_loaded, make_task_manager, resolve_tasks
from ddp_eval.tasks.task_errors import Stage, blaming, errors_pass_through
from ddp_eval.tasks.task_sources import TaskSources
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases


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
    answer: Callable[[Asked], Answers],
    phases: Phases,
    include_paths: Sequence[str] = (),
    on_progress: Callable[[], None] = lambda: None,
    kept: KeptSetup | None = None,
) -> Outcome:
    """Build the tasks' requests, have them answered, and return lm_eval's results.

    answer: called once with all requests. It writes what is to be kept of its answers (`asked.tables`) before it returns: metrics
        run the tasks' own code, which may fail. May raise UserError.
    on_progress: called for every task that is loaded and every document whose prompt is built; what it raises ends the run.
    kept: what earlier evaluations have left to this one, and it to the next.
    Raises UserError for unknown tasks, tasks of kinds that are not served, and tasks that fail to load.
    """
    phases.switch("tasks")
    environment.start_collecting()
    given_template = template_arguments(config.model_args).get("chat_template")
    check_chat_template(config.apply_chat_template, encoder.tokenizer, given_template)
    if config.trust_remote_code:  # as lm_eval's command does; datasets 4 and newer run no code of data sets
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = True
    lm = RequestCollector(encoder, model_config, answer, config, phases, kept)
    manager = make_task_manager(config, include_paths)
    specs = resolve_tasks(manager, config.tasks)
    check_before_loading(specs, manager.task_index, config.confirm_run_unsafe_code)
    if config.write_out:
        logging.getLogger("lm_eval.evaluator_utils").setLevel(logging.INFO)  # where lm_eval shows prompts

    def on_loaded(tasks: Mapping[str, Any]) -> None:
        check_loaded(tasks, config)
        lm.begin_building(tasks)

    hooks = Hooks(on_loaded, errors_pass_through()(on_progress), kept)
    with _pad_token_set(encoder.tokenizer, model_config):
        tracker = EvaluationTracker()
        with (
            blaming(config.tasks, lambda: lm.stage),
            patched_lm_eval(manager, lm.templates, lm.chosen, phases, hooks, _trusts_code(config)) as sources,
            _keeping(kept, lm, sources),
        ):
            results: Any = lm_eval.simple_evaluate(
                model=lm,
                tasks=specs,
                task_manager=manager,
                # lm_eval takes the documents in their own order, whatever the order of the list, but numbers them by the list's.
                samples=dict(lm.chosen) or None,
                evaluation_tracker=tracker,
                **_options_of(config),
            )
    _stamp(results, config, model_config, tracker)
    phases.switch("other")
    without_number = irregular.find_nan(results.get("samples", {}))
    irregular.log_irregular(without_number)
    return Outcome(results, lm.fingerprints, dict(sorted(sources.files.items())), {**lm.irregular, **without_number})


def _trusts_code(config: Config) -> bool:
    """By the flag or, from Python, by model_args: either lets the model's loader run code."""
    return bool(config.loader_args.get("trust_remote_code"))


def _options_of(config: Config) -> dict[str, Any]:
    """The settings as `lm_eval.simple_evaluate` takes them."""
    return {
        "model_args": config.model_args,
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "bootstrap_iters": config.bootstrap_iters,
        "write_out": config.write_out,
        "delete_requests_cache": config.cache_requests == "delete",
        "log_samples": True,
        "system_instruction": config.system_instruction,
        "apply_chat_template": config.apply_chat_template,
        "fewshot_as_multiturn": bool(config.fewshot_as_multiturn),
        "gen_kwargs": config.gen_kwargs or None,
        "predict_only": config.predict_only,
        "random_seed": config.seed[0],
        "numpy_random_seed": config.seed[1],
        "torch_random_seed": config.seed[2],
        "fewshot_random_seed": config.seed[3],
        "confirm_run_unsafe_code": config.confirm_run_unsafe_code,
        "metadata": config.metadata,
    }


@contextlib.contextmanager
def _keeping(kept: KeptSetup | None, lm: RequestCollector, sources: TaskSources) -> Iterator[None]:
    """Keep the set-up for the next model, also where this one could not be scored, but not where a task's own code failed."""
    if kept is None:
        yield
        return
    kept.begin(lm.settings, lm.encoder, sources)
    try:
        yield
    except BaseException:
        if lm.fingerprints and lm.stage is not Stage.METRICS:
            kept.end(sources)
        else:
            kept.forget()
        raise
    kept.end(sources)


@contextlib.contextmanager
def _pad_token_set(tokenizer: Any, model_config: Any) -> Iterator[None]:
    """Give the tokenizer the pad token that lm_eval would: it is named in the results."""
    pad_token = tokenizer.pad_token
    configure_pad_token(tokenizer, model_config=model_config)
    try:
        yield
    finally:
        tokenizer.pad_token = pad_token


def _stamp(results: dict[str, Any], config: Config, model_config: Any, tracker: EvaluationTracker) -> None:
    """Add to lm_eval's results what `lm-eval run` adds to them."""
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
