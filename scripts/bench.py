#!/usr/bin/env python3
"""Time ddp_eval against lm_eval's own HF backend: same machine, model and requests, in turn.

    OMP_NUM_THREADS=1 python scripts/bench.py --peer lm_eval --model PATH --tasks T1,T2 --include_path DIR --out benchmarks/NAME

Each side has a process of its own with the loaded model, as its users have; one works while the other waits. For each task and
repeat, lm_eval scores the requests at each of its batch sizes, then ddp_eval does. What is timed is the scoring alone, from
request texts to log-probabilities (tokenise, plan with its self-check, forward, gather, and all else between the question and the
answer); building prompts and computing metrics is lm_eval's own code on both sides and is left out. lm_eval counts at the batch
size that is best for the task: all are tried on a quarter of the documents (twice on a GPU, where a size's first run loads
kernels), and those within 1.15 times the best on all of them. ddp_eval's first run, on a quarter of the documents,
stands apart in the record: on a GPU it compiles.

The share of peak is ddp_eval's useful work over the seconds of its forward phase, over the rate of a large matrix product
measured beside it in the same process, dtype and threads:

    useful work = 2 * (weights of the layers) * (distinct tokens) + 4 * (query width) * (layers) * (visible pairs)
                  + 2 * (hidden size) * (vocabulary) * (distinct reads)

with every token of the requests' prefix tree counted once, nothing repeated or padded, and what ddp_eval leaves out of the last
layer at tokens that are not read (feed-forward part, attention) not counted. Prints a table and, with --out, writes
NAME.md and NAME.json.

With --commands the whole commands of both sides are timed instead, from start to exit: see commands.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
import unittest.mock
from typing import Any

import commands  # beside this file
from sides import (  # beside this file
    Job,
    Side,
    compare_metrics,
    cut,
    difference,
    evaluate_by_lm_eval,
    evaluate_by_us,
    format_conditions,
    keep,
    read_task,
)

CALLS = ("loglikelihood", "loglikelihood_rolling")
EIGHT_TASKS = [
    f"local_{name}"
    for name in ["hellaswag", "arc_challenge", "mmlu", "truthfulqa_mc1", "winogrande", "piqa", "boolq", "lambada_openai"]
]


def main() -> None:
    args = read_arguments()
    if args.commands:
        return commands.main(args)
    os.environ.setdefault("TQDM_DISABLE", "1")  # before the sides start
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    job = Job(load_model, run_ours, run_lm_eval, no_memory=(math.inf, None))
    lm_eval_side = Side("lm_eval", args, job) if args.peer == "lm_eval" else None
    trials = 2 if commands.find_device(args) == "cuda" else 1
    our_side = Side("ours", args, job)
    with lm_eval_side or contextlib.nullcontext(), our_side:
        rows: list[dict[str, Any]] = []
        report = {"conditions": our_side.ask("conditions"), "softmax_dtype": args.softmax_dtype, "rows": rows}
        for task in args.tasks.split(","):
            rows.append(measure_task(lm_eval_side, our_side, task, sizes, args.repeats, trials))
            print(format_row(rows[-1]), file=sys.stderr, flush=True)
            keep(report, format_report, args.out)
    print(format_report(report))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=["lm_eval", "none"], default="lm_eval", help="what to compare with (default lm_eval)")
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument(
        "--random_weights", action="store_true", help="the model directory has a config and a tokenizer, no weights"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the weights for both sides (default float32)")
    parser.add_argument("--tasks", default=",".join(EIGHT_TASKS), help="comma-separated TASK or TASK:DOCUMENTS, a row each")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--batch_sizes", default="1,8,16,32,64", help="lm_eval's batch sizes to try (default 1,8,16,32,64)")
    parser.add_argument("--no_packing", action="store_true", help="time the padded rows instead of the packs")
    parser.add_argument(
        "--softmax_dtype", help="lm_eval's softmax_dtype: float64 shows how far its own sums are off (default: its own)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of both sides; medians are reported (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default 1)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    parser.add_argument(
        "--commands", action="store_true", help="time whole commands, from start to exit; --tasks takes A+B+C[:DOCUMENTS] too"
    )
    parser.add_argument("--gen_kwargs", help="with --commands: both sides' --gen_kwargs, such as max_gen_toks=16")
    args = parser.parse_args()
    if args.commands and (args.peer == "none" or args.random_weights):
        parser.error("--commands compares with lm_eval and reads the model's weights: leave out --peer none and --random_weights")
    if args.gen_kwargs and not args.commands:
        parser.error("--gen_kwargs is for --commands; scripts/bench_generation.py times tasks that generate text")
    return args


def load_model(args: argparse.Namespace, device: Any) -> Any:
    import torch
    import transformers

    dtype = getattr(torch, args.dtype)
    if not args.random_weights:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(args.model)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measure_task(
    lm_eval_side: Side | None, our_side: Side, task: str, sizes: list[int], repeats: int, trials: int = 1
) -> dict[str, Any]:
    """Medians of alternating runs, and how far apart the two sides' answers are. Ends the script where memory does not do.

    trials: runs of each batch size on a quarter of the documents, of which the faster counts.
    """
    task, limit, quarter = read_task(task)
    ours: list[dict[str, Any]] = []
    theirs: Any = None
    tried: dict[str, float] = {}
    if lm_eval_side:
        lm_eval_side.ask("run", task, 1, 1)  # warms up
        tried = {str(size): min(lm_eval_side.ask("run", task, quarter, size)[0] for _ in range(trials)) for size in sizes}
    first_s = our_side.ask("run", task, quarter, None)[0]
    times: dict[str, list[float]] = {name: [] for name in tried if tried[name] <= 1.15 * min(tried.values())}
    for _ in range(repeats):
        for name, seen in times.items():
            assert lm_eval_side is not None, "only that side has sizes"
            elapsed_s, answers = lm_eval_side.ask("run", task, limit, int(name))
            seen.append(elapsed_s)
            theirs = answers or theirs
        elapsed_s, answers = our_side.ask("run", task, limit, None)
        if answers is None or answers["packs_split"]:
            sys.exit(f"{task}: memory did not do for ddp_eval's packs beside lm_eval's process: the times would say nothing")
        ours.append({**answers, "elapsed_s": elapsed_s})
    if lm_eval_side and theirs is None:
        sys.exit(f"{task}: lm_eval ran out of memory at every one of --batch_sizes {','.join(times)}")

    def median(get: Any) -> float:
        return statistics.median(get(run) for run in ours)

    row = {
        "task": task,
        "limit": limit,
        **{key: ours[0][key] for key in ("requests", "request_tokens", "computed_tokens", "packs", "batching")},
        **ours[0]["useful"],
        "attention": ours[0]["engine"]["attention"],
        "phases_s": {name: median(lambda run, name=name: run["phases_s"].get(name, 0.0)) for name in ours[0]["phases_s"]},
        "peak_flops": median(lambda run: run["peak_flops"]),
        "share_of_peak": median(lambda run: run["useful"]["flops"] / run["phases_s"]["forward"] / run["peak_flops"]),
        "ours_s": median(lambda run: run["elapsed_s"]),
        "ours_first_quarter_s": first_s,
        "all_times_s": {**times, "ours": [run["elapsed_s"] for run in ours]},
        "quarter_times_s": tried,
    }
    if not lm_eval_side:
        return row
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    best_size = min(medians, key=medians.__getitem__)
    return row | {
        "lm_eval_s": medians[best_size],
        "lm_eval_batch_size": int(best_size),
        "ratio": medians[best_size] / row["ours_s"],
        **compare(theirs, ours[-1]),
    }


def run_lm_eval(
    model: Any, tokenizer: Any, task: str, limit: float | None, batch_size: int, args: argparse.Namespace
) -> tuple[float, dict[str, Any]]:
    options = {"batch_size": batch_size, "softmax_dtype": args.softmax_dtype}
    elapsed_s, results = evaluate_by_lm_eval(model, tokenizer, task, limit, args, CALLS, **options)
    return elapsed_s, answers_of(results)


def run_ours(
    model: Any, tokenizer: Any, task: str, limit: float | None, batch_size: None, args: argparse.Namespace
) -> tuple[float, dict[str, Any]]:
    from ddp_eval.run import leader

    planned: list[Any] = []
    make_plan = leader.make_plan

    def plan_and_note(engine: Any, requests: Any, *rest: Any) -> Any:
        planned[:] = [engine, requests]
        return make_plan(engine, requests, *rest)

    with tempfile.TemporaryDirectory() as scratch, unittest.mock.patch.object(leader, "make_plan", plan_and_note):
        options = {"output_path": scratch, "packing": not args.no_packing}
        peak_flops = measure_peak(model)
        elapsed_s, results = evaluate_by_us(model, tokenizer, task, limit, args, CALLS, **options)
        peak_flops = statistics.mean([peak_flops, measure_peak(model)])
    return elapsed_s, {
        **answers_of(results),
        **results["ddp_eval"],
        "peak_flops": peak_flops,
        "useful": count_useful(*planned),
    }


def answers_of(results: dict[str, Any]) -> dict[str, Any]:
    """What the two sides are compared by."""
    return {
        "metrics": results["results"],
        "answers": {task: [sample["filtered_resps"] for sample in rows] for task, rows in results["samples"].items()},
    }


def measure_peak(model: Any) -> float:
    """Operations per second of a large matrix product on the model's device, in its dtype.

    By the faster of two kernels on a CPU, whichever of them ddp_eval takes there; on a GPU of many products in a row, once its
    clocks have settled.
    """
    import torch

    from ddp_eval.engines.ops import onednn_linear

    on_gpu = model.device.type == "cuda"
    size = 8192 if on_gpu else 2048
    left, right = torch.rand((2, size, size), dtype=model.dtype, device=model.device)
    has_onednn = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
    with torch.inference_mode():
        if on_gpu:
            return 2 * size**3 / product_s_on_gpu(left, right)
        rates = []
        for multiply in (torch.mm, onednn_linear.multiply) if has_onednn else (torch.mm,):
            times = []
            for _ in range(5):
                started = time.perf_counter()
                multiply(left, right)
                times.append(time.perf_counter() - started)
            rates.append(2 * size**3 / statistics.median(times))
    return max(rates)


def product_s_on_gpu(left: Any, right: Any, warm_up: int = 20, products: int = 50) -> float:
    """Seconds of one product, by the device's own clock."""
    import torch

    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(warm_up):
        torch.mm(left, right)
    begins.record()
    for _ in range(products):
        torch.mm(left, right)
    ends.record()
    torch.cuda.synchronize()
    return float(begins.elapsed_time(ends)) / 1000 / products


def count_useful(engine: Any, requests: Any) -> dict[str, float]:
    """Distinct tokens, visible pairs and reads of all requests as one prefix tree, and the operations they need."""
    from ddp_eval.packs.cut import plan_one_tree
    from ddp_eval.packs.plan import build_pack

    tree = build_pack(plan_one_tree(requests)[0], 0)
    cost = engine.cost_model()
    tokens, pairs, reads = len(tree), float((tree.depth + 1.0).sum()), len(tree.reads)
    at_token, at_pair = engine.flops_left_out()
    unread_pairs = pairs - float((tree.depth[tree.reads] + 1.0).sum())
    left_out = at_token * (tokens - reads) + at_pair * unread_pairs
    return {
        "distinct_tokens": tokens,
        "visible_pairs": pairs,
        "distinct_reads": reads,
        "flops": cost.token * tokens + cost.pair * pairs + cost.read * reads - left_out,
    }


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of a log-probability, answers whose greedy flag differs, and largest relative difference of a metric."""
    largest, flags = 0.0, 0
    for task, samples in theirs["answers"].items():
        for left, right in zip(samples, ours["answers"][task], strict=True):
            for a, b in zip(left, right, strict=True):
                a, b = (a, b) if isinstance(a, (tuple, list)) else ((a, None), (b, None))
                largest = max(largest, difference(a[0], b[0]))
                flags += a[1] != b[1]
    worst = max(compare_metrics(theirs["metrics"], ours["metrics"]).values())
    return {"max_difference_nats": largest, "greedy_flags_differing": flags, "max_relative_difference_of_metrics": worst}


COLUMNS: dict[str, Any] = {
    "task": lambda row: row["task"],
    "requests": lambda row: f"{row['requests']:,}",
    "tokens asked": lambda row: f"{row['request_tokens']:,}",
    "tokens computed": lambda row: f"{row['computed_tokens']:,}",
    "packs": lambda row: f"{row['packs']:,}",
    "tokenise s": lambda row: f"{row['phases_s']['tokenize']:.2f}",
    "plan s": lambda row: f"{row['phases_s']['plan']:.2f}",
    "forward s": lambda row: f"{row['phases_s']['forward']:.2f}",
    "gather s": lambda row: f"{row['phases_s']['gather']:.3f}",
    "score s": lambda row: f"{row['phases_s']['score']:.2f}",
    "ours s": lambda row: f"{row['ours_s']:.2f}",
    "share of peak": lambda row: f"{cut(100 * row['share_of_peak'], 1)}%",
}
AGAINST_LM_EVAL: dict[str, Any] = {
    "lm_eval s (batch)": lambda row: f"{row['lm_eval_s']:.2f} ({row['lm_eval_batch_size']})",
    "ratio": lambda row: f"**{cut(row['ratio'])}**",
    "max difference, nats": lambda row: f"{row['max_difference_nats']:.1e}",
    "greedy flags differing": lambda row: str(row["greedy_flags_differing"]),
    "metrics differ by": lambda row: f"{row['max_relative_difference_of_metrics']:.1g}",
}


def format_row(row: dict[str, Any]) -> str:
    return f"| {' | '.join(show(row) for show in columns_of(row).values())} |"


def columns_of(row: dict[str, Any]) -> dict[str, Any]:
    return COLUMNS | AGAINST_LM_EVAL if "ratio" in row else COLUMNS


def note_on_rounding(report: dict[str, Any]) -> list[str]:
    """What differences from lm_eval come of in 16 bits, where it was not given another type for them."""
    dtype = report["conditions"]["dtype"]
    if dtype == "float32" or report["softmax_dtype"]:
        return []
    return [
        "",
        f"lm_eval takes log-softmax and adds up an answer's log-probabilities in {dtype}: sums of some hundred nats, on WikiText "
        "thousands, are rounded by one or two, on WikiText dozens. ddp_eval adds them in float64.",
    ]


def format_report(report: dict[str, Any]) -> str:
    conditions, rows = report["conditions"], report["rows"]
    compared = [math.log(row["ratio"]) for row in rows if "ratio" in row]
    mean = f"Geometric mean of the ratios: **{cut(math.exp(statistics.fmean(compared)))}**. " if compared else ""
    attention = ", ".join(sorted({row["attention"] for row in rows}))
    share = sum(row["flops"] for row in rows) / sum(row["phases_s"]["forward"] * row["peak_flops"] for row in rows)
    peak_flops = statistics.median(row["peak_flops"] for row in rows)
    firsts = ", ".join(f"{row['task']} {row['ours_first_quarter_s']:.2f} s" for row in rows)
    lines = [
        *format_conditions(conditions),
        f"| {' | '.join(columns_of(rows[0]))} |",
        f"|{'---|' * len(columns_of(rows[0]))}",
        *map(format_row, rows),
        "",
        f"Attention of packs: {attention}. {mean}Useful work over the forward phases of all tasks: "
        f"**{cut(100 * share, 1)}%** of the rate of a large matrix product ({peak_flops / 1e9:,.0f} GFLOP/s).",
        "",
        f"ddp_eval's first run of each task, on a quarter of the documents, with what it compiled: {firsts}.",
        *(note_on_rounding(report) if compared else []),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
