"""What scripts/bench.py and its kin count and print."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_eval.packing import CostModel, requests_from_lists

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import bench
import bench_ablation
import bench_ranks
import sides


def test_useful_work_of_many_requests_by_hand():
    """Catches a tree that is cut in several for 1,000 items and more, of which only the first was counted."""
    stem, tail, count = 4, 20, 1500
    sequences = [[1, 2, 3, 4, 10 + index, *range(1, tail), 9] for index in range(count)]
    cost = CostModel(token=1000.0, pair=10.0, read=1.0, slowdown=2.0)
    engine = types.SimpleNamespace(cost_model=lambda: cost, flops_left_out=lambda: (100.0, 2.0))
    found = bench.count_useful(engine, requests_from_lists(sequences, [tail + 1] * count))
    # The stem once, behind it a branch for each request; read at the stem's last token, once, and all along the branches.
    tokens, reads = stem + tail * count, 1 + tail * count
    pairs = sum(range(1, stem + 1)) + count * sum(range(stem + 1, stem + tail + 1))
    assert (found["distinct_tokens"], found["visible_pairs"], found["distinct_reads"]) == (tokens, pairs, reads)
    unread_pairs = sum(range(1, stem))
    assert found["flops"] == pytest.approx(1000 * tokens + 10 * pairs + reads - 100 * (tokens - reads) - 2 * unread_pairs)


def test_useful_work_does_not_depend_on_order():
    """Catches a request counted twice because its kin stand elsewhere in the list."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 3, random.integers(2, 9)).tolist() for _ in range(1200)]
    engine = types.SimpleNamespace(cost_model=CostModel, flops_left_out=lambda: (0.0, 0.0))
    distinct = len({tuple(one[:end]) for one in sequences for end in range(1, len(one))})
    for order in (sequences, sequences[::-1]):
        assert bench.count_useful(engine, requests_from_lists(order, [1] * 1200))["distinct_tokens"] == distinct


def test_every_idea_can_be_taken_away(tiny_model):
    """Catches a variant that the engine does not take any more, and ideas that bring what they are not called after."""
    stem = list(range(1, 30))
    texts = [[*stem, question, 60, answer, 70] for question in (40, 41) for answer in (50, 51)]
    requests = requests_from_lists(texts, [2] * 4)
    model, device = tiny_model("llama"), torch.device("cpu")
    tokens = {name: bench_ablation.run_variant(name, model, device, requests)[1] for name in bench_ablation.COLUMNS}
    assert tokens["padded"] == tokens["reads only"] == 4 * 32
    assert tokens["choices"] == 2 * (31 + 2) and tokens["few-shot"] == tokens["blocks"] == 29 + 2 * (2 + 2)


def test_no_figure_passes_a_floor_that_the_measurement_did_not():
    """Catches 1.1963 printed as 1.20 where 1.2 is asked for."""
    assert [sides.cut(value) for value in (1.1963, 1.19999, 1.2, 12.0)] == ["1.196", "1.199", "1.200", "12.000"]
    assert sides.cut(79.97, 1) == "79.9"


def test_waiting_for_a_slower_rank_is_part_of_scoring():
    """Catches a rank that is done early and so makes the run look quicker than it was, and a start that nobody is told of."""
    phases = {"start": 3.0, "tasks": 1.0, "forward": 60.0, "wait": 15.0, "gather": 1.0, "score": 2.0}
    one, two = bench_ranks.share_out(120.0, {"forward": 112.0, "gather": 0.0}), bench_ranks.share_out(84.0, phases)
    assert two == {"wall": 84.0, "scoring": 76.0, "start-up": 6.0}
    table = bench_ranks.format_report({"1": [one], "2": [two]}, argparse.Namespace(first_forward=False, flags=[], repeats=1))
    assert table.splitlines()[-4:] == [
        "| ranks | wall, s | times | scoring, s | times | start-up |",
        "|---|---|---|---|---|---|",
        "| 1 | 120.0 | 1.000 | 112.0 | 1.000 | 6.7% |",
        "| 2 | 84.0 | 1.428 | 76.0 | 1.473 | 7.1% |",
    ]
