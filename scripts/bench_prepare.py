#!/usr/bin/env python3
"""What rank 0 does alone: seconds before the first forward and after the last, beside lm_eval's own time for the same work.

    python scripts/bench_prepare.py --model DIR --tasks A,B:DOCUMENTS,A+B+C --include_path DIR --ranks 1,2 --out benchmarks/NAME

A+B+C is one command with three tasks. Give a model that computes next to nothing (`make_bench_model.py --shape tiny`): what is
measured does not depend on it. For each suite, in turn:

- `python -m ddp_eval`, on each number of ranks: its phases on rank 0, by telemetry.json, with what comes before the process of
  rank 0 starts (launcher) and after telemetry.json is written (exit); the peak memory of rank 0's process; and how long the other
  ranks wait.
- `python -m ddp_eval plan`, which builds and plans the same requests, on one core and on two.
- lm_eval's code for the same work, with no forward: load the tasks, build the requests, encode them (`HFLM.loglikelihood`,
  `loglikelihood_rolling`, `generate_until`) as rank 0 of 1 and as rank 0 of 8. The latter runs alone: 8 of them on
  fewer than 8 free cores take longer.

Data sets have been read once before, as on any machine where a command runs for the second time. Processes may use all cores that
this one may; PyTorch has --threads of them in each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from commands import count_documents, our_flags  # beside this file
from run_command import CommandError, run_command, usable_cores
from sides import cut, describe_commands, format_conditions, format_table, keep, read_suite

LM_EVAL_RANKS = (1, 8)
FEWSHOT_SEED = 1234  # lm_eval's default
BUILDING, PLANNING = ("tasks", "tokenize"), ("plan", "trial")  # phases of ddp_eval


def main() -> None:
    args = read_arguments()
    if args.lm_eval_side:
        logging.disable(logging.WARNING)
        print(json.dumps(prepare_by_lm_eval(args) | (time_index(args) if args.lm_eval_side == 1 else {})))
        return
    rows: list[dict[str, Any]] = []
    report = {"conditions": describe_commands(args), "rows": rows}
    for suite in args.tasks.split(","):
        rows.append(measure_suite(suite, args))
        print(suite, *(f"{ranks} rank(s): {run['wall_s']:.1f} s" for ranks, run in rows[-1]["ddp_eval"].items()), file=sys.stderr)
        keep(report, format_report, args.out)
    print(format_report(report))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default float32)")
    parser.add_argument("--tasks", required=True, help="comma-separated TASK, A+B+C or A+B+C:DOCUMENTS, a row each")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks of ddp_eval (default 1,2)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; medians are reported (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank (default 1)")
    parser.add_argument("--gen_kwargs", help="ddp_eval's --gen_kwargs, such as max_gen_toks=16")
    parser.add_argument(
        "--lm_eval_limit", type=int, help="have lm_eval's rank build so many documents of each task, and scale up (default: all)"
    )
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    parser.add_argument("--lm_eval_side", type=int, metavar="RANKS", help=argparse.SUPPRESS)  # be lm_eval's process
    args = parser.parse_args()
    try:
        list(map(read_suite, args.tasks.split(",")))
    except ValueError as error:
        parser.error(str(error))
    return argparse.Namespace(**vars(args), cpu=True, no_packing=False)


def measure_suite(suite: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: medians of --repeats, everything in turn."""
    tasks, limit, _ = read_suite(suite)
    flags = our_flags(tasks, limit, args)
    plan = [sys.executable, "-m", "ddp_eval", "plan"]
    run_command([*plan, *our_flags(tasks, 1, args)], args.threads)  # data sets, once read, are in the cache
    measures: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}
    for ranks in args.ranks.split(","):
        measures["ddp_eval", ranks] = functools.partial(measure_run, int(ranks), flags, args)
    for count in range(1, min(2, len(usable_cores())) + 1):
        measures["plan", str(count)] = functools.partial(measure_plan, [*plan, *flags], count)
    for ranks in map(str, LM_EVAL_RANKS):
        measures["lm_eval", ranks] = functools.partial(measure_lm_eval, suite, ranks, args)
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in measures}
    for _ in range(args.repeats):
        for key, measure in measures.items():
            seen[key].append(measure())
    row: dict[str, Any] = {"suite": suite, "limit": limit, "ddp_eval": {}, "plan": {}, "lm_eval": {}}
    for (what, ranks), runs in seen.items():
        row[what][ranks] = median_of(runs)
    return row | {"runs": {f"{what} {ranks}": runs for (what, ranks), runs in seen.items()}}


def measure_run(ranks: int, flags: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """A whole command of ddp_eval."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as scratch:
        argv = [sys.executable, *launcher, "-m", "ddp_eval", *flags, "--output_path", f"{scratch}/run"]
        ran = run_command(argv, args.threads, is_launcher=ranks > 1)
        results, telemetry = (json.loads(Path(scratch, "run", f"{name}.json").read_text()) for name in ("results", "telemetry"))
    leader, *followers = telemetry["ranks"]
    return {
        "documents": count_documents(results),
        "requests": results["ddp_eval"]["requests"],
        "wall_s": ran.wall_s,
        **split_wall(leader, ran.began_unix_s, ran.wall_s),
        "peak_bytes": ran.peak_bytes,
        "workers_peak_bytes": ran.workers_peak_bytes,
        **(describe_waits(followers, ran.wall_s) if followers else {}),
    }


def split_wall(leader: dict[str, Any], began_unix_s: float, wall_s: float) -> dict[str, Any]:
    """A command's seconds by phase of rank 0, in three parts: before the first forward, from there to the end of the last, after.

    leader: rank 0's report in telemetry.json. "launch" is the time to the start of its process, "exit" what follows its report.
    """
    launch_s = max(0.0, leader["began_unix_s"] - began_unix_s)
    before, during, after = split_timeline(leader["timeline"], leader["wall_s"])
    return {
        "before_s": {"launch": launch_s, **before},
        "during_s": during,
        "after_s": {**after, "exit": max(0.0, wall_s - launch_s - leader["wall_s"])},
    }


def split_timeline(timeline: Sequence[Sequence[Any]], wall_s: float) -> tuple[dict[str, float], ...]:
    """Seconds by phase: before the first forward, from there to the end of the last, after that.

    timeline: (when it began, phase), in order. A rank that runs no forward has all its time before the first.

    >>> split_timeline([(0.0, "tasks"), (2.0, "forward"), (3.0, "gather"), (3.5, "tasks")], 4.0)
    ({'tasks': 2.0}, {'forward': 1.0}, {'gather': 0.5, 'tasks': 0.5})
    """
    forwards = [index for index, (_, phase) in enumerate(timeline) if phase == "forward"] or [len(timeline)]
    parts: tuple[dict[str, float], ...] = ({}, {}, {})
    ends = [*(at_s for at_s, _ in timeline[1:]), wall_s]
    for index, ((at_s, phase), end_s) in enumerate(zip(timeline, ends, strict=True)):
        part = parts[(index >= forwards[0]) + (index > forwards[-1])]
        part[phase] = part.get(phase, 0.0) + end_s - at_s
    return parts


def describe_waits(followers: Sequence[dict[str, Any]], wall_s: float) -> dict[str, float]:
    """Means over ranks 1 and up: seconds of waiting for rank 0 before the first forward and in all, and shares of the command."""
    before_s = statistics.fmean(split_timeline(rank["timeline"], rank["wall_s"])[0].get("wait", 0.0) for rank in followers)
    in_all_s = statistics.fmean(rank["phases_s"].get("wait", 0.0) for rank in followers)
    return {
        "wait_before_s": before_s,
        "wait_before_share": before_s / wall_s,
        "wait_s": in_all_s,
        "wait_share": in_all_s / wall_s,
    }


def measure_plan(argv: Sequence[str], count: int) -> dict[str, float]:
    """`ddp_eval plan` on `count` cores."""
    ran = run_command(argv, count, usable_cores()[:count])
    return {"wall_s": ran.wall_s, "peak_bytes": ran.peak_bytes}


def measure_lm_eval(suite: str, ranks: str, args: argparse.Namespace) -> dict[str, Any]:
    """`prepare_by_lm_eval` in a process of its own."""
    argv = [sys.executable, __file__, "--lm_eval_side", ranks, "--model", args.model, "--tasks", suite]
    argv += ["--include_path", args.include_path] if args.include_path else []
    argv += ["--lm_eval_limit", str(args.lm_eval_limit)] if args.lm_eval_limit else []
    ran = run_command(argv, args.threads)
    return json.loads(ran.stdout.splitlines()[-1]) | {"peak_bytes": ran.peak_bytes}


def prepare_by_lm_eval(args: argparse.Namespace) -> dict[str, Any]:
    """lm_eval's time for the tasks of one suite as rank 0 of `args.lm_eval_side`; imports and the model are not counted.

    With args.lm_eval_limit prompts and token ids are those of so many documents of a task, scaled up to all that the rank has.
    """
    import transformers
    from lm_eval.evaluator_utils import get_sample_size
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (suite,) = args.tasks.split(",")
    names, limit, _ = read_suite(suite)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    lm = without_forward(HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(args.model)))
    started = time.perf_counter()
    manager = TaskManager(include_path=args.include_path, include_defaults=not args.include_path)
    tasks = manager.load(names)["tasks"]
    found = {"tasks_s": time.perf_counter() - started, "prompts_s": 0.0, "ids_s": 0.0, "documents": 0, "measured_documents": 0}
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:  # as simple_evaluate does
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        documents = min(get_sample_size(task, limit) or len(task.eval_docs), len(task.eval_docs))
        measured, scale = choose_measured(documents, args.lm_eval_limit, args.lm_eval_side)
        started = time.perf_counter()
        task.build_all_requests(limit=measured, rank=0, world_size=args.lm_eval_side)
        built = time.perf_counter()
        encode_by_lm_eval(lm, task.instances)
        found["prompts_s"] += (built - started) * scale
        found["ids_s"] += (time.perf_counter() - built) * scale
        found["documents"] += documents
        found["measured_documents"] += measured
    return found


def choose_measured(documents: int, limit: int | None, ranks: int) -> tuple[int, float]:
    """How many documents of a task to give to all ranks so that rank 0 builds `limit`, and the factor from those to all it has.

    >>> choose_measured(1000, 25, 8), choose_measured(1000, None, 8), choose_measured(10, 25, 1)
    ((200, 5.0), (1000, 1.0), (10, 1.0))
    """
    measured = min(documents, limit * ranks) if limit else documents
    return measured, math.ceil(documents / ranks) / math.ceil(measured / ranks)


def time_index(args: argparse.Namespace) -> dict[str, float]:
    """Seconds that lm_eval's command takes to read the index of its own task files and those of --include_path."""
    from lm_eval.tasks import TaskManager

    started = time.perf_counter()
    TaskManager(include_path=args.include_path)
    return {"index_s": time.perf_counter() - started}


def without_forward(lm: Any) -> Any:
    """An HFLM that does all but compute: every score is 0 and every generated text is empty."""
    lm._loglikelihood_tokens = lambda requests, **options: [(0.0, False)] * len(requests)
    lm._model_generate = lambda context, **options: context
    return lm


def encode_by_lm_eval(lm: Any, requests: Sequence[Any]) -> None:
    """Have each request answered by the method of `lm` that lm_eval would ask."""
    by_method: dict[str, list[Any]] = {}
    for request in requests:
        by_method.setdefault(request.request_type, []).extend([request] * request.repeats)
    with contextlib.redirect_stdout(io.StringIO()):
        for method, found in by_method.items():
            getattr(lm, method)(found, disable_tqdm=True)


def median_of(runs: Sequence[Any]) -> Any:
    """Of numbers the median, of dictionaries one of medians; what a run lacks counts as 0.

    >>> median_of([{"a": 1.0, "b": {"c": 2.0}}, {"a": 3.0, "b": {}}])
    {'a': 2.0, 'b': {'c': 1.0}}
    """
    if not isinstance(runs[0], dict):
        return statistics.median(runs)
    keys = dict.fromkeys(key for run in runs for key in run)
    blank: dict[str, Any] = {key: {} if any(isinstance(run.get(key), dict) for run in runs) else 0.0 for key in keys}
    return {key: median_of([run.get(key, blank[key]) for run in runs]) for key in keys}


def format_report(report: dict[str, Any]) -> str:
    rows = report["rows"]
    lines = [*format_conditions(report["conditions"])]
    lines += ["Rank 0 of ddp_eval, whole commands: seconds by phase.", "", *format_phases(rows)]
    if any("wait_s" in run for row in rows for run in row["ddp_eval"].values()):
        lines += ["", "Ranks 1 and up, on average: time spent waiting for rank 0, and its share of the command.", ""]
        lines += format_waits(rows)
    lines += ["", ABOUT_LM_EVAL, *([ABOUT_SCALE] if any(map(is_scaled, rows)) else []), "", *format_comparison(rows)]
    return "\n".join(lines)


ABOUT_LM_EVAL = (
    "The same requests by lm_eval's code with no forward: load tasks, build prompts, encode. Its rank 0 of 8 builds every eighth "
    "document and is taken for the slowest rank; it ran alone. The index of lm_eval's own task files, which every rank of its "
    "command reads first, has a column of its own and is in no sum. On any number of ranks ddp_eval's rank 0 builds and encodes "
    "all requests (phases tasks and tokenize) and plans them (plan and trial)."
)
ABOUT_SCALE = "*: lm_eval measured on fewer documents of each task, seconds of its prompts and token ids scaled up linearly."


def is_scaled(row: dict[str, Any]) -> bool:
    return any(run["measured_documents"] < run["documents"] for run in row["lm_eval"].values())


def format_phases(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each suite and number of ranks; phases that take less than 5 ms everywhere have no column."""
    runs = [run for row in rows for run in row["ddp_eval"].values()]
    before, after = (find_columns(run[part] for run in runs) for part in ("before_s", "after_s"))
    workers = any(run["workers_peak_bytes"] >= 2**26 for run in runs)  # not for `git` and its like
    heads = [
        *("tasks of a command", "documents", "requests", "ranks", *before, "**before the first forward**", "to the last forward"),
        *(
            *after,
            "**after the last**",
            "**wall**",
            "before and after",
            "peak MiB",
            *(["its workers' peak MiB"] if workers else []),
        ),
    ]
    cells = []
    for row in rows:
        for ranks, run in row["ddp_eval"].items():
            first, last = sum(run["before_s"].values()), sum(run["after_s"].values())
            numbers = [
                *(run["before_s"].get(phase, 0.0) for phase in before),
                *(first, sum(run["during_s"].values())),
                *(run["after_s"].get(phase, 0.0) for phase in after),
                *(last, run["wall_s"]),
            ]
            cells.append(
                [
                    *(row["suite"], f"{run['documents']:,.0f}", f"{run['requests']:,.0f}", ranks),
                    *(f"{number:.2f}" for number in numbers),
                    f"{cut(100 * (first + last) / run['wall_s'], 1)}%",
                    f"{run['peak_bytes'] / 2**20:,.0f}",
                    *([f"{run['workers_peak_bytes'] / 2**20:,.0f}"] if workers else []),
                ]
            )
    return format_table(heads, cells)


def find_columns(runs: Any) -> list[str]:
    """Phases that any run spends 5 ms in, "launch" first, "exit" last, in between in the order of a run."""
    from ddp_eval.telemetry.summary import PHASES

    found = {phase for run in runs for phase, seconds in run.items() if seconds >= 0.005}
    order = ["launch", *PHASES, *sorted(found - {"launch", "exit", *PHASES}), "exit"]
    return [phase for phase in order if phase in found]


def format_waits(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["tasks of a command", "ranks", "before their first forward, s", "share", "in all, s", "share"]
    return format_table(
        heads,
        [
            [
                *(row["suite"], ranks, f"{run['wait_before_s']:.2f}", f"{run['wait_before_share']:.1%}"),
                *(f"{run['wait_s']:.2f}", f"{run['wait_share']:.1%}"),
            ]
            for row in rows
            for ranks, run in row["ddp_eval"].items()
            if "wait_s" in run
        ],
    )


def format_comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """ddp_eval on its smallest number of ranks against lm_eval, and the command `plan`."""
    cores = list(rows[0]["plan"])
    heads = [
        *("tasks of a command", "documents", "lm_eval: index", "tasks", "prompts", "token ids", "sum", "rank 0 of 8: sum"),
        *("ddp_eval: tasks and tokenize", "and plan", "faster than lm_eval on 1", "on 8"),
        *(f"`plan`, {count} core{'s' if count != '1' else ''}" for count in cores),
    ]
    cells = []
    for row in rows:
        one, eight = (row["lm_eval"][str(ranks)] for ranks in LM_EVAL_RANKS)
        run = next(iter(row["ddp_eval"].values()))
        built = sum(run["before_s"].get(phase, 0.0) for phase in BUILDING)
        planned = built + sum(run["before_s"].get(phase, 0.0) for phase in PLANNING)
        star = "*" if is_scaled(row) else ""
        cells.append(
            [
                *(row["suite"], f"{run['documents']:,.0f}", f"{one['index_s']:.2f}", f"{one['tasks_s']:.2f}"),
                *(f"{seconds:.2f}{star}" for seconds in (one["prompts_s"], one["ids_s"], total_s(one), total_s(eight))),
                *(f"{built:.2f}", f"{planned:.2f}"),
                *(f"**{cut(total_s(side) / planned, 2)}x**{star}" for side in (one, eight)),
                *(f"{row['plan'][count]['wall_s']:.2f}" for count in cores),
            ]
        )
    return format_table(heads, cells)


def total_s(lm_eval: dict[str, float]) -> float:
    return lm_eval["tasks_s"] + lm_eval["prompts_s"] + lm_eval["ids_s"]


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        main()
    except CommandError as error:
        sys.exit(str(error))
