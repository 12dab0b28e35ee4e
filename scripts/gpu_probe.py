#!/usr/bin/env python3
"""Where a pack's time goes on a device: compiling, launching, kernels.

    python scripts/gpu_probe.py --model DIR --dtype bfloat16 --out benchmarks/NAME

DIR has a config; weights are drawn on the device. The requests are random tokens in the shape of MMLU's: questions with four
short choices behind a long prefix that they share, cut into packs of several lengths.

- Compiling: seconds of each pack's first forward over those of its second, torch.compile's own count of graphs and seconds, and
  how many packs compiled anew. What a process's first forward loads, and the engine's own checks, are behind it by then.
- Host time: seconds until a launch returns, beside those until its results are there. Nearer to 1, the device waits for the host.
- Kernels: those that take most of one pack's time, by the profiler.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

from sides import describe_conditions, format_conditions, format_table, keep  # beside this file, and lets it find the package

KERNELS = 12
SHAPES = {"cuda": (600, 60, 120), "cpu": (40, 6, 12)}  # tokens of a prefix, questions behind it, tokens of a question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory with a config")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--repeats", type=int, default=5, help="forwards of each pack once it is compiled (default 5)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--out", help="write PATH.md and PATH.json")
    args = parser.parse_args()
    import torch

    from ddp_eval.engines.hf.engine import HFEngine

    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    args.threads = torch.get_num_threads()
    engine = HFEngine(draw_model(args, device), device)
    packs = make_packs(engine)
    warm_up(engine)
    timed: list[dict[str, Any]] = []
    report = {
        "conditions": describe_conditions(args, engine.model, device),
        "attention": engine.tree_attention,
        "packs": timed,
    }
    for pack in packs:
        timed.append(time_pack(engine, pack, args.repeats))
        keep(report, format_report, args.out)
    report["kernels"] = find_kernels(engine, packs[-1])
    keep(report, format_report, args.out)
    print(format_report(report))


def draw_model(args: argparse.Namespace, device: Any) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(args.model)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()


def make_packs(engine: Any) -> list[Any]:
    """Packs of a quarter, a half and the whole of the questions, then of lengths a little off: do they compile anew?"""
    import numpy as np

    generator = np.random.default_rng(0)
    prefix_tokens, questions, question_tokens = SHAPES[engine.device.type]

    def draw(count: int) -> list[int]:
        return generator.integers(2, engine.vocab_size, count).tolist()

    packs = []
    prefix = draw(prefix_tokens)
    for count in (questions // 4 or 1, questions // 2, questions, questions - 1, questions - 3):
        bodies = [prefix + draw(question_tokens + index % 7) for index in range(count)]
        packs.append(make_pack([body + draw(1) for body in bodies for _ in range(4)]))
    return packs


def make_pack(sequences: list[list[int]]) -> Any:
    """All of them in one pack, the last token of each read."""
    from ddp_eval.packs.cut import plan_one_tree
    from ddp_eval.packs.plan import build_pack
    from ddp_eval.packs.requests import requests_from_lists

    plan, _ = plan_one_tree(requests_from_lists(sequences, [1] * len(sequences)))
    return build_pack(plan, 0)


def warm_up(engine: Any) -> None:
    """One request by itself, which shares nothing and so needs no kernel of its own; the engine checks the model before it."""
    forward_s(engine, make_pack([[2 + index % 7 for index in range(16)]]))


def time_pack(engine: Any, pack: Any, repeats: int) -> dict[str, Any]:
    """Seconds of the first forward, and medians of the later ones; graphs and seconds that torch.compile has added."""
    before = compiled()
    first_s = forward_s(engine, pack)[1]
    later = [forward_s(engine, pack) for _ in range(repeats)]
    after = compiled()
    whole_s = statistics.median(whole for _, whole in later)
    return {
        "tokens": len(pack),
        "input_shape": list(engine.input_shape(pack)),
        "first_s": first_s,
        "whole_s": whole_s,
        "launch_s": statistics.median(launch for launch, _ in later),
        "tokens_per_s": len(pack) / whole_s,
        "graphs": after["graphs"] - before["graphs"],
        "compile_s": after["seconds"] - before["seconds"],
    }


def forward_s(engine: Any, pack: Any) -> tuple[float, float]:
    """Seconds until a launch returns, and until its results are on the host, with nothing else under way."""
    started = time.perf_counter()
    launched = engine.launch(pack)
    launch_s = time.perf_counter() - started
    engine.collect(launched)
    return launch_s, time.perf_counter() - started


def compiled() -> dict[str, float]:
    """What torch.compile has done in this process so far: graphs, and its own count of seconds, NaN where it keeps none."""
    from torch._dynamo import utils

    spent = getattr(utils, "compilation_time_metrics", {})
    unknown = 0.0 if hasattr(utils, "compilation_time_metrics") and not spent else math.nan
    outer = next((name for name in ("_compile.compile_inner", "_compile") if name in spent), None)
    return {"graphs": utils.counters["stats"]["unique_graphs"], "seconds": sum(spent[outer]) if outer else unknown}


def find_kernels(engine: Any, pack: Any) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) that take most of a forward, with their share of all of its kernels' time."""
    import torch

    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, *([activity.CUDA] if engine.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        forward_s(engine, pack)
    on_device = engine.device.type == "cuda"

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    # Annotations span kernels that are counted by themselves.
    events = [
        event
        for event in profile.key_averages()
        if not on_device or (str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False))
    ]
    whole = sum(map(microseconds, events)) or 1.0
    most = sorted(events, key=microseconds, reverse=True)[:KERNELS]
    return [{"name": e.key, "calls": e.count, "share": microseconds(e) / whole, "us": microseconds(e)} for e in most]


def format_report(report: dict[str, Any]) -> str:
    heads = ["tokens", "fed", "first forward s", "later s", "launch s", "host's share", "tokens/s", "graphs", "compile s"]
    rows = [
        [f"{p['tokens']:,}", "x".join(map(str, p["input_shape"])), f"{p['first_s']:.2f}", f"{p['whole_s']:.4f}",
         f"{p['launch_s']:.4f}", f"{p['launch_s'] / p['whole_s']:.0%}", f"{p['tokens_per_s']:,.0f}", f"{p['graphs']:.0f}",
         "-" if math.isnan(p["compile_s"]) else f"{p['compile_s']:.2f}"]
        for p in report["packs"]
    ]  # fmt: skip
    lines = [*format_conditions(report["conditions"]), f"Attention of packs: {report['attention']}.", ""]
    lines += format_table(heads, rows)
    if "kernels" in report:
        kernels = [
            [f"`{k['name'][:90]}`", str(k["calls"]), f"{k['us'] / 1e3:.2f}", f"{k['share']:.1%}"] for k in report["kernels"]
        ]
        lines += ["", "Kernels of one forward of the last pack:", "", *format_table(["kernel", "calls", "ms", "share"], kernels)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
