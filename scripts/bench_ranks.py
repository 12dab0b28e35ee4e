#!/usr/bin/env python3
"""How much sooner several ranks are than one, one thread each, and how long a run takes to its first forward.

    python scripts/bench_ranks.py --ranks 1,2 --repeats 3 --out benchmarks/NAME -- --model_args pretrained=PATH --tasks T …

What follows -- goes to ddp_eval. Runs alternate; medians are reported. `scoring` is what ranks share, up to the last result of
the slowest; `wall` is the whole command, and `start-up` the share of it that is neither scoring nor metrics: launcher, imports,
prompts, weights, plan. With --first_forward the same flags go to `python -m lm_eval` too, and both are stopped at the model's
first forward.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import cut  # beside this file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FIRST_FORWARD = """
import os, runpy, sys, time
began = float(sys.argv[1])
import torch, transformers
def first(model, *args, **kwargs):
    print("first forward after", time.time() - began, flush=True)
    os._exit(0)
transformers.PreTrainedModel.__call__ = first
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks (default 1,2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--first_forward", action="store_true", help="time the start of both sides instead")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    parser.add_argument("flags", nargs="+", help="flags of ddp_eval, behind --")
    args = parser.parse_args()
    measure = measure_start if args.first_forward else measure_run
    names = ["ddp_eval", "lm_eval"] if args.first_forward else args.ranks.split(",")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            runs[name].append(measure(name, args.flags))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    text = format_report(runs, args)
    print(text)
    if args.out:
        Path(f"{args.out}.md").write_text(text + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(runs, indent=1) + "\n")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}


def measure_run(ranks: str, flags: list[str]) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as directory:
        command = [*launcher, "-m", "ddp_eval", *flags, "--output_path", f"{directory}/run"]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        wall_s = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr)
        facts = json.loads(Path(f"{directory}/run/results.json").read_text())["ddp_eval"]
    return {**share_out(wall_s, facts["phases_s"]), "packs": facts["packs"]}


def scoring_s(phases_s: dict[str, float]) -> float:
    """Seconds from the first pack to the last result of all ranks, by the leader: it waits for other stages and slower ranks.

    The moments that it waits for them at the start are counted too.
    """
    return phases_s["forward"] + phases_s.get("wait", 0.0) + phases_s["gather"]


def share_out(wall_s: float, phases_s: dict[str, float]) -> dict[str, float]:
    """Of a command of `wall_s` seconds and its leader's phases: what ranks share, and what comes before and behind."""
    scoring = scoring_s(phases_s)
    return {"wall": wall_s, "scoring": scoring, "start-up": wall_s - scoring - phases_s.get("score", 0.0)}


def measure_start(module: str, flags: list[str]) -> dict[str, Any]:
    began = time.time()
    command = [sys.executable, "-c", FIRST_FORWARD, repr(began), module, *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("first forward after")]
    if not found:
        sys.exit(done.stderr)
    return {"first forward": float(found[0].split()[-1])}


def format_report(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    from ddp_eval.output.versions import describe_packages
    from ddp_eval.system.machine import describe_hardware

    keys = [key for key in next(iter(runs.values()))[0] if key != "packs"]
    medians = {name: {key: statistics.median(run[key] for run in seen) for key in keys} for name, seen in runs.items()}
    first = next(iter(medians.values()))
    timed = [key for key in keys if key != "start-up"]
    heads = ["side" if args.first_forward else "ranks", *(f"{key}, s | times" for key in timed), *keys[len(timed) :]]
    # Where this machine keeps its files is of no use to others.
    flags = re.sub(r"(^|[ =])/\S*/", r"\1", " ".join(args.flags))
    packages = ", ".join(f"{name} {version}" for name, version in describe_packages().items())
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}. Hardware: {json.dumps(describe_hardware())}. Packages: {packages}.",
            f"Flags: `{flags}`; one thread a rank; medians of {args.repeats}.",
            "",
            f"| {' | '.join(heads)} |",
            f"|---|{'---|---|' * len(timed)}{'---|' * (len(keys) - len(timed))}",
            *(f"| {' | '.join([name, *format_medians(row, first)])} |" for name, row in medians.items()),
        ]
    )


def format_medians(row: dict[str, float], first: dict[str, float]) -> list[str]:
    """Cells of a row: seconds and how many times sooner than the first row; start-up as a share of the whole command."""
    cells = [f"{row[key]:.1f} | {cut(first[key] / row[key])}" for key in row if key != "start-up"]
    return [*cells, f"{row['start-up'] / row['wall']:.1%}"] if "start-up" in row else cells


if __name__ == "__main__":
    main()
