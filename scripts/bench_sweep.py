#!/usr/bin/env python3
"""Time a sweep over checkpoints against a run of its own for each, and against an lm_eval command for each, start to end.

    OMP_NUM_THREADS=1 python scripts/bench_sweep.py --model DIR --tasks A:100,B:100,C:100 --include_path TASKS --out NAME

--model is a model directory (`make_bench_model.py --shape llama23m`); its checkpoints are copies whose weights are moved a
little. All sides run on one core, one after the other, with the same tasks and documents. `gap` is the time from the end of a
model's last forward to the first of the next, by telemetry.json; `resident` is rank 0's memory at the end of each model: it must
not grow.
Scores of the sweep and of the runs are compared to the bit. For memory over many models alone: --checkpoints 20 --only sweep.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from run_command import run_command, usable_cores  # beside this file
from sides import describe_commands, format_conditions, format_table, keep

SIDES = ("sweep", "runs", "lm_eval")


def main() -> int:
    args = read_arguments()
    cores = usable_cores()[:1]
    with tempfile.TemporaryDirectory(prefix="bench_sweep_") as scratch:
        place = Path(scratch)
        models = write_checkpoints(Path(args.model), place / "train", args.checkpoints)
        warm_up(args, models[0], place, cores)
        report: dict[str, Any] = {"conditions": describe_commands(args), "tasks": args.tasks, "checkpoints": args.checkpoints}
        for side in args.only.split(","):
            report[side] = {"sweep": time_sweep, "runs": time_runs, "lm_eval": time_lm_eval}[side](args, models, place, cores)
            print(side, f"{report[side]['wall_s']:.1f} s", file=sys.stderr, flush=True)
            keep(report, format_report, args.out)
        if {"sweep", "runs"} <= report.keys():
            report["same_bits"] = all(
                scores_of(place / "sweep" / one.name) == scores_of(place / "runs" / one.name) for one in models
            )
            keep(report, format_report, args.out)
    print(format_report(report))
    return 0 if report.get("same_bits", True) else 1


def scores_of(directory: Path) -> bytes:
    return (directory / "scores.parquet").read_bytes()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a model and its tokenizer")
    parser.add_argument("--tasks", required=True, help="comma-separated TASK or TASK:DOCUMENTS, of one and the same number")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--checkpoints", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--only", default=",".join(SIDES), help="some of sweep,runs,lm_eval (default: all)")
    parser.add_argument("--batch_size", type=int, default=1, help="of lm_eval (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side (default 1)")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    args = parser.parse_args()
    args.cpu, args.dtype = True, "float32"
    words = [task.partition(":") for task in args.tasks.split(",")]
    limits = {limit for _, _, limit in words}
    if len(limits) != 1:
        parser.error("--tasks must name the same number of documents for each task")
    limit = limits.pop()
    args.flags = ["--tasks", ",".join(name for name, _, _ in words), *(["--limit", limit] if limit else [])]
    args.flags += ["--include_path", args.include_path] if args.include_path else []
    return args


def write_checkpoints(model: Path, place: Path, count: int) -> list[Path]:
    import safetensors.torch

    for number in range(1, count + 1):
        folder = Path(shutil.copytree(model, place / f"checkpoint-{number * 100}"))
        for file in folder.glob("*.safetensors"):
            weights = safetensors.torch.load_file(file)
            moved = {name: (one.float() * (1 + number / 1000)).to(one.dtype) for name, one in weights.items()}
            safetensors.torch.save_file(moved, file, {"format": "pt"})
    return [place / f"checkpoint-{number * 100}" for number in range(1, count + 1)]


def warm_up(args: argparse.Namespace, model: Path, place: Path, cores: list[int]) -> None:
    """Data sets, bytecode and the index of tasks are in their caches, as for whoever evaluates a second time."""
    run_one(args, model, place / "warm", cores)


def run_one(args: argparse.Namespace, model: Path, output: Path, cores: list[int]) -> Any:
    flags = ["--model_args", f"pretrained={model}", *args.flags, "--device", "cpu", "--output_path", str(output)]
    return run_command([sys.executable, "-m", "ddp_eval", *flags], args.threads, cores)


def time_sweep(args: argparse.Namespace, models: list[Path], place: Path, cores: list[int]) -> dict[str, Any]:
    pattern = str(models[0].parent / "checkpoint-*")
    flags = ["sweep", "--models", pattern, *args.flags, "--device", "cpu", "--output_path", str(place / "sweep")]
    done = run_command([sys.executable, "-m", "ddp_eval", *flags], args.threads, cores)
    found = [read_telemetry(place / "sweep" / model.name) for model in models]
    gaps = [after["first_s"] - before["last_s"] for before, after in itertools.pairwise(found)]
    return {
        "wall_s": done.wall_s,
        "peak_bytes": done.peak_bytes,
        "setup_s": [one["setup_s"] for one in found],
        "gap_s": gaps,
        "resident_bytes": [one["resident_bytes"] for one in found],
    }


def read_telemetry(directory: Path) -> dict[str, Any]:
    """first_s, last_s: when the first forward began and the last one ended, in seconds of the clock."""
    rank = json.loads((directory / "telemetry.json").read_text())["ranks"][0]
    timeline = [*rank["timeline"], [rank["wall_s"], "end"]]
    spans = [(began, after) for (began, name), (after, _) in itertools.pairwise(timeline) if name == "forward"]
    return {
        "first_s": rank["began_unix_s"] + spans[0][0],
        "last_s": rank["began_unix_s"] + spans[-1][1],
        "setup_s": sum(rank["phases_s"].get(name, 0.0) for name in ("tasks", "tokenize", "plan")),
        "resident_bytes": rank["samples"][-1][2] if rank["samples"] else 0,
    }


def time_runs(args: argparse.Namespace, models: list[Path], place: Path, cores: list[int]) -> dict[str, Any]:
    each = [run_one(args, model, place / "runs" / model.name, cores).wall_s for model in models]
    return {"wall_s": sum(each), "each_s": each}


def time_lm_eval(args: argparse.Namespace, models: list[Path], place: Path, cores: list[int]) -> dict[str, Any]:
    each = []
    for model in models:
        flags = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", *args.flags, "--device", "cpu"]
        flags += ["--batch_size", str(args.batch_size), "--output_path", str(place / "lm_eval" / model.name)]
        each.append(run_command([sys.executable, "-m", "lm_eval", *flags], args.threads, cores).wall_s)
    return {"wall_s": sum(each), "each_s": each}


def format_report(report: dict[str, Any]) -> str:
    rows = []
    sweep = report.get("sweep")
    for side, name in zip(SIDES, ("one sweep", "a run for each", "an lm_eval command for each"), strict=True):
        if side in report:
            factor = f"{report[side]['wall_s'] / sweep['wall_s']:.1f}" if sweep else ""
            rows.append([name, f"{report[side]['wall_s']:.1f}", factor])
    lines = [
        f"# {report['checkpoints']} checkpoints, {report['tasks']}", "", *format_conditions(report["conditions"]),
        *format_table(["", "seconds, start to end", "times the sweep's"], rows), "",
    ]  # fmt: skip
    if sweep:
        first, *others = sweep["setup_s"]
        rest_s = statistics.median(others or [0.0])
        lines += [
            f"Set-up (tasks, token ids, plan): {first:.2f} s for the first model, {rest_s:.2f} s for each other in the median."
        ]
        if sweep["gap_s"]:
            median_s, most_s = statistics.median(sweep["gap_s"]), max(sweep["gap_s"])
            lines += [
                f"From a model's last forward to the first of the next: {median_s:.2f} s in the median, {most_s:.2f} s at most."
            ]
        megabytes = ", ".join(f"{one / 2**20:.0f}" for one in sweep["resident_bytes"])
        lines += [f"Resident memory of rank 0 at the end of each model, MiB: {megabytes}."]
    if "same_bits" in report:
        lines += [f"Scores of the sweep and of the runs: {'the same bits' if report['same_bits'] else 'they DIFFER'}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
