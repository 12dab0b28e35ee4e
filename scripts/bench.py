#!/usr/bin/env python3
"""Time ddp_eval against lm_eval's own HF backend: same process, same loaded model, same requests, in turn.

    OMP_NUM_THREADS=1 python scripts/bench.py --peer lm_eval --model PATH --tasks T1,T2 --include_path DIR --out benchmarks/NAME

For each task and repeat, lm_eval scores the requests at each of its batch sizes, then ddp_eval does. What is timed is the
scoring alone, from request texts to log-probabilities (tokenise, plan with its self-check, forward, gather, and all else between
the question and the answer); building prompts and computing metrics is lm_eval's own code on both sides and is left out.
lm_eval counts at the batch size that is best for the task. Prints a table and, with --out, writes NAME.md and NAME.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EIGHT_TASKS = [
    f"local_{name}"
    for name in ["hellaswag", "arc_challenge", "mmlu", "truthfulqa_mc1", "winogrande", "piqa", "boolq", "lambada_openai"]
]


def main() -> None:
    args = read_arguments()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    model = load_model(args, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sizes = [int(size) for size in args.batch_sizes.split(",")]

    rows = []
    for task in args.tasks.split(","):
        task, _, limit = task.partition(":")
        args.limit = float(limit) if limit else None
        rows.append(measure_task(model, tokenizer, task, sizes, args))
        print(format_row(rows[-1]), file=sys.stderr, flush=True)
    report = {"conditions": describe_conditions(args, model, device), "rows": rows}
    text = format_report(report)
    print(text)
    if args.out:
        Path(f"{args.out}.md").write_text(text + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=["lm_eval"], default="lm_eval", help="what to compare with")
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument(
        "--random_weights", action="store_true", help="the model directory has a config and a tokenizer, no weights"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the weights for both sides (default float32)")
    parser.add_argument("--tasks", default=",".join(EIGHT_TASKS), help="comma-separated TASK or TASK:DOCUMENTS, a row each")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--batch_sizes", default="1,16", help="lm_eval's batch sizes to try (default 1,16)")
    parser.add_argument(
        "--softmax_dtype", help="lm_eval's softmax_dtype: float64 shows how far its own sums are off (default: its own)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of both sides; medians are reported (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default 1)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    return parser.parse_args()


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


def measure_task(model: Any, tokenizer: Any, task: str, sizes: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Medians of alternating runs, and how far apart the two sides' answers are."""
    import torch

    times: dict[str, list[float]] = {str(size): [] for size in sizes}
    times["ours"] = []
    phases: dict[str, list[float]] = {}
    answers: dict[str, Any] = {}
    for repeat in range(args.repeats):
        for size in sizes:
            best = min((statistics.median(seen) for name, seen in times.items() if seen and name != "ours"), default=math.inf)
            mine = times[str(size)]
            if repeat and mine and statistics.median(mine) > 1.3 * best:
                continue  # clearly not lm_eval's best batch size for this task
            try:
                elapsed_s, answers["lm_eval"] = run_lm_eval(model, tokenizer, task, size, args)
            except torch.OutOfMemoryError:
                elapsed_s = math.inf
                torch.cuda.empty_cache()
            mine.append(elapsed_s)
        elapsed_s, answers["ours"] = run_ours(model, tokenizer, task, args)
        times["ours"].append(elapsed_s)
        for name, seconds in answers["ours"]["ddp_eval"]["phases_s"].items():
            phases.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    best_size = min((name for name in medians if name != "ours"), key=medians.__getitem__)
    return {
        "task": task,
        **{
            key: answers["ours"]["ddp_eval"][key]
            for key in ("requests", "request_tokens", "computed_tokens", "packs", "layout_of_requests")
        },
        "phases_s": {name: statistics.median(seen) for name, seen in phases.items()},
        "ours_s": medians["ours"],
        "lm_eval_s": medians[best_size],
        "lm_eval_batch_size": int(best_size),
        "ratio": medians[best_size] / medians["ours"],
        "all_times_s": times,
        **compare(answers["lm_eval"], answers["ours"]),
    }


def run_lm_eval(model: Any, tokenizer: Any, task: str, batch_size: int, args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=args.softmax_dtype)
    spent = time_scoring(lm)
    manager = TaskManager(include_path=args.include_path, include_defaults=not args.include_path)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[task], limit=args.limit, task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity=None
    )
    return sum(spent), results


def run_ours(model: Any, tokenizer: Any, task: str, args: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    from ddp_eval import harness
    from ddp_eval.runner import evaluate

    spent: list[float] = []
    original = harness._LeaderLM.__init__

    def timed_init(self: Any, *rest: Any) -> None:
        original(self, *rest)
        spent.append(0.0)
        time_scoring(self, spent)

    harness._LeaderLM.__init__ = timed_init
    # Reading the index of lm_eval's own 14,000 task files takes seconds in each of many runs.
    load_index = harness.TaskManager
    harness.TaskManager = lambda **rest: load_index(**{**rest, "include_defaults": not args.include_path})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            results = evaluate(
                model, tokenizer, [task], limit=args.limit, include_path=args.include_path, bootstrap_iters=0,
                log_samples=True, output_path=scratch,
            )  # fmt: skip
    finally:
        harness._LeaderLM.__init__ = original
        harness.TaskManager = load_index
    return sum(spent), results


def time_scoring(lm: Any, spent: list[float] | None = None) -> list[float]:
    """Have `lm` note the seconds that each call for log-likelihoods takes."""
    spent = [] if spent is None else spent
    for name in ("loglikelihood", "loglikelihood_rolling"):
        call = getattr(lm, name)

        def timed(requests: Any, *rest: Any, call: Any = call, **kwargs: Any) -> Any:
            started = time.perf_counter()
            answers = call(requests, *rest, **kwargs)
            spent.append(time.perf_counter() - started)
            return answers

        setattr(lm, name, timed)
    return spent


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of a log-probability, answers whose greedy flag differs, and largest relative difference of a metric."""
    largest, flags = 0.0, 0
    for task, samples in theirs["samples"].items():
        for left, right in zip(samples, ours["samples"][task], strict=True):
            for a, b in zip(left["filtered_resps"], right["filtered_resps"], strict=True):
                a, b = (a, b) if isinstance(a, (tuple, list)) else ((a, None), (b, None))
                largest = max(largest, abs(a[0] - b[0]))
                flags += a[1] != b[1]
    metrics = [
        (value, ours["results"][task][name])
        for task, values in theirs["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and "stderr" not in name
    ]
    worst = max(abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in metrics)
    return {"max_difference_nats": largest, "greedy_flags_differing": flags, "max_relative_difference_of_metrics": worst}


def describe_conditions(args: argparse.Namespace, model: Any, device: Any) -> dict[str, Any]:
    from ddp_eval.results import describe_hardware, describe_packages

    repository = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    config = model.config
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        # Where this machine keeps its files is of no use to others.
        "command": shlex.join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        "model": f"{type(model).__name__} {model.num_parameters() / 1e6:.1f} M parameters, hidden {config.hidden_size}, "
        f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}, {args.dtype}",
        "device": str(device),
        "threads": args.threads,
        "hardware": describe_hardware(),
        "packages": describe_packages(),
        "python": platform.python_version(),
    }


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
    "lm_eval s (batch)": lambda row: f"{row['lm_eval_s']:.2f} ({row['lm_eval_batch_size']})",
    "ratio": lambda row: f"**{row['ratio']:.2f}**",
    "max difference, nats": lambda row: f"{row['max_difference_nats']:.1e}",
    "greedy flags differing": lambda row: str(row["greedy_flags_differing"]),
    "metrics differ by": lambda row: f"{row['max_relative_difference_of_metrics']:.1g}",
}


def format_row(row: dict[str, Any]) -> str:
    return f"| {' | '.join(show(row) for show in COLUMNS.values())} |"


def format_report(report: dict[str, Any]) -> str:
    conditions, rows = report["conditions"], report["rows"]
    mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))
    packages = ", ".join(f"{name} {version}" for name, version in conditions["packages"].items())
    lines = [
        f"{conditions['date']}, commit {conditions['commit']}, on {conditions['device']} with {conditions['threads']} thread(s).",
        f"Model: {conditions['model']}.",
        f"Hardware: {json.dumps(conditions['hardware'])}. Packages: {packages}.",
        f"Command: `{conditions['command']}`",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *map(format_row, rows),
        "",
        f"Geometric mean of the ratios: **{mean:.2f}**.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
