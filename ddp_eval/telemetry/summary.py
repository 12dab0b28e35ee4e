"""How a run went and where its time went: samples of utilisation, and telemetry.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddp_eval.system.text import format_bytes
from ddp_eval.telemetry.sampler import COLUMNS

_LEAST_WEIGHTS_BYTES = 2**30  # of a model whose loading is a matter of the disk


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
    """What the figures ask for, the largest cost first: what takes which share of the time, and what to do."""
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
    ("again",): "rank {rank} runs again what came out NaN meanwhile ({share:.0%}): fix the model, or give another dtype",
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
