#!/usr/bin/env python3
"""Kill evaluations at random moments, resume them on other numbers of ranks, and compare with an undisturbed run.

    python scripts/chaos.py --trials 100

Each trial is one run directory. Again and again the same command is started in it, on 1 to 4 ranks, never as many as the time
before, and one rank, all ranks or the launcher get SIGKILL at a random moment, until a start ends by itself; a trial in which no
start was killed does not count. Then scores.parquet, results.json (but for times) and texts.parquet must equal the undisturbed
run's to the bit, and no pack or batch of texts may have been computed that was in a journal before. Exit code 1 if not.

The launcher is torchrun's elastic agent, started by fork from this process, which has imported torch, transformers and lm_eval
once for all; `--torchrun` starts torchrun itself, which takes several seconds a start. A third of the launches allow an elastic
restart. The model is the embedded one, slowed down by `--pack_s` a pack, so that many moments lie within packs. Linux only.

`--sweep N`: the command is a sweep over N checkpoints, each of whose run directories is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

from ddp_eval.output import journal

# Scores and texts, greedy and drawn, in one run.
FLAGS = ["--model_args", "pretrained=demo", "--tasks", "demo_hellaswag", "demo_lambada", "gen_boolean", "gen_drawn", "gen_story"]
FLAGS += ["--include_path", str(Path(__file__).resolve().parent.parent / "tests" / "support" / "generation_tasks")]
FLAGS += ["--num_fewshot", "1", "--limit", "8", "--max_pack_tokens", "1", "--bootstrap_iters", "50"]
SWEPT = ["--tasks", "demo_lambada", "gen_boolean", "--include_path", FLAGS[FLAGS.index("--include_path") + 1]]
SWEPT += ["--limit", "4", "--max_pack_tokens", "1", "--bootstrap_iters", "50"]
SIZES = {"slot_tokens": 10**6, "max_slots": 3, "queue": 6}  # of batches of texts, so small that there are a dozen
TARGETS = ("one rank", "all ranks", "torchrun")
MOST_KILLS = 3  # in one trial
GONE_S = 40.0  # torchrun gives ranks that do not end 30 s


@dataclasses.dataclass
class Tally:
    """What happened in all trials. Times in seconds."""

    starts: int = 0
    kills: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(TARGETS, 0))
    restarts: int = 0
    computed: int = 0
    lost: int = 0
    lost_s: list[float] = dataclasses.field(default_factory=list)
    most_lost: int = 0
    gone_s: list[float] = dataclasses.field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack_s", type=float, default=0.03, help="seconds added to each pack")
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="a sweep over so many checkpoints (default: one run)")
    parser.add_argument("--torchrun", action="store_true", help="start torchrun itself each time")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.worker:
        work(args.worker, args.pack_s, flags)
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TQDM_DISABLE": "1"}
    if not args.torchrun:
        preload()
    place = Path(tempfile.mkdtemp(prefix="chaos_"))
    try:
        write_checkpoints(place / "train", args.sweep)
        return run_trials(args, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def preload() -> None:
    """Import what every rank needs, and start no thread: it would be missing in the forked processes."""
    for module in ("torch.distributed.launcher.api", "transformers.models.llama.modeling_llama", "pyarrow.parquet"):
        importlib.import_module(module)
    for module in ("ddp_eval.tasks.harness", "ddp_eval.run.runner"):
        importlib.import_module(module)
    from ddp_eval.engines.hf import checkpoint

    checkpoint.load_config({"pretrained": "demo"})
    checkpoint.load_tokenizer({"pretrained": "demo"})


def write_checkpoints(place: Path, count: int) -> None:
    """The demo model, moved a little from one to the next."""
    import safetensors.torch

    from ddp_eval import demo

    for number in range(1, count + 1):
        folder = Path(shutil.copytree(demo.MODEL_PATH, place / f"checkpoint-{number}"))
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        moved = {name: (one.float() * (1 + number / 1000)).to(one.dtype) for name, one in weights.items()}
        safetensors.torch.save_file(moved, folder / "model.safetensors", {"format": "pt"})


def run_trials(args: argparse.Namespace, place: Path) -> int:
    dice, tally, began = random.Random(args.seed), Tally(), time.monotonic()
    expected, length_s = place / "undisturbed", 0.0
    for name in ("warm up", "undisturbed"):
        started = time.monotonic()
        launch = Launch(args, place / name, 2, 0)
        if launch.wait(300) != 0:
            print(launch.log())
            return 1
        length_s = time.monotonic() - started
    trials = 0
    while trials < args.trials:
        directory, kills = place / "trial", sum(tally.kills.values())
        wrong = run_until_done(args, directory, dice, length_s, tally) or any_difference(args, expected, directory)
        if wrong:
            print(f"trial {trials} (seed {args.seed}): {wrong}")
            return 1
        shutil.rmtree(directory)
        if sum(tally.kills.values()) == kills:  # it was done before its moment came
            continue
        trials += 1
        if trials % 10 == 0:
            print(f"{trials} trials, {sum(tally.kills.values())} kills, {time.monotonic() - began:.0f} s", flush=True)
    report(args, tally, length_s)
    return 0


def report(args: argparse.Namespace, tally: Tally, length_s: float) -> None:
    kills = ", ".join(f"{count} of {target}" for target, count in tally.kills.items())
    print(f"{args.trials} trials (seed {args.seed}), all bit-identical to the undisturbed run, which takes {length_s:.1f} s")
    print(f"{tally.starts} starts, {sum(tally.kills.values())} kills ({kills}), {tally.restarts} elastic restarts")
    if not args.sweep:  # whose models number their packs alike
        print(f"{tally.computed} packs computed, none that was in a journal before; {tally.lost} packs in hand lost")
        if tally.lost_s:
            median_s, most_s = statistics.median(tally.lost_s), max(tally.lost_s)
            print(f"a kill lost {median_s:.3f} s of computing in the median, {most_s:.3f} s at most, over all its ranks")
        print(f"a process lost at most {tally.most_lost} pack(s)")
    if tally.gone_s:
        median_s, most_s = statistics.median(tally.gone_s), max(tally.gone_s)
        print(f"all processes were gone {median_s:.1f} s after a kill in the median, {most_s:.1f} s at most")


def run_until_done(args: argparse.Namespace, directory: Path, dice: random.Random, length_s: float, tally: Tally) -> str | None:
    """Start and kill until a start ends by itself. Returns what went wrong, None if nothing did."""
    ranks = 0
    for attempt in range(50):
        done_before = packs_in_journals(directory) if not args.sweep else set()  # whose models number theirs alike
        ranks = dice.choice([count for count in range(1, 5) if count != ranks])
        restarts = 1 if dice.random() < 1 / 3 else 0
        launch = Launch(args, directory, ranks, restarts)
        tally.starts += 1
        moment = time.monotonic() + dice.uniform(0.05, 1.0) * length_s if attempt < MOST_KILLS else float("inf")
        while launch.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)
        killed_at = None
        if launch.poll() is None:
            target = dice.choice(TARGETS)
            while not launch.ranks() and launch.poll() is None:  # the launcher has not started any yet
                time.sleep(0.005)
            killed_at = launch.kill(target, dice)
            tally.kills[target] += killed_at is not None
        code = launch.wait(GONE_S + 60)
        left = launch.wait_until_gone(GONE_S)
        if left:
            return f"processes {left} outlive the launcher\n{launch.log()}"
        if killed_at is not None and not launch.restarted():  # else it has gone on
            tally.gone_s.append(time.monotonic() - killed_at)
        if code is None:
            os.kill(launch.pid, signal.SIGUSR2)
            time.sleep(2)
            return f"a start does not end\n{launch.log()}"
        begun, finished, lost_s, most, again = launch.packs(killed_at)
        twice = set(begun) & done_before | again
        if twice and not args.sweep:
            return f"packs {sorted(twice)} were computed again"
        tally.computed += len(finished)
        tally.restarts += launch.restarted()
        tally.lost += len(begun) - len(finished)
        tally.most_lost = max(tally.most_lost, most)
        if killed_at is not None and begun:
            tally.lost_s.append(lost_s)
        if code == 0:
            return None
        if killed_at is None:
            return f"a start failed by itself\n{launch.log()}"
    return "never done"


class Launch:
    """One start of the command, of its own process id, with a folder for what its ranks note down."""

    def __init__(self, args: argparse.Namespace, directory: Path, ranks: int, restarts: int) -> None:
        self.notes = directory / "notes" / uuid.uuid4().hex
        self.notes.mkdir(parents=True)
        flags = [*FLAGS, "--output_path", str(directory / "run")]
        if args.sweep:
            pattern = str(directory.parent / "train" / "checkpoint-*")
            flags = ["sweep", "--models", pattern, *SWEPT, "--output_path", str(directory / "run")]
        self._code: int | None = None
        if args.torchrun:
            script = [__file__, "--worker", str(self.notes), "--pack_s", str(args.pack_s), *flags]
            shape = ["--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
            with open(self.notes / "log", "wb") as log:
                command = [sys.executable, "-m", "torch.distributed.run", *shape, *script]
                self.pid = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True).pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.setsid()
                log_file = os.open(self.notes / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log_file, 1)
                os.dup2(log_file, 2)
                faulthandler.register(signal.SIGUSR2, log_file)
                run_agent(self.notes, args.pack_s, flags, ranks, restarts)
                code = 0
            os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, limit_s: float) -> int | None:
        deadline = time.monotonic() + limit_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.poll()

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are alive."""
        return [pid for note in self.notes.glob("*.pid") if is_alive(pid := int(note.stem))]

    def kill(self, target: str, dice: random.Random) -> float | None:
        """Returns when it was done; None if nobody was left to be killed."""
        ranks = sorted(self.ranks())
        victims = [self.pid] if target == "torchrun" else ranks if target == "all ranks" else ranks and [dice.choice(ranks)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return time.monotonic() if victims else None

    def wait_until_gone(self, limit_s: float) -> list[int]:
        deadline = time.monotonic() + limit_s
        while (left := self.ranks()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in (signal.SIGUSR2, signal.SIGKILL):  # the first has them say where they are
            for pid in left:
                os.kill(pid, number)
            time.sleep(2 if left else 0)
        return left

    def restarted(self) -> int:
        return len({self._restart(note.stem) for note in self.notes.glob("*.packs")} - {0})

    def packs(self, killed_at: float | None) -> tuple[list[int], list[int], float, int, set[int]]:
        """Packs begun; packs finished; seconds of computing that the others took; most packs that one process lost; packs that
        were begun again behind an elastic restart."""
        begun, finished, lost_s, most = [], [], 0.0, 0
        again: set[int] = set()
        by_restart = sorted(self.notes.glob("*.packs"), key=lambda note: self._restart(note.stem))
        for note in by_restart:
            earlier = {
                int(line.split()[1])
                for other in by_restart
                if self._restart(other.stem) < self._restart(note.stem)
                for line in other.read_text().splitlines()
                if line.startswith("done")
            }
            lines = [line.split() for line in note.read_text().splitlines()]
            open_packs = {int(pack): float(moment) for word, pack, moment in lines if word == "begin"}
            begun += list(open_packs)
            again |= earlier & set(open_packs)
            for word, pack, _ in lines:
                if word == "done":
                    finished.append(int(pack))
                    open_packs.pop(int(pack), None)  # the models of a sweep number theirs alike
            most = max(most, len(open_packs))
            lost_s += sum(max(0.0, killed_at - moment) for moment in open_packs.values()) if killed_at else 0.0
        return begun, finished, lost_s, most, again

    def _restart(self, pid: str) -> int:
        return int(json.loads((self.notes / f"{pid}.pid").read_text())["restart"])

    def log(self) -> str:
        return (self.notes / "log").read_text(errors="replace")[-8000:]


def run_agent(notes: Path, pack_s: float, flags: list[str], ranks: int, restarts: int) -> None:
    """What `torchrun --standalone` does, with ranks that are forked instead of started anew."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, work)(notes, pack_s, flags)


def work(notes: Path, pack_s: float, flags: list[str]) -> None:
    """One rank: `python -m ddp_eval` that notes down its packs and takes `pack_s` longer for each."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    (notes / f"{os.getpid()}.pid").write_text(json.dumps({"restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))}))

    import lm_eval.evaluator

    from ddp_eval.__main__ import main as evaluate
    from ddp_eval.distributed import watchdog
    from ddp_eval.engines.hf import decode
    from ddp_eval.output import directory as run_directory
    from ddp_eval.packs import batches

    lm_eval.evaluator.add_env_info = lambda results: None  # asks pip and lscpu about the machine, which takes a second
    forget = run_directory.RunDirectory.forget_journals

    def copy_and_forget(directory: run_directory.RunDirectory) -> None:
        """What a start throws away, rightly or not, counts as done all the same."""
        for path in directory.journals.glob("*.journal"):
            shutil.copy(path, notes.parent / path.name)
        forget(directory)

    mock.patch.object(run_directory.RunDirectory, "forget_journals", copy_and_forget).start()
    packs = os.open(notes / f"{os.getpid()}.packs", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    append, append_texts, step = journal.Journal.append, journal.Journal.append_texts, watchdog.step
    decode.choose_sizes = lambda engine: batches.BatchLimits(**SIZES)

    def note(word: str, pack: int) -> None:
        os.write(packs, f"{word} {pack} {time.monotonic()}\n".encode())

    def begin(name: str, pack: int | None = None, detail: str = "") -> None:
        step(name, pack, detail)
        if pack is not None:
            note("begin", pack)
            time.sleep(pack_s)

    def finish(own: journal.Journal, pack: int, *values: Any) -> None:
        append(own, pack, *values)
        note("done", pack)

    def finish_texts(own: journal.Journal, unit: int, *values: Any) -> None:
        append_texts(own, unit, *values)
        note("done", unit)

    watchdog.step = begin
    mock.patch.multiple(journal.Journal, append=finish, append_texts=finish_texts).start()
    sys.argv = ["ddp_eval", *flags]
    evaluate()


def packs_in_journals(directory: Path) -> set[int]:
    """Packs that a start must find done: those of all whole records, of journals that are gone too."""
    found: set[int] = set()
    for path in [*(directory / "run" / "journal").glob("*.journal"), *(directory / "notes").glob("*.journal")]:
        data = path.read_bytes()
        header = journal.decode_header(data)
        if header is not None:
            key, _, start = header
            found |= {pack for pack, *_ in journal.decode_records(data, start, key)}
    return found


def any_difference(args: argparse.Namespace, expected: Path, directory: Path) -> str | None:
    if not args.sweep:
        return differences(expected, directory)
    states = {one["state"] for one in json.loads((directory / "run" / "sweep.json").read_text())["models"]}
    if states != {"done"}:
        return f"the sweep ends with models that are {states}"
    names = [f"checkpoint-{number}" for number in range(1, args.sweep + 1)]
    found = ((name, differences(expected, directory, f"run/{name}")) for name in names)
    return next((f"{name}: {difference}" for name, difference in found if difference), None)


def differences(expected: Path, directory: Path, run: str = "run") -> str | None:
    for name in ("scores.parquet", "texts.parquet"):
        if (expected / run / name).read_bytes() != (directory / run / name).read_bytes():
            return f"{name} differs"
    if results_but_times(expected / run) != results_but_times(directory / run):
        return "results.json differs"
    return None


def results_but_times(directory: Path) -> dict:
    found = json.loads((directory / "results.json").read_text())
    del found["date"], found["total_evaluation_time_seconds"], found["ddp_eval"]["phases_s"]
    del found["ddp_eval"]["lm_eval_files"]["date"]
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


if __name__ == "__main__":
    sys.exit(main())
