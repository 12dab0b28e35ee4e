#!/usr/bin/env python3
"""Damage the files that ddp_eval reads back, and see that each is read, or refused in one sentence: no traceback, hang or crash.

    python scripts/fuzz_files.py --examples 10000 --output benchmarks/fuzz_files.md

The files are those of a tiny run of the demo model, of lm_eval's own HF backend on one task, and of hand-written flags. Every
example damages one file (scripts/damage_files.py) and gives it to its readers in a child process, which may take `--seconds`
for it and `--memory` more than it had at its start. Prints a table; exit code 1 if anything else came of a file than a value
or a sentence. What failed is kept in `--keep DIR`, from which `--again FILE` gives one to its reader in this very process.
Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pickle
import platform
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parent.parent
GENERATION_TASKS = ROOT / "tests" / "support" / "generation_tasks"
RUN_TASKS = ("demo_boolean_expressions", "demo_lambada", "demo_mmlu", "demo_wikitext", "gen_story")
FLAGS = [
    "--model_args", "pretrained=demo", "--tasks", *RUN_TASKS, "--include_path", str(GENERATION_TASKS),
    "--limit", "3", "--log_samples", "--device", "cpu",
]  # fmt: skip
CONFIG = """\
model: hf
model_args: {pretrained: demo, dtype: float32, max_length: 512}
tasks: [demo_lambada, demo_mmlu]
num_fewshot: 2
limit: 3
seed: [0, 1234, 1234, 1234]
gen_kwargs: {temperature: 0.5, until: ["a"]}
metadata: {max_seq_lengths: [4096]}
apply_chat_template: false
cache_requests: false
output_path: run
log_samples: true
"""
KEY = bytes(range(32))
FAILED = ("traceback", "hang", "crash", "memory")
OUTCOMES = ("read", "refused", *FAILED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="of each reader (default: %(default)s)")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=[*READERS], metavar="NAME", help="(default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="for one file (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB over the start (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="where the undamaged files are, or are to be made (default: made anew)")
    parser.add_argument("--keep", type=Path, help="where to keep what failed")
    parser.add_argument("--output", type=Path, help="write the table into this file too")
    parser.add_argument("--again", type=Path, help="a file kept of --readers NAME: show what comes of it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz_files_") as scratch:
        source = args.source or Path(scratch) / "source"
        if args.child:
            serve(source)
            return 0
        if not (source / "lm_eval").is_dir():
            make_source(source)
        if args.again:
            return show_again(source, args.readers[0], args.again, Path(scratch))
        rows = []
        for name in args.readers:
            rows.append(fuzz(name, source, Path(scratch), args))
            print(format_row(rows[-1]), flush=True)
    text = format_record(rows, args)
    print(text)
    if args.output:
        args.output.write_text(text)
    return 1 if any(row.counts[outcome] for row in rows for outcome in FAILED) else 0


# Readers: what is done with a directory in which one file is damaged. Each part may raise UserError.


def compare(place: Path, first: str = "run") -> Iterator[Callable[[], None]]:
    from ddp_eval.analysis.difference import compare_runs
    from ddp_eval.analysis.read import read_run
    from ddp_eval.analysis.verdict import format_comparison, jsonable

    def both() -> None:
        runs = read_run(place / first), read_run(place / "other")
        for pair in (runs, runs[::-1]):
            comparison = compare_runs(*pair)
            check_text(format_comparison(comparison))
            json.dumps(jsonable(comparison), allow_nan=False).encode()

    yield both


def compare_lm_eval(place: Path) -> Iterator[Callable[[], None]]:
    yield from compare(place, "lm_eval")


def report(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.analysis.read import read_run
    from ddp_eval.analysis.report import render

    def page() -> None:
        check_page(render([read_run(place / "run"), read_run(place / "other")], 100))

    yield page


def compare_sweep(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.analysis.sweep import read_sweep
    from ddp_eval.analysis.sweep_compare import AGAINST
    from ddp_eval.analysis.sweep_compare import compare_sweep as compare_models
    from ddp_eval.analysis.sweep_files import write_tables
    from ddp_eval.analysis.sweep_text import format_sweep
    from ddp_eval.analysis.verdict import jsonable

    def tables() -> None:
        write_tables(place / "sweep")
        for against in AGAINST:
            compared = compare_models(read_sweep(place / "sweep"), against)
            check_text(format_sweep(compared))
            json.dumps(jsonable(compared), allow_nan=False).encode()

    yield tables


def report_sweep(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.analysis.sweep import read_sweep
    from ddp_eval.analysis.sweep_report import render_sweep

    def page() -> None:
        check_page(render_sweep(read_sweep(place / "sweep")))

    yield page


def reproduce(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.cli import reproduce as command
    from ddp_eval.errors import UserError

    def check(order: Any) -> None:
        model = order.inspect.__self__.manifest["model"]
        found = {"model": model, "packages": {}, "versions": {}, "prompts_by_task": {}, "documents_by_task": {}}
        order.inspect(found)

    def order() -> None:
        with contextlib.suppress(UserError):  # it needs leave to run the code of task files
            command.parse([str(place / "run")])
        check(command.parse([str(place / "run"), "--trust_remote_code", "--confirm_run_unsafe_code", "--trust_task_files"]))

    yield order


def finished(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.__main__ import _show
    from ddp_eval.cli import flags as cli
    from ddp_eval.output import directory as run_directory
    from ddp_eval.run.resume import warn_nonfinite

    config, _ = cli.parse([*FLAGS, "--output_path", str(place / "run")])

    def look() -> None:
        found = run_directory.find_finished(config, lambda manifest: True)
        if found is not None:
            warn_nonfinite(found["ddp_eval"].get("not_finite", {}))
            with contextlib.redirect_stdout(SimpleNamespace(write=check_text, flush=lambda: None)):
                _show(config, found)
                _show(dataclasses.replace(config, show_config=True), found)

    yield look


def resume(place: Path) -> Iterator[Callable[[], None]]:
    """A start in a directory whose run is unfinished, or that is somebody else's."""
    from ddp_eval.cli import flags as cli
    from ddp_eval.output import directory as run_directory

    def start(*more: str) -> None:
        config, _ = cli.parse([*FLAGS, "--output_path", str(place / "unfinished"), *more])
        run_directory.find_finished(config, lambda manifest: True)
        directory = run_directory.open_directory(config, lambda: None)
        directory.layout  # noqa: B018
        directory.close()

    yield start
    yield lambda: start("--overwrite")
    yield lambda: start("--fresh")


def journals(place: Path) -> Iterator[Callable[[], None]]:
    import numpy as np

    from ddp_eval.output import journal

    def read() -> None:
        with contextlib.suppress(journal.OtherWork):
            found = journal.read_journals(place / "journals", KEY, np.array([0, 3, 4, 9]), np.array([0, 2, 3]))
            items = found.results["item"]
            assert not items.size or 0 <= items.min() <= items.max() < 9
            assert found.lengths[:, 1].sum() == len(found.answers)

    yield read


def config_file(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.cli import flags as cli

    yield lambda: cli.parse(["--config", str(place / "flags" / "config.yaml")]) and None


def samples_file(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.cli import flags as cli

    yield lambda: cli.parse(["--tasks", "demo_lambada", "--samples", str(place / "flags" / "samples.json")]) and None


def index_cache(place: Path) -> Iterator[Callable[[], None]]:
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")

    def read() -> None:
        cache = make_cache(place / "tasks")
        for name in ("a.yaml", "b.yaml"):
            assert isinstance(cache.load_yaml(str(place / "tasks" / name), resolve_func=False, recursive=True), dict)
        cache.save()

    yield read


def model_config(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.engines.hf import checkpoint

    yield lambda: checkpoint.load_config({"pretrained": str(place / "model")}) and None


def weights_header(place: Path) -> Iterator[Callable[[], None]]:
    from ddp_eval.engines.hf import pipeline_parallel

    stage: Any = SimpleNamespace(layers=range(1), is_first=True, is_last=False)
    path = str(place / "model" / "model.safetensors")

    def read() -> None:
        pipeline_parallel._holds_weights_of(stage, path)

    yield read


@dataclasses.dataclass(frozen=True)
class Reader:
    """file: what is damaged, in the source; content: how; read: what reads it. needs: top directories of the source."""

    file: str
    content: str
    read: Callable[[Path], Iterator[Callable[[], None]]]
    needs: tuple[str, ...] = ("run", "other")


READERS = {
    "manifest.json: compare": Reader("run/manifest.json", "json", compare),
    "manifest.json: reproduce": Reader("run/manifest.json", "json", reproduce, ("run",)),
    "manifest.json: a finished run": Reader("run/manifest.json", "json", finished, ("run",)),
    "manifest.json: report": Reader("run/manifest.json", "json", report),
    "results.json: compare": Reader("run/results.json", "json", compare),
    "results.json: a finished run": Reader("run/results.json", "json", finished, ("run",)),
    "results.json: report": Reader("run/results.json", "json", report),
    "results.json: report of a sweep": Reader("sweep/a/results.json", "json", report_sweep, ("sweep",)),
    "sweep.json: compare": Reader("sweep/sweep.json", "json", compare_sweep, ("sweep",)),
    "sweep.json: report": Reader("sweep/sweep.json", "json", report_sweep, ("sweep",)),
    "telemetry.json: report": Reader("run/telemetry.json", "json", report),
    "samples_*.jsonl: report": Reader("run/samples_demo_boolean_expressions.jsonl", "lines", report),
    "samples_*.jsonl of lm_eval: compare": Reader("lm_eval/samples.jsonl", "lines", compare_lm_eval, ("lm_eval", "other")),
    "results_*.json of lm_eval: compare": Reader("lm_eval/results.json", "json", compare_lm_eval, ("lm_eval", "other")),
    "scores.parquet: compare": Reader("run/scores.parquet", "table", compare),
    "texts.parquet: compare": Reader("run/texts.parquet", "table", compare),
    "documents.parquet: compare": Reader("run/documents.parquet", "table", compare),
    "status.json: a start": Reader("unfinished/status.json", "json", resume, ("unfinished",)),
    "the lock: a start": Reader("unfinished/.ddp_eval.lock", "json", resume, ("unfinished",)),
    "run.json: a start": Reader("unfinished/journal/run.json", "json", resume, ("unfinished",)),
    "*.journal: resuming": Reader("journals/a.journal", "journal", journals, ("journals",)),
    "the file of --config": Reader("flags/config.yaml", "yaml", config_file, ("flags",)),
    "the file of --samples": Reader("flags/samples.json", "json", samples_file, ("flags",)),
    "the index cache": Reader("cache/ddp_eval/index", "gzip", index_cache, ("cache", "tasks")),
    "config.json of a model": Reader("model/config.json", "json", model_config, ("model",)),
    "*.safetensors: which layers": Reader("model/model.safetensors", "safetensors", weights_header, ("model",)),
}


def find_file(source: Path, reader: Reader) -> Path:
    """The file that is damaged, relative to the source; those whose names hold a date or a digest are the only ones there."""
    place = source / reader.file
    if place.exists():
        return Path(reader.file)
    pattern = {"samples.jsonl": "samples_*.jsonl", "results.json": "results_*.json", "index": "*.jsonl.gz"}[place.name]
    return next(place.parent.rglob(pattern)).relative_to(source)


def make_source(place: Path, with_lm_eval: bool = True) -> None:
    """Real files of all kinds, from real runs of the demo.

    with_lm_eval: have lm_eval write its own files; else they are this package's samples, of the same fields, under its names.
    """
    from ddp_eval import demo
    from ddp_eval.output import lock

    place.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    _run([sys.executable, "-m", "ddp_eval", *FLAGS, "--output_path", str(place / "run")], environment)
    shutil.copytree(place / "run", place / "other")
    make_sweep(place / "sweep", place / "run")
    made = place / "made_by_lm_eval"
    if with_lm_eval:
        flags = ["run", "--model", "hf", "--model_args", f"pretrained={demo.MODEL_PATH}", "--tasks", "demo_mmlu_philosophy"]
        flags += ["--include_path", demo.TASKS_PATH, "--limit", "3", "--log_samples", "--device", "cpu"]
        _run([sys.executable, "-m", "lm_eval", *flags, "--output_path", str(made)], environment)
    else:
        made.mkdir()
        date = "2026-01-02T03-04-05.678901"
        shutil.copyfile(place / "run" / "samples_demo_mmlu_philosophy.jsonl", made / f"samples_demo_mmlu_philosophy_{date}.jsonl")
        shutil.copyfile(place / "run" / "results.json", made / f"results_{date}.json")
    (place / "flags").mkdir()
    (place / "flags" / "config.yaml").write_text(CONFIG)
    (place / "flags" / "samples.json").write_text(json.dumps({"demo_lambada": [0, 5], "demo_mmlu_philosophy": [1]}))
    make_unfinished(place / "unfinished")
    own = lock.Lock(place / "unfinished" / ".ddp_eval.lock", lambda: None)
    own.path.write_text(json.dumps({**own._me, "host": "elsewhere", "machine": "another"}))
    make_journal(place / "journals")
    (place / "tasks").mkdir()
    for name in ("a", "b"):
        (place / "tasks" / f"{name}.yaml").write_text(f"task: {name}\ndoc_to_text: text\n")
        os.utime(place / "tasks" / f"{name}.yaml", (1_000_000_000, 1_000_000_000))
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    cache = make_cache(place / "tasks")
    for name in ("a.yaml", "b.yaml"):
        cache.load_yaml(str(place / "tasks" / name), resolve_func=False, recursive=True)
    cache.save()
    (place / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(demo.MODEL_PATH, name), place / "model" / name)
    made.rename(place / "lm_eval")  # last: it marks a whole source


def _run(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=600)


def make_sweep(place: Path, run: Path) -> None:
    """Two models that are done, of one run's files, and two that are not."""
    models: list[dict[str, Any]] = []
    for step, (name, state) in enumerate((("a", "done"), ("b", "done"), ("c", "failed"), ("d", "waiting"))):
        facts = {"model": f"train/step-{step}", "revision": None, "step": step, "reason": "why" if state == "failed" else None}
        models.append({"name": name, **facts, "state": state, "seconds": 2.5 if state == "done" else None})
        if state == "done":
            shutil.copytree(run, place / name)
    (place / "sweep.json").write_text(json.dumps({"version": 1, "models": models}))


def make_unfinished(place: Path) -> None:
    from ddp_eval.cli import flags as cli
    from ddp_eval.output import directory as run_directory

    config, _ = cli.parse([*FLAGS, "--output_path", str(place)])
    directory = run_directory.open_directory(config, lambda: None)
    directory.begin_replacing(config, "replicas")
    make_journal(directory.journals)  # without one, closing the directory leaves nothing that binds the next start
    directory.close()


def make_journal(place: Path) -> None:
    import numpy as np

    from ddp_eval.output.journal import Journal
    from ddp_eval.packs.results import RESULT

    place.mkdir(exist_ok=True)
    own = Journal(place / "a.journal", KEY, "cpu")
    for pack, (start, count) in enumerate(((0, 3), (3, 1), (4, 5))):
        own.append(pack, np.array([(start + item, item - 1.5, item > 1) for item in range(count)], dtype=RESULT))
    own.append_texts(3, [[5, 6, 7], [8]])
    own.append_texts(4, [[9]])
    own.close()


def make_cache(tasks: Path) -> Any:
    import yaml

    from ddp_eval.tasks.index_cache import IndexCache

    def load(path: str, *, resolve_func: bool, recursive: bool, _seen: set[Path] | None = None) -> Any:
        if _seen is not None:
            _seen.add(Path(path).resolve())
        return yaml.safe_load(Path(path).read_text())

    return IndexCache(str(tasks), load, ["1"])


# The child: each line of its stdin is {"reader": name, "place": directory}, and of its stdout {"outcome", "detail", "bytes"}.


def serve(source: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    prepare()
    base_bytes = read_status("VmRSS")
    limit = read_status("VmSize") + 4 * 2**30  # so that a failure does not take the machine with it
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reset_peak()
        outcome, detail = read_once(order["reader"], Path(order["place"]))
        grown = max(0, read_status("VmHWM") - base_bytes)
        print(json.dumps({"outcome": outcome, "detail": detail, "bytes": grown}), file=answers, flush=True)


def prepare() -> None:
    """Import what readers import, and do not wait in a start for a run at work: here there is none."""
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import transformers

    from ddp_eval.analysis import plots, report, sweep_report  # noqa: F401
    from ddp_eval.cli import flags, reproduce  # noqa: F401
    from ddp_eval.output import lock, shapes  # noqa: F401
    from ddp_eval.tasks import harness

    torch.set_num_threads(1)
    transformers.AutoConfig  # noqa: B018
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for name in ("curves", "intervals", "margins", "timeline", "utilisation"):
        setattr(plots, name, made_once(getattr(plots, name)))
    harness.format_tables = made_once(harness.format_tables)
    lock.WATCH_S = lock.DYING_S = 0.0
    own_time = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic, strftime=time.strftime)
    mock.patch.object(lock, "time", own_time).start()


def made_once(make: Callable[..., str]) -> Callable[..., str]:
    """A plot or table that is made again only of other values: most damage leaves most of them as they were."""
    made: dict[bytes, str] = {}

    def make_or_remember(*values: Any, **settings: Any) -> str:
        key = pickle.dumps((values, settings))
        if key not in made:
            made[key] = make(*values, **settings)
        return made[key]

    return make_or_remember


def read_once(name: str, place: Path) -> tuple[str, str]:
    """("read" | "refused" | "traceback" | "memory", sentence or traceback)"""
    from ddp_eval.errors import UserError, printable
    from ddp_eval.system.read_back import OUT_OF_MEMORY

    outcome, detail = "read", ""
    for part in READERS[name].read(place):
        try:
            part()
        except UserError as error:
            sentence = printable(error)
            if OUT_OF_MEMORY in sentence:
                return "memory", sentence
            # A flag's name will do for its file.
            if str(place) not in sentence and not re.match(r"--|model_args |\w+ in --model_args", sentence):
                return "traceback", f"a sentence that names no file: {sentence}"
            outcome, detail = "refused", sentence
        except MemoryError:
            return "memory", traceback.format_exc()
        except BaseException:
            return "traceback", traceback.format_exc()
    return outcome, detail


def check_text(text: str) -> None:
    from ddp_eval.errors import printable

    assert printable(text, keep="\n") == text, "a terminal would obey this text"


def check_page(text: str) -> None:
    for bad in ("<script>alert", "</script><img"):
        assert bad not in text, f"{bad} is in the page as it was in the file"
    text.encode("utf-8", "backslashreplace")


def read_status(name: str) -> int:
    """Bytes of this process, by the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


# The parent.


class Child:
    """A process that reads damaged files, replaced when it dies or hangs."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._process: subprocess.Popen[str] | None = None

    def read(self, reader: str, place: Path, seconds: float, most_bytes: float) -> tuple[str, str, int]:
        """(outcome, detail, bytes over the start)"""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"reader": reader, "place": str(place)}), file=self._process.stdin, flush=True)
        line = self._wait(seconds)
        if line is None:
            self.close()
            return "hang", f"no answer in {seconds:g} s", 0
        if not line:
            code = self._process.wait()
            self.close()
            return "crash", f"the reader's process ended with {code}", 0
        answer = json.loads(line)
        if answer["bytes"] > most_bytes:
            self.close()
            return "memory", f"{answer['bytes']:,} bytes over the start; {answer['outcome']}: {answer['detail']}", answer["bytes"]
        return answer["outcome"], answer["detail"], answer["bytes"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
        self._process = None

    def start(self) -> None:
        if self._process is not None:
            return
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--child", "--source", str(self._source)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.DEVNULL
        )
        if self._wait(120) != "ready\n":
            raise RuntimeError("the reader's process does not start")

    def _wait(self, seconds: float) -> str | None:
        """A line, "" at the end of the process, None when there is none in time. A machine that sleeps makes nobody late."""
        assert self._process is not None and self._process.stdout is not None
        for _ in range(int(seconds * 10)):
            if select.select([self._process.stdout], [], [], 0.1)[0]:
                return self._process.stdout.readline()
        return None


@dataclasses.dataclass
class Row:
    """What came of all examples of one reader."""

    name: str
    counts: Counter[str]
    seconds: float
    slowest_s: float
    most_bytes: int


def fuzz(name: str, source: Path, scratch: Path, args: argparse.Namespace) -> Row:
    from damage_files import damage

    child, reader = Child(source), READERS[name]
    file = find_file(source, reader)
    data = (source / file).read_bytes()
    row = Row(name, Counter(), 0.0, 0.0, 0)
    began = time.monotonic()
    try:
        for number in range(args.examples):
            rng = random.Random(f"{args.seed} {name} {number}")
            damaged = damage(reader.content, data, rng)
            child.start()
            started = time.monotonic()
            outcome, detail, num_bytes = read_damaged(
                child, name, source, file, damaged, scratch / "work", args.seconds, args.memory * 2**30
            )
            row.counts[outcome] += 1
            row.slowest_s = max(row.slowest_s, time.monotonic() - started)
            row.most_bytes = max(row.most_bytes, num_bytes)
            if outcome in FAILED:
                keep_failure(args.keep, name, number, damaged, detail)
    finally:
        child.close()
    row.seconds = time.monotonic() - began
    return row


def read_damaged(
    child: Child, name: str, source: Path, file: Path, damaged: Any, work: Path, seconds: float, most_bytes: float
) -> tuple[str, str, int]:
    """Have a copy of the source, with `damaged` in place of `file`, read. The copy is gone afterwards."""
    from damage_files import put

    work.mkdir(parents=True)
    try:
        for top in READERS[name].needs:  # only a start writes into what it reads; and put() unlinks first
            shutil.copytree(source / top, work / top, copy_function=shutil.copy2 if top == "unfinished" else os.link)
        put(work / file, damaged)
        return child.read(name, work, seconds, most_bytes)
    finally:
        shutil.rmtree(work)


def keep_failure(keep: Path | None, name: str, number: int, damaged: Any, detail: str) -> None:
    print(f"{name}, example {number}: {detail.strip()[-600:]}", file=sys.stderr, flush=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        (keep / f"{plain}.{number}").write_bytes(damaged if isinstance(damaged, bytes) else repr(damaged).encode())


def show_again(source: Path, name: str, failure: Path, scratch: Path) -> int:
    from damage_files import put

    prepare()
    logging.disable(logging.NOTSET)
    for top in READERS[name].needs:
        shutil.copytree(source / top, scratch / "again" / top)
    put(scratch / "again" / find_file(source, READERS[name]), failure.read_bytes())
    print(*read_once(name, scratch / "again"), sep="\n")
    return 0


def format_row(row: Row) -> str:
    counts = " | ".join(f"{row.counts[outcome]:,}" for outcome in OUTCOMES)
    return f"| {row.name} | {row.counts.total():,} | {counts} | {row.slowest_s:.1f} | {row.most_bytes / 2**20:,.0f} |"


def format_record(rows: list[Row], args: argparse.Namespace) -> str:
    import numpy
    import pyarrow
    import pydantic

    head = ["reader", "files", *OUTCOMES, "slowest, s", "most memory, MiB"]
    today = datetime.date.today().isoformat()
    return "\n".join(
        [
            "# Damaged files",
            "",
            f"`python scripts/fuzz_files.py --examples {args.examples} --seed {args.seed}`, {today}, commit {commit()}; "
            f"{platform.system()}, Python {platform.python_version()}, numpy {numpy.__version__}, pyarrow {pyarrow.__version__}, "
            f"pydantic {pydantic.VERSION}.",
            "",
            "Each file is a real one with one to three faults (flipped bits, cuts, values of other types, keys twice,",
            "nesting, other columns, broken footers, pipes, devices, links, ...: `scripts/damage_files.py`), read in a child",
            f"process. Failed are a traceback, no answer in {args.seconds:g} s, a process that dies, more than",
            f"{args.memory:g} GiB of memory over that at the start (resident), and a sentence that names no file.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *map(format_row, rows),
            "",
        ]
    )


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
