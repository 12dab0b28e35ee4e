#!/usr/bin/env python3
"""What each idea brings: seconds of the forward phase on the same requests, one idea more in each column.

    OMP_NUM_THREADS=1 python scripts/bench_ablation.py --model PATH --tasks T1:DOCS,T2 --include_path DIR --out benchmarks/NAME

    padded      rows padded to the longest of a batch, sorted by length; the head at every token
    reads only  the head where an answer is read
    choices     requests with the same context share it
    few-shot    all shared prefixes, under a dense mask, packs filled up to 4,096 tokens
    blocks      the same packs, attention by blocks (blocks.py)
    cost        packs cut by what they cost (the default)

Medians of alternating runs in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

COLUMNS = ("padded", "reads only", "choices", "few-shot", "blocks", "cost")


def main() -> None:
    args = read_arguments()
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers
    from bench import load_model

    from ddp_eval.engines.hf import checkpoint

    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if device.type == "cpu":
        checkpoint.keep_freed_memory()
    model = load_model(args, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows = []
    for task in args.tasks.split(","):
        requests = requests_of(model, tokenizer, task, args.include_path)
        times: dict[str, list[float]] = {name: [] for name in COLUMNS}
        tokens = {}
        for _ in range(args.repeats):
            for name in COLUMNS:
                seconds, tokens[name] = run_variant(name, model, device, requests)
                times[name].append(seconds)
        rows.append({"task": task, "times_s": times, "tokens": tokens})
        print(format_row(rows[-1]), file=sys.stderr, flush=True)
    text = format_report(rows, args, model)
    print(text)
    if args.out:
        Path(f"{args.out}.md").write_text(text + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(rows, indent=1) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument("--random_weights", action="store_true", help="the directory has a config and a tokenizer, no weights")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default float32)")
    parser.add_argument("--tasks", required=True, help="comma-separated TASK or TASK:DOCUMENTS, a row each")
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs; medians are reported (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    return parser.parse_args()


class _Enough(Exception):
    """The requests are known: no need to run them."""


def requests_of(model: Any, tokenizer: Any, task: str, include_path: str | None) -> Any:
    """The tokenised requests of TASK or TASK:DOCUMENTS, as a run would plan them."""
    import ddp_eval
    from ddp_eval.run import leader

    name, _, limit = task.partition(":")
    found = []

    def note(engine: Any, requests: Any, *rest: Any) -> Any:
        found.append(requests)
        raise _Enough

    with (
        unittest.mock.patch.object(leader, "make_plan", note),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(_Enough),
    ):
        ddp_eval.evaluate(model, tokenizer, [name], limit=float(limit) if limit else None, include_path=include_path)
    return found[0]


def run_variant(name: str, model: Any, device: Any, requests: Any) -> tuple[float, int]:
    """Seconds to plan and run, and tokens that went through the model."""
    from ddp_eval.engines.hf.engine import HFEngine
    from ddp_eval.packs import cut
    from ddp_eval.packs import plan as packing
    from ddp_eval.packs.rows import plan_rows

    with contextlib.closing(HFEngine(model, device, keep_attention=name == "few-shot")) as engine:
        _ = engine._shortcuts  # the model is asked before the clock starts
        if name == "padded":
            engine._shortcuts, engine._keeps_reads = (False, False), False
        started = time.perf_counter()
        if name in ("padded", "reads only"):
            few_reads, padding = max(1, 2**28 // engine.vocab_size), engine.cost_model().most_padding
            plan, _ = plan_rows(requests, engine.max_tokens(), few_reads, most_padding=padding)
        elif name == "choices":
            with unittest.mock.patch.object(cut, "sort_and_share", share_contexts(cut.sort_and_share)):
                plan, _ = cut.plan_packs(requests, engine.cost_model(), engine.max_tokens(), engine.max_reads())
        elif name == "cost":
            plan, _ = cut.plan_packs(requests, engine.cost_model(), engine.max_tokens(), engine.max_reads())
        else:
            few = cut.CostModel(forward=1e30, dense=False)
            plan, _ = cut.plan_packs(requests, few, 4096, max(1, 2**28 // engine.vocab_size))
        for index in range(plan.num_packs):
            engine.collect(engine.launch(packing.build_pack(plan, index)))
        return time.perf_counter() - started, len(plan.tokens)


def share_contexts(sort_and_share: Any) -> Any:
    """The sharing of prefixes cut down to requests that share all their context."""

    def shared_contexts(requests: Any) -> Any:
        order, item_of_request, shared = sort_and_share(requests)
        context = (requests.starts[1:] - requests.starts[:-1])[order] - requests.num_targets[order]
        shared[shared < context - 1] = 0
        return order, item_of_request, shared

    return shared_contexts


def format_row(row: dict[str, Any]) -> str:
    medians = {name: statistics.median(seen) for name, seen in row["times_s"].items()}
    cells = [
        f"{medians[name]:.2f} s ({medians['padded'] / medians[name]:.2f} times, {row['tokens'][name]:,})" for name in COLUMNS
    ]
    return f"| {row['task']} | {' | '.join(cells)} |"


def format_report(rows: list[dict[str, Any]], args: argparse.Namespace, model: Any) -> str:
    from sides import describe_conditions, format_conditions

    return "\n".join(
        [
            *format_conditions(describe_conditions(args, model, model.device)),
            "Seconds to plan and run (times faster than padded, tokens through the model):",
            "",
            f"| task | {' | '.join(COLUMNS)} |",
            f"|---|{'---|' * len(COLUMNS)}",
            *map(format_row, rows),
        ]
    )


if __name__ == "__main__":
    main()
