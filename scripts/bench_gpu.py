#!/usr/bin/env python3
"""What one GPU can tell within a given time: part after part, most worth first, each written as soon as it is done.

    scripts/bench_gpu.sh --out benchmarks/gpu_NAME [--tasks A:300,B:300 --include_path TASKS --generation_tasks G:64]

First it is checked that this Python has what the parts import and that torch computes on the device; if not, nothing starts and
the reason is printed (exit code 2). Then timed_parts.py runs the parts in what is left of --budget_s. OUT.md and OUT.json have
what each part came to, also while one runs; OUT.log has what they printed. Models are drawn from configs on the device, in
bfloat16; tasks are the demo's if none are given. --only runs some of the parts: in two commands, say, where one may not take so
long.

With --rehearse the same parts run on the CPU with tiny shapes and few documents: whether they run, not how fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sides import commit_of_code, format_table  # beside this file
from sides import keep as write_record
from timed_parts import REPOSITORY, Found, Part, describe, in_turn, run_parts

SCRIPTS = REPOSITORY / "scripts"
DTYPE = "bfloat16"
# All of their documents, so that a quarter of them is one.
DEMO_TASKS = (
    "demo_hellaswag:100,demo_mmlu_philosophy:45,demo_mmlu_global_facts:35,"
    "demo_boolean_expressions:250,demo_lambada:100,demo_wikitext:8"
)
# Of these, one of each kind of request: enough to see that a part runs.
REHEARSED_TASKS = "demo_hellaswag:2,demo_lambada:2,demo_wikitext:1"
SPREAD = "0.03"  # of weights that generate: with more, 2,048 wide, rounding in bfloat16 alone turns next tokens
GENERATION_TASKS = REPOSITORY / "tests" / "support" / "generation_tasks"
# GB of the device's memory for 8 B parameters: one copy of the weights and what a pack takes; two copies and lm_eval's batches.
ONE_COPY_GB, TWO_COPIES_GB = 24, 60


def make_parts(args: argparse.Namespace, work: Path, checked: dict[str, Any]) -> list[Part]:
    """In order of worth. checked: by gpu_check.py. work: a directory for what the parts write."""
    models = {name: work / "models" / name for name in ("1b", "8b", "1b_text")}
    few = args.tasks if args.rehearse else ",".join((halved(args.tasks) if args.own_tasks else args.tasks).split(",")[:3])
    parts = [
        tests_part(checked),
        models_part(args, work),
        speed_part(args, work, "1b", models["1b"], args.tasks, 150),
        speed_part(args, work, "8b", models["8b"], few, 210, lacks_memory(args, checked, TWO_COPIES_GB)),
        probe_part(args, work, "8b", models["8b"], lacks_memory(args, checked, ONE_COPY_GB)),
        probe_part(args, work, "1b", models["1b"]),
        generation_part(args, work, models["1b_text"]),
        Part("shard", in_turn(*shard_commands(args, work)), 40, 90),
        vllm_part(args, work, models["1b"]),
    ]
    # What is rehearsed is whether parts run: other work on the machine may slow them down, and the budget alone ends them.
    return [dataclasses.replace(part, needs_s=1, at_most_s=args.budget_s) for part in parts] if args.rehearse else parts


def tests_part(checked: dict[str, Any]) -> Part:
    argv = [sys.executable, "-m", "pytest", "-v", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "90", "tests/gpu"]
    return Part("tests", argv, 30, 120, missing=", ".join(checked["tests_missing"]))


def models_part(args: argparse.Namespace, work: Path) -> Part:
    shapes = ["rehearsal", "rehearsal"] if args.rehearse else ["llama1b", "llama8b"]
    argv = [sys.executable, str(SCRIPTS / "gpu_models.py"), "--shapes", *shapes, "--tasks", args.tasks,
            "--include_path", str(args.include_path), "--out", str(work / "models")]  # fmt: skip
    return Part("models", argv, 20, 120)


def speed_part(
    args: argparse.Namespace, work: Path, size: str, model: Path, tasks: str, at_most_s: float, missing: str = ""
) -> Part:
    argv = [sys.executable, str(SCRIPTS / "bench.py"), *random_model(args, model), "--tasks", tasks,
            "--include_path", str(args.include_path), *lm_eval_sizes(args)]  # fmt: skip
    return recorded(f"speed_{size}", argv, work, 80, at_most_s, missing=missing)


def probe_part(args: argparse.Namespace, work: Path, size: str, model: Path, missing: str = "") -> Part:
    """With a cache of compiled kernels of its own: what is in another's would not be compiled, and why one is anew in the log."""
    name = f"probe_{size}"
    argv = [sys.executable, str(SCRIPTS / "gpu_probe.py"), "--model", str(model), "--dtype", DTYPE, *on_cpu(args)]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / f"{name}_cache"), "TRITON_CACHE_DIR": str(work / f"{name}_cache" / "triton")}
    return recorded(name, argv, work, 40, 90, {**caches, "TORCH_LOGS": "recompiles"}, missing)


def generation_part(args: argparse.Namespace, work: Path, model: Path) -> Part:
    argv = [sys.executable, str(SCRIPTS / "bench_generation.py"), *random_model(args, model), "--tasks", args.generation_tasks,
            "--include_path", str(args.generation_path), *lm_eval_sizes(args), "--initializer_range", SPREAD]  # fmt: skip
    return recorded("generation_1b", argv, work, 60, 130)


def recorded(
    name: str, argv: Sequence[str], work: Path, needs_s: float, at_most_s: float, environment: dict[str, str] | None = None,
    missing: str = "",
) -> Part:  # fmt: skip
    """A part on the models, whose command writes a record to --out."""
    argv = [*argv, "--out", str(work / name)]
    return Part(name, argv, needs_s, at_most_s, work / name, environment or {}, missing, after="models")


def random_model(args: argparse.Namespace, model: Path) -> list[str]:
    return ["--model", str(model), "--random_weights", "--dtype", DTYPE, *on_cpu(args)]


def lm_eval_sizes(args: argparse.Namespace) -> list[str]:
    return ["--batch_sizes", "2,4" if args.rehearse else "16,64,256", "--repeats", "1"]


def on_cpu(args: argparse.Namespace) -> list[str]:
    return ["--cpu"] if args.rehearse else []


def lacks_memory(args: argparse.Namespace, checked: dict[str, Any], needed_gb: int) -> str:
    free_gb = checked["free_bytes"] / 1e9
    return "" if args.rehearse or free_gb >= needed_gb else f"{free_gb:.0f} GB free on the device, it takes {needed_gb}"


def shard_commands(args: argparse.Namespace, work: Path) -> list[list[str]]:
    """The demo whole and under --layout shard, which one rank makes a whole copy: both must come to the same bits."""
    tasks = ["demo_hellaswag", "--limit", "2"] if args.rehearse else ["demo"]
    device = ["--device", "cpu" if args.rehearse else "cuda"]
    ddp_eval, places = [sys.executable, "-m", "ddp_eval"], [str(work / layout) for layout in ("replicas", "shard")]
    runs = [
        [*ddp_eval, "--tasks", *tasks, "--bootstrap_iters", "0", *device, "--layout", Path(place).name, "--output_path", place]
        for place in places
    ]
    return [*runs, [*ddp_eval, "compare", *places, "--expect", "identical"]]


def vllm_part(args: argparse.Namespace, work: Path, model: Path) -> Part:
    """Whole commands over one task: ddp_eval, ddp_eval with vLLM, lm_eval with vLLM. vLLM reads its weights from disk."""
    weights, python = work / "weights", args.vllm_python or sys.executable
    task, _, documents = args.tasks.split(",")[0].partition(":")
    drawing = [sys.executable, str(SCRIPTS / "gpu_models.py"), "--draw", str(model), "--dtype", DTYPE, *on_cpu(args),
               "--out", str(weights)]  # fmt: skip
    # Log-probabilities of prompts take memory that vLLM does not count when it takes its share of the device's.
    vllm_args = "max_model_len=2048,enforce_eager=True" if args.rehearse else "max_model_len=4096,gpu_memory_utilization=0.6"
    comparing = [sys.executable, str(SCRIPTS / "bench_peers.py"), "--model", str(weights), "--dtypes", DTYPE, *on_cpu(args),
                 "--tasks", f"{task}:{documents or 100}", "--include_path", str(args.include_path), "--vllm_args", vllm_args,
                 "--peers", "lm_eval vllm;ddp_eval, vLLM;ddp_eval", "--repeats", "1",
                 "--threads", str(1 if args.rehearse else min(8, os.cpu_count() or 1)),
                 "--python", f"vllm={python}", "--python", f"vllm-cpu={python}", "--out", str(work / "vllm")]  # fmt: skip
    return Part("vllm", in_turn(drawing, comparing), 120, 240, work / "vllm", missing=lacks_vllm(args), after="models")


def lacks_vllm(args: argparse.Namespace) -> str:
    """Why the interpreter for vLLM cannot run it, or ""."""
    program = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ['vllm', 'lm_eval'])))"
    if not args.vllm_python:
        return "" if importlib.util.find_spec("vllm") else "vLLM is not installed"
    try:
        found = subprocess.run([args.vllm_python, "-c", program], timeout=60, stderr=subprocess.DEVNULL).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        found = False
    return "" if found else f"{Path(args.vllm_python).name} of --vllm_python does not have vllm and lm_eval"


def halved(tasks: str) -> str:
    """The same tasks with half of their documents.

    >>> halved("a:300,b:5,c")
    'a:150,b:2,c'
    """
    parts = (task.partition(":") for task in tasks.split(","))
    return ",".join(f"{name}:{max(1, int(documents) // 2)}" if documents else name for name, _, documents in parts)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """What gpu_check.py has seen. Ends the script, with exit code 2, where no part could run."""
    argv = [sys.executable, str(SCRIPTS / "gpu_check.py"), *on_cpu(args)]
    timeout_s = args.budget_s if args.rehearse else 120
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s)
        checked: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        refuse(f"the imports and one matrix product on the device have not ended within {timeout_s:.0f} s")
    except (IndexError, ValueError):
        refuse(f"gpu_check.py failed: {ran.stderr.strip()[-300:]}")
    if checked["missing"]:
        refuse(f"{sys.executable} cannot import {', '.join(checked['missing'])}")
    if checked["problem"]:
        refuse(f"{checked['problem']}; --rehearse runs the parts on the CPU")
    return checked


def format_report(report: dict[str, Any]) -> str:
    checked = report["checked"]
    packages = ", ".join(f"{name} {version}" for name, version in checked["packages"].items())
    lines = [
        f"{report['date']}, commit {report['commit']}: `{report['command']}`",
        f"Hardware: {json.dumps(checked['hardware'])}, {checked['free_bytes'] / 1e9:.0f} GB of the device's memory free.",
        f"Packages: {packages}. Compiler for flex_attention: {checked['compiler']}.",
        "",
        *format_table(["part", "what came of it"], [[one["part"], describe(one).partition(": ")[2]] for one in report["parts"]]),
    ]
    for one in report["parts"]:
        if "seconds" in one:
            lines += ["", f"## {one['part']}", "", *([one["md"]] if "md" in one else [])]
            if "md" not in one or one["state"] != "done":
                lines += ["```text", *one["last"], "```"]
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write PATH.md, PATH.json and PATH.log (default gpu_record in the working directory)")
    parser.add_argument("--budget_s", type=float, help="seconds for everything (default 690, with --rehearse 900)")
    parser.add_argument("--tasks", help="comma-separated TASK:DOCUMENTS, a multiple-choice one first (default: the demo's); "
                        "half of the documents of the first three for 8 B")  # fmt: skip
    parser.add_argument("--include_path", type=Path, help="directory of the tasks' files")
    parser.add_argument("--generation_tasks", help="tasks that generate text, TASK:DOCUMENTS (default: two of the tests')")
    parser.add_argument("--vllm_python", help="a Python that has vLLM and lm_eval (default: this one, if it has vLLM)")
    parser.add_argument("--only", help="comma-separated names of parts to run; models is made for those that need it")
    parser.add_argument("--commit", help="the commit of this code, where it is not in a git repository")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny shapes, few documents")
    args = parser.parse_args()
    if args.include_path and not (args.tasks and args.generation_tasks):
        parser.error("--include_path needs --tasks and --generation_tasks, tasks in it, the latter such that generate text")
    args.own_tasks = bool(args.tasks)
    args.tasks = args.tasks or (REHEARSED_TASKS if args.rehearse else DEMO_TASKS)
    few = 2 if args.rehearse else 64
    args.generation_path = args.include_path.resolve() if args.include_path else GENERATION_TASKS
    args.generation_tasks = args.generation_tasks or f"gen_boolean:{few},gen_story:{few}"
    args.include_path = (args.include_path or REPOSITORY / "ddp_eval" / "demo" / "tasks").resolve()
    args.budget_s = args.budget_s or (900 if args.rehearse else 690)
    args.out = Path(args.out or "gpu_record").resolve()
    return args


def choose(parts: Sequence[Part], only: str | None) -> list[Part]:
    """The parts that --only names, and those that they come after."""
    if not only:
        return list(parts)
    names = set(only.split(","))
    if unknown := names - {part.name for part in parts}:
        refuse(f"--only takes {','.join(part.name for part in parts)}, got {','.join(sorted(unknown))}")
    names |= {part.after for part in parts if part.name in names}
    return [part for part in parts if part.name in names]


def refuse(reason: str) -> NoReturn:
    print(f"bench_gpu: {reason}", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    args, started = read_arguments(), time.monotonic()
    commit = args.commit or commit_of_code()
    os.environ["CODE_COMMIT"] = commit  # for the records of the parts
    checked = check(args)
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": shlex.join(["scripts/bench_gpu.sh", *words]),
        "checked": checked,
        "parts": [],
    }

    def keep(parts: Found) -> None:
        report["parts"] = parts
        write_record(report, format_report, args.out)

    log = Path(f"{args.out}.log")
    log.unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # the part that runs is killed, and the record says so
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        parts = choose(make_parts(args, Path(work), checked), args.only)
        ran = run_parts(parts, args.budget_s - (time.monotonic() - started), log, keep)
    return 0 if all(is_as_expected(one, parts, args.rehearse) for one in ran) else 1


def is_as_expected(one: dict[str, Any], parts: Sequence[Part], rehearse: bool) -> bool:
    """On a device a part may have had its time, or find none left; to rehearse, each that can run must come to its end."""
    if one["why"] in [part.missing for part in parts if part.name == one["part"]]:
        return True
    return one["state"] == "done" if rehearse else one["state"] not in ("failed", "interrupted")


if __name__ == "__main__":
    sys.exit(main())
