"""`python -m ddp_eval plan`: before a machine is requested, what a model needs and which layout would be the fastest.

Reads the model's config alone; with --tasks also builds the prompts and cuts them into packs, to count the work.
"""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any, NamedTuple

import torch

from ddp_eval.cli import flags as cli
from ddp_eval.cli.subcommand import SubcommandParser
from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.layout import AUTO
from ddp_eval.placement.choose import TYPICAL_WORKLOAD, Candidate, Ranks, evaluate_layouts, recommend, why_not
from ddp_eval.placement.memory import measure_model, usable_bytes
from ddp_eval.placement.speed import CUDA_SPEEDS, Amount
from ddp_eval.system.text import GIB, count_packs, format_bytes

GPU = torch.device("cuda")  # what is planned for, whatever this machine has
_ABOUT = """\
How much memory a model needs, what fits, what would be the fastest, and the command to copy. Takes the flags of a
run, and these of the machine. Exit code 3 when nothing fits."""
NOTHING_FITS = 3  # the exit code, beside 2 for a UserError and 1 for a defect


def main(argv: list[str]) -> int:
    """Print the plan. Returns the exit code: 0, or 3 when nothing fits. Raises UserError for what cannot be meant."""
    options, rest, own = _read(argv)
    has_tasks = any(word.split("=")[0] in ("--tasks", "-t") for word in rest)
    config, _ = cli.parse(rest if has_tasks else [*rest, "--tasks", "demo"], own)
    words = rest if has_tasks else [*rest, "--tasks", "TASKS"]
    text, fits = make_report(config, words, options.gpus, options.nodes, parse_memory(options.gpu_memory), has_tasks)
    print(text)
    return 0 if fits else NOTHING_FITS


def _read(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The values of its own flags, the words that are left, and the names of its own."""
    parser = SubcommandParser("plan", _ABOUT)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node (default: 8)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    parser.add_argument("--gpu_memory", "--gpu-memory", default="80GiB", help="memory of a GPU (default: 80GiB)")
    options, rest = parser.parse_known_args(argv)
    for name in ("gpus", "nodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(options, name)}")
    return options, rest, parser.flags


def parse_memory(text: str) -> int:
    """Bytes of "80GiB", "24GB" or "80G" (which is GiB). Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"--gpu_memory must be a number with GiB, GB or MiB, such as 80GiB, got {text}")
    units = {"gib": GIB, "gb": 10**9, "g": GIB, "mib": 2**20, "mb": 10**6}
    return int(float(match[1]) * units[match[2].lower()])


def make_report(config: Config, words: list[str], gpus: int, nodes: int, gpu_memory: int, count_work: bool) -> tuple[str, bool]:
    """The whole text, and whether there is a layout that fits.

    words: the flags of the run, for the command to copy. count_work: build the prompts of config.tasks and cut them, else
    assume a typical amount.
    """
    from ddp_eval.engines.hf import checkpoint, limits

    model_config = checkpoint.load_config(config.loader_args)
    if config.model != "hf":
        raise UserError(f"plan is for --model hf: {config.model} lays a model out itself, by tensor_parallel_size")
    limits.check_window(config.loader_args, model_config)
    if checkpoint.is_seq2seq(config.model_args, model_config):
        raise UserError(f"plan is for decoder-only models, and {config.model_args['pretrained']} is an encoder-decoder")
    whole = checkpoint.whole_model(config.loader_args, model_config)
    sizes = measure_model(whole, GPU)
    max_tokens = config.max_pack_tokens or sizes.largest_pack
    counted = _count_work(config, model_config, whole) if count_work else Work(TYPICAL_WORKLOAD, None, None)
    amount, generating = counted.amount, counted.generating
    ranks = Ranks(gpus * nodes, gpus, usable_bytes(gpu_memory), max_tokens, CUDA_SPEEDS, GPU)
    candidates = [
        Candidate(one.layout, impossible=why) if (why := why_not(config, model_config, one.layout, generating)) else one
        for one in evaluate_layouts(whole, ranks, amount)
    ]
    best = recommend(candidates)
    dtype = str(next(whole.parameters()).dtype).removeprefix("torch.")
    work = "counted" if count_work else "assumed: give --tasks to count yours"
    speeds = CUDA_SPEEDS
    slower = ", in half precision: float32 takes several times as long" if dtype == "float32" else ""
    lines = [
        f"{type(whole).__name__}: {whole.num_parameters():,} parameters in {dtype}, {sizes.weights:,} bytes of weights "
        f"({format_bytes(sizes.weights)})",
        f"{nodes} x {gpus} GPUs of {format_bytes(gpu_memory)}, {format_bytes(usable_bytes(gpu_memory))} of each usable "
        f"(about 1 GiB is for CUDA's context, 5% of the rest for the allocator); "
        f"packs of up to {max_tokens:,} tokens",
        f"work: {amount.tokens:,} tokens in {count_packs(amount.packs)} ({work})",
        *([f"scoring: {counted.mode}"] if counted.mode else []),
        f"seconds at {speeds.flops / 1e12:.0f} TFLOP/s a GPU{slower}; {speeds.link / 1e9:.0f} GB/s within a node, "
        f"{speeds.node_link / 1e9:.0f} GB/s between nodes, {speeds.load / 1e9:.0f} GB/s to load; for comparison, not a promise",
        "",
        *_table(candidates, ranks.world_size),
        "",
        *_advice(words, best, gpus, nodes),
        *_answer(config.layout, str(best.layout)),
    ]
    return "\n".join(lines), best.fits


class Work(NamedTuple):
    """amount: of the run. generating: the first task that generates text, None if none does. mode: how requests will be scored,
    if the model passes its self-check, and why; None where that is not known."""

    amount: Amount
    generating: str | None
    mode: str | None


def _count_work(config: Config, model_config: Any, whole: Any) -> Work:
    """Build and cut the requests of config.tasks, as a run would; no weight is needed. Answers count as long as they may be."""
    from ddp_eval import demo
    from ddp_eval.engines.hf import checkpoint, limits
    from ddp_eval.engines.hf import engine as hf
    from ddp_eval.packs.batches import plan_batches
    from ddp_eval.run.planning import cut_without_trial
    from ddp_eval.tasks import harness
    from ddp_eval.tasks.request_types import Answers, Asked
    from ddp_eval.tasks.tokenization import Encoder
    from ddp_eval.telemetry.meter import Phases

    class Counted(Exception):
        """Carries the requests out of lm_eval, which would go on to score."""

    class Unloaded(hf.HFEngine):
        splits_head = True  # not to be asked of a model without weights

    engine = Unloaded(whole, GPU)

    def stop(asked: Asked) -> Answers:
        limits.check_requests(asked.requests, asked.prompts, engine, config.model_args)
        raise Counted(asked.requests, asked.prompts)

    tokenizer = checkpoint.load_tokenizer(config.loader_args)
    max_length = harness.max_length_of(config.model_args, checkpoint.window_config(model_config), tokenizer)
    encoder = Encoder(tokenizer, max_length, config.model_args.get("add_bos_token"), config.model_args.get("prefix_token_id"))
    try:
        harness.evaluate_tasks(config, encoder, model_config, stop, Phases(), [demo.TASKS_PATH])
    except Counted as counted:
        requests, prompts = counted.args

    max_tokens = config.max_pack_tokens or engine.max_tokens()
    plan, mode = cut_without_trial(engine, requests, config.packing, max_tokens)
    texts, _ = plan_batches(prompts, engine.generation_sizes(), [False] * len(prompts.settings))
    answers = int(texts.limits.sum())
    units = plan.num_packs + texts.num_batches
    work = Amount(len(plan.tokens) + len(texts.tokens) + answers, len(plan.targets) + answers, units)
    return Work(work, prompts.tasks[0] if len(prompts) else None, mode if len(requests) else None)


def _table(candidates: list[Candidate], world_size: int) -> list[str]:
    rows = [("layout", "copies", "weights", "pack", "a GPU has", "load", "run", "idle", "why")]
    for one in candidates:
        copies = str(one.layout.replicas(world_size))
        if one.impossible is not None:
            rows.append((str(one.layout), copies, "", "", "impossible", "", "", "", one.impossible))
            continue
        assert one.prediction is not None
        spare = f"{format_bytes(abs(one.spare))} {'left' if one.fits else 'too few'}"
        rows.append(
            (
                str(one.layout), copies, format_bytes(one.weights), format_bytes(one.room), spare,
                f"{one.prediction.load_s:.0f} s", f"{one.prediction.run_s:.1f} s", f"{one.prediction.idle_share:.0%}",
                one.prediction.why,
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]


def _advice(words: list[str], best: Candidate, gpus: int, nodes: int) -> list[str]:
    if not best.fits:
        missing = format_bytes(-best.spare)
        return [f"nothing fits: {best.layout} comes closest, {missing} short per GPU; take more GPUs, or larger ones"]
    flags = [*_without_layout(words), "--layout", str(best.layout)]
    lines = [f"recommended: {best.layout}"]
    if nodes == 1:
        lines.append(f"torchrun --standalone --nproc_per_node={gpus} -m ddp_eval {shlex.join(flags)}")
    else:
        rendezvous = "--rdzv_backend=c10d --rdzv_endpoint=HEAD:29500"
        launcher = f"torchrun --nnodes={nodes} --nproc_per_node={gpus} {rendezvous}"
        lines.append(f"on each node, with HEAD the name of one: {launcher} -m ddp_eval {shlex.join(flags)}")
    if not any(word.replace("-", "_").startswith(("__output_path", "_o")) for word in words):
        flags += ["--output_path", "DIR"]
    return [*lines, f"sbatch --nodes={nodes} --gpus-per-node={gpus} slurm/eval.sh {shlex.join(flags)}"]


def _answer(asked: str, best: str) -> list[str]:
    """To a --layout that the user named: it changes nothing here."""
    if asked in (AUTO, best):
        return []
    return [f"--layout {asked} is ignored: plan compares all layouts, and the command names the fastest that fits"]


def _without_layout(words: list[str]) -> list[str]:
    """The user's flags but for a layout, which is ours to name."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word.partition("=")[0] != "--layout":
            kept.append(word)
        skip = word == "--layout"
    return kept
