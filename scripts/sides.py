"""Two sides, ddp_eval and lm_eval's own HF backend, each in a process of its own with the loaded model, asked in turn.

What bench.py and bench_generation.py share: the processes, the clocks around a model's answers, and the words on conditions and
ratios; bench_prepare.py and commands.py take those words too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import shlex
import sys
import time
import traceback
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


@dataclasses.dataclass(frozen=True)
class Job:
    """What the two sides do; it is sent to their processes.

    load: (args, device) -> the model.
    ours, lm_eval: (model, tokenizer, task, limit, batch size, args) -> the answer of that side.
    no_memory: the answer where the device's memory does not do.
    """

    load: Callable[..., Any]
    ours: Callable[..., Any]
    lm_eval: Callable[..., Any]
    no_memory: Any


class Side:
    """A process that holds the model and runs tasks for one of the two sides when asked. name: "ours" or "lm_eval".

    It starts at once, so that two that are made before either is entered load their models at the same time.
    """

    def __init__(self, name: str, args: argparse.Namespace, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, args, job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *question: Any) -> Any:
        """("run", task, limit, batch size), ("call", function of model and tokenizer, *more), ("conditions",) or ("ready",).

        Raises what the side has failed of.
        """
        self._connection.send(question)
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> Side:
        self.ask("ready")
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.terminate()
        self._process.join()


def serve(name: str, args: argparse.Namespace, job: Job, connection: Any) -> None:
    """The life of a side's process: load the model, then answer one question after another."""
    import torch
    import transformers

    from ddp_eval.errors import is_out_of_memory

    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if name == "ours" and device.type == "cpu":
        from ddp_eval.engines.hf.checkpoint import keep_freed_memory

        keep_freed_memory()  # as the command does
    model = job.load(args, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    run = {"ours": job.ours, "lm_eval": job.lm_eval}[name]
    while True:
        try:
            question, *rest = connection.recv()
        except EOFError:
            return
        answer: Any = None
        try:
            if question == "conditions":
                answer = describe_conditions(args, model, device)
            elif question == "call":
                function, *more = rest
                answer = function(model, tokenizer, *more)
            elif question == "run":
                with contextlib.redirect_stdout(io.StringIO()):
                    answer = run(model, tokenizer, *rest, args)
        except BaseException as error:
            answer = job.no_memory
            if not is_out_of_memory(error):
                traceback.print_exc()
                answer = RuntimeError(f"{name}: {error}")
        # The other side is next, and needs the room; only here have the frames of an error let go. So each time that is taken
        # includes asking the card for memory anew, on both sides.
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        connection.send(answer)


def read_task(text: str) -> tuple[str, float | None, float]:
    """TASK or TASK:DOCUMENTS -> the task, `limit`, and the limit that takes a quarter of its documents.

    >>> read_task("local_piqa:40"), read_task("local_piqa")
    (('local_piqa', 40.0, 10.0), ('local_piqa', None, 0.25))
    """
    task, _, documents = text.partition(":")
    limit = float(documents) if documents else None
    return task, limit, max(1, limit // 4) if limit else 0.25


def read_suite(text: str) -> tuple[list[str], float | None, float]:
    """A+B+C or A+B+C:DOCUMENTS, the tasks of one command -> the tasks, `limit` of each, and the limit that takes a quarter.

    >>> read_suite("local_piqa+local_boolq:40"), read_suite("local_piqa")
    ((['local_piqa', 'local_boolq'], 40.0, 10.0), (['local_piqa'], None, 0.25))

    Raises ValueError for limits of single tasks: lm_eval's command has one --limit.
    """
    names, _, documents = text.partition(":")
    if "" in names.split("+") or not (":" not in text or (documents.isdigit() and int(documents))):
        raise ValueError(f"--tasks takes TASK, A+B+C or A+B+C:DOCUMENTS, with one limit for all tasks of a command, got {text}")
    _, limit, quarter = read_task(text)
    return names.split("+"), limit, quarter


def evaluate_by_lm_eval(
    model: Any, tokenizer: Any, task: str, limit: float | None, args: argparse.Namespace, calls: Sequence[str], **options: Any
) -> tuple[float, dict[str, Any]]:
    """Seconds that lm_eval's HF backend spends in its methods `calls`, and the results. options: of HFLM."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, **options)
    spent: list[float] = []
    note_seconds(lm, calls, spent)
    manager = TaskManager(include_path=args.include_path, include_defaults=not args.include_path)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[task], limit=limit, task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity=None
    )
    return sum(spent), results


def evaluate_by_us(
    model: Any, tokenizer: Any, task: str, limit: float | None, args: argparse.Namespace, calls: Sequence[str], **options: Any
) -> tuple[float, dict[str, Any]]:
    """Seconds that ddp_eval spends in its LM's methods `calls`, and the results. options: of `ddp_eval.evaluate`."""
    import ddp_eval
    from ddp_eval.tasks import collector, select

    spent: list[float] = []
    start_lm, load_index = collector.RequestCollector.__init__, select.TaskManager

    def start_timed(self: Any, *rest: Any) -> None:
        start_lm(self, *rest)
        note_seconds(self, calls, spent)

    patch = unittest.mock.patch.object
    with (
        patch(collector.RequestCollector, "__init__", start_timed),
        # Reading the index of lm_eval's own 14,000 task files takes seconds in each of many runs.
        patch(select, "TaskManager", lambda **rest: load_index(**{**rest, "include_defaults": not args.include_path})),
    ):
        results = ddp_eval.evaluate(
            model, tokenizer, [task], limit=limit, include_path=args.include_path, bootstrap_iters=0, log_samples=True, **options
        )
    return sum(spent), results


def compare_metrics(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """{"task metric": relative difference} between two "results" of lm_eval; standard errors are left out."""
    pairs = {
        f"{task} {name}": (value, ours[task][name])
        for task, values in theirs.items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and "stderr" not in name
    }
    return {name: relative_difference(a, b) for name, (a, b) in pairs.items()}


def relative_difference(a: float, b: float) -> float:
    """Of two metrics; 0 where neither is a number, infinite where one is none.

    >>> relative_difference(2.0, 1.0), relative_difference(math.nan, math.nan), relative_difference(math.nan, 1.0)
    (0.5, 0.0, inf)
    """
    if math.isnan(a) and math.isnan(b):
        return 0.0
    apart = difference(a, b)
    return apart / max(abs(a), abs(b)) if 0 < apart < math.inf else apart


def difference(a: float, b: float) -> float:
    """How far apart two log-probabilities are; infinite where one is not a number, which no comparison would find too far.

    >>> difference(-1.5, -1.0), difference(-math.inf, -math.inf), difference(math.nan, math.nan), difference(-math.inf, -1.0)
    (0.5, 0.0, inf, inf)
    """
    apart = 0.0 if a == b else abs(a - b)
    return math.inf if math.isnan(apart) else apart


def note_seconds(lm: Any, calls: Sequence[str], spent: list[float]) -> None:
    """Have `lm`, a model or its class, add to `spent` the seconds that each call of these methods takes."""
    for name in calls:
        call = getattr(lm, name)

        def timed(*rest: Any, call: Any = call, **kwargs: Any) -> Any:
            started = time.perf_counter()
            answers = call(*rest, **kwargs)
            spent.append(time.perf_counter() - started)
            return answers

        setattr(lm, name, timed)


def describe_conditions(args: argparse.Namespace, model: Any, device: Any) -> dict[str, Any]:
    from ddp_eval.output.versions import describe_packages
    from ddp_eval.system.machine import describe_hardware

    config = model.config
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit_of_code(),
        # Where this machine keeps its files is of no use to others.
        "command": shlex.join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        "model": f"{type(model).__name__} {model.num_parameters() / 1e6:.1f} M parameters, hidden {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}, {args.dtype}",
        "dtype": args.dtype,
        "device": str(device),
        "threads": args.threads,
        "hardware": describe_hardware(),
        "packages": describe_packages(),
        "python": platform.python_version(),
    }


def commit_of_code() -> str:
    """Of this repository, and whether its files differ from it; CODE_COMMIT where that is set, for a copy without git."""
    from ddp_eval.system.machine import git_commit

    found = git_commit(REPOSITORY)
    here = found["commit"][:7] + (" with changes" if found["dirty"] else "") if found else "unknown"
    return os.environ.get("CODE_COMMIT") or here


def describe_commands(args: argparse.Namespace) -> dict[str, Any]:
    """`describe_conditions` of whole commands: the processes that they start hold the weights, here the config is enough."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(args.model))
    return describe_conditions(args, model, torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu"))


def keep(report: dict[str, Any], format_report: Callable[[dict[str, Any]], str], out: str | Path | None) -> None:
    """Write OUT.md and OUT.json. After every task: what ends the whole, even while it writes, leaves the rows that are done."""
    if out:
        for end, text in ((".md", format_report(report)), (".json", json.dumps(report, indent=1))):
            unfinished = Path(f"{out}{end}.tmp")
            unfinished.write_text(text + "\n")
            unfinished.replace(f"{out}{end}")


def cut(value: float, digits: int = 3) -> str:
    """As text that says no more than was measured, whatever floor it is held against.

    >>> cut(1.19963)
    '1.199'
    """
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]


def format_conditions(conditions: dict[str, Any]) -> list[str]:
    """The lines above a table."""
    packages = ", ".join(f"{name} {version}" for name, version in conditions["packages"].items())
    return [
        f"{conditions['date']}, commit {conditions['commit']}, on {conditions['device']} with {conditions['threads']} thread(s).",
        f"Model: {conditions['model']}.",
        f"Hardware: {json.dumps(conditions['hardware'])}. Packages: {packages}.",
        f"Command: `{conditions['command']}`",
        "",
    ]
