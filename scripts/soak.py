#!/usr/bin/env python3
"""Run for long and see that nothing grows or stays behind: memory of each rank, processes, files, ports.

    python scripts/soak.py --runs 20 --requests 100000

First `--runs` runs in a row by the same two ranks of torchrun, then one run of `--requests` short requests. Prints each
rank's resident memory at 10%, 50% and 100% of both. Exit code 1 if a process (and with it a port) or a file outside of the run
directories is left, or if memory grows by more than `--most_growth_mb` from 50% to 100%, or 2.5 times that from 10%. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

TASK = """\
task: soak
dataset_path: json
custom_dataset: !function soak_task.load
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list:
  - metric: acc
"""
TASK_CODE = """\
import datasets

def load(**settings):
    numbers = range(REQUESTS)
    rows = {"question": [f"{n % 991} + {n // 991} =" for n in numbers], "answer": [str(n % 991 + n // 991) for n in numbers]}
    return datasets.DatasetDict(test=datasets.Dataset.from_dict(rows))
"""
MARK = "DDP_EVAL_SOAK"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--most_growth_mb", type=float, default=20.0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        place = Path(scratch)
        (place / "tasks").mkdir()
        (place / "tasks" / "soak.yaml").write_text(TASK)
        (place / "tasks" / "soak_task.py").write_text(TASK_CODE.replace("REQUESTS", str(args.requests)))
        small = ["--model_args", "pretrained=demo", "--tasks", "demo_hellaswag", "demo_lambada", "--limit", "4"]
        many = [[*small, "--bootstrap_iters", "50", "--output_path", str(place / f"run{number}")] for number in range(args.runs)]
        flags = ["--model_args", "pretrained=demo", "--tasks", "soak", "--include_path", str(place / "tasks")]
        one = [[*flags, "--output_path", str(place / "large")]]
        good = soak(place, f"{args.runs} runs in a row", many, args.most_growth_mb)
        return 0 if soak(place, f"one run of {args.requests:,} requests", one, args.most_growth_mb) and good else 1


def soak(place: Path, name: str, command_lines: list[list[str]], most_growth_mb: float) -> bool:
    """Have two ranks run these command lines, one behind the other; print what they needed and left."""
    notes = place / uuid.uuid4().hex
    temporary = notes / "tmp"
    temporary.mkdir(parents=True)
    (notes / "lines.json").write_text(json.dumps(command_lines))
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", MARK: notes.name}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        "--worker",
        str(notes),
    ]
    started = time.monotonic()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    elapsed_s = time.monotonic() - started
    if finished.returncode:
        print(finished.stdout + finished.stderr)
        return False
    time.sleep(1)
    print(f"{name}: {elapsed_s:.0f} s", flush=True)
    flat = True
    for rank in (0, 1):
        samples = json.loads((notes / f"{rank}.json").read_text())
        tenth, half, end = (samples[max(0, len(samples) * share // 100 - 1)] for share in (10, 50, 100))
        flat = flat and end - half <= most_growth_mb and end - tenth <= 2.5 * most_growth_mb
        print(f"  rank {rank}: {tenth:.0f} MB at 10%, {half:.0f} MB at 50%, {end:.0f} MB at 100%")
    processes = marked_processes(notes.name)
    # torchrun leaves an empty folder for its ranks' logs.
    files = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
    for line in command_lines:
        run = Path(line[line.index("--output_path") + 1])
        files += [entry.name for entry in run.iterdir() if entry.name.startswith(".") or entry.name == "journal"]
    print(f"  left behind: processes {processes or 'none'}, files {files or 'none'}")
    return flat and not processes and not files


def work(notes: Path) -> None:
    """One rank: every command line in turn, and its memory after each run, or after each pack of a single one."""
    import lm_eval.evaluator

    from ddp_eval.cli import flags as cli
    from ddp_eval.distributed.world import join_group, leave_group
    from ddp_eval.run import execute, runner
    from ddp_eval.tasks import select

    lm_eval.evaluator.add_env_info = lambda results: None  # asks pip and lscpu about the machine, which takes a second
    load_index = select.TaskManager
    select.TaskManager = lambda **options: load_index(**{**options, "include_defaults": False})
    configs = [cli.parse(line)[0] for line in json.loads((notes / "lines.json").read_text())]
    samples: list[float] = []
    launch = execute._launch

    def launch_and_sample(world: Any, engine: Any, pack: Any) -> list[Any]:
        samples.append(resident_mb())
        return launch(world, engine, pack)

    if len(configs) == 1:
        execute._launch = launch_and_sample
    world = join_group()
    for config in configs:
        runner.run(config, world)
        gc.collect()  # modules and tasks refer to each other in circles
        samples.append(resident_mb())
    leave_group(world)
    (notes / f"{world.rank}.json").write_text(json.dumps(samples))


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def marked_processes(name: str) -> list[int]:
    """Processes that are alive and were started with this mark in their environment."""
    mark, alive = f"{MARK}={name}".encode(), []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                alive.append(int(directory.name))
    return alive


if __name__ == "__main__":
    sys.exit(main())
