#!/usr/bin/env python3
"""What one GPU can tell within a given time: part after part, most worth first, each written as soon as it is done.

    scripts/bench_gpu.sh --out benchmarks/gpu_NAME [--tasks A:300,B:300 --include_path TASKS --generation_tasks G:64]

A part is a command of its own. It starts if --budget_s leaves what it needs, and ends when it has had its share or the budget is
spent; what it has written by then is kept. A part that fails ends no other. OUT.md and OUT.json have what each part came to,
OUT.log what they printed. Models are drawn from configs on the device, in bfloat16; tasks are the demo's if none are given.

With --rehearse the same parts run on the CPU with tiny shapes and few documents: whether they run, not how fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_TASKS = "demo_hellaswag,demo_mmlu_philosophy,demo_mmlu_global_facts,demo_boolean_expressions,demo_lambada,demo_wikitext"
# Of these, one of each kind of request: enough to see that a part runs.
REHEARSED_TASKS = "demo_hellaswag:2,demo_lambada:2,demo_wikitext:1"
GENERATION_TASKS = REPOSITORY / "tests" / "support" / "generation_tasks"


@dataclasses.dataclass(frozen=True)
class Part:
    """name: of its record. needs_s: left of the budget, or it is skipped. at_most_s: then it is ended.

    missing: why it cannot run here, or "". record: the path, without .md and .json, that the command writes its own record to.
    """

    name: str
    argv: Sequence[str]
    needs_s: float
    at_most_s: float
    record: Path | None = None
    missing: str = ""


def run_parts(parts: Sequence[Part], budget_s: float, log: Path, keep: Callable[[list[dict[str, Any]]], None]) -> bool:
    """Run the parts in order within the budget. keep: is given what all parts so far came to, after each. True if none failed."""
    ends = time.monotonic() + budget_s
    found: list[dict[str, Any]] = []
    for part in parts:
        left_s = ends - time.monotonic()
        if part.missing:
            found.append({"part": part.name, "state": "skipped", "why": part.missing})
        elif left_s < part.needs_s:
            found.append({"part": part.name, "state": "skipped", "why": f"{left_s:.0f} s left, it needs {part.needs_s:.0f}"})
        else:
            found.append(run_part(part, min(left_s, part.at_most_s), log))
        print(describe(found[-1]), file=sys.stderr, flush=True)
        keep(found)
    return all(one["state"] != "failed" for one in found)


def run_part(part: Part, timeout_s: float, log: Path) -> dict[str, Any]:
    """What a part came to: its state, seconds, the end of its output, and its own record, as far as it came."""
    began, started = log.stat().st_size if log.exists() else 0, time.monotonic()
    with log.open("a") as output:
        output.write(f"\n== {part.name}: {' '.join(map(str, part.argv))}\n")
        output.flush()
        process = subprocess.Popen(
            part.argv, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=REPOSITORY, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
            state, why = ("done", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            state, why = "ended", f"after its {timeout_s:.0f} s"
        finally:
            end_session(process)
    lines = [line for line in log.read_text(errors="replace")[began:].splitlines() if line.strip()]
    record = {}
    if part.record:
        for kind in ("md", "json"):
            file = Path(f"{part.record}.{kind}")
            if file.exists():
                record[kind] = file.read_text() if kind == "md" else json.loads(file.read_text())
    seconds = round(time.monotonic() - started, 1)
    return {"part": part.name, "state": state, "why": why, "seconds": seconds, "last": lines[-12:], **record}


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End what a part has started and left running: it would hold the device, or its memory."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def describe(one: dict[str, Any]) -> str:
    seconds = f" in {one['seconds']:.0f} s" if "seconds" in one else ""
    return f"{one['part']}: {one['state']}{seconds}{' (' + one['why'] + ')' if one['why'] else ''}"


def make_parts(args: argparse.Namespace, work: Path) -> list[Part]:
    """In order of worth."""
    python, scripts = sys.executable, REPOSITORY / "scripts"
    shapes = ("tiny", "tiny") if args.rehearse else ("llama1b", "llama8b")
    models = [work / "models" / name for name in ("1b", "8b")]
    device = ["--cpu"] if args.rehearse else []
    dtype = "bfloat16"
    sizes = "2,4" if args.rehearse else "16,64"
    include = ["--include_path", str(args.include_path)]

    def speed(name: str, model: Path, tasks: str, at_most_s: float) -> Part:
        argv = [python, str(scripts / "bench.py"), "--model", str(model), "--random_weights", "--dtype", dtype, "--tasks", tasks,
                *include, "--batch_sizes", sizes, "--repeats", "1", *device, "--out", str(work / name)]  # fmt: skip
        return Part(name, argv, 45, at_most_s, work / name)

    def probe(name: str, model: Path) -> Part:
        argv = [
            python,
            str(scripts / "gpu_probe.py"),
            "--model",
            str(model),
            "--dtype",
            dtype,
            *device,
            "--out",
            str(work / name),
        ]
        return Part(name, argv, 30, 75, work / name)

    generation = [
        *(python, str(scripts / "bench_generation.py"), "--model", str(models[0]), "--random_weights", "--dtype", dtype),
        *("--tasks", args.generation_tasks, "--include_path", str(args.generation_path)),
        *("--batch_sizes", sizes, "--repeats", "1", *device, "--out", str(work / "generation_1b")),
    ]
    vllm = "" if importlib.util.find_spec("vllm") else "vLLM is not installed"
    few = args.tasks.split(",")[0] if args.rehearse else halved(args.tasks)
    making = [python, str(scripts / "bench_gpu.py"), "--tasks", args.tasks, *include, "--generation_tasks", args.generation_tasks]
    making += ["--rehearse"] if args.rehearse else []
    parts = [
        Part("tests", [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"], 20, 150),
        Part("models", [*making, "--models", str(work / "models"), "--shapes", *shapes], 15, 120),
        speed("speed_1b", models[0], args.tasks, 150),
        speed("speed_8b", models[1], few, 210),
        probe("probe_8b", models[1]),
        probe("probe_1b", models[0]),
        Part("generation_1b", generation, 40, 100, work / "generation_1b"),
        Part("shard", shard_argv(args, work), 25, 75),
        Part("vllm", vllm_argv(args, models[0], include), 60, 120, missing=vllm),
    ]
    # What is rehearsed is whether parts run: other work on the machine may slow them down.
    return [dataclasses.replace(part, needs_s=1, at_most_s=300) for part in parts] if args.rehearse else parts


def shard_argv(args: argparse.Namespace, work: Path) -> list[str]:
    """The demo whole and under --layout shard, which one rank makes a whole copy: both must come to the same bits."""
    device = " --device cpu" if args.rehearse else ""
    tasks = "demo_hellaswag --limit 2" if args.rehearse else "demo"
    run = f"{sys.executable} -m ddp_eval --tasks {tasks} --bootstrap_iters 0{device}"
    one, other = work / "whole", work / "shard"
    return ["bash", "-ec", f"{run} --layout replicas --output_path {one}; {run} --layout shard --output_path {other}; "
            f"{sys.executable} -m ddp_eval compare {one} {other} --expect identical"]  # fmt: skip


def vllm_argv(args: argparse.Namespace, model: Path, include: Sequence[str]) -> list[str]:
    """ddp_eval's whole command with vLLM, random weights drawn by vLLM itself."""
    tasks = ",".join(task.partition(":")[0] for task in args.tasks.split(","))
    limit = max(int(task.partition(":")[2] or 64) for task in args.tasks.split(","))
    model_args = f"pretrained={model},dtype=bfloat16,load_format=dummy,gpu_memory_utilization=0.6,max_model_len=4096"
    return [sys.executable, "-m", "ddp_eval", "--model", "vllm", "--model_args", model_args, "--tasks", tasks, *include,
            "--limit", str(limit), "--bootstrap_iters", "0"]  # fmt: skip


def halved(tasks: str) -> str:
    """The same tasks with half of their documents.

    >>> halved("a:300,b:5,c")
    'a:150,b:2,c'
    """
    parts = (task.partition(":") for task in tasks.split(","))
    return ",".join(f"{name}:{max(1, int(documents) // 2)}" if documents else name for name, _, documents in parts)


def make_models(directory: Path, shapes: Sequence[str], args: argparse.Namespace) -> None:
    """Configs of the shapes under 1b and 8b, with one tokenizer that has learnt the tasks' texts (to rehearse: the demo's)."""
    import logging

    from make_bench_model import make_config, read_texts, train_tokenizer  # beside this file

    logging.disable(logging.WARNING)
    if args.rehearse:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "ddp_eval" / "demo" / "model")
    else:
        tasks = [task.partition(":")[0] for task in args.tasks.split(",")]
        tokenizer = train_tokenizer(read_texts(tasks, str(args.include_path)))
    for name, shape in zip(("1b", "8b"), shapes, strict=True):
        tokenizer.save_pretrained(directory / name)
        make_config(shape, tokenizer).save_pretrained(directory / name)


def format_report(report: dict[str, Any]) -> str:
    lines = [f"{report['date']}, commit {report['commit']}: `{report['command']}`", f"Hardware: {report['hardware']}.", ""]
    lines += ["| part | what came of it |", "|---|---|"]
    lines += [f"| {one['part']} | {describe(one).partition(': ')[2]} |" for one in report["parts"]]
    for one in report["parts"]:
        if "seconds" in one:
            lines += ["", f"## {one['part']}", "", *([one["md"]] if "md" in one else ["```text", *one["last"], "```"])]
    return "\n".join(lines)


def describe_machine() -> dict[str, str]:
    gpus = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {"commit": output_of("git", "rev-parse", "--short", "HEAD") or "unknown", "hardware": gpus or "no GPU"}


def output_of(*argv: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write PATH.md, PATH.json and PATH.log (default gpu_record in the working directory)")
    parser.add_argument("--budget_s", type=float, help="seconds for everything (default 690, with --rehearse 900)")
    parser.add_argument("--tasks", help="comma-separated TASK:DOCUMENTS (default: the demo's); half of the documents for 8 B")
    parser.add_argument("--include_path", type=Path, help="directory of the tasks' files")
    parser.add_argument("--generation_tasks", help="tasks that generate text, TASK:DOCUMENTS (default: one of the tests')")
    parser.add_argument("--only", help="comma-separated names of parts to run")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny shapes, few documents")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)  # the part that makes them
    parser.add_argument("--shapes", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generation_tasks is None and args.include_path:
        parser.error("--include_path needs --generation_tasks, tasks in it that generate text")
    documents = ",".join(f"{task}:300" for task in DEMO_TASKS.split(","))
    args.tasks = args.tasks or (REHEARSED_TASKS if args.rehearse else documents)
    few = 2 if args.rehearse else 64
    args.generation_path = args.include_path.resolve() if args.include_path else GENERATION_TASKS
    args.generation_tasks = args.generation_tasks or f"gen_boolean:{few},gen_story:{few}"
    args.include_path = (args.include_path or REPOSITORY / "ddp_eval" / "demo" / "tasks").resolve()
    args.budget_s = args.budget_s or (900 if args.rehearse else 690)
    args.out = Path(args.out or "gpu_record").resolve()
    return args


def main() -> int:
    args = read_arguments()
    if args.models:
        make_models(args.models, args.shapes, args)
        return 0
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(
            ["scripts/bench_gpu.sh", *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])]
        ),
        **describe_machine(),
        "parts": [],
    }

    def keep(found: list[dict[str, Any]]) -> None:
        report["parts"] = found
        Path(f"{args.out}.md").write_text(format_report(report) + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")

    log = Path(f"{args.out}.log")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as work:
        parts = make_parts(args, Path(work))
        if args.only:
            parts = [part for part in parts if part.name in (*args.only.split(","), "models")]
        return 0 if run_parts(parts, args.budget_s, log, keep) else 1


if __name__ == "__main__":
    sys.exit(main())
