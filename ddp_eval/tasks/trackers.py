"""Where results go beside the run directory: Weights & Biases, Trackio, the Hugging Face hub, each through lm_eval's own logger.

Only the leader opens them, before the run, so that what is wrong shows before hours of work. What goes wrong afterwards is one
line: the results are written by then. Their settings and tokens are in no file of a run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from ddp_eval.config import Config
from ddp_eval.errors import UserError, one_line

log = logging.getLogger("ddp_eval")

Send = Callable[[dict[str, Any], dict[str, Any] | None, int | None], None]  # results without samples, samples, step

STEP = "step"  # the name under which W&B has the x-axis


class Track(Protocol):
    """What `tracking` gives: logs results, with the step of the checkpoint that they are of as the x-axis where it has one.

    logged: marks of the trackers that have them already. Returns the marks of those that have them by now.
    """

    def __call__(self, results: dict[str, Any], step: int | None = None, logged: Collection[str] = ()) -> list[str]: ...


def check_installed(config: Config) -> None:
    """Raise UserError where a package is missing. Imports none of them."""
    for flag, package, wanted in (
        ("--wandb_args", "wandb", config.wandb_args),
        ("--trackio_args", "trackio", config.trackio_args),
        ("--hf_hub_log_args", "huggingface_hub", config.hf_hub_log_args),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs the package {package}, which is not installed: pip install {package}")


@contextlib.contextmanager
def tracking(config: Config) -> Iterator[Track]:
    """Open what the flags name, and give a function to call with the results. Raises UserError for what cannot be opened.

    It may be called again with the results of another checkpoint: with a step each, they are a curve.
    """
    with contextlib.ExitStack() as stack:
        senders = [
            (flag, _mark_of(flag, wanted), stack.enter_context(_opened(flag, functools.partial(make, config))))
            for flag, make, wanted in (
                ("--wandb_args", _open_wandb, config.wandb_args),
                ("--trackio_args", _open_trackio, config.trackio_args),
                ("--hf_hub_log_args", _open_hub, config.hf_hub_log_args),
            )
            if wanted
        ]

        def send_all(results: dict[str, Any], step: int | None = None, logged: Collection[str] = ()) -> list[str]:
            plain = {key: value for key, value in results.items() if key != "samples"}
            have = set(logged)
            for flag, mark, send in senders:
                if mark in have:
                    continue
                try:
                    send(copy.deepcopy(plain), results.get("samples") if config.log_samples else None, step)
                    have.add(mark)
                except Exception as error:
                    log.warning("%s: the results were not logged: %s: %s", flag, type(error).__name__, one_line(error))

            return sorted(have)

        yield send_all


def _mark_of(flag: str, arguments: Mapping[str, Any]) -> str:
    """Another one for each tracker, project and run, from which none of them can be read."""
    text = json.dumps([flag, arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


@contextlib.contextmanager
def _opened(flag: str, open_logger: Callable[[], tuple[Send, Callable[[], None]]]) -> Iterator[Send]:
    try:
        send, close = open_logger()
    except Exception as error:
        raise UserError(f"{flag} cannot be used: {type(error).__name__}: {one_line(error)}") from error
    try:
        yield send
    finally:
        with contextlib.suppress(Exception):
            close()


def _open_wandb(config: Config) -> tuple[Send, Callable[[], None]]:
    from lm_eval.loggers import WandbLogger

    logger = WandbLogger(dict(config.wandb_args), dict(config.wandb_config_args))
    run = logger.run
    send = _sender(logger)

    def send_at(results: dict[str, Any], samples: dict[str, Any] | None, step: int | None) -> None:
        logger.run = run if step is None else _AtStep(run, step, results.get("results", {}))
        send(results, samples, step)

    return send_at, lambda: run.finish()


class _AtStep:
    """A run of W&B that logs everything with a metric `step`, which is the x-axis of the tasks' metrics.

    W&B's own step must never go back: it drops what a training that came further, or a later checkpoint, was logged before.
    """

    def __init__(self, run: Any, step: int, tasks: Iterable[str]) -> None:
        self._run = run
        self._step = step
        run.define_metric(STEP)
        for task in tasks:
            run.define_metric(f"{task}/*", step_metric=STEP)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._run.log({**values, STEP: self._step})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def _open_trackio(config: Config) -> tuple[Send, Callable[[], None]]:
    from lm_eval.loggers import TrackioLogger

    logger = TrackioLogger(dict(config.trackio_args))
    return _sender(logger), logger.finish


def _sender(logger: Any) -> Send:
    given = logger.step  # among the tracker's arguments

    def send(results: dict[str, Any], samples: dict[str, Any] | None, step: int | None) -> None:
        logger.step = given if step is None else step
        logger.post_init(results)
        logger.log_eval_result()
        if samples is not None:
            logger.log_eval_samples(samples)

    return send


def _open_hub(config: Config) -> tuple[Send, Callable[[], None]]:
    """lm_eval uploads files that it writes itself: into a temporary directory, not among those of the run."""
    from huggingface_hub import get_token
    from lm_eval.loggers import EvaluationTracker

    place = tempfile.TemporaryDirectory(prefix="ddp_eval_hub_")
    token = os.environ.get("HF_TOKEN") or get_token() or ""
    try:
        tracker = EvaluationTracker(output_path=place.name, token=token, **config.hf_hub_log_args)
    except BaseException:
        place.cleanup()
        raise
    if tracker.push_samples_to_hub and not config.log_samples:
        log.warning("--hf_hub_log_args push_samples_to_hub=True uploads no samples without --log_samples")

    def send(results: dict[str, Any], samples: dict[str, Any] | None, step: int | None) -> None:
        general = tracker.general_config_tracker
        for field in dataclasses.fields(general):
            setattr(general, field.name, results.get(field.name))
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in (samples or {}).items():
            tracker.save_results_samples(task_name=task, samples=rows)
        if tracker.push_results_to_hub or tracker.push_samples_to_hub:
            tracker.recreate_metadata_card()

    return send, place.cleanup
