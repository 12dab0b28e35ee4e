"""The same tasks under every layout and engine, against one rank: how far log-probabilities move, what flips, what it takes.

    python scripts/compare_layouts.py --model_args pretrained=DIR --tasks demo --limit 25 --out benchmarks/layouts_demo
    python scripts/compare_layouts.py … --vllm_python ENV/bin/python      also vLLM, from an environment that has it
    python scripts/compare_layouts.py … --speed                           one rank and SPEED_RUNS in turn, medians of 3

Each row is a launch of its own: torchrun with as many ranks as the layout takes, one thread each. Writes OUT.json and OUT.md.
Exits with 1 when a row that should agree does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_ranks import scoring_s  # beside this file
from sides import cut

from ddp_eval.output import tables, versions, write
from ddp_eval.system import machine

# ranks, flags, whether its numbers must be those of one rank to the bit
HF_RUNS: dict[str, tuple[int, list[str], bool]] = {
    "replicas, 1 rank": (1, ["--layout", "replicas"], True),
    "replicas, 2 ranks": (2, ["--layout", "replicas"], True),
    "replicas, 4 ranks": (4, ["--layout", "replicas"], True),
    "tensor:2": (2, ["--layout", "tensor:2"], False),
    "layers:2": (2, ["--layout", "layers:2"], True),
    "layers:4": (4, ["--layout", "layers:4"], True),
    "2 replicas x tensor:2": (4, ["--layout", "tensor:2"], False),
    "2 replicas x layers:2": (4, ["--layout", "layers:2"], True),
    "shard:2": (2, ["--layout", "shard:2"], True),
    "shard:4": (4, ["--layout", "shard:4"], True),
    "2 groups of shard:2": (4, ["--layout", "shard:2"], True),
}
SPEED_RUNS = {"replicas": 1, "layers:2": 2, "tensor:2": 2, "shard:2": 2}  # layout: ranks
VLLM_RUNS: dict[str, tuple[int, int]] = {"vllm, 1 rank": (1, 1), "vllm, 2 ranks": (2, 1), "vllm, tensor_parallel_size=2": (2, 2)}
WITHIN_NATS = 1e-4  # by default; rounding grows with the logits and the layers, and depends on the processor


def main() -> int:
    options = read_flags()
    with tempfile.TemporaryDirectory() as scratch:
        if options.speed:
            rows = compare_speed(options, Path(scratch))
            text = describe_speed(rows)
        else:
            rows = compare_numbers(options, Path(scratch))
            text = describe_numbers(rows)
    record = {
        "command": " ".join(["python", "scripts/compare_layouts.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": machine.describe_hardware(),
        "packages": versions.describe_packages(),
        "git": machine.git_commit(os.path.dirname(os.path.abspath(__file__))),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{options.out}.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"# Layouts against one rank\n\n{record['date']}, `{record['command']}`\n\n"
    Path(f"{options.out}.md").write_text(heading + text + "\n")
    print(text)
    return 0 if all(row.get("agrees", True) for row in rows) else 1


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_args", default="pretrained=demo")
    parser.add_argument("--tasks", nargs="+", default=["demo"])
    parser.add_argument("--limit", default=None)
    parser.add_argument("--more", default="", help="more flags for every run, in one string")
    parser.add_argument("--only", nargs="+", help="rows to run, by name")
    parser.add_argument("--vllm_python", help="the Python of an environment with vLLM")
    parser.add_argument("--vllm_args", help="more model_args for vLLM, such as enforce_eager=True")
    parser.add_argument(
        "--within", type=float, default=WITHIN_NATS, metavar="NATS",
        help=f"largest difference that counts as rounding where bits may differ (default: {WITHIN_NATS:g})",
    )  # fmt: skip
    parser.add_argument("--program", nargs="+", default=["-m", "ddp_eval"], help="what torchrun starts")
    parser.add_argument("--speed", action="store_true", help="time one rank against two in each layout")
    parser.add_argument("--out", type=Path, required=True, help="path of the record, without .json or .md")
    return parser.parse_args()


def run(options: argparse.Namespace, python: str, ranks: int, flags: list[str], path: Path) -> dict[str, Any]:
    """Launch one evaluation. Returns its results; raises RuntimeError with its last words when it fails."""
    limit = ["--limit", options.limit] if options.limit else []
    command = [
        python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options.program,
        "--tasks", *options.tasks, *limit, *options.more.split(), *flags, "--output_path", str(path),
    ]  # fmt: skip
    started = time.perf_counter()
    finished = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr[-3000:]}")
    found = json.loads((path / write.RESULTS).read_text())
    return {
        "wall_s": time.perf_counter() - started,
        "phases_s": found["ddp_eval"]["phases_s"],
        "packs": found["ddp_eval"]["packs"],
        "metrics": found["results"],
        "scores": tables.read_scores(path / tables.SCORES),
        "engine": found["ddp_eval"]["engine"]["name"],
        "sent_mb": sent_mb(json.loads((path / write.TELEMETRY).read_text())),
    }


def sent_mb(telemetry: dict[str, Any]) -> float:
    """Hidden states and weights that all ranks sent. Not counted: what transformers adds up within a tensor-parallel model."""
    sent = [rank["collectives"].get(name, {}).get("sent_bytes", 0) for rank in telemetry["ranks"] for name in _PAYLOADS]
    return float(sum(sent)) / 1e6


_PAYLOADS = ("send", "all_gather (weights)")


def compare_numbers(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    launches = {name: (sys.executable, ranks, ["--model_args", options.model_args, *flags], exact)
                for name, (ranks, flags, exact) in HF_RUNS.items()}  # fmt: skip
    if options.vllm_python:
        for name, (ranks, size) in VLLM_RUNS.items():
            more = f",{options.vllm_args}" if options.vllm_args else ""
            model_args = f"{options.model_args},tensor_parallel_size={size}{more}"
            launches[name] = (options.vllm_python, ranks, ["--model", "vllm", "--model_args", model_args], False)
    reference, rows = None, []
    for number, (name, (python, ranks, flags, exact)) in enumerate(launches.items()):
        if number and options.only and name not in options.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcome = run(options, python, ranks, flags, scratch / str(number))
        reference = reference or outcome
        rows.append({"layout": name, "ranks": ranks, **compare(reference, outcome, exact, options.within)})
    return rows


def compare(one: dict[str, Any], other: dict[str, Any], exact: bool, within_nats: float = WITHIN_NATS) -> dict[str, Any]:
    """How far `other` is from `one`, request by request.

    exact: the bits must be equal. within_nats: otherwise, the limit on every difference, however long its request.
    """
    a, b = one["scores"], other["scores"]
    assert all(list(getattr(a, name)) == list(getattr(b, name)) for name in ("task", "doc_id", "idx")), "the same requests"
    first, second = np.array(a.loglikelihood), np.array(b.loglikelihood)
    drift = np.abs(first - second)
    flipped = sum(chosen(a, first)[key] != answer for key, answer in chosen(b, second).items())
    greedy = sum(x != y for x, y in zip(list(a.is_greedy), list(b.is_greedy), strict=True))
    worst = worst_metric(one["metrics"], other["metrics"])
    agrees = bool(drift.max() == 0) if exact else bool(drift.max() < within_nats)
    return {
        "requests": len(drift),
        "largest_difference_nats": float(drift.max()),
        "largest_difference_per_token_nats": float((drift / np.array(a.num_tokens)).max()),
        "answers_flipped": int(flipped),
        "greedy_flags_flipped": int(greedy),
        "largest_relative_metric_difference": float(worst),
        "agrees": agrees and not flipped,
        "wall_s": round(other["wall_s"], 1),
        "scoring_s": round(scoring_s(other["phases_s"]), 2),
    }


def chosen(scores: Any, sums: Any) -> dict[tuple[str, int], int]:
    """For each document with several choices, the one of the greatest log-probability."""
    best: dict[tuple[str, int], tuple[float, int]] = {}
    counts: dict[tuple[str, int], int] = {}
    for task, doc_id, idx, value in zip(scores.task, list(scores.doc_id), list(scores.idx), sums.tolist(), strict=True):
        key = (task, doc_id)
        counts[key] = counts.get(key, 0) + 1
        best[key] = max(best.get(key, (-np.inf, -1)), (value, idx))
    return {key: answer for key, (_, answer) in best.items() if counts[key] > 1}


def worst_metric(one: dict[str, Any], other: dict[str, Any]) -> float:
    differences = [0.0]
    for task, metrics in one.items():
        for name, value in metrics.items():
            if isinstance(value, float) and np.isfinite(value):
                differences.append(abs(value - other[task][name]) / max(abs(value), 1e-12))
    return max(differences)


def describe_numbers(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layout | ranks | requests | largest difference, nats | per token | answers flipped | greedy flags flipped "
        "| largest relative difference of a metric |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['layout']} | {row['ranks']} | {row['requests']:,} | {row['largest_difference_nats']:.1e} "
            f"| {row['largest_difference_per_token_nats']:.1e} | {row['answers_flipped']} | {row['greedy_flags_flipped']} "
            f"| {row['largest_relative_metric_difference']:.1e} |"
        )
    return "\n".join(lines)


def compare_speed(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One rank and the layouts in turn, three times each; seconds of the forward phase."""
    first, *others = SPEED_RUNS
    seconds: dict[str, list[float]] = {first: [], **{layout: [] for layout in others if layout in (options.only or others)}}
    sent: dict[str, float] = {}
    packs = 0
    for turn in range(3):
        for layout in seconds:
            ranks = SPEED_RUNS[layout]
            flags = ["--model_args", options.model_args, "--layout", layout]
            outcome = run(options, sys.executable, ranks, flags, scratch / f"{layout}{turn}")
            seconds[layout].append(scoring_s(outcome["phases_s"]))
            packs, sent[layout] = outcome["packs"], outcome["sent_mb"]
            print(f"{layout}: {seconds[layout][-1]:.2f} s", file=sys.stderr, flush=True)
    one = statistics.median(seconds[first])
    return [
        {"layout": layout, "packs": packs, "seconds": taken, "median_s": statistics.median(taken),
         "times": one / statistics.median(taken), "sent_mb": None if layout.startswith("tensor") else sent[layout]}
        for layout, taken in seconds.items()
    ]  # fmt: skip


def describe_speed(rows: list[dict[str, Any]]) -> str:
    lines = ["| layout | packs | seconds | median | times one rank | MB sent |", "|---|---|---|---|---|---|"]
    for row in rows:
        taken = ", ".join(f"{value:.2f}" for value in row["seconds"])
        sent = "not counted" if row["sent_mb"] is None else f"{row['sent_mb']:,.0f}"
        lines.append(f"| {row['layout']} | {row['packs']} | {taken} | {row['median_s']:.2f} s | {cut(row['times'])} | {sent} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
