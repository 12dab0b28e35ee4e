#!/usr/bin/env python3
"""ddp_eval beside its peers: whole commands over the same documents, and apart their start-up, prompts and scoring.

    python scripts/bench_peers.py --model DIR --tasks A:200,B:200:0 --include_path TASKS --cpu --out benchmarks/peers_NAME

Each peer has an environment of its own, made from the pins in benchmarks/peers/ (in --environments, some GB; --python NAME=PATH
takes one that is there), and runs its own command, from start to exit, on the same cores:

    ddp_eval, ddp_eval with vLLM, lm_eval's hf at its best batch size, lm_eval's hf with --batch_size auto, lm_eval's vllm,
    lighteval's accelerate at its best batch size, over rows that hold lm_eval's prompts

For each task and dtype each of them runs once on a few documents, so that data sets are in the cache, vLLM's kernels compiled,
and ddp_eval's index of lm_eval's task files made.
Batch sizes are tried on a quarter of the documents, and the one that scores best is taken. Then all run in turn, --repeats times;
medians are reported. One that takes longer than --once_above seconds runs once. A peer that cannot run is a row with the reason.

    start    imports, weights, vLLM's engine         prompts   task files, data, few-shot examples, requests
    scoring  from request texts to log-probabilities   end       metrics, files, exit

Every log-probability is held against ddp_eval's in the same dtype, and every document's best choice. Another choice counts as a
tie where ddp_eval's own two log-probabilities are no further apart than the bounds. Tasks must be multiple-choice.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import try_sizes  # beside this file
from peer_environments import EnvironmentFailed, python_of, versions_in
from peers import PEERS, SPANS, Job, Peer, write_rows
from run_command import CommandError
from sides import cut, describe_commands, difference, format_conditions, format_table, keep, read_task

WITHIN_NATS = {"float32": 1e-4, "bfloat16": 0.1}  # of a scored token
FEW = 2  # documents of the first run
NO_MEMORY, FAILED = FAULTS = ("not enough memory", "failed")
Runs = Callable[[float], dict[str, Any]]  # a peer on so many documents
Grown = Callable[[dict[str, Any]], None]


class NotThere(str):
    """In place of an environment's Python: why there is none."""


def measure_task(
    text: str, dtype: str, pythons: dict[str, str], args: argparse.Namespace, place: Path, grown: Grown = lambda row: None
) -> dict[str, Any]:
    """The numbers of each peer on one task, or the reason why there are none. pythons: of each environment, or NotThere.

    grown: is given the row after each peer's turn.
    """
    task, limit, quarter, shots = read_task_and_shots(text)
    job = Job(args, task, dtype, place / text.replace(":", "_"), shots)
    fits = write_rows(job, (limit, quarter, FEW))
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Runs] = {}
    for name in args.peers.split(";"):
        peer = PEERS[name]
        python = pythons[environment_of(peer, args)]
        if not (fits or peer.several_contexts):
            python = NotThere("its tasks have one context and several choices in a document")
        if isinstance(python, NotThere):
            found[name] = {"reason": str(python)}
            continue
        try:
            ready[name], found[name] = prepare(peer, job, python, quarter)
        except CommandError as error:
            found[name] = {"reason": reason_of(error)}
    take_turns(ready, found, job, limit, lambda: grown(row_of(job, limit, found)))
    return row_of(job, limit, found)


def row_of(job: Job, limit: float, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the peers have come to so far, the last answers of each held against ddp_eval's."""
    reference = found.get("ddp_eval", {}).get("last")
    peers = {name: {key: value for key, value in one.items() if key != "last"} for name, one in found.items()}
    for name, one in found.items():
        if reference and "last" in one:
            peers[name] |= compare(reference, one["last"], WITHIN_NATS[job.dtype])
    return {"task": job.task, "documents": int(limit), "num_fewshot": job.shots, "dtype": job.dtype, "peers": peers}


def read_task_and_shots(text: str) -> tuple[str, float, float, int | None]:
    """TASK:DOCUMENTS or TASK:DOCUMENTS:SHOTS -> the task, its documents, a quarter of them, its few-shot examples.

    >>> read_task_and_shots("local_piqa:40"), read_task_and_shots("local_arc_challenge:40:0")
    (('local_piqa', 40.0, 10.0, None), ('local_arc_challenge', 40.0, 10.0, 0))
    """
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts[1:]):
        sys.exit(f"--tasks takes TASK:DOCUMENTS or TASK:DOCUMENTS:SHOTS, got {text}")
    task, limit, quarter = read_task(":".join(parts[:2]))
    if not limit:
        sys.exit(f"--tasks needs a number of documents, got {text}")
    return task, limit, quarter, int(parts[2]) if parts[2:] else None


def environment_of(peer: Peer, args: argparse.Namespace) -> str:
    return "vllm-cpu" if peer.environment == "vllm" and args.cpu else peer.environment


def prepare(peer: Peer, job: Job, python: str, quarter: float) -> tuple[Runs, dict[str, Any]]:
    """Run the peer on a few documents, choose its batch size. Returns what runs it on so many documents, and what was tried."""
    sizes = job.args.batch_sizes.split(",") if peer.batch_size == "best" else [peer.batch_size]
    peer.command(job, python, FEW, sizes[0])
    tried: dict[int, float] = {}
    if len(sizes) > 1:
        tried = try_sizes(lambda size: peer.command(job, python, quarter, str(size))["scoring_s"], [int(size) for size in sizes])
    size = str(min(tried, key=tried.__getitem__)) if tried else sizes[0]
    return lambda limit: peer.command(job, python, limit, size), {"batch_size": size, "quarter_scoring_s": tried, "runs": []}


def take_turns(
    ready: dict[str, Runs], found: dict[str, dict[str, Any]], job: Job, limit: float, grown: Callable[[], None]
) -> None:
    """Run all peers in turn, the slow ones once; what each came to goes into `found`, medians with it."""
    for turn in range(job.args.repeats):
        for name in list(ready):
            one = found[name]
            if turn and one["runs"][0]["wall_s"] > job.args.once_above:
                continue
            try:
                one["last"] = last = ready[name](limit)
            except CommandError as error:
                found[name] = {"reason": reason_of(error)}
                del ready[name]
                continue
            print(f"{job.task} {job.dtype} {name}: {last['wall_s']:.1f} s", file=sys.stderr, flush=True)
            one["runs"].append({key: last[key] for key in ("wall_s", *SPANS)})
            one["acc"] = last["acc"]
            one.update({key: statistics.median(run[key] for run in one["runs"]) for key in ("wall_s", *SPANS)})
            grown()


def reason_of(error: CommandError) -> str:
    if error.is_out_of_memory:
        return NO_MEMORY
    bars = re.compile(r"\d+%\|")  # tqdm's
    lines = [line for line in error.stderr.splitlines() if line.strip() and not bars.search(line)]
    return f"{FAILED}: {(lines or [f'returned {error.returncode}'])[-1].strip()[:200]}"


def compare(ours: dict[str, Any], theirs: dict[str, Any], within_nats: float) -> dict[str, Any]:
    """How far `theirs` is from `ours`: nats of a request and of a token, documents with another best choice, ties apart."""
    a, b, tokens = ours["answers"], theirs["answers"], ours["tokens"]
    if a.keys() != b.keys():
        return {"agrees": False, "requests_that_differ": len(a.keys() ^ b.keys())}
    drift = {key: difference(a[key], b[key]) for key in a}
    of_token = max(drift[key] / tokens[key] for key in a)
    documents: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for key in sorted(a):
        documents.setdefault(key[:2], []).append(key)
    ties = others = 0
    for keys in documents.values():
        ours_best, theirs_best = (max(keys, key=values.__getitem__) for values in (a, b))
        if ours_best != theirs_best:
            is_tie = a[ours_best] - a[theirs_best] <= within_nats * (tokens[ours_best] + tokens[theirs_best])
            ties, others = ties + is_tie, others + (not is_tie)
    return {
        "max_difference_nats": max(drift.values()),
        "max_difference_of_a_token_nats": of_token,
        "other_choices_that_tie": ties,
        "other_choices": others,
        "accuracy_differs_by": abs(ours["acc"] - theirs["acc"]),
        "agrees": of_token <= within_nats and not others,
    }


HEADS = ["peer", "batch", "whole s", "runs", *(span.removesuffix("_s") + " s" for span in SPANS), "ddp_eval faster", "accuracy",
         "max difference, nats", "of a token", "other choices (ties)"]  # fmt: skip


def format_peer(name: str, found: dict[str, Any], ours_s: float | None) -> list[str]:
    if "wall_s" not in found:
        return [name, "", found.get("reason", "not run yet").replace("|", "/"), *[""] * (len(HEADS) - 3)]
    faster = f"**{cut(found['wall_s'] / ours_s, 2)}**" if ours_s else ""
    nats = found.get("max_difference_nats")
    if nats is None:
        differences = ["other requests", "", ""] if "agrees" in found else ["", "", ""]
    else:
        of_token = f"{found['max_difference_of_a_token_nats']:.1e}"
        differences = [f"{nats:.1e}", of_token, f"{found['other_choices']} ({found['other_choices_that_tie']})"]
    seconds = [f"{found[key]:.1f}" for key in SPANS]
    return [name, found["batch_size"], f"{found['wall_s']:.1f}", str(len(found["runs"])), *seconds, faster,
            f"{found['acc']:.4f}", *differences]  # fmt: skip


def label_of(row: dict[str, Any]) -> str:
    shots = "" if row["num_fewshot"] is None else f" {row['num_fewshot']}-shot"
    return f"{row['task']}{shots}, {row['documents']}"


def format_report(report: dict[str, Any]) -> str:
    rows = report["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    whole = []
    for row in rows:
        cells = [f"{row['peers'][n]['wall_s']:.1f}" if "wall_s" in row["peers"].get(n, {}) else "-" for n in names]
        whole.append([label_of(row), row["dtype"], *cells])
    lines = [
        *format_conditions(report["conditions"]),
        "Environments: " + "; ".join(f"{name}: {text}" for name, text in report["environments"].items()) + ".",
        "",
        "Seconds of whole commands, from start to exit.",
        "",
        *format_table(["task, documents", "dtype", *names], whole),
    ]
    for row in rows:
        ours_s = row["peers"].get("ddp_eval", {}).get("wall_s")
        table = [format_peer(name, found, ours_s) for name, found in row["peers"].items()]
        lines += ["", f"{label_of(row)} documents, {row['dtype']}:", "", *format_table(HEADS, table)]
    return "\n".join(lines)


def main() -> int:
    args = read_arguments()
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    for text in args.tasks.split(","):
        read_task_and_shots(text)  # a wrong one ends it here
    pythons, described = find_environments(args)
    if args.make_only:
        return 0
    rows: list[dict[str, Any]] = []
    report = {"conditions": describe_commands(args), "environments": described, "rows": rows}

    def grown(row: dict[str, Any]) -> None:
        keep({**report, "rows": [*rows, row]}, format_report, args.out)

    with tempfile.TemporaryDirectory() as place:
        for dtype in args.dtypes.split(","):
            for text in args.tasks.split(","):
                rows.append(measure_task(text, dtype, pythons, args, Path(place), grown))
                keep(report, format_report, args.out)
    print(format_report(report))
    return 0 if all(map(is_as_expected, rows)) else 1


def is_as_expected(row: dict[str, Any]) -> bool:
    """Whether no peer has failed or answered otherwise. One that has no environment, or is not for the task, is no fault."""
    return all(found.get("agrees", not found.get("reason", "").startswith(FAULTS)) for found in row["peers"].values())


def find_environments(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each environment that the peers need, or NotThere; and what is in it, for the record."""
    given = dict(text.split("=", 1) for text in args.python)
    pythons, described = {"": sys.executable}, {}
    for peer in (PEERS[name] for name in args.peers.split(";")):
        name = environment_of(peer, args)
        if name in pythons:
            continue
        try:
            pythons[name] = given.get(name) or str(python_of(name, args.environments))
            described[name] = versions_in(pythons[name])
        except EnvironmentFailed as error:
            pythons[name] = NotThere(f"no environment: {error}")
            described[name] = str(pythons[name])
        print(f"{name}: {described[name]}", file=sys.stderr, flush=True)
    return pythons, described


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory, with weights")
    parser.add_argument(
        "--tasks", required=True, help="comma-separated TASK:DOCUMENTS[:SHOTS], multiple-choice; SHOTS: few-shot examples"
    )
    parser.add_argument("--include_path", help="directory of the tasks' files")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default float32,bfloat16")
    parser.add_argument("--peers", default=";".join(PEERS), help=f"with ; between them (default {';'.join(PEERS)})")
    parser.add_argument("--environments", type=Path, default=Path("peers-env"), help="where they are made (default peers-env)")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="an environment that is there")
    parser.add_argument("--make_only", action="store_true", help="make the environments and no more")
    parser.add_argument("--batch_sizes", default="1,8,32", help="of lm_eval and lighteval, to try (default 1,8,32)")
    parser.add_argument("--vllm_args", help="more model_args for the commands with vLLM, such as max_model_len=4096")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each peer, in turn (default 3)")
    parser.add_argument("--once_above", type=float, default=300, help="seconds from which a peer runs once (default 300)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--memory_gb", type=float, default=12, help="GiB a command may take on a CPU, 0: all (default 12)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    args = parser.parse_args()
    args.gen_kwargs, args.dtype = None, args.dtypes
    args.environments = args.environments.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
