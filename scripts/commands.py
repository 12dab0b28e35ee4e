#!/usr/bin/env python3
"""Whole commands of both sides, from start to exit: what `bench.py --commands` does.

    python scripts/bench.py --commands --model DIR --tasks A,B+C:DOCUMENTS --include_path DIR --out benchmarks/NAME

`python -m ddp_eval …` and `python -m lm_eval run --model hf …` evaluate the same tasks with the same model, limit, number of
threads and cores, in turn; A+B+C is one command with three tasks. What either does before and after scoring counts: imports,
lm_eval's index of its own task files, data sets, prompts, weights, metrics and standard errors, files. Both run once on a single
document of each task first, so that data sets are in the cache. lm_eval's batch sizes are tried on a quarter of the documents;
those that score within 1.15 times the best run on all of them.

Scoring alone is measured in the same runs. ddp_eval: the phases of telemetry.json that lie between the requests' texts and the
answers. lm_eval: the seconds in the methods of `HFLM` that score, written down by `run_lm_eval` below, which runs the command.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_command import CommandError, run_command, usable_cores  # beside this file
from sides import compare_metrics, cut, describe_commands, format_conditions, format_table, keep, note_seconds, read_suite

CALLS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
SCORING = ("tokenize", "plan", "trial", "measure", "send", "wait", "forward", "gather", "again")  # phases of ddp_eval
ACCURACIES = ("acc", "acc_norm", "exact_match")


def main(args: argparse.Namespace) -> None:
    suites = args.tasks.split(",")
    try:
        list(map(read_suite, suites))
    except ValueError as error:
        sys.exit(str(error))
    rows: list[dict[str, Any]] = []
    report = {"conditions": describe_commands(args), "rows": rows}
    for suite in suites:
        try:
            rows.append(measure_suite(suite, args))
        except CommandError as error:
            sys.exit(str(error))
        print(" | ".join(format_row(rows[-1])), file=sys.stderr, flush=True)
        keep(report, format_report, args.out)
    print(format_report(report))


def measure_suite(suite: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of alternating runs, and how far apart the two sides' metrics are."""
    tasks, limit, quarter = read_suite(suite)
    sizes = [int(size) for size in args.batch_sizes.split(",")]

    def ours(limit: float | None) -> dict[str, Any]:
        return run_ours(our_flags(tasks, limit, args), args)

    def theirs(limit: float | None, size: int) -> dict[str, Any]:
        return run_theirs(lm_eval_flags(tasks, limit, size, args), args)

    ours(1), theirs(1, min(sizes))  # data sets, once read, are in the cache
    tried = try_sizes(lambda size: theirs(quarter, size)["scoring_s"], sizes) if len(sizes) > 1 else {sizes[0]: 0.0}
    runs: dict[str, list[dict[str, Any]]] = {str(size): [] for size in choose_sizes(tried)}
    if not runs:
        sys.exit(f"{suite}: lm_eval ran out of memory at every one of --batch_sizes {args.batch_sizes}")
    ours_runs: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        for size, seen in runs.items():
            seen.append(theirs(limit, int(size)))
        ours_runs.append(ours(limit))
    return {
        "suite": suite,
        "limit": limit,
        "quarter_scoring_s": tried,
        **summarize(runs, ours_runs),
        "runs": {name: [one | {"results": None} for one in seen] for name, seen in {**runs, "ours": ours_runs}.items()},
    }


def try_sizes(score: Any, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of `score(size)` for each batch size, infinite where memory does not suffice."""
    tried = {}
    for size in sizes:
        try:
            tried[size] = score(size)
        except CommandError as error:
            if not error.is_out_of_memory:
                raise
            tried[size] = math.inf
    return tried


def choose_sizes(tried: dict[int, float]) -> list[int]:
    """Batch sizes within 1.15 times the best.

    >>> choose_sizes({1: 4.0, 8: 2.0, 16: 2.2, 32: math.inf})
    [8, 16]
    """
    return [size for size, seconds in tried.items() if seconds <= 1.15 * min(tried.values()) and seconds < math.inf]


def summarize(theirs: dict[str, list[dict[str, Any]]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ratios, lm_eval at the batch size whose whole command is best, and for scoring at the one that scores best.

    theirs: {batch size: runs}. A run is {"wall_s", "scoring_s", "results", …}.
    """
    row: dict[str, Any] = {"ours": {}, "lm_eval": {}, "lm_eval_batch_size": {}, "ratio": {}}
    for what in ("wall_s", "scoring_s"):
        medians = {size: statistics.median(run[what] for run in runs) for size, runs in theirs.items()}
        best = min(medians, key=medians.__getitem__)
        row["ours"][what] = statistics.median(run[what] for run in ours)
        row["lm_eval"][what], row["lm_eval_batch_size"][what] = medians[best], int(best)
        row["ratio"][what] = medians[best] / row["ours"][what]
    answers = theirs[str(row["lm_eval_batch_size"]["wall_s"])][-1]["results"]
    differences = compare_metrics(answers["results"], ours[-1]["results"]["results"])
    worst = max(differences, key=differences.__getitem__)
    return row | {
        "documents": count_documents(answers),
        "requests": ours[-1]["results"]["ddp_eval"]["requests"],
        "metrics": len(differences),
        "max_relative_difference_of_metrics": differences[worst],
        "worst_metric": worst,
        "accuracies_that_differ": [name for name, value in differences.items() if value and is_accuracy(name)],
    }


def count_documents(results: dict[str, Any]) -> int:
    """Documents of all tasks of lm_eval's results."""
    return sum(count["effective"] for count in results["n-samples"].values())


def is_accuracy(name: str) -> bool:
    """name: a key of `compare_metrics`, such as "local_piqa acc_norm,none"."""
    return name.rpartition(" ")[2].partition(",")[0] in ACCURACIES


def common_flags(tasks: Sequence[str], limit: float | None, args: argparse.Namespace, shots: int | None = None) -> list[str]:
    """What both commands take."""
    return [
        *("--tasks", ",".join(tasks)),
        *(["--limit", f"{limit:g}"] if limit else []),
        *([] if shots is None else ["--num_fewshot", str(shots)]),
        *(["--include_path", args.include_path] if args.include_path else []),
        *(["--gen_kwargs", args.gen_kwargs] if args.gen_kwargs else []),
    ]


def our_flags(tasks: Sequence[str], limit: float | None, args: argparse.Namespace) -> list[str]:
    return [
        *("--model_args", f"pretrained={args.model},dtype={args.dtype}"),
        *common_flags(tasks, limit, args),
        *(["--device", "cpu"] if args.cpu else []),
        *(["--no_packing"] if args.no_packing else []),
    ]


def lm_eval_flags(tasks: Sequence[str], limit: float | None, size: int, args: argparse.Namespace) -> list[str]:
    softmax = f",softmax_dtype={args.softmax_dtype}" if args.softmax_dtype else ""
    return [
        *("run", "--model", "hf", "--model_args", f"pretrained={args.model},dtype={args.dtype}{softmax}"),
        *common_flags(tasks, limit, args),
        *("--batch_size", str(size), "--device", find_device(args)),
    ]


def find_device(args: argparse.Namespace) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"


def run_ours(flags: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        argv = [sys.executable, "-m", "ddp_eval", *flags, "--output_path", f"{scratch}/run"]
        ran = run_command(argv, args.threads, usable_cores()[: args.threads])
        results = json.loads(Path(f"{scratch}/run/results.json").read_text())
    scoring_s = sum(results["ddp_eval"]["phases_s"].get(phase, 0.0) for phase in SCORING)
    return {"wall_s": ran.wall_s, "scoring_s": scoring_s, "peak_bytes": ran.peak_bytes, "results": results}


def run_theirs(flags: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        notes = Path(scratch, "seconds")
        argv = [sys.executable, __file__, str(notes), *flags, "--output_path", f"{scratch}/run"]
        ran = run_command(argv, args.threads, usable_cores()[: args.threads])
        (file,) = Path(f"{scratch}/run").rglob("results_*.json")
        results = json.loads(file.read_text())
        scoring_s = sum(json.loads(notes.read_text()))
    return {"wall_s": ran.wall_s, "scoring_s": scoring_s, "peak_bytes": ran.peak_bytes, "results": results}


def run_lm_eval(notes: Path) -> None:
    """lm_eval's own command, with the seconds of each call that scores written to the file `notes` at its end."""
    from lm_eval.models.huggingface import HFLM

    spent: list[float] = []
    note_seconds(HFLM, CALLS, spent)
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
    notes.write_text(json.dumps(spent))


HEADS = [
    "tasks of a command", "documents", "requests", "lm_eval s (batch)", "ddp_eval s", "ratio",
    "scoring alone: lm_eval s (batch)", "ddp_eval s", "ratio", "metrics differ by", "accuracies that differ",
]  # fmt: skip


def format_row(row: dict[str, Any]) -> list[str]:
    cells = [
        cell
        for what in ("wall_s", "scoring_s")
        for cell in (
            f"{row['lm_eval'][what]:.1f} ({row['lm_eval_batch_size'][what]})",
            f"{row['ours'][what]:.1f}",
            f"**{cut(row['ratio'][what], 2)}**",
        )
    ]
    differing = ", ".join(row["accuracies_that_differ"]) or "none"
    worst = f"{row['max_relative_difference_of_metrics']:.1g}"
    return [row["suite"], f"{row['documents']:,}", f"{row['requests']:,}", *cells, worst, differing]


def format_report(report: dict[str, Any]) -> str:
    rows = report["rows"]
    means = [cut(math.exp(statistics.fmean(math.log(row["ratio"][what]) for row in rows)), 2) for what in ("wall_s", "scoring_s")]
    return "\n".join(
        [
            *format_conditions(report["conditions"]),
            "Whole commands, from start to exit, as processes of their own on the same cores; medians of alternating runs.",
            "",
            *format_table(HEADS, [format_row(row) for row in rows]),
            "",
            f"Geometric means of the ratios: whole commands **{means[0]}**, scoring alone **{means[1]}**.",
        ]
    )


if __name__ == "__main__":
    path = Path(sys.argv.pop(1))
    run_lm_eval(path)
