"""`torchrun … -m ddp_eval`: from the command line to an exit code.

0: done. 2: an error that the user can fix, in one sentence. 3: two runs differ more than --expect allows.
1: a defect or a lost rank, with its traceback. 75 (EX_TEMPFAIL): stopped by SIGTERM or SIGUSR1, the same command resumes;
or models of a sweep are left to another launch, or sweep.json could not be written: the same command goes on with what is left.
130: the same by Ctrl-C. 141: whoever reads what a command prints ended first, as `head` does. torchrun makes 1 of all but 0.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import logging
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ddp_eval.cli import COMMANDS, split_command
from ddp_eval.cli.subcommand import Evaluation
from ddp_eval.config import Config
from ddp_eval.distributed import launch_environment, watchdog
from ddp_eval.errors import UserError, printable
from ddp_eval.output import status
from ddp_eval.tasks import trackers

if TYPE_CHECKING:
    from ddp_eval.distributed.world import World
    from ddp_eval.run.preflight import PreflightReport
    from ddp_eval.run.sweep import SweepEnd

_T = TypeVar("_T")
_DEATH_S = 1.0
NOT_READ = 141  # what a shell says of a program that SIGPIPE has ended
MIN_JOIN_S = 120.0  # ranks start at different moments, however short their steps are


def main() -> None:
    # Imports and requests make millions of objects that stay: looking through them for garbage takes a tenth of a start.
    gc.set_threshold(200_000, 20, 100)
    launch_environment.drop_empty()
    watching = watchdog.Watch()
    watching.start()
    _quiet_down()
    if not _is_rank_zero():
        _check_launch()
    try:
        name, argv = split_command(sys.argv[1:])
        command = COMMANDS[name]
        if not command.runs_on_all_ranks:
            watchdog.step(f"at work on {name}")
            try:
                sys.exit(
                    _print_all(functools.partial(importlib.import_module(command.module).main, argv)) if _is_rank_zero() else 0
                )
            except UserError as error:  # of rank 0 alone: there is nobody to agree with
                watchdog.say(str(error))
                watchdog.leave(2, status.FAILED, str(error))
        watching.timeout_s = Config.timeout
        evaluation: Evaluation = importlib.import_module(command.module).parse(argv)
        _check_launch()
        if code := _run(evaluation, watching):
            sys.exit(code)
        if evaluation.conclude is not None:
            if not _is_rank_zero():
                sys.exit(0)
            with watchdog.speaking():
                watchdog.step("comparing the two runs")
                sys.exit(_print_all(evaluation.conclude))
    except UserError as error:
        _report_and_leave(error)


def _print_all(work: Callable[[], _T]) -> _T | int:
    """What `work` returns, once all that it prints is read or on its way; or the exit code for a reader that has gone.

    Nothing is printed any more afterwards: the interpreter would report the closed pipe at its end.
    """
    returned: _T | int = NOT_READ
    try:
        returned = work()
        print(end="", flush=True)
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return returned


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more: other pipes and connections break too."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)
    return bool(look.poll(0))


def _quiet_down() -> None:
    """Only rank 0 prints; other libraries log errors alone, and show bars on a terminal only. To be called before they load."""
    is_rank_zero = _is_rank_zero()
    if not is_rank_zero:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    if not (is_rank_zero and sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not is_rank_zero:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # rank 0 reports retries
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableLines("%(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as an error, it also raises
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every line would come twice
    level = logging.getLevelName(os.environ.get("LMEVAL_LOG_LEVEL", "").upper())
    if isinstance(level, int):
        logging.getLogger("lm_eval").setLevel(level)


class _PrintableLines(logging.Formatter):
    """Names and messages out of files do nothing to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def _is_rank_zero() -> bool:
    return launch_environment.is_first()


def _check_launch() -> None:
    """Refuse wrong values of the launcher's variables, before anything else reads them. Each rank reports its own."""
    try:
        launch_environment.read()
    except UserError as error:
        watchdog.say(str(error))
        watchdog.leave(2, status.FAILED, str(error))


def _run(evaluation: Evaluation, watching: watchdog.Watch) -> int:
    """The exit code, where it is over and all ranks have left each other."""
    watching.timeout_s = evaluation.config.timeout
    watchdog.step("importing torch")
    from ddp_eval.distributed.contact import reporting_to_launcher

    try:
        return reporting_to_launcher(_join_and_run)(evaluation, watching) or 0
    except Exception:
        # Threads may be inside of torch still: the interpreter's own end would abort the process over them.
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _join_and_run(evaluation: Evaluation, watching: watchdog.Watch) -> int:
    from ddp_eval.distributed import collectives, launch_environment
    from ddp_eval.distributed import world as world_module
    from ddp_eval.distributed.store import common_store, report_once
    from ddp_eval.run import preflight

    config, results, end = evaluation.config, None, None
    try:
        watchdog.step("preparing to join the other ranks")
        trackers.check_installed(config)
        checks = preflight.check_if_due(config)
        world = world_module.join_group(config.device, max(config.timeout, MIN_JOIN_S))
        store, local_ranks = common_store(world), world_module.local_ranks(world)
        watching.join_ranks(
            world.rank, store, world.pids, local_ranks, config.timeout, functools.partial(report_once, shared=True)
        )
        checks = checks or preflight.check_if_due(config)
        if checks is not None:
            watchdog.step("trying an all-reduce, in which any rank may be the one that hangs")
            speed = preflight.check_group(world)
            if config.preflight:
                watching.stop()
                _report_checks(checks, speed, world)
                return 0
        watchdog.step("importing transformers")
        with world.meter.phases("start"):
            from ddp_eval.run.runner import run  # it fails on a node with wrong packages: named by now
        watchdog.step("starting the run")
        if world.is_leader:
            for note in evaluation.notes:
                logging.getLogger("ddp_eval").warning(note)
        if evaluation.sweep is not None:
            from ddp_eval.run.sweep import run_sweep

            end = run_sweep(config, evaluation.sweep, world, _show)
        else:
            results = run(config, world, evaluation.inspect)
    except UserError as error:  # not for @record: it would add a traceback
        _report_and_leave(error)
    except collectives.LostContact as error:
        # Ranks on the node of the one that died know more; the launcher may be a moment late to see it go.
        sentence = watching.await_death(_DEATH_S) or str(error)
        report_once(sentence, shared=True)
        time.sleep(2)  # let the launcher see the rank that failed first go first
        watchdog.leave(1, status.FAILED, sentence, first_hand=False)
    except Exception as error:
        report_once(watchdog.note_failure(launch_environment.launch_rank(), error))  # before other ranks see this one die
        raise
    watching.stop()
    world_module.leave_group(world)
    # Whoever reads it may have gone; the run is in its directory.
    if end is not None:
        _print_all(functools.partial(_show_sweep, config, end))
        return 1 if end.count("failed") else watchdog.EXIT_PREEMPTED if end.held or not end.is_written else 0
    if results is not None:
        _print_all(functools.partial(_show, config, results))
    return 0


def _show(config: Config, results: dict[str, Any]) -> None:
    from ddp_eval.tasks.harness import format_results, format_tables
    from ddp_eval.telemetry.summary import format_summary

    if config.show_config:
        print(printable(format_results(results), keep="\n"))
    if not config.predict_only:  # no metrics, no table
        print(printable(format_tables(results), keep="\n"))
    if "telemetry" in results["ddp_eval"]:  # not where the run was found complete
        print(format_summary(results["ddp_eval"]["telemetry"]))
    if config.output_path:
        print(printable(f"ddp_eval: the run is in {config.output_path}"))


def _show_sweep(config: Config, end: SweepEnd) -> None:
    """A line for each model of a sweep."""
    width = max((len(one["name"]) for one in end.entries), default=0)
    for one in end.entries:
        took = f"{one['seconds']:.1f} s" if one["seconds"] is not None else ""
        print(printable(f"ddp_eval: {one['name']:<{width}}  {one['state']}  {one['reason'] or took}".rstrip()))
    print(printable(f"ddp_eval: the sweep is in {config.output_path}: {end.describe()}"))


def _report_checks(checks: PreflightReport, speed: str, world: World) -> None:
    """The end of --preflight: a line for each node, printed by rank 0."""
    from ddp_eval.distributed import world as world_module

    world_module.leave_group(world)
    for line in checks.lines:
        print(line)
    print(f"ddp_eval: the node checks passed; {speed}")


def _report_and_leave(error: UserError) -> NoReturn:
    from ddp_eval.distributed.meeting import NotMet
    from ddp_eval.distributed.store import report_once

    report_once(str(error), shared=isinstance(error, NotMet))
    watchdog.leave(2, status.FAILED, str(error))


def command() -> None:
    """`main` as the whole of a process, which ends at once where all went well.

    The interpreter takes a second to take apart what ends with the process anyway. Threads, and what other libraries have to do
    at the end, come first: of what is registered, the first is the last to run.
    """
    went_well: list[bool] = []
    atexit.register(_end, went_well)
    main()
    went_well.append(True)


def _end(went_well: list[bool]) -> None:
    if not went_well:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:  # nobody reads it any more: the interpreter has an exit code for that
        return
    ctypes.CDLL(None).fflush(None)  # what NCCL and others print
    os._exit(0)


if __name__ == "__main__":
    command()
