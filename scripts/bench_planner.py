#!/usr/bin/env python3
"""Time and memory of the planner at 1, 4, 16, 64 M tokens, and how evenly its packs load 1 to 1,024 ranks.

    python scripts/bench_planner.py --out benchmarks/planner     # writes planner.md, planner.json, planner.png

Requests are MMLU-like: 57 subjects, each with a prefix of 600 tokens, questions of 100 to 200 tokens behind it, four choices of
one token each. Costs are those of a Llama of 1 B parameters on a GPU. Memory is the most that the planner takes
beside the requests, over the bytes of the token arrays (4 a token). Each size runs in a process of its own, on one thread. The
ranks' loads are what a DistributedSampler deals; busiest over mean is the time that is lost when every rank waits for the last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MILLIONS = [1, 4, 16, 64]
RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
SUBJECTS, PREFIX, QUESTION, CHOICES = 57, 600, 199, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write PATH.md, PATH.json and PATH.png (needs matplotlib)")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    for millions in MILLIONS:
        command = [sys.executable, __file__, "--one", str(millions)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1], file=sys.stderr, flush=True)
    text = format_report(rows)
    print(text)
    if args.out:
        Path(f"{args.out}.md").write_text(text + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(rows, indent=1) + "\n")
        plot(rows, f"{args.out}.png")


def make_requests(millions: float):
    from ddp_eval.packing import Requests

    random = np.random.default_rng(0)
    length = PREFIX + QUESTION + 1
    questions = max(SUBJECTS, round(millions * 1e6 / length / CHOICES))
    tokens = np.empty((questions, CHOICES, length), dtype=np.int32)
    prefixes = random.integers(0, 30000, (SUBJECTS, PREFIX), dtype=np.int32)
    tokens[:, :, :PREFIX] = prefixes[np.arange(questions) % SUBJECTS][:, None]
    tokens[:, :, PREFIX:-1] = random.integers(0, 30000, (questions, 1, QUESTION), dtype=np.int32)
    tokens[:, :, -1] = np.arange(CHOICES)
    # Questions differ in length: cut some of each one's first tokens, all of its choices alike.
    cut = np.repeat(random.integers(0, QUESTION // 2, questions), CHOICES)
    rows = tokens.reshape(-1, length)
    keep = ~((np.arange(length) >= PREFIX) & (np.arange(length) < PREFIX + cut[:, None]))
    flat, lengths = rows[keep], keep.sum(axis=1)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Requests(flat, starts, np.ones(len(lengths), dtype=np.int32))


def measure(millions: float) -> dict:
    from ddp_eval.packing import CostModel, build_pack, plan_packs

    requests = make_requests(millions)
    cost = CostModel(
        enough=1.2e15, forward=16 * 3e10, token=2e9, pair=4 * 2048 * 16, read=2 * 2048 * 128e3, slowdown=2, dense=False
    )
    before, highest, done = rss(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], rss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    plan, _ = plan_packs(requests, cost, 8192)
    elapsed_s = time.perf_counter() - started
    done.set()
    watcher.join()
    loads = np.diff(plan.token_starts).astype(float)  # ascending cost; tokens are most of it
    started = time.perf_counter()
    for index in range(min(20, plan.num_packs)):
        build_pack(plan, index)
    build_s = (time.perf_counter() - started) / min(20, plan.num_packs)
    return {
        "tokens": int(requests.starts[-1]),
        "requests": len(requests),
        "plan_s": elapsed_s,
        "extra_bytes_over_token_bytes": (highest[0] - before) / requests.tokens.nbytes,
        "packs": plan.num_packs,
        "planned_tokens": len(plan.tokens),
        "build_pack_s": build_s,
        "busiest_over_mean": {ranks: busiest(loads, ranks) for ranks in RANKS if ranks <= plan.num_packs},
    }


def busiest(loads: np.ndarray, ranks: int) -> float:
    """Load of the busiest rank over the mean, with the sampler's repeats counted as work."""
    dealt = np.resize(loads, math.ceil(len(loads) / ranks) * ranks).reshape(-1, ranks)
    return float(dealt.sum(axis=0).max() / (loads.sum() / ranks))


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_report(rows: list[dict]) -> str:
    from ddp_eval.machine import describe_hardware

    slopes = [math.log(b["plan_s"] / a["plan_s"]) / math.log(b["tokens"] / a["tokens"]) for a, b in itertools.pairwise(rows)]
    cpu = describe_hardware()["cpu"]
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}, one core of {cpu}, Python {platform.python_version()}, numpy {np.__version__}.",
            "Command: `python scripts/bench_planner.py --out benchmarks/planner`",
            "",
            "| tokens | requests | plan, s | extra memory over the tokens' bytes | packs | tokens planned | build a pack, ms |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row['tokens']:,} | {row['requests']:,} | {row['plan_s']:.2f} | {row['extra_bytes_over_token_bytes']:.2f} | "
                f"{row['packs']:,} | {row['planned_tokens']:,} | {row['build_pack_s'] * 1e3:.1f} |"
                for row in rows
            ),
            "",
            f"Time grows as tokens to the power {', '.join(f'{slope:.2f}' for slope in slopes)} from step to step.",
            "",
            "Busiest rank over the mean:",
            "",
            f"| tokens | {' | '.join(map(str, RANKS))} ranks |",
            f"|---|{'---|' * len(RANKS)}",
            *(f"| {row['tokens']:,} | {' | '.join(_show_load(row, ranks) for ranks in RANKS)} |" for row in rows),
        ]
    )


def _show_load(row: dict, ranks: int) -> str:
    value = row["busiest_over_mean"].get(str(ranks))
    return "more ranks than packs" if value is None else f"{value:.3f}"


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.loglog([row["tokens"] for row in rows], [row["plan_s"] for row in rows], "o-")
    left.set(xlabel="tokens of all requests", ylabel="seconds to plan, one core")
    for row in rows:
        points = {int(ranks): value for ranks, value in row["busiest_over_mean"].items()}
        right.semilogx(list(points), list(points.values()), "o-", base=2, label=f"{row['tokens'] / 1e6:.0f} M tokens")
    right.set(xlabel="ranks", ylabel="busiest rank over mean")
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
