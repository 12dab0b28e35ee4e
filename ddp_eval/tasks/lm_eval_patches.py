"""All that is replaced inside lm_eval while it evaluates, each with its reason. Everything is put back when the block ends.

What belongs to one subject stands in a module of its own: task_sources.py has the replacements that read tasks as their files are
now, and is entered here; index_cache.py has lm_eval's index of task files, which is read before.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.loggers.evaluation_tracker
import lm_eval.utils
from lm_eval.api.samplers import ContextSampler, FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from torch.utils import collect_env
from transformers import AutoTokenizer

from ddp_eval.distributed import watchdog
from ddp_eval.errors import UserError
from ddp_eval.system import environment
from ddp_eval.system.machine import describe_commit
from ddp_eval.system.quiet import prompt_bar, quiet_libraries
from ddp_eval.tasks.bootstrap import bootstrap_stderr
from ddp_eval.tasks.document_rows import dump_document, iterate_rows
from ddp_eval.tasks.kept_setup import KeptSetup
from ddp_eval.tasks.patch import Patch, apply
from ddp_eval.tasks.task_sources import TaskSources, reading_anew
from ddp_eval.tasks.templates import TemplateCache, forget_literals, parse_literal
from ddp_eval.telemetry.meter import Phases


class Hooks(NamedTuple):
    """What is called out of lm_eval.

    on_loaded:  given the tasks, by name, once all are loaded; may raise UserError.
    on_progress: called for every task that is loaded and every document whose prompt is built; what it raises ends the run.
    kept: asked for each task and its requests before lm_eval makes them.
    """

    on_loaded: Callable[[Mapping[str, Any]], None]
    on_progress: Callable[[], None]
    kept: KeptSetup | None = None


@contextlib.contextmanager
def patched_lm_eval(
    manager: TaskManager,
    templates: TemplateCache,
    chosen: Mapping[str, Sequence[int]],
    phases: Phases,
    hooks: Hooks,
    trust_remote_code: bool = False,
) -> Iterator[TaskSources]:
    """Replace what is slow, forks, prints or reads stale files, and report progress. Yields the files that tasks are made of.

    chosen: {task: ascending document numbers}, of tasks of which not all documents are evaluated.
    trust_remote_code: whether the run allows Python code of a model or data set.
    """
    with contextlib.ExitStack() as stack:
        sources = stack.enter_context(reading_anew())

        def prepare(tasks: Mapping[str, Any]) -> None:
            hooks.on_loaded(tasks)
            for name, task in tasks.items():
                apply(_patches_of_task(name, task, chosen.get(name, ())), stack)
            keep_examples(templates, tasks.values())

        apply(_patches(templates, phases), stack)
        apply(_patches_of_progress(manager, hooks, prepare), stack)
        apply([] if trust_remote_code else [_no_code_of_tokenizers()], stack)
        stack.enter_context(quiet_libraries())
        stack.callback(forget_literals)
        stack.callback(templates.forget_documents)
        yield sources


def _patches(templates: TemplateCache, phases: Phases) -> list[Patch]:
    commit = describe_commit(os.getcwd()) or get_commit_from_path(os.getcwd())
    describe_machine = _timed(phases, "write", lambda: environment.start_collecting().result())
    of_rank_zero = types.SimpleNamespace(**vars(os) | {"environ": {**os.environ, "LOCAL_RANK": "0"}})
    our_json = types.SimpleNamespace(**vars(json) | {"dumps": dump_document})
    our_ast = types.SimpleNamespace(**vars(ast) | {"literal_eval": parse_literal})
    return [
        Patch(lm_eval.utils, "apply_template", templates.render, "compiles a template again for every document and example"),
        Patch(lm_eval.api.task, "ast", our_ast, "parses the same choices of an example again for every document"),
        Patch(
            lm_eval.loggers.evaluation_tracker, "random_name_id", lambda: "model",
            "draws an unused model name from `random`, and so changes what templates draw from there",
        ),
        Patch(
            lm_eval.evaluator, "os", of_rank_zero,
            "returns nothing on other local ranks than 0, and such a rank of a larger launch may evaluate alone",
        ),
        Patch(
            lm_eval.evaluator, "get_git_commit_hash", lambda: commit,
            "asks git for the working directory's commit, which prints an error of its own where there is none",
        ),
        Patch(
            lm_eval.api.metrics, "bootstrap_stderr", _timed(phases, "bootstrap", bootstrap_stderr),
            "forks a process per core, which can hang",
        ),
        Patch(collect_env, "get_pretty_env_info", describe_machine, "runs a dozen programs when all is done"),
        Patch(lm_eval.evaluator, "json", our_json, "writes each document, for its digest, by an encoder written in Python"),
        Patch(
            datasets.Dataset, "__iter__", iterate_rows(datasets.Dataset.__iter__),
            "makes a table of each row, for each of the two times that lm_eval goes through the documents", "datasets 5.2",
        ),
    ]  # fmt: skip


def _no_code_of_tokenizers() -> Patch:
    """The tasks RULER and BABILong load the tokenizer that model_args or metadata name, always with trust_remote_code=True."""
    from_pretrained = AutoTokenizer.from_pretrained

    def from_pretrained_without_code(*names: Any, **options: Any) -> Any:
        return from_pretrained(*names, **{**options, "trust_remote_code": False})

    why = "lets tasks run the Python code of a repository that nobody has allowed"
    return Patch(AutoTokenizer, "from_pretrained", from_pretrained_without_code, why)


def _patches_of_progress(manager: TaskManager, hooks: Hooks, prepare: Callable[[Mapping[str, Any]], None]) -> list[Patch]:
    on_progress, kept = hooks.on_progress, hooks.kept
    building = _Building(on_progress)
    build_task, build_requests = TaskFactory._build_task, Task.build_all_requests
    if kept is not None:
        build_task, build_requests = _asking_first(kept, build_task, build_requests)
    return [
        Patch(
            manager,
            "load",
            _load_and_prepare(manager.load, prepare),
            "is followed at once by the building of requests: only here can the tasks be checked",
        ),
        Patch(
            TaskFactory,
            "_build_task",
            _build_and_go_on(build_task, on_progress),
            "may load tasks for hours in silence",
        ),
        Patch(Task, "build_all_requests", building.naming_the_task(build_requests), "gives its bar no task's name"),
        Patch(lm_eval.api.task, "tqdm", building.bar, "leaves its bars on the screen, and a long step must be seen to go on"),
    ]


def _patches_of_task(name: str, task: Any, chosen: Sequence[int]) -> list[Patch]:
    """Every document's metrics are progress, and the watchdog names the document. chosen: the documents' numbers, if not all."""
    touch_filters = _call_before(lambda: watchdog.touch(f"the filters of task {name}"), task.apply_filters)
    silent = "computes metrics, which may take long, in silence"
    return [
        Patch(task, "doc_iterator", _naming_documents(name, task.doc_iterator, chosen), silent),
        Patch(task, "process_results", _call_before(watchdog.touch, task.process_results), silent),
        Patch(task, "apply_filters", touch_filters, silent),
    ]


def _load_and_prepare(load: Callable[[Any], Any], prepare: Callable[[Mapping[str, Any]], None]) -> Callable[[Any], Any]:
    def load_and_prepare(specs: Any) -> Any:
        loaded = load(specs)
        prepare(loaded["tasks"])
        return loaded

    return load_and_prepare


def _asking_first(
    kept: KeptSetup, build_task: Callable[..., Any], build_requests: Callable[..., None]
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """lm_eval's methods that make a task and its requests, with those that are there already passed over."""

    def load(factory: Any, entry: Any, overrides: Any) -> Any:
        return kept.load(build_task, factory, entry, overrides)

    def build(task: Any, **options: Any) -> None:
        kept.build(build_requests, task, options)

    return load, build


def _build_and_go_on(build: Callable[..., Any], on_progress: Callable[[], None]) -> Callable[..., Any]:
    def build_and_go_on(factory: Any, entry: Any, *args: Any, **options: Any) -> Any:
        watchdog.touch(f"loading task {entry.name}")
        on_progress()
        try:
            return build(factory, entry, *args, **options)
        except IndexError as error:
            if "size 0" in str(error):  # it looks at the first
                raise UserError(f"the task {entry.name} has no documents to evaluate") from error
            raise

    return build_and_go_on


class _Building:
    """The task whose requests lm_eval builds: the watchdog names the document in hand, and a bar counts them."""

    def __init__(self, on_progress: Callable[[], None]) -> None:
        self._go_on = on_progress
        self._task = ""
        self._chosen: Sequence[int] = ()

    def naming_the_task(self, build_all_requests: Callable[..., None]) -> Callable[..., None]:
        def build(task: Any, **options: Any) -> None:
            self._task, self._chosen = task.config.task, sorted(set(options.get("samples") or ()))
            build_all_requests(task, **options)
            watchdog.touch("")

        return build

    def bar(self, documents: Iterable[Any], total: int) -> Any:
        named = _name_each(documents, self._task, self._chosen)
        return prompt_bar(call_between(self._go_on, named), total)


def call_between(action: Callable[[], None], documents: Iterable[Any]) -> Iterator[Any]:
    for document in documents:
        action()
        yield document


def _naming_documents(name: str, iterate: Callable[..., Iterator[Any]], chosen: Sequence[int]) -> Callable[..., Iterator[Any]]:
    def iterate_and_name(**options: Any) -> Iterator[Any]:
        yield from _name_each(iterate(**options), name, chosen)
        watchdog.touch("")

    return iterate_and_name


def _name_each(documents: Iterable[Any], name: str, chosen: Sequence[int]) -> Iterator[Any]:
    """Let the watchdog know which document is in hand. documents: (number, document); chosen: the numbers of those chosen."""
    for number, document in documents:
        watchdog.touch(f"task {name}, document {chosen[number] if chosen else number}")
        yield number, document


def _call_before(action: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def do(*args: Any, **options: Any) -> Any:
        action()
        return function(*args, **options)

    return do


def _timed(phases: Phases, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def do(*args: Any, **options: Any) -> Any:
        with phases(phase):
            return function(*args, **options)

    return do


def keep_examples(templates: TemplateCache, tasks: Collection[Any]) -> None:
    """Have few-shot examples rendered once, except for those that a task's own code sees: it might change them."""
    seen_by_code = {id(example) for task in tasks if not _is_declared(task) for example in _examples_of(task)}
    examples = (example for task in tasks for example in _examples_of(task))
    templates.keep(example for example in examples if id(example) not in seen_by_code)


def _examples_of(task: Any) -> Sequence[Any]:
    examples = getattr(getattr(task, "sampler", None), "df", None)
    return examples if isinstance(examples, list) else ()


def _is_declared(task: Any) -> bool:
    """Whether templates and lm_eval's own code are all that builds the task's prompts."""
    if type(task) is not ConfigurableTask or task.prompt is not None:
        return False
    if type(getattr(task, "sampler", None)) not in (ContextSampler, FirstNSampler):
        return False
    names = ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "description")
    sources = [getattr(config, name, None) for config in (task.config, task.fewshot_cfg) for name in names]
    return all(isinstance(source, (str, int, list, dict, type(None))) for source in sources)
