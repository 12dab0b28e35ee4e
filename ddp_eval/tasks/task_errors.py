"""What an error that comes out of lm_eval means: an error of ours, or one that the task's author or the user can fix."""

from __future__ import annotations

import contextlib
import enum
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2

from ddp_eval.errors import UserError, one_line
from ddp_eval.system import hub


class Stage(enum.Enum):
    """What lm_eval does with the tasks."""

    LOADING = "load the documents"
    BUILDING = "build the requests"
    METRICS = "compute the metrics"


class OwnError(Exception):
    """Carries an error of ours through lm_eval, which would take it for an error of the task."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def errors_pass_through() -> Iterator[None]:
    """For our code that lm_eval calls: `blaming` raises its errors as they are."""
    try:
        yield
    except BaseException as error:
        raise OwnError(error) from error


@contextlib.contextmanager
def blaming(tasks: Sequence[Any], stage: Callable[[], Stage]) -> Iterator[None]:
    """Raise UserError with a sentence about `tasks` for an error of theirs, and other errors as they are."""
    try:
        yield
    except OwnError as own:
        raise own.error from None
    except UserError:
        raise
    except SystemExit as error:  # some tasks do, where a program of theirs is missing
        raise ends_the_program(tasks) from error
    except Exception as error:
        if stage() is Stage.METRICS:
            raise  # the scores are kept; what a task's own code did wrong shows in its traceback
        if isinstance(error, IndexError) and "size 0" in str(error):
            raise UserError(f"the task {name_some(tasks)} has no documents to evaluate") from error
        if isinstance(error, IndexError) and str(error) == "string index out of range" and _raised_by_lm_evals_task(error):
            raise UserError(
                f"the first document of {name_some(tasks)} has an empty choice or target, with which lm_eval loads no task"
            ) from error
        if isinstance(error, jinja2.exceptions.TemplateError):
            raise UserError(f"a template in the task {name_some(tasks)} does not work: {one_line(error)}") from error
        raise task_failed(stage(), tasks, error) from error


def _raised_by_lm_evals_task(error: BaseException) -> bool:
    """Whether it was lm_eval's own check of a task's first document, not code of the task's author."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == "lm_eval.api.task" and frame.f_code.co_name == "__init__"


def task_failed(stage: Stage, tasks: Sequence[Any], error: Exception) -> UserError:
    return UserError(f"lm_eval could not {stage.value} of {name_some(tasks)}: {describe_error(error)}")


def ends_the_program(tasks: Sequence[Any]) -> UserError:
    return UserError(f"the code of {name_some(tasks)} ends the program: what it has printed says why")


def name_some(tasks: Sequence[Any]) -> str:
    names = [task if isinstance(task, str) else "a task given as a config" for task in tasks]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe_error(error: BaseException) -> str:
    """An error of lm_eval or of a task's own code in one line."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # the outer one has no details
    return f"{type(error).__name__}: {one_line(error) or 'no message'}{hub.advice(error)}"
