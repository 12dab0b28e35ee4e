#!/usr/bin/env python3
"""Time ddp_eval's way from request texts to token ids against lm_eval's, and compare the ids, to the last one.

    python scripts/bench_tokenization.py --model PATH --tasks T1,T2 --include_path DIR --out benchmarks/NAME

The requests are lm_eval's own. Its side is `HFLM.loglikelihood` and `loglikelihood_rolling` up to where token ids would be
scored; ours is `Encoder.encode_pairs` and `encode_rolling`. Windows are wider than any text, so that nothing is cut. Sides
alternate; medians are reported. Both may use every core that the process is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sides import read_task  # beside this file, and lets it find the package

WINDOW = 10**6  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory with a config and a tokenizer; weights are not read")
    parser.add_argument("--tasks", required=True, help="comma-separated TASK or TASK:DOCUMENTS, a row each")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of both sides (default 3)")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    rows = []
    for task in args.tasks.split(","):
        rows.append(measure_task(args, task))
        print(rows[-1], file=sys.stderr, flush=True)
    text = format_report(args, rows)
    print(text)
    if args.out:
        Path(f"{args.out}.md").write_text(text + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(rows, indent=1) + "\n")


def measure_task(args: argparse.Namespace, task: str) -> dict[str, Any]:
    import transformers
    from lm_eval.models.huggingface import HFLM

    from ddp_eval.tasks.tokenization import Encoder

    name, limit, _ = read_task(task)
    requests = collect_requests([name], args.include_path, limit)
    if requests["generate_until"]:
        raise SystemExit(f"{task} generates text: give tasks that are scored by log-likelihoods")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    config = transformers.AutoConfig.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=WINDOW)
    encoder = Encoder(tokenizer, WINDOW)

    def theirs() -> list[tuple[list[int], list[int]]]:
        ids: list[tuple[list[int], list[int]]] = []

        def keep(requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            ids.extend((context, continuation) for _, context, continuation in requests)
            return [(0.0, False)] * len(requests)

        with unittest.mock.patch.object(lm, "_loglikelihood_tokens", keep):
            lm.loglikelihood(requests["loglikelihood"], disable_tqdm=True)
            lm.loglikelihood_rolling(requests["loglikelihood_rolling"], disable_tqdm=True)
        return ids

    def ours() -> list[Any]:
        pairs = [request.args for request in requests["loglikelihood"]]
        texts = [request.args[0] for request in requests["loglikelihood_rolling"]]
        return [encoder.encode_pairs(pairs).requests, encoder.encode_rolling(texts).requests]

    seconds: dict[str, list[float]] = {"lm_eval": [], "ours": []}
    for _ in range(args.repeats):
        expected, found = timed(theirs, seconds["lm_eval"]), timed(ours, seconds["ours"])
    return {
        "task": task,
        "requests": len(expected),
        "tokens": sum(len(context) + len(continuation) for context, continuation in expected),
        "differing": sum(left != right for left, right in zip(expected, split_ids(found), strict=True)),
        "lm_eval_s": statistics.median(seconds["lm_eval"]),
        "ours_s": statistics.median(seconds["ours"]),
        "all_times_s": seconds,
    }


def timed(deed: Callable[[], Any], seconds: list[float]) -> Any:
    started = time.perf_counter()
    result = deed()
    seconds.append(time.perf_counter() - started)
    return result


def split_ids(found: list[Any]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of every one of our requests."""
    split = []
    for requests in found:
        for index, targets in enumerate(requests.num_targets.tolist()):
            ids = requests.tokens[requests.starts[index] : requests.starts[index + 1]].tolist()
            split.append((ids[:-targets], ids[-targets:]))
    return split


def collect_requests(
    tasks: Sequence[str], include_path: str | None, limit: float | None = None, num_fewshot: int | None = None
) -> dict[str, list[Any]]:
    """lm_eval's requests of some tasks, by their type."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    found: dict[str, list[Any]] = {"loglikelihood": [], "loglikelihood_rolling": [], "generate_until": []}

    class Collector(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found["loglikelihood"] += requests
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            found["loglikelihood_rolling"] += requests
            return [0.0] * len(requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            found["generate_until"] += requests
            return [""] * len(requests)

    manager = TaskManager(include_path=include_path, include_defaults=not include_path)
    lm_eval.simple_evaluate(
        model=Collector(), tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=0
    )
    return found


def format_report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    from ddp_eval.output.versions import describe_packages
    from ddp_eval.system.machine import describe_hardware

    packages = ", ".join(f"{name} {version}" for name, version in describe_packages().items())
    total = {name: sum(row[name] for row in rows) for name in ("requests", "tokens", "differing", "lm_eval_s", "ours_s")}
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}. Hardware: {json.dumps(describe_hardware())}. Packages: {packages}.",
            f"Tokenizer of {Path(args.model).name}; medians of {args.repeats} alternating runs.",
            "",
            "| task | requests | tokens | requests whose ids differ | lm_eval s | ours s | times |",
            "|---|---|---|---|---|---|---|",
            *map(format_row, [*rows, {"task": "all", **total}]),
        ]
    )


def format_row(row: dict[str, Any]) -> str:
    times = f"**{row['lm_eval_s'] / row['ours_s']:.1f}**"
    return (
        f"| {row['task']} | {row['requests']:,} | {row['tokens']:,} | {row['differing']} | {row['lm_eval_s']:.2f} "
        f"| {row['ours_s']:.2f} | {times} |"
    )


if __name__ == "__main__":
    main()
