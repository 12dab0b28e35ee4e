"""How a run went and where its time went: samples of utilisation, and telemetry.json."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddp_eval.distributed.collectives import World
from ddp_eval.packs.plan import Plan
from ddp_eval.placement.memory import format_bytes

# Of one sample: seconds since the rank's start; cores in use; resident bytes; and of the GPU: share busy, bytes used, watts.
COLUMNS = ("at_s", "cpu_cores", "rss_bytes", "gpu_busy", "gpu_memory_bytes", "gpu_power_w")
_MOST_SAMPLES = 600  # a longer run is sampled less often
_LEAST_WEIGHTS_BYTES = 2**30  # of a model whose loading is a matter of the disk

# Dense half-precision products, operations per second, from NVIDIA's data sheets (half of what they promise with sparsity). The
# first counts whose words are all among those of the device's name.
_KNOWN_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 9.9e14),
    ("H200 NVL", 8.355e14),
    ("H200", 9.894e14),
    ("H100 NVL", 8.355e14),
    ("H100 PCIe", 7.56e14),
    ("H100", 9.894e14),
    ("A100", 3.12e14),
    ("L40S", 3.6205e14),
    ("L40", 1.8105e14),
    ("L4", 1.21e14),
    ("V100 PCIE", 1.12e14),
    ("V100", 1.25e14),
)


class Sampler:
    """A thread that notes processor, memory and GPU of this rank in `world.meter` while its block runs.

    GPU figures come from NVML where nvidia-ml-py is installed; those that the device does not tell are None.
    """

    def __init__(self, world: World, interval_s: float = 0.5) -> None:
        self._meter = world.meter
        self._interval_s = interval_s
        self._read_gpu = _gpu_reader(world)
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        then, used = time.perf_counter(), time.process_time()
        while not self._finished.wait(self._interval_s):
            started = time.thread_time()
            now, using = time.perf_counter(), time.process_time()
            cores = (using - used) / max(now - then, 1e-9)
            then, used = now, using
            samples = self._meter.samples
            samples.append([now - self._meter.phases.began, cores, resident_bytes(), *self._read_gpu()])
            if len(samples) > _MOST_SAMPLES:
                del samples[::2]
                self._interval_s *= 2
            self._meter.sampling_s += time.thread_time() - started


def resident_bytes() -> int:
    """Memory that this process holds; where the system does not tell, the most it ever held."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gpu_reader(world: World) -> Callable[[], list[float | None]]:
    """() -> [share busy, bytes used, watts] of this rank's GPU."""
    nothing: list[float | None] = [None, None, None]
    if world.device.type != "cuda":
        return lambda: nothing
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(world.device).uuid}")
    except Exception:  # no nvidia-ml-py, no driver's library, or a device that NVML has no handle for
        return lambda: nothing
    readings = (
        lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        lambda: float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    )

    def read() -> list[float | None]:
        row: list[float | None] = []
        for reading in readings:
            try:
                row.append(reading())
            except pynvml.NVMLError:
                row.append(None)
        return row

    return read


def fed_tokens(plan: Plan, pad: Callable[[np.ndarray], np.ndarray] = np.asarray) -> int:
    """Tokens that all forwards of a plan take, padding included. pad: from packs' tokens to the lengths that they are fed in."""
    if not plan.num_packs:
        return 0
    if not plan.rows:
        return int(pad(np.diff(plan.token_starts)).sum())
    roots = np.flatnonzero(plan.shared == 0)
    row_lengths = np.maximum.reduceat(plan.lengths, roots).astype(np.int64)
    first_rows = np.searchsorted(roots, plan.item_starts[:-1])
    rows = np.diff([*first_rows, len(roots)])
    return int((rows * np.maximum.reduceat(row_lengths, first_rows)).sum())


def known_peak(name: str) -> float | None:
    """Of a GPU by its name, in half precision; None where it is not known, or only a slice of the GPU is there (MIG)."""
    words = set(name.replace("-", " ").split())
    return None if "MIG" in words else next((peak for part, peak in _KNOWN_PEAKS if words.issuperset(part.split())), None)


def peak_flops(device: Any, dtype: Any) -> dict[str, Any] | None:
    """Operations per second of a matrix product: known for some GPUs in half precision, measured on a CPU; else None."""
    import torch

    from ddp_eval.engines.ops import onednn_linear

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_peak(name)
        return {"per_s": known, "from": f"data sheet of {name}"} if known and dtype != torch.float32 else None
    matrix = torch.ones(768, 768, dtype=dtype)
    best_s = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        onednn_linear.matrix_product(matrix, matrix)
        best_s = min(best_s, time.perf_counter() - started)
    return {"per_s": 2 * 768**3 / best_s, "from": f"a 768 x 768 product in {dtype}, {torch.get_num_threads()} threads"}


def summarize(reports: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """telemetry.json: every rank's report and what follows from all of them.

    facts: "request_tokens", "computed_tokens" and "fed_tokens" of the packs; "left_request_tokens" and "left_tokens" of those
        that this start ran; "asked_tokens" and "generated_tokens" of the texts that it ran; "flops_per_token",
        "flops_per_pair", "flops_per_read" of a rank; "weights_bytes" of the whole model; "ranks_per_replica", which all
        count the same; "peak" (see `peak_flops`).

    Of texts, no plan knows what will be computed: it is counted, and they are in the figures only where this start ran them.

    The share of peak is that of the operations that a rank's packs need: of the layers for each token, of attention for each
    visible pair, of the head for each read. scripts/bench.py counts alike, but a prefix that several packs repeat only once, and
    not what the last layer leaves out where it is not read. A rank that generates has none: nobody counts those of texts.
    """
    units = {"computed_tokens": "flops_per_token", "visible_pairs": "flops_per_pair", "reads": "flops_per_read"}
    texts = sum(report["counts"].get("text_tokens", 0) for report in reports) / facts["ranks_per_replica"]
    generated, peak = facts["generated_tokens"], facts.get("peak")
    texts_asked = facts["asked_tokens"] + generated
    forward_s = [report["phases_s"].get("forward", 0.0) for report in reports]
    busy_s, mean_s = max(forward_s), sum(forward_s) / len(forward_s)
    done_tokens = [report["counts"].get("computed_tokens", 0) for report in reports]
    done_flops = [sum(report["counts"].get(what, 0) * facts[unit] for what, unit in units.items()) for report in reports]
    wall_s = max(report["wall_s"] for report in reports)
    computed = facts["computed_tokens"] + texts
    per_rank = [
        {
            "rank": rank,
            **report,
            "tokens_per_s": _rate(tokens, seconds),
            "share_of_peak": _rate(flops, seconds * peak["per_s"]) if peak and not report["counts"].get("batches") else None,
            "sampling_share": _ratio(report["sampling_s"], report["wall_s"]),
        }
        for rank, (report, tokens, flops, seconds) in enumerate(zip(reports, done_tokens, done_flops, forward_s, strict=True))
    ]
    return {
        "wall_s": wall_s,
        "tokens_per_s": _rate(facts["left_tokens"] + texts, busy_s),
        "useful_tokens_per_s": _rate(facts["left_request_tokens"] + texts_asked, busy_s),
        "generated_tokens_per_s": _rate(generated, busy_s),
        "sharing": _ratio(facts["request_tokens"] + texts_asked, computed),
        "padding": _ratio(facts["fed_tokens"] + texts, computed),
        "imbalance": _ratio(busy_s - mean_s, mean_s) if facts["left_tokens"] + texts else None,
        "idle_share": sum(report["phases_s"].get("wait", 0.0) for report in reports) / sum(one["wall_s"] for one in reports),
        "peak": peak,
        "weights_bytes": facts.get("weights_bytes"),
        **{unit: facts[unit] for unit in units.values()},
        "sample_columns": list(COLUMNS),
        "ranks": per_rank,
    }


def advise(telemetry: dict[str, Any]) -> list[str]:
    """What the figures ask for, dearest first: what takes which share of the time, and what to do."""
    ranks, leader = telemetry["ranks"], telemetry["ranks"][0]
    wall_s = telemetry["wall_s"]

    def share(rank: dict[str, Any], *phases: str) -> float:
        return float(sum(rank["phases_s"].get(phase, 0.0) for phase in phases) / rank["wall_s"])

    found: list[tuple[float, str]] = []

    def note(cost: float, least: float, sentence: str) -> None:
        if cost >= least:
            found.append((cost, sentence))

    building = share(leader, "tasks", "tokenize", "plan")
    if len(ranks) > 1:
        waits = sum(share(rank, "wait") for rank in ranks[1:]) / (len(ranks) - 1)
        who = f"ranks 1 to {len(ranks) - 1} wait" if len(ranks) > 2 else "rank 1 waits"
        note(waits, 0.1, f"{who} {waits:.0%} of the time: {_cause_of_waits(ranks)}")
        slowest = max(range(len(ranks)), key=lambda rank: ranks[rank]["phases_s"].get("forward", 0.0))
        longer = telemetry["imbalance"] or 0.0  # None where a resume found nothing left to compute
        note(
            longer * share(leader, "forward"),
            0.05,
            f"rank {slowest} computes {longer:.0%} longer than the mean: lower --max_pack_tokens",
        )
    else:
        note(building, 0.3, f"building prompts takes {building:.0%} of the time: give more tasks to one run")
    start, load, weights_bytes = share(leader, "start"), share(leader, "load"), telemetry.get("weights_bytes") or 0
    if weights_bytes < _LEAST_WEIGHTS_BYTES:  # of a small model transformers' code takes longer to load than the weights
        start, load = start + load, 0.0
    note(start, 0.3, f"starting Python and its imports takes {start:.0%} of the time: give more tasks to one run")
    note(
        load,
        0.3,
        f"loading the model ({format_bytes(weights_bytes)}) takes {load:.0%} of the time: keep its files on a local disk, or "
        "give more tasks to one run",
    )
    bootstrap = share(leader, "bootstrap")
    note(bootstrap, 0.3, f"bootstrapping standard errors takes {bootstrap:.0%} of the time: lower --bootstrap_iters")
    padding = telemetry["padding"] or 1.0
    note(
        (1 - 1 / padding) * share(leader, "forward"),
        0.1,
        f"{1 - 1 / padding:.0%} of all tokens are padding: lower --max_pack_tokens",
    )
    least_s = 5.0  # of a run that is worth advice
    return [sentence for _, sentence in sorted(found, reverse=True)] if wall_s >= least_s else []


# What may keep the others waiting: phases of the rank that they wait for, and what to say of them.
_CAUSES = {
    ("start", "join", "load"): "mostly for rank {rank} to start and import ({share:.0%}): give more tasks to one run",
    ("tasks", "tokenize", "plan"): (
        "rank {rank} builds the prompts meanwhile ({share:.0%}): give more tasks to one run, or start fewer ranks"
    ),
    ("forward", "trial", "measure"): "mostly for rank {rank} to compute ({share:.0%}): lower --max_pack_tokens",
    ("again",): "rank {rank} runs again what came out NaN meanwhile ({share:.0%}): mend the model, or give another dtype",
    ("bootstrap",): "rank {rank} bootstraps standard errors meanwhile ({share:.0%}): lower --bootstrap_iters",
    ("score",): "rank {rank} computes metrics meanwhile ({share:.0%}): start fewer ranks",
    ("write", "other"): "rank {rank} writes the results meanwhile ({share:.0%}): start fewer ranks",
}


def _cause_of_waits(ranks: Sequence[dict[str, Any]]) -> str:
    """The one thing that takes rank 0, or at computing the slowest rank, longer than ranks 1 and up on average, by most."""

    def seconds(rank: int, phases: Sequence[str]) -> float:
        return float(sum(ranks[rank]["phases_s"].get(phase, 0.0) for phase in phases))

    found = []
    for phases, sentence in _CAUSES.items():
        each_s = [seconds(rank, phases) for rank in range(len(ranks))]
        rank = each_s.index(max(each_s)) if "forward" in phases else 0
        found.append((each_s[rank] - sum(each_s[1:]) / (len(ranks) - 1), rank, sentence))
    longer_s, rank, sentence = max(found)
    return sentence.format(rank=rank, share=longer_s / ranks[rank]["wall_s"])


def format_summary(telemetry: dict[str, Any]) -> str:
    """A few lines for the terminal: seconds by phase of each rank, rates, bytes, advice."""
    ranks = telemetry["ranks"]
    names = sorted({name for rank in ranks for name in rank["phases_s"]}, key=_phase_order)
    rows = [["rank", "wall s", *names]]
    rows += [
        [str(rank["rank"]), *(f"{s:.2f}" for s in (rank["wall_s"], *(rank["phases_s"].get(n, 0.0) for n in names)))]
        for rank in ranks
    ]
    shown = rows if len(rows) <= 9 else [*rows[:9], ["..."] + [""] * (len(names) + 1)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in shown]
    sent = sum(one["sent_bytes"] for rank in ranks for one in rank["collectives"].values())
    peaks = [rank["share_of_peak"] for rank in ranks if rank["share_of_peak"] is not None]
    ran = telemetry["tokens_per_s"] is not None
    parts = [
        f"{telemetry['tokens_per_s']:,.0f} tokens/s ({telemetry['useful_tokens_per_s'] or 0:,.0f} of the requests as asked)"
        if ran
        else "nothing was left to run",
        *([f"{telemetry['generated_tokens_per_s']:,.0f} generated tokens/s"] if telemetry["generated_tokens_per_s"] else []),
        f"sharing {telemetry['sharing'] or 1:.2f}",
        f"padding {telemetry['padding'] or 1:.2f}",
        *(
            [f"{sum(peaks) / len(peaks):.0%} of peak{'' if len(peaks) == len(ranks) else ' where no text was generated'}"]
            if peaks
            else []
        ),
        *_utilisation(telemetry),
        *([f"imbalance {telemetry['imbalance'] or 0:.0%}"] if ran else []),
        f"idle {telemetry['idle_share']:.0%}",
        f"sent {sent:,} bytes",
        f"sampling {max(rank['sampling_share'] or 0.0 for rank in ranks):.2%}",
    ]
    return "\n".join([*lines, ", ".join(parts), *advise(telemetry)])


PHASES = (
    "start", "join", "tasks", "tokenize", "load", "plan", "trial", "measure",
    "send", "wait", "forward", "gather", "again", "score", "bootstrap", "write", "other",
)  # fmt: skip


def _phase_order(name: str) -> tuple[int, str]:
    return (PHASES.index(name) if name in PHASES else len(PHASES), name)


def _utilisation(telemetry: dict[str, Any]) -> list[str]:
    """Means over all samples, GPU where there are any, else CPU and memory."""
    samples = [sample for rank in telemetry["ranks"] for sample in rank["samples"]]
    busy = [sample[3] for sample in samples if sample[3] is not None]
    if busy:
        return [f"GPU {sum(busy) / len(busy):.0%} busy"]
    if not samples:
        return []
    cores, most = sum(sample[1] for sample in samples) / len(samples), max(sample[2] for sample in samples)
    return [f"{cores:.2f} cores in use by a rank", f"{format_bytes(int(most))} resident"]


def _ratio(amount: float, whole: float) -> float | None:
    return amount / whole if whole else None


def _rate(amount: float, seconds: float) -> float | None:
    """None where nothing was done: no speed is known of it."""
    return amount / seconds if amount and seconds else None
