"""How far the same evaluation drifts from one way of computing it to another: the numeric ladder, measured.

    python scripts/drift.py                                  # the demo model on the demo tasks
    python scripts/drift.py --model PATH --limit 100 --out benchmarks/drift_NAME

Each row runs one setting and compares it, request by request, with a reference: every input in a forward of its own, in
float32. Half-precision rows start from a copy of the checkpoint in bfloat16, and their reference has the same rounded weights;
how much that rounding changes is a row of its own. Writes OUT.json and OUT.md. The models are small enough for a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from ddp_eval.analysis.difference import compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.config import Config
from ddp_eval.distributed.world import join_group
from ddp_eval.engines.hf.checkpoint import resolve_pretrained
from ddp_eval.output import versions, write
from ddp_eval.run import runner
from ddp_eval.system import machine

# name -> checkpoint, settings, what it is compared with
ROWS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "float32, alone": ("float32", {"numerics": "alone"}, None),
    "float32, packs": ("float32", {}, "float32, alone"),
    "float32, packs of 1024 tokens": ("float32", {"max_pack_tokens": 1024}, "float32, alone"),
    "float32, padded rows": ("float32", {"packing": False}, "float32, alone"),
    "float32, packs on 3 ranks": ("float32", {"ranks": 3}, "float32, packs"),
    "bfloat16 weights in float32, packs (--numerics fp32)": ("bfloat16", {"numerics": "fp32"}, "float32, packs"),
    "bfloat16, alone": ("bfloat16", {"numerics": "alone"}, "bfloat16 weights in float32, packs (--numerics fp32)"),
    "bfloat16, packs": ("bfloat16", {}, "bfloat16 weights in float32, packs (--numerics fp32)"),
    "bfloat16, packs against alone": ("bfloat16", {"same_as": "bfloat16, packs"}, "bfloat16, alone"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint (default: the demo model)")
    parser.add_argument("--tasks", default="demo", help="tasks, with commas between (default: the demo tasks)")
    parser.add_argument("--include_path", help="one more directory of task files")
    parser.add_argument("--limit", type=int, default=50, help="documents of each task")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/drift_demo"), help="where to write, without an ending")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(options, Path(scratch))
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(format_record(record))
    print(format_record(record))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    world = join_group("cpu")
    checkpoints = {"float32": options.model, "bfloat16": str(save_in_half(options.model, scratch / "half"))}
    places: dict[str, Path] = {}
    rows = []
    for name, (checkpoint, settings, reference) in ROWS.items():
        places[name] = places.get(settings.get("same_as", ""), scratch / f"run{len(places)}")
        if not places[name].exists():
            run(options, checkpoints[checkpoint], settings, places[name], world)
        row: dict[str, Any] = {"setting": name, "compared_with": reference}
        row["computed_tokens"] = json.loads((places[name] / write.MANIFEST).read_text())["computed_tokens"]
        ranks = json.loads((places[name] / write.TELEMETRY).read_text())["ranks"]
        row["forward_s"] = max(rank["phases_s"]["forward"] for rank in ranks)
        if reference:
            overall = compare_runs(read_run(places[reference]), read_run(places[name]))["overall"]
            row |= {key: overall[key] for key in ("requests", "requests_differing", "answers", "answers_flipped", "near_ties")}
            row |= {"greedy_flipped": overall["greedy_flipped"], "delta_nats": overall["delta_nats"]}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "model": Path(options.model).name,
        "tasks": options.tasks,
        "limit": options.limit,
        "packages": versions.describe_packages(),
        "hardware": machine.describe_hardware(),
        "rows": rows,
    }


def run(options: argparse.Namespace, checkpoint: str, settings: dict[str, Any], place: Path, world: Any) -> None:
    """One evaluation: in this process, or under torchrun where a row wants several ranks."""
    if "ranks" in settings:
        flags = ["--model_args", f"pretrained={checkpoint}", "--tasks", options.tasks, "--limit", str(options.limit)]
        flags += ["--device", "cpu", "--output_path", str(place)]
        flags += ["--include_path", options.include_path] if options.include_path else []
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings['ranks']}", "-m", "ddp_eval"]
        subprocess.run([sys.executable, *launcher, *flags], check=True, stdout=subprocess.DEVNULL)
        return
    config = Config(
        model_args={"pretrained": checkpoint},
        tasks=options.tasks.split(","),
        limit=options.limit,
        include_path=options.include_path,
        output_path=str(place),
        bootstrap_iters=0,
        **settings,
    )
    runner.run(config, world)


def save_in_half(model: str, directory: Path) -> Path:
    """A copy of the checkpoint with weights in bfloat16."""
    name = resolve_pretrained({"pretrained": model})
    transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(name).save_pretrained(directory)
    return directory


def format_record(record: dict[str, Any]) -> str:
    hardware, packages = record["hardware"], record["packages"]
    lines = [
        f"Model {record['model']}, tasks {record['tasks']}, {record['limit']} documents each; {hardware['cpu']}, one thread, "
        f"torch {packages['torch']}, transformers {packages['transformers']}, {record['date']}; `{record['command']}`",
        "",
        "| setting | compared with | tokens computed | forward, s | requests changed | max nats | mean | p99 | answers flipped "
        "| near ties |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        cost = [f"{row['computed_tokens']:,}", f"{row['forward_s']:.1f}"]
        if row["compared_with"]:
            nats = [f"{row['delta_nats'][key]:.2g}" for key in ("max", "mean", "p99")]
            differ = f"{row['requests_differing']:,} of {row['requests']:,}"
            flips = f"{row['answers_flipped']:,} of {row['answers']:,}"
            cells = [row["compared_with"], *cost, differ, *nats, flips, f"{row['near_ties']:,}"]
        else:
            cells = ["(reference)", *cost, *[""] * 6]
        lines.append(f"| {' | '.join([row['setting'], *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
