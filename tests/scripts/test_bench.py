"""What scripts/bench.py and its kin count and print."""

from __future__ import annotations

import argparse
import copy
import math
import types

import bench
import bench_ablation
import bench_generation
import bench_ranks
import numpy as np
import pytest
import sides
import torch

from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.system import machine


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


def test_where_two_answers_part(tiny_model, tiny_tokenizer):
    """Catches logits of another place than where the tokens differ, sides that are mixed up, and a tie called none."""
    model, prompt = tiny_model("llama"), (5, 6, 7)
    found = bench_generation.explain_difference(model, tiny_tokenizer, prompt, (8, 9, 10), (8, 11))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, 8]])).logits[0, -1]
    assert found["step"] == 1 and found["tokens"] == [tiny_tokenizer.decode([9]), tiny_tokenizer.decode([11])]
    assert found["logits"] == pytest.approx([float(logits[9]), float(logits[11])])
    assert bench_generation.explain_difference(model, tiny_tokenizer, prompt, (8,), (8, 11))["logits"] == []
    tie = {"step": 1, "tokens": ["a", "b"], "logits": [7.25, 7.25001]}
    assert bench_generation.format_difference("story", tie).endswith("apart: a tie")


def test_times_of_generation_are_shown_before_texts_are_compared():
    """Catches times that are lost with a comparison that takes too long, and texts that were generated one at a time unseen."""
    row = {"task": "story", "requests": 2, "asked_tokens": 9, "prompt_tokens": 8, "generated_tokens": 4, "batches": 1, "slots": 0}
    row |= {"answer_tokens": [1, 2], "lm_eval_s": 2.0, "lm_eval_batch_size": 16, "ours_s": 1.0, "ratio": 2.0}
    row |= {"why_one_by_one": "its cache is odd", "quarter_times_s": {"16": 0.5}}
    conditions = {"date": "d", "commit": "c", "device": "cpu", "threads": 1, "model": "m", "command": "x"}
    conditions |= {"hardware": {}, "packages": {}}
    text = bench_generation.format_report({"rows": [row], "conditions": conditions})
    assert "| not compared yet |" in text and "- story: one text at a time, since its cache is odd." in text
    compared = row | {"texts_compared": 2, "texts_equal": 1, "differences": [{"step": 3, "tokens": [], "logits": []}]}
    assert "| 1 of 2 |" in bench_generation.format_report({"rows": [compared], "conditions": conditions})


def test_half_precision_is_explained_in_float32(tiny_model, tiny_tokenizer):
    """Catches a tie told from rounded logits, and another model's weights in the exact copy."""
    model = copy.deepcopy(tiny_model("gpt2")).bfloat16()  # no buffers that are rounded too
    (found,) = bench_generation.explain_differences(model, tiny_tokenizer, [((5, 6, 7), (8, 9), (8, 11))])
    with torch.inference_mode():
        logits = copy.deepcopy(model).float()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
    assert found["logits"] == pytest.approx([float(logits[9]), float(logits[11])], abs=1e-6)


@pytest.mark.parametrize(
    ("git", "named"),
    [
        (None, "unknown"),
        ({"commit": "0123456789", "dirty": False}, "0123456"),
        ({"commit": "0123456789", "dirty": True}, "0123456 with changes"),
    ],
)
def test_a_record_names_the_code_that_ran(monkeypatch, git, named):
    """Catches records of changed files under a commit's name, and a machine without git on which nothing runs."""
    monkeypatch.delenv("CODE_COMMIT", raising=False)
    monkeypatch.setattr(machine, "git_commit", lambda path: git)
    assert sides.commit_of_code() == named
    monkeypatch.setenv("CODE_COMMIT", "abc")
    assert sides.commit_of_code() == "abc"


class FakeSide(sides.Side):
    """Answers what `measure_task` asks, in turn. answer: (limit, batch size) -> what a side answers."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def ask(self, *question):
        _, _, limit, size = question
        self.asked.append((limit, size))
        return self.answer(limit, size)


OURS = {
    **{"requests": 1, "request_tokens": 2, "computed_tokens": 2, "packs": 1, "batching": "packs", "packs_split": {}},
    **{"phases_s": {"forward": 1.0}, "peak_flops": 1e9, "useful": {"flops": 1e8}, "answers": {"t": []}, "metrics": {"t": {}}},
    "engine": {"attention": "sdpa"},
}
THEIRS = {"answers": {"t": []}, "metrics": {"t": {"acc": 1.0}}}


def test_lm_eval_counts_at_its_best_size_and_both_sides_are_warm():
    """Catches a side that pays for its first run in its times, sizes tried on all documents, and one picked that is not best."""
    seconds = {1: 4.0, 8: 2.0, 16: math.inf}
    theirs = FakeSide(lambda limit, size: (seconds[size], THEIRS if seconds[size] < math.inf else None))
    ours = FakeSide(lambda limit, size: (1.0, {**OURS, "metrics": THEIRS["metrics"]}))
    row = bench.measure_task(theirs, ours, "t:40", [1, 8, 16], repeats=2)
    assert (row["ratio"], row["lm_eval_batch_size"]) == (2.0, 8)
    assert theirs.asked == [(1, 1), (10.0, 1), (10.0, 8), (10.0, 16), (40.0, 8), (40.0, 8)]
    assert ours.asked == [(10.0, None), (40.0, None), (40.0, None)]
    bench.measure_task(theirs, ours, "t", [8], repeats=1)
    assert theirs.asked[-2:] == [(0.25, 8), (None, 8)], "a quarter of all documents"


def test_times_that_memory_spoilt_are_not_reported():
    """Catches packs run in pieces, or a side that had no room, in a table of speeds."""
    no_room, pieces = (math.inf, None), (1.0, {**OURS, "packs_split": {"0": 2}})
    for answer in (no_room, pieces):
        with pytest.raises(SystemExit, match="t: memory did not do for ddp_eval's packs"):
            bench.measure_task(None, FakeSide(lambda limit, size, answer=answer: answer), "t:4", [1], repeats=1)
    with pytest.raises(SystemExit, match="t: lm_eval ran out of memory at every one of --batch_sizes 8,16"):
        bench.measure_task(FakeSide(lambda *asked: no_room), FakeSide(lambda *asked: (1.0, OURS)), "t:4", [8, 16], repeats=1)
