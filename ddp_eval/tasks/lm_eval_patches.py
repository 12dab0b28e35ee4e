"""What of lm_eval 0.4.13 is replaced while it evaluates, each with its reason. Everything is put back when the block ends."""

from __future__ import annotations

import ast
import contextlib
import os
import types
import unittest.mock
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler, FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.tasks._factory import TaskFactory

from ddp_eval.distributed import watchdog
from ddp_eval.errors import UserError
from ddp_eval.system import environment
from ddp_eval.system.machine import describe_commit
from ddp_eval.system.quiet import less_chatter, prompt_bar
from ddp_eval.tasks.bootstrap import bootstrap_stderr
from ddp_eval.tasks.templates import TemplateCache, forget_literals, parse_literal
from ddp_eval.telemetry.meter import Phases


@contextlib.contextmanager
def patched_lm_eval(phases: Phases, templates: TemplateCache, go_on: Callable[[], None]) -> Iterator[None]:
    """Replace what is slow, forks or prints.

    go_on: called for every task that is loaded and every document whose prompt is built; what it raises ends the run.
    """
    patch = unittest.mock.patch
    commit = describe_commit(os.getcwd()) or get_commit_from_path(os.getcwd())
    describe = _timed(phases, "write", lambda: environment.start_collecting().result())
    build = TaskFactory._build_task

    def build_and_go_on(factory: Any, entry: Any, *args: Any, **options: Any) -> Any:
        watchdog.renew(f"loading task {entry.name}")
        go_on()
        try:
            return build(factory, entry, *args, **options)
        except IndexError as error:
            if "size 0" in str(error):  # it looks at the first
                raise UserError(f"the task {entry.name} has no documents to evaluate") from error
            raise

    build_requests = Task.build_all_requests
    current: dict[str, Any] = {"name": ""}

    def build_requests_of(task: Any, **options: Any) -> None:
        current.update(name=task.config.task, samples=sorted(set(options.get("samples") or ())))
        build_requests(task, **options)
        watchdog.renew("")

    def show_documents(documents: Any, total: int) -> Any:
        return prompt_bar(_between(go_on, _naming(documents, **current)), total)

    with (
        # It compiles a template anew for every document and every example.
        patch("lm_eval.utils.apply_template", templates.render),
        # It parses the same choices of an example again for every document.
        patch("lm_eval.api.task.ast", types.SimpleNamespace(**vars(ast) | {"literal_eval": parse_literal})),
        # It draws an unused model name from `random`, and so changes what templates draw from there.
        patch("lm_eval.loggers.evaluation_tracker.random_name_id", lambda: "model"),
        # On a rank of a larger launch that evaluates alone, it would take itself for another's helper and return nothing.
        patch("lm_eval.evaluator.os", types.SimpleNamespace(**vars(os) | {"environ": {**os.environ, "LOCAL_RANK": "0"}})),
        # It asks git for the working directory's commit, which prints an error of its own where there is none.
        patch("lm_eval.evaluator.get_git_commit_hash", lambda: commit),
        # It forks a process per core, which can hang.
        patch("lm_eval.api.metrics.bootstrap_stderr", _timed(phases, "bootstrap", bootstrap_stderr)),
        # It runs a dozen programs when all is done.
        patch("torch.utils.collect_env.get_pretty_env_info", describe),
        # Its bars stay on the screen; and a long step must be seen to go on.
        patch("lm_eval.api.task.tqdm", show_documents),
        patch.object(Task, "build_all_requests", build_requests_of),
        patch.object(TaskFactory, "_build_task", build_and_go_on),
        less_chatter(),
    ):
        try:
            yield
        finally:
            templates.forget_documents()
            forget_literals()


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


def _between(action: Callable[[], None], documents: Iterable[Any]) -> Iterator[Any]:
    for document in documents:
        action()
        yield document


def _naming(documents: Iterable[Any], name: str, samples: Sequence[int] = ()) -> Iterator[Any]:
    """Let the watch know which document is in hand. documents: (number, document); samples: the numbers of those chosen."""
    for number, document in documents:
        watchdog.renew(describe_document(name, samples[number] if samples else number))
        yield number, document


def describe_document(task: str, number: int) -> str:
    return f"task {task}, document {number}"


def _timed(phases: Phases, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def do(*args: Any, **options: Any) -> Any:
        with phases(phase):
            return function(*args, **options)

    return do
