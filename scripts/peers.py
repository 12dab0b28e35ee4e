"""The commands that bench_peers.py runs: ddp_eval's and its peers', how each is started and what is read of it.

What a command comes to: "wall_s" and its parts (SPANS), in seconds; "acc", the accuracy that it reports; "answers", the
log-probability in nats of every (task, document, choice).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import commands  # beside this file
from bench_tokenization import collect_requests
from run_command import Finished, run_command, usable_cores

HERE = Path(__file__).resolve().parent
SPANS = ("start_s", "prompts_s", "scoring_s", "end_s")

Answers = dict[tuple[str, int, int], float]


@dataclasses.dataclass(frozen=True)
class Peer:
    """environment: its name for peer_environments.py, "" for this Python; command: what runs; batch_size: "best", "auto" or "".

    several_contexts: whether it takes documents whose choices stand behind different contexts.
    """

    environment: str
    command: Callable[[Job, str, float, str], dict[str, Any]]
    batch_size: str = ""
    several_contexts: bool = True


@dataclasses.dataclass(frozen=True)
class Job:
    """One task in one dtype. rows: where lighteval's rows lie; shots: few-shot examples, None for the task's own number."""

    args: argparse.Namespace
    task: str
    dtype: str
    rows: Path
    shots: int | None = None

    def flags(self, limit: float) -> list[str]:
        """What ddp_eval and lm_eval are both given."""
        return commands.common_flags([self.task], limit, self.args, self.shots)


def run_ddp_eval(job: Job, python: str, limit: float, batch_size: str, engine: str = "hf") -> dict[str, Any]:
    args = job.args
    with tempfile.TemporaryDirectory() as scratch:
        model_args = model_args_of(job, engine)
        more = ["--model", "vllm"] if engine == "vllm" else ["--device", "cpu"] if args.cpu else []
        flags = ["--model_args", model_args, *job.flags(limit), *more]
        ran = run(args, [python, "-m", "ddp_eval", *flags, "--output_path", f"{scratch}/run"])
        results = json.loads(Path(scratch, "run", "results.json").read_text())
        answers, tokens = read_scores(Path(scratch, "run"))
    phases = results["ddp_eval"]["phases_s"]
    prompts_s, end_s = phases.get("tasks", 0.0), sum(phases.get(phase, 0.0) for phase in ("score", "bootstrap", "write"))
    scoring_s = sum(phases.get(phase, 0.0) for phase in commands.SCORING)
    spans = ran.wall_s - prompts_s - scoring_s - end_s, prompts_s, scoring_s, end_s
    return finish(ran, spans, answers, results["results"][job.task], "acc,none") | {"tokens": tokens}


def model_args_of(job: Job, engine: str) -> str:
    """The same for ddp_eval and for lm_eval."""
    more = f",{job.args.vllm_args}" if engine == "vllm" and job.args.vllm_args else ""
    return f"pretrained={job.args.model},dtype={job.dtype}{more}"


def run_lm_eval(job: Job, python: str, limit: float, batch_size: str, model: str = "hf") -> dict[str, Any]:
    args = job.args
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--device", commands.find_device(args)] if model == "hf" else []
        flags = [
            *("run", "--model", model, "--model_args", model_args_of(job, model)),
            *job.flags(limit),
            *("--batch_size", batch_size or "auto", *more, "--output_path", f"{scratch}/run"),
        ]
        ran, notes = run_noted(args, python, f"lm_eval-{model}", flags, scratch)
        (file,) = Path(scratch, "run").rglob("results_*.json")
        metrics = json.loads(file.read_text())["results"][job.task]
    return finish(ran, spans_of(ran, notes), answers_of(notes), metrics, "acc,none")


def run_lighteval(job: Job, python: str, limit: float, batch_size: str) -> dict[str, Any]:
    args = job.args
    with tempfile.TemporaryDirectory() as scratch:
        # Its cache answers what it has answered before: each run has its own.
        model_args = f"model_name={args.model},dtype={job.dtype},batch_size={batch_size},cache_dir={scratch}/cache"
        where = ["--custom-tasks", str(HERE / "lighteval_rows.py"), "--output-dir", f"{scratch}/run"]
        flags = ["accelerate", model_args, f"{job.task}|0", *where]
        rows = job.rows / f"{limit:g}"
        ran, notes = run_noted(args, python, "lighteval", flags, scratch, PEER_ROWS=str(rows))
        (file,) = Path(scratch, "run").rglob("results_*.json")
        metrics = json.loads(file.read_text())["results"][f"{job.task}|0"]
    return finish(ran, spans_of(ran, notes), answers_of(notes), metrics, "acc")


PEERS = {
    "ddp_eval": Peer("", run_ddp_eval),
    "ddp_eval, vLLM": Peer("vllm", functools.partial(run_ddp_eval, engine="vllm")),
    "lm_eval hf": Peer("lm_eval", run_lm_eval, "best"),
    "lm_eval hf, auto": Peer("lm_eval", run_lm_eval, "auto"),
    "lm_eval vllm": Peer("vllm", functools.partial(run_lm_eval, model="vllm")),
    "lighteval": Peer("lighteval", run_lighteval, "best", several_contexts=False),
}


def run_noted(
    args: argparse.Namespace, python: str, peer: str, flags: Sequence[str], scratch: str, **more: str
) -> tuple[Finished, dict[str, Any]]:
    notes = Path(scratch, "notes.json")
    ran = run(args, [python, str(HERE / "noted_command.py"), str(notes), peer, *flags], **more)
    return ran, json.loads(notes.read_text())


def run(args: argparse.Namespace, argv: Sequence[str], **more: str) -> Finished:
    """Run a command with no more memory than --memory_gb, which "auto" batch sizes would otherwise take from the machine."""
    before, limits = dict(os.environ), resource.getrlimit(resource.RLIMIT_DATA)
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **more})
    if args.memory_gb and args.cpu:
        resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory_gb * 2**30), limits[1]))
    try:
        return run_command(argv, args.threads, usable_cores()[: args.threads])
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        os.environ.clear()
        os.environ.update(before)


def finish(ran: Finished, spans: Sequence[float], answers: Answers, metrics: dict[str, Any], accuracy: str) -> dict[str, Any]:
    return {"wall_s": ran.wall_s, **dict(zip(SPANS, spans, strict=True)), "acc": metrics[accuracy], "answers": answers}


def spans_of(ran: Finished, notes: dict[str, Any]) -> tuple[float, float, float, float]:
    """Seconds of start-up, prompts, scoring and end by the notes of noted_command.py; they add up to the command's."""
    scoring = [(start, stop) for what, start, stop in notes["spans"] if what == "scoring"]
    first, last = min(start for start, _ in scoring), max(stop for _, stop in scoring)
    prompts_s = sum(stop - start for what, start, stop in notes["spans"] if what == "prompts")
    return first - ran.began_unix_s - prompts_s, prompts_s, last - first, ran.began_unix_s + ran.wall_s - last


def answers_of(notes: dict[str, Any]) -> Answers:
    return {(task, document, choice): value for task, document, choice, value in notes["answers"]}


def read_scores(directory: Path) -> tuple[Answers, dict[tuple[str, int, int], int]]:
    """Log-probabilities of a run of ddp_eval, and how many tokens each is the sum of."""
    from ddp_eval.output import tables

    scores = tables.read_scores(directory / tables.SCORES)
    keys = list(zip(scores.task, map(int, scores.doc_id), map(int, scores.idx), strict=True))
    sums, tokens = map(float, scores.loglikelihood), map(int, scores.num_tokens)
    return dict(zip(keys, sums, strict=True)), dict(zip(keys, tokens, strict=True))


def write_rows(job: Job, limits: Sequence[float]) -> bool:
    """The task's requests as lighteval's rows, job.rows/LIMIT/TASK/validation.jsonl. False where a document is no such row."""
    task, args = job.task, job.args
    for limit in limits:
        documents: dict[int, list[Any]] = {}
        for request in collect_requests([task], args.include_path, limit, job.shots)["loglikelihood"]:
            documents.setdefault(request.doc_id, []).append(request)
        lines = []
        for requests in documents.values():
            requests.sort(key=lambda request: request.idx)
            contexts = {request.args[0] for request in requests}
            if len(contexts) > 1 or len(requests) < 2:
                return False
            choices, gold = [request.args[1] for request in requests], gold_of(task, requests[0].doc, args)
            lines.append(json.dumps({"query": contexts.pop(), "choices": choices, "gold": gold}))
        folder = job.rows / f"{limit:g}" / task
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return True


@functools.cache
def load_task(task: str, include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=not include_path).load([task])["tasks"][task]


def gold_of(task: str, document: dict[str, Any], args: argparse.Namespace) -> int:
    """The index of the right choice."""
    loaded = load_task(task, args.include_path)
    gold = loaded.doc_to_target(document)
    return gold if isinstance(gold, int) else list(loaded.doc_to_choice(document)).index(gold)
