#!/usr/bin/env python3
"""Time and memory of the planner at 1 to 256 M tokens, and how evenly its packs load 1 to 1,024 ranks.

    python scripts/bench_planner.py --out benchmarks/planner     # writes planner.md, planner.json, planner.png

Requests are MMLU-like: 57 subjects, each with a prefix of 600 tokens, questions of 100 to 200 tokens behind it, four choices of
one token each. Costs are those of a Llama of 1 B parameters on a GPU, once with an attention kernel that pays for what a tree
sees, once with a dense one that pays for all pairs. Memory is the most that the planner takes beside the requests, over the bytes
of the token arrays (4 a token). Each size runs in a process of its own, on one thread. The ranks' loads are the costs of the
packs that a DistributedSampler deals them; busiest over mean is the time that is lost when every rank waits for the last.
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
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from ddp_eval.packs.cut import CostModel
    from ddp_eval.packs.plan import Pack
    from ddp_eval.packs.requests import Requests

MILLIONS = [1, 4, 16, 64, 256]
RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
SUBJECTS, PREFIX, QUESTION, CHOICES = 57, 600, 199, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write PATH.md, PATH.json and PATH.png (needs matplotlib)")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.dense)))
        return
    rows = []
    for kernel, millions in itertools.product([[], ["--dense"]], MILLIONS):
        command = [sys.executable, __file__, "--one", str(millions), *kernel]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1], file=sys.stderr, flush=True)
    text = format_report(rows)
    print(text)
    if args.out:
        Path(f"{args.out}.md").write_text(text + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(rows, indent=1) + "\n")
        plot(rows, f"{args.out}.png")


def make_requests(millions: float) -> Requests:
    from ddp_eval.packs.requests import Requests

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


def measure(millions: float, dense: bool) -> dict:
    from ddp_eval.packs.cut import CostModel, plan_packs
    from ddp_eval.packs.plan import build_pack

    requests = make_requests(millions)
    cost = CostModel(
        enough=1.2e15, forward=16 * 3e10, token=2e9, pair=4 * 2048 * 16, read=2 * 2048 * 128e3, slowdown=2, dense=dense
    )
    before, highest, done = rss(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], rss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, started_cpu = time.perf_counter(), time.thread_time()
    plan, _ = plan_packs(requests, cost, 8192)
    elapsed_s, cpu_s = time.perf_counter() - started, time.thread_time() - started_cpu
    done.set()
    watcher.join()
    started = time.perf_counter()
    packs = [build_pack(plan, index) for index in range(plan.num_packs)]
    build_s = (time.perf_counter() - started) / plan.num_packs
    costs = np.array([cost_of(pack, cost) for pack in packs])
    return {
        "dense": dense,
        "tokens": int(requests.starts[-1]),
        "requests": len(requests),
        "plan_s": elapsed_s,
        "plan_cpu_s": cpu_s,
        "extra_bytes_over_token_bytes": (highest[0] - before) / requests.tokens.nbytes,
        "packs": plan.num_packs,
        "planned_tokens": len(plan.tokens),
        "build_pack_s": build_s,
        "busiest_over_mean": {ranks: busiest(costs, ranks) for ranks in RANKS if ranks <= plan.num_packs},
    }


def cost_of(pack: Pack, cost: CostModel) -> float:
    """A pack's cost, by its tokens as they are laid out."""
    pairs = len(pack) ** 2.0 if cost.dense and not pack.is_chain else float((pack.depth + 1.0).sum())
    return cost.forward + cost.token * len(pack) + cost.slowdown * cost.pair * pairs + cost.read * len(pack.reads)


def busiest(costs: np.ndarray, ranks: int) -> float:
    """Load of the busiest rank over the mean, with the sampler's repeats counted as work. costs: (P,), ascending."""
    dealt = np.resize(costs, math.ceil(len(costs) / ranks) * ranks).reshape(-1, ranks)
    return float(dealt.sum(axis=0).max() / (costs.sum() / ranks))


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_report(rows: list[dict]) -> str:
    from ddp_eval.system.machine import describe_hardware

    slopes = {
        kernel: ", ".join(f"{slope(a, b):.2f}" for a, b in itertools.pairwise(row for row in rows if kernel_of(row) == kernel))
        for kernel in dict.fromkeys(map(kernel_of, rows))
    }
    cpu = describe_hardware()["cpu"]
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}, one core of {cpu}, Python {platform.python_version()}, numpy {np.__version__}. "
            f"Load at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; above 1, the machine was shared.",
            "Command: `python scripts/bench_planner.py --out benchmarks/planner`",
            "",
            "| kernel | tokens | requests | plan, s | of the processor | extra memory over the tokens' bytes | packs "
            "| tokens planned | build a pack, ms |",
            "|---|---|---|---|---|---|---|---|---|",
            *(
                f"| {kernel_of(row)} | {row['tokens']:,} | {row['requests']:,} | {row['plan_s']:.2f} | {row['plan_cpu_s']:.2f} "
                f"| {row['extra_bytes_over_token_bytes']:.2f} | {row['packs']:,} | {row['planned_tokens']:,} "
                f"| {row['build_pack_s'] * 1e3:.1f} |"
                for row in rows
            ),
            "",
            *(
                f"Processor time with a {name} kernel grows as tokens to the power {powers} from step to step."
                for name, powers in slopes.items()
            ),
            "",
            "Busiest rank over the mean:",
            "",
            f"| kernel | tokens | {' | '.join(map(str, RANKS))} ranks |",
            f"|---|---|{'---|' * len(RANKS)}",
            *(
                f"| {kernel_of(row)} | {row['tokens']:,} | {' | '.join(_show_load(row, ranks) for ranks in RANKS)} |"
                for row in rows
            ),
        ]
    )


def slope(before: dict, after: dict) -> float:
    return math.log(after["plan_cpu_s"] / before["plan_cpu_s"]) / math.log(after["tokens"] / before["tokens"])


def kernel_of(row: dict) -> str:
    return "dense" if row["dense"] else "tree"


def _show_load(row: dict, ranks: int) -> str:
    value = row["busiest_over_mean"].get(str(ranks))
    return "more ranks than packs" if value is None else f"{value:.3f}"


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for dense, group in itertools.groupby(rows, lambda row: row["dense"]):
        tokens, seconds = zip(*((row["tokens"], row["plan_cpu_s"]) for row in group), strict=True)
        left.loglog(tokens, seconds, "o-", label=kernel_of({"dense": dense}))
    left.set(xlabel="tokens of all requests", ylabel="processor seconds to plan")
    left.legend()
    for row in rows:
        points = {int(ranks): value for ranks, value in row["busiest_over_mean"].items()}
        right.semilogx(list(points), list(points.values()), "o-", base=2, label=f"{kernel_of(row)}, {row['tokens'] / 1e6:.0f} M")
    right.set(xlabel="ranks", ylabel="busiest rank over mean")
    right.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
