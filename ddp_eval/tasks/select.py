"""Which tasks names and files lead to, and what must be right before a model is loaded for them."""

from __future__ import annotations

import difflib
import glob
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ddp_eval import demo
from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.tasks.index import Leaf, check_once, drop_members, is_complete
from ddp_eval.tasks.index_cache import reuse_index
from ddp_eval.tasks.request_types import makes_text
from ddp_eval.tasks.task_checks import check_output_type, check_spec, is_unsafe, refuse_multimodal, refuse_unsafe
from ddp_eval.tasks.task_errors import Stage, describe_error, ends_the_program, name_some, task_failed
from ddp_eval.tasks.task_sources import reading_anew

log = logging.getLogger("ddp_eval")


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
    manager = make_task_manager(config, [demo.TASKS_PATH])
    specs = resolve_tasks(manager, tasks)
    leaves = {leaf.trail[-1]: leaf for leaf in check_before_loading(specs, manager.task_index, allows_unsafe=True)}
    names = {name for leaf in leaves.values() for name in leaf.trail}
    files = {spec for spec in specs if isinstance(spec, str) and spec not in manager.task_index}
    files |= {str(manager.task_index[name].yaml_path) for name in names if name in manager.task_index}
    try:
        with reading_anew():
            contents = [load_yaml(file, resolve_func=True) for file in sorted(files - {"None"})]
    except SystemExit as error:
        raise ends_the_program(tasks) from error
    except Exception as error:
        raise task_failed(Stage.LOADING, tasks, error) from error
    for content in contents:
        if "class" in content:
            _check_class(str(content.get("task")), content["class"])
    return len(leaves), sorted(name for name, leaf in leaves.items() if is_unsafe(leaf))


def make_task_manager(config: Config, include_paths: Sequence[str]) -> TaskManager:
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
                log.warning("looking %s up in lm_eval's index of tasks", name_some(unknown))
            return TaskManager(include_path=paths, metadata=metadata)
    except Exception as error:
        raise UserError(f"lm_eval could not read the task files: {describe_error(error)}") from error


def _include_paths(paths: Sequence[str], more: str | None) -> list[str]:
    found = [*paths, *([more] if more else [])]
    for path in found:
        if not os.path.isdir(path):
            raise UserError(f"--include_path must be a directory of task files, got {path}")
        for file in Path(path).rglob("*.yaml"):  # lm_eval opens all of them, and would wait for a pipe
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise UserError(f"--include_path must hold regular files, and {file} is none")
    return found


def resolve_tasks(manager: TaskManager, tasks: Sequence[Any]) -> list[Any]:
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


def check_before_loading(specs: Sequence[Any], index: Any, allows_unsafe: bool) -> list[Leaf]:
    """Refuse what cannot run before documents are fetched, which may take hours. Returns the tasks that files name."""
    contents = [_read_task_file(spec) if isinstance(spec, str) and spec not in index else spec for spec in specs]
    # A program may also give tasks that it has made.
    named = (one for one in contents if isinstance(one, (str, Mapping)))
    leaves = [leaf for content in named for leaf in check_spec(content, index, allows_unsafe)]
    return leaves


def _read_task_file(path: str) -> dict[str, Any]:
    try:
        return load_yaml(path, resolve_func=False)
    except Exception as error:
        raise UserError(f"lm_eval could not read the task file {path}: {describe_error(error)}") from error


def check_chat_template(wanted: bool | str, tokenizer: Any, given: str | None = None) -> None:
    """A tokenizer has no chat template, one without a name, or several by name. given: the user's own, in its place."""
    template = getattr(tokenizer, "chat_template", None)
    if not wanted or (given and wanted is True):
        return
    if not template:
        raise UserError(
            "--apply_chat_template needs a tokenizer with a chat template, and this one has none; chat_template_args in "
            '--model_args may give one, {"chat_template": "…"}'
        )
    names = sorted(template) if isinstance(template, dict) else []
    if isinstance(wanted, str) and not names:
        raise UserError(f"there is no chat template {wanted}: the tokenizer has a single one, give --apply_chat_template alone")
    if names and (wanted if isinstance(wanted, str) else "default") not in names:
        raise UserError(f"--apply_chat_template must name one of the tokenizer's templates: {', '.join(names)}")


def _list_close(task: str, known: Iterable[str]) -> str:
    return find_close(task, known) or "`python -m ddp_eval ls tasks` lists all, --include_path DIR adds your own"


def find_close(task: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(task, list(known), n=3, cutoff=0.75)
    return f"did you mean {' or '.join(close)}?" if close else None


def check_loaded(tasks: Mapping[str, Any], config: Config) -> None:
    """Refuse what only shows once tasks are loaded, before their requests are built. Raises UserError."""
    for name, task in tasks.items():
        _check_task(name, task, config.confirm_run_unsafe_code)
        if config.model_args.get("enable_thinking") and not makes_text(task.OUTPUT_TYPE):
            kind = task.OUTPUT_TYPE
            raise UserError(
                f"enable_thinking=True is for tasks that generate text, and {name} is of the type {kind}: leave it out"
            )
    _check_samples(tasks, config)
    _warn_of_ignored_flags(tasks, config)


def _check_task(name: str, task: Any, allows_unsafe: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        refuse_multimodal(name)
    check_output_type(name, getattr(task, "OUTPUT_TYPE", None))
    if getattr(task, "UNSAFE_CODE", False) and not allows_unsafe:
        refuse_unsafe(name)
    if not len(task.eval_docs):
        raise UserError(f"the task {name} has no documents to evaluate")


def _check_class(name: str, kind: type) -> None:
    """As `_check_task`, for the class of a task that is written in Python. A ConfigurableTask's config decides, not its class."""
    if getattr(kind, "MULTIMODAL", False):
        refuse_multimodal(name)
    if not issubclass(kind, ConfigurableTask):
        check_output_type(name, getattr(kind, "OUTPUT_TYPE", None))


def _check_samples(tasks: Mapping[str, Any], config: Config) -> None:
    for name, indices in (config.samples or {}).items():
        if name not in tasks:
            hint = find_close(name, tasks) or "add it there"
            raise UserError(f"--samples names the task {name}, which is not among --tasks ({name_some(config.tasks)}): {hint}")
        count = len(tasks[name].eval_docs)
        if max(indices) >= count:
            raise UserError(
                f"--samples asks for document {max(indices)} of the task {name}, whose documents are 0 to {count - 1}"
            )


def _warn_of_ignored_flags(tasks: Mapping[str, Any], config: Config) -> None:
    """lm_eval drops these in silence. Of its cache of prompts, which knows a task by its name alone, none is ever read."""
    if config.cache_requests in ("true", "refresh"):
        log.warning("--cache_requests is ignored: prompts are built in every run, so that none is of an earlier task file")
    fixed = [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0]
    if config.num_fewshot and fixed:
        log.warning("--num_fewshot is ignored for tasks that are fixed at 0 examples: %s", name_some(fixed))
    if config.gen_kwargs and not any(makes_text(task.OUTPUT_TYPE) for task in tasks.values()):
        log.warning("--gen_kwargs is ignored: no task generates text")
