"""Load tasks of lm_eval's own index the way a run does, without their data: does each come to requests here?

    python scripts/walk_tasks.py [--per_directory 2] [--names NAME ...] [--output benchmarks/walk_tasks.md]

Takes some tasks of every directory of lm_eval's index, and of every output type, and builds the requests of two documents of each
through `harness.evaluate_tasks`, up to where a model would score them. No data set is fetched. `datasets.load_dataset` gives
stand-in rows instead: their columns are those that the task's templates and functions ask for, found by letting them ask, and a
value is whatever its use makes of it (text, number, list, mapping). A few kinds of values are tried in turn.

Where no stand-in fits, the same task is loaded by lm_eval alone with the same rows. If that fails alike, the failure is not of
this package, and it is counted by what is missing. What fails here and not there is a defect of ours, and is listed by name.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import itertools
import json
import logging
import random
import re
import signal
import sys
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jinja2
import jinja2.meta
import lm_eval
import lm_eval.utils
import numpy as np
import transformers
from lm_eval.api.model import LM

from ddp_eval import demo
from ddp_eval.config import Config
from ddp_eval.errors import UserError, one_line
from ddp_eval.tasks import harness, select
from ddp_eval.tasks.index import find_leaves
from ddp_eval.tasks.request_types import Asked
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases

# What a value is as text; each uniformly for all columns, tried in this order.
CONTENTS = ("1", "A", "0", '["A", "B", "C", "D"]', "a b. c d? 1", "yes", "(A)", "True", '{"A": "B"}', "entailment", "2020-01-01")
MOST_TRIES = 24


class Value(str):
    """Text that also answers as a list of four, a mapping of any key, and a number: 1 where it is none."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self] * 4
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter([self] * 4)

    def __len__(self) -> int:
        return 4

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return hash(int(str(self)) if str(self).isdigit() else str(self))  # as a key: of a number where it is one

    def __bool__(self) -> bool:
        return True

    def __index__(self) -> int:
        return int(self)

    def __int__(self) -> int:
        return int(str(self)) if str(self).isdigit() else 1

    def __float__(self) -> float:
        return float(int(self))

    def __add__(self, other: Any) -> Any:
        return str(self) + other if isinstance(other, str) else [*self, *other] if isinstance(other, list) else int(self) + other

    def __radd__(self, other: Any) -> Any:
        return other + str(self) if isinstance(other, str) else [*other, *self] if isinstance(other, list) else other + int(self)

    def __sub__(self, other: Any) -> Any:
        return int(self) - other

    def __rsub__(self, other: Any) -> Any:
        return other - int(self)

    def __lt__(self, other: Any) -> bool:
        return False

    def __gt__(self, other: Any) -> bool:
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        return self

    def keys(self) -> list[str]:
        return ["A", "B"]

    def values(self) -> list[Any]:
        return [self] * 2

    def items(self) -> list[tuple[str, Any]]:
        return [("A", self), ("B", self)]

    def append(self, other: Any) -> None:
        pass

    def tolist(self) -> list[Any]:
        return [self] * 4

    as_py = copy = lambda self: self


class Row(dict):
    """A document that has every column it is asked for. `columns`: name -> value, shared by all rows, which learns new names."""

    columns: dict[str, Any]
    content: str

    def __missing__(self, key: str) -> Any:
        self[key] = self.columns[key] = Value(self.content)
        return self[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]

    def copy(self) -> Row:
        return make_row(self, self.columns, self.content)


def make_row(values: dict[str, Any], columns: dict[str, Any], content: str) -> Row:
    row = Row(values)
    row.columns, row.content = columns, content
    return row


class Rows(list):
    """What tasks use of a `datasets.Dataset`, over stand-in rows."""

    @property
    def features(self) -> dict[str, Any]:
        return dict(self[0])

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    @property
    def num_rows(self) -> int:
        return len(self)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self]
        if isinstance(key, slice):
            return Rows(list.__getitem__(self, key))
        return list.__getitem__(self, int(key) % max(1, len(self)))

    def map(
        self, function: Any, *args: Any, with_indices: bool = False, batched: bool = False, fn_kwargs: Any = None, **_: Any
    ) -> Rows:
        more = fn_kwargs or {}
        if batched:
            out = function({name: [row[name] for row in self] for name in self.column_names}, **more)
            size = len(next(iter(out.values())))
            return Rows(self._like({name: list(values)[index] for name, values in out.items()}) for index in range(size))
        mapped = []
        for index, row in enumerate(self):
            out = function(row.copy(), *([index] if with_indices else []), **more)
            mapped.append(self._like({**row, **(out or {})}))
        return Rows(mapped)

    def _like(self, values: dict[str, Any]) -> Row:
        return make_row(values, self[0].columns, self[0].content)

    def filter(self, function: Any, *args: Any, **options: Any) -> Rows:
        more = options.get("fn_kwargs") or {}
        kept = Rows(
            row for index, row in enumerate(self) if function(row, *([index] if options.get("with_indices") else []), **more)
        )
        return kept or self  # of rows that stand for all, one would have been kept

    def select(self, indices: Any, **_: Any) -> Rows:
        return Rows(self[index] for index, _ in zip(indices, self, strict=False)) or self

    def train_test_split(self, *args: Any, **_: Any) -> Splits:
        return Splits(self)

    def rename_column(self, old: str, new: str) -> Rows:
        return self.map(lambda row: {new: row[old]})

    def rename_columns(self, names: dict[str, str]) -> Rows:
        return self.map(lambda row: {new: row[old] for old, new in names.items()})

    def add_column(self, name: str, values: Any, **_: Any) -> Rows:
        return self.map(lambda row, index: {name: values[index]}, with_indices=True)

    def to_list(self) -> list[Any]:
        return list(self)

    def same(self, *args: Any, **_: Any) -> Any:
        return self

    shuffle = sort = flatten = remove_columns = cast_column = cast = with_format = select_columns = take = flatten_indices = same
    class_encode_column = repeat = skip = to_iterable_dataset = same

    def unique(self, name: str) -> list[Any]:
        return [self[0][name]]


class Splits(dict):
    """A data set of any split, the same rows in each."""

    def __init__(self, rows: Rows) -> None:
        super().__init__({name: rows for name in ("train", "validation", "test")})
        self.rows = rows

    def __missing__(self, split: str) -> Rows:
        return self.rows

    def __contains__(self, split: object) -> bool:
        return True

    def map(self, *args: Any, **options: Any) -> Splits:
        return Splits(self.rows.map(*args, **options))

    def filter(self, *args: Any, **options: Any) -> Splits:
        return Splits(self.rows.filter(*args, **options))

    def same(self, *args: Any, **_: Any) -> Splits:
        return self

    shuffle = remove_columns = cast_column = rename_column = with_format = same


class Built(BaseException):
    """Carries the number of requests out of lm_eval, which would go on to have them scored."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class Outcome(NamedTuple):
    """kind: loads, refused, or what is missing; detail: in words; requests: built; tries: of stand-in rows."""

    name: str
    type: str
    kind: str
    detail: str = ""
    requests: int = 0
    tries: int = 1


class Asker(LM):
    """lm_eval's side alone: raises Built at the first request."""

    def loglikelihood(self, requests: Any) -> Any:
        raise Built(len(requests))

    generate_until = loglikelihood_rolling = loglikelihood

    @property
    def tokenizer_name(self) -> str:
        return ""


def words_of(settings: Any) -> set[str]:
    """Names that the templates in a task's settings use, and words that may be a column's name by themselves."""
    found = set()
    texts: list[Any] = [settings]
    environment = jinja2.Environment(extensions=["jinja2.ext.do"])
    environment.filters["regex_replace"] = str
    while texts:
        value = texts.pop()
        if isinstance(value, dict):
            texts += value.values()
        elif isinstance(value, list):
            texts += value
        elif isinstance(value, str):
            with contextlib.suppress(jinja2.TemplateError):
                found |= jinja2.meta.find_undeclared_variables(environment.parse(value))
            if value.isidentifier() and value not in ("train", "test", "validation", "mean", "acc"):
                found.add(value)
    return found - {"range", "len", "cycler"}


class Walk:
    """One process's walk: lm_eval's index, read once, and a tokenizer."""

    def __init__(self) -> None:
        self.manager = select.TaskManager(include_path=[demo.TASKS_PATH], metadata={})
        self.config = transformers.AutoConfig.from_pretrained(demo.MODEL_PATH)
        self.encoder = Encoder(transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH), 2**20)  # room for any answer

    def choose(self, per_directory: int) -> list[tuple[str, str]]:
        """(name, type) of some tasks of each directory and type."""
        groups = collections.defaultdict(list)
        for name in self.manager.all_subtasks:
            entry = self.manager.task_index[name]
            kind = self.type_of(name)
            parts = Path(entry.yaml_path).parts if entry.yaml_path else ("", "tasks", "?")
            directory = parts[parts.index("tasks") + 1] if "tasks" in parts else "?"
            groups[directory, kind].append((name, kind))
        chance = random.Random(0)
        return [
            one
            for group in sorted(groups)
            for one in chance.sample(sorted(groups[group]), min(per_directory, len(groups[group])))
        ]

    def type_of(self, name: str) -> str:
        leaf = next(iter(find_leaves(name, self.manager.task_index)), None)
        return (leaf.output_type if leaf else None) or "class"

    def visit(self, name: str, kind: str) -> Outcome:
        leaf = next(iter(find_leaves(name, self.manager.task_index)), None)
        names = words_of(leaf.settings) if leaf else set()
        first: tuple[BaseException, Any] | None = None
        tries = 0
        for content, lists in itertools.product(CONTENTS, (False, True)):
            columns: dict[str, Any] = {column: Value(content) for column in names}
            if lists:  # columns that a template takes for lists of choices
                columns |= {
                    column: ["a", "b", "c", "d"] for column in names if re.search("choice|option|ending|label|target", column)
                }
            for _ in range(4):  # a missing column is learnt by its name
                tries += 1
                known = len(columns)
                try:
                    return Outcome(name, kind, "loads", requests=self._build(name, columns, content, self._ours), tries=tries)
                except UserError as error:
                    if "shows images or sound" in str(error):
                        return Outcome(name, kind, "refused: multimodal", tries=tries)
                    cause = error.__cause__ or error
                    if isinstance(cause, SystemExit):
                        return Outcome(name, kind, "missing package", one_line(error, 150), tries=tries)
                except TooLong as error:
                    return Outcome(name, kind, "stand-in rows do not fit", str(error), tries=tries)
                except SystemExit as error:
                    return Outcome(name, kind, "missing package", f"its code ends the program: {error.code}", tries=tries)
                except Exception as error:
                    cause = error
                first = first or (cause, columns)
                if what := missing(cause):
                    return Outcome(name, kind, *what, tries=tries)
                if undefined := re.search(r"'(\w+)' is undefined", str(cause)):
                    columns[undefined[1]] = Value(content)
                if len(columns) == known or tries > MOST_TRIES:
                    break
            if tries > MOST_TRIES:
                break
        assert first is not None
        cause, columns = first
        try:
            self._build(name, columns, CONTENTS[0], self._theirs)
        except (Exception, TooLong) as error:
            told = f"{type(error).__name__}: {one_line(error, 150)}"
            if isinstance(error, ImportError):
                return Outcome(
                    name, kind, "code of the task's own does not import (lm_eval alone fails alike)", told, tries=tries
                )
            return Outcome(name, kind, "stand-in rows do not fit (lm_eval alone fails alike)", told, tries=tries)
        return Outcome(
            name, kind, "DEFECT: fails here, not in lm_eval alone", f"{type(cause).__name__}: {one_line(cause, 150)}", tries=tries
        )

    def _build(self, name: str, columns: dict[str, Any], content: str, load: Any) -> int:
        """How many requests two documents come to. Raises what the way there raises."""
        rows = Rows(make_row(columns, columns, content) for _ in range(12))

        def load_dataset(*args: Any, split: Any = None, **options: Any) -> Any:
            return rows if split else Splits(rows)

        with unittest.mock.patch.object(datasets, "load_dataset", load_dataset), _in_time():
            try:
                load(name)
            except Built as built:
                return built.count
        raise RuntimeError("it came to an end without a request")

    def _manager(self, **_: Any) -> Any:
        return self.manager

    def _ours(self, name: str) -> None:
        def stop(asked: Asked) -> Any:
            raise Built(len(asked.requests) + len(asked.prompts))

        config = Config(tasks=[name], limit=2, confirm_run_unsafe_code=True, model_args={"pretrained": "demo"})
        with unittest.mock.patch.object(select, "TaskManager", self._manager):
            harness.evaluate_tasks(config, self.encoder, self.config, stop, Phases())

    def _theirs(self, name: str) -> None:
        lm_eval.simple_evaluate(
            model=Asker(), tasks=[name], task_manager=self._manager(), limit=2, confirm_run_unsafe_code=True, bootstrap_iters=0
        )


class TooLong(BaseException):
    """A stand-in value keeps a task's code busy for ever."""


@contextlib.contextmanager
def _in_time(limit_s: int = 20) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong(f"still busy after {limit_s} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def missing(error: BaseException) -> tuple[str, str] | None:
    """What is not there, where that is why."""
    seen: BaseException | None = error
    for _ in range(9):  # they may refer to each other in circles
        if seen is None:
            break
        if isinstance(seen, ModuleNotFoundError):
            return "missing package", seen.name or one_line(seen, 150)
        text = f"{type(seen).__name__}: {one_line(seen, 150)}".replace(f"{Path.cwd()}/", "")
        if isinstance(seen, ImportError) and re.search("install|require", str(seen)):
            return "missing package", one_line(seen, 150)
        network = ("ConnectionError", "MaxRetryError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "URLError", "gaierror")
        if type(seen).__name__ in network or "offline mode" in str(seen).lower() or "couldn't connect to" in str(seen):
            return "missing data or metric (fetched by the task's own code)", text
        if isinstance(seen, FileNotFoundError):
            return "missing data or metric (fetched by the task's own code)", text
        if isinstance(seen, LookupError) and "nltk" in str(seen).lower():
            return "missing data or metric (fetched by the task's own code)", "nltk"
        seen = seen.__cause__ or seen.__context__
    return None


def format_report(outcomes: list[Outcome], sample: int, total: int, elapsed_s: float) -> str:
    types = sorted({one.type for one in outcomes})
    kinds = [kind for kind, _ in collections.Counter(one.kind for one in outcomes).most_common()]
    count = collections.Counter((one.kind, one.type) for one in outcomes)
    lines = [
        "# Walk through lm_eval's tasks",
        "",
        f"{sample} of the {total:,} tasks in the index of lm_eval {lm_eval.__version__}, each loaded through ddp_eval's own path "
        f"to its requests, without data sets (`scripts/walk_tasks.py`; {datetime.date.today()}, {elapsed_s:.0f} s). "
        "`class`: a task written in Python, which tells its type only once it is made.",
        "",
        f"| outcome | all | {' | '.join(types)} |",
        f"|---|---|{'---|' * len(types)}",
    ]
    for kind in kinds:
        cells = [str(count[kind, type]) for type in types]
        lines.append(f"| {kind} | {sum(count[kind, type] for type in types)} | {' | '.join(cells)} |")
    lines.append(f"| all | {len(outcomes)} | {' | '.join(str(sum(count[kind, type] for kind in kinds)) for type in types)} |")
    for kind in kinds:
        if kind == "loads":
            continue
        lines += ["", f"## {kind}", ""]
        by_detail = collections.defaultdict(list)
        for one in outcomes:
            if one.kind == kind:
                by_detail[one.detail].append(one.name)
        for detail, names in sorted(by_detail.items(), key=lambda pair: -len(pair[1])):
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"- {detail.replace('|', '/') or 'each'}: {shown}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per_directory", type=int, default=2, help="tasks of each type from each directory of the index")
    parser.add_argument("--names", nargs="+", help="these tasks instead")
    parser.add_argument(
        "--part", nargs=2, type=int, default=(0, 1), metavar=("K", "N"), help="every Nth of them, from the Kth on"
    )
    parser.add_argument("--outcomes", type=Path, help="also write each outcome to this file, a line of JSON each")
    parser.add_argument("--report", nargs="+", type=Path, help="walk nowhere: report what several parts have written")
    parser.add_argument("--output", type=Path, help="where the report goes (default: stdout)")
    options = parser.parse_args()
    if options.report:
        lines = [json.loads(line) for path in options.report for line in path.read_text(encoding="utf-8").splitlines()]
        latest = {line["outcome"][0]: Outcome(*line["outcome"]) for line in lines}
        write(sorted(latest.values()), lines[0]["total"], sum(line["elapsed_s"] for line in lines), options.output)
        return
    logging.disable(logging.ERROR)
    datasets.disable_progress_bars()
    np.seterr(all="ignore")
    walk = Walk()
    total = len(walk.manager.all_subtasks)
    chosen = [(name, walk.type_of(name)) for name in options.names] if options.names else walk.choose(options.per_directory)
    chosen = chosen[options.part[0] :: options.part[1]]
    outcomes, elapsed_s = [], 0.0
    for index, (name, kind) in enumerate(chosen):
        started = time.monotonic()
        outcomes.append(walk.visit(name, kind))
        took_s = time.monotonic() - started
        elapsed_s += took_s
        print(f"{index + 1}/{len(chosen)} {outcomes[-1].kind} {name} {outcomes[-1].detail}", file=sys.stderr, flush=True)
        if options.outcomes:
            with options.outcomes.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"outcome": outcomes[-1], "total": total, "elapsed_s": took_s}) + "\n")
    write(outcomes, total, elapsed_s, options.output)


def write(outcomes: list[Outcome], total: int, elapsed_s: float, output: Path | None) -> None:
    report = format_report(outcomes, len(outcomes), total, elapsed_s)
    if output:
        output.write_text(report, encoding="utf-8")
    else:
        print(report)
    if any(one.kind.startswith("DEFECT") for one in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
