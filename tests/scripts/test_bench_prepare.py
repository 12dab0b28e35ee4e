"""What scripts/bench_prepare.py measures and prints: what rank 0 does alone, beside lm_eval's own code."""

from __future__ import annotations

import argparse

import bench_prepare
import pytest
import transformers
from bench_tokenization import collect_requests
from lm_eval.models.huggingface import HFLM
from places import GENERATION_TASKS

from ddp_eval import demo


def arguments(**more):
    options = {
        **{"dtype": "float32", "include_path": demo.TASKS_PATH, "ranks": "1,2", "repeats": 1, "threads": 1, "gen_kwargs": None},
        **{"lm_eval_limit": None, "lm_eval_side": None, "out": None, "cpu": True, "no_packing": False},
    }
    return argparse.Namespace(**{**options, **more})


def test_seconds_before_between_and_after_the_forwards_by_hand():
    """Catches phases that come back after the forwards and are counted before them, and seconds that are counted nowhere."""
    timeline = [[0.0, "start"], [2.0, "tasks"], [5.0, "tokenize"], [6.0, "tasks"], [6.5, "forward"], [8.0, "tasks"]]
    timeline += [[8.25, "forward"], [9.0, "gather"], [9.5, "tasks"], [10.0, "score"]]
    leader = {"began_unix_s": 1000.5, "wall_s": 12.0, "timeline": timeline}
    found = bench_prepare.split_wall(leader, began_unix_s=999.0, wall_s=14.0)
    assert found == {
        "before_s": {"launch": 1.5, "start": 2.0, "tasks": 3.5, "tokenize": 1.0},
        "during_s": {"forward": 2.25, "tasks": 0.25},
        "after_s": {"gather": 0.5, "tasks": 0.5, "score": 2.0, "exit": 0.5},
    }
    assert sum(sum(part.values()) for part in found.values()) == 14.0


def test_a_rank_without_a_forward_has_only_time_before_it():
    """Catches a rank that got no pack, whose waits then count as waits after the forwards, or as none."""
    assert bench_prepare.split_timeline([[0.0, "load"], [1.0, "wait"]], 5.0) == ({"load": 1.0, "wait": 4.0}, {}, {})


def test_waits_are_means_of_the_other_ranks_and_shares_of_the_command():
    """Catches shares of the rank's own time, and waits at the end among those at the start."""
    one = {"timeline": [[0.0, "wait"], [4.0, "forward"], [6.0, "wait"]], "wall_s": 8.0, "phases_s": {"wait": 6.0}}
    two = {"timeline": [[0.0, "load"], [2.0, "wait"], [4.0, "forward"]], "wall_s": 8.0, "phases_s": {"wait": 2.0}}
    assert bench_prepare.describe_waits([one, two], wall_s=10.0) == {
        **{"wait_before_s": 3.0, "wait_before_share": 0.3, "wait_s": 4.0, "wait_share": 0.4}
    }


def test_medians_of_runs_that_lack_a_phase():
    """Catches a phase of one run in three that is reported as if it were in all."""
    runs = [
        {"wall_s": 4.0, "before_s": {"tasks": 1.0}},
        {"wall_s": 2.0, "before_s": {}},
        {"wall_s": 9.0, "before_s": {"load": 3.0}},
    ]
    assert bench_prepare.median_of(runs) == {"wall_s": 4.0, "before_s": {"tasks": 0.0, "load": 0.0}}


def test_documents_that_stand_for_all_of_a_rank():
    """Catches seconds of one document of rank 0 of 8 that are scaled up as if all ranks' documents were its own."""
    assert bench_prepare.choose_measured(40, 2, 8) == (16, 2.5)
    assert bench_prepare.choose_measured(40, 2, 1) == (2, 20.0)
    assert bench_prepare.choose_measured(40, None, 8) == (40, 1.0)
    assert bench_prepare.choose_measured(5, 2, 8) == (5, 1.0)


def a_row(measured):
    before = {"launch": 0.5, "tasks": 2.0, "tokenize": 1.0, "plan": 0.75, "trial": 0.25, "other": 0.001}
    run = {
        **{"documents": 1000, "requests": 4000, "wall_s": 10.0, "before_s": before, "during_s": {"forward": 4.0}},
        **{"after_s": {"score": 0.5, "exit": 1.0}, "peak_bytes": 600 * 2**20, "workers_peak_bytes": 2**20},
    }
    waits = {"wait_before_s": 4.0, "wait_before_share": 0.4, "wait_s": 5.0, "wait_share": 0.5}
    theirs = {"tasks_s": 1.0, "prompts_s": 12.0, "ids_s": 7.0, "index_s": 6.5, "documents": 1000, "measured_documents": measured}
    eight = {**theirs, "prompts_s": 1.5, "ids_s": 1.5}
    return {
        **{"suite": "a+b", "limit": None, "ddp_eval": {"1": run, "2": {**run, **waits}}},
        **{"plan": {"1": {"wall_s": 6.0}}, "lm_eval": {"1": theirs, "8": eight}},
    }


def test_tables_by_hand():
    """Catches columns in another order than their heads, ratios upside down, and scaled figures that do not say so."""
    assert bench_prepare.format_phases([a_row(1000)]) == [
        "| tasks of a command | documents | requests | ranks | launch | tasks | tokenize | plan | trial "
        "| **before the first forward** | to the last forward | score | exit | **after the last** | **wall** | before and after "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| a+b | 1,000 | 4,000 | 1 | 0.50 | 2.00 | 1.00 | 0.75 | 0.25 | 4.50 | 4.00 | 0.50 | 1.00 | 1.50 | 10.00 | 60.0% | 600 |",
        "| a+b | 1,000 | 4,000 | 2 | 0.50 | 2.00 | 1.00 | 0.75 | 0.25 | 4.50 | 4.00 | 0.50 | 1.00 | 1.50 | 10.00 | 60.0% | 600 |",
    ]
    assert bench_prepare.format_waits([a_row(1000)])[2:] == ["| a+b | 2 | 4.00 | 40.0% | 5.00 | 50.0% |"]
    assert bench_prepare.format_comparison([a_row(1000)]) == [
        "| tasks of a command | documents | lm_eval: index | tasks | prompts | token ids | sum | rank 0 of 8: sum "
        "| ddp_eval: tasks and tokenize | and plan | faster than lm_eval on 1 | on 8 | `plan`, 1 core |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| a+b | 1,000 | 6.50 | 1.00 | 12.00 | 7.00 | 20.00 | 4.00 | 3.00 | 4.00 | **5.00x** | **1.00x** | 6.00 |",
    ]
    scaled = bench_prepare.format_comparison([a_row(100)])[-1]
    assert (
        scaled == "| a+b | 1,000 | 6.50 | 1.00 | 12.00* | 7.00* | 20.00* | 4.00* | 3.00 | 4.00 | **5.00x*** | **1.00x*** | 6.00 |"
    )


@pytest.mark.parametrize(("ranks", "documents"), [(1, 10), (8, 2)])
def test_lm_eval_builds_the_requests_of_its_command(tiny_model_path, monkeypatch, ranks, documents):
    """Catches other examples than lm_eval's own (seed, number), and a rank 0 of 8 that builds the documents of all."""
    built = []
    monkeypatch.setattr(bench_prepare, "encode_by_lm_eval", lambda lm, requests: built.extend(requests))
    args = arguments(model=str(tiny_model_path("llama")), tasks="demo_hellaswag:10", lm_eval_side=ranks)
    found = bench_prepare.prepare_by_lm_eval(args)
    expected = collect_requests(["demo_hellaswag"], demo.TASKS_PATH, limit=10)["loglikelihood"]
    mine = [one for one in expected if one.doc_id % ranks == 0]
    assert [(one.doc_id, one.args[1]) for one in built] == [(one.doc_id, one.args[1]) for one in mine]
    if ranks == 1:  # several ranks of lm_eval draw other examples than one
        assert [one.args for one in built] == [one.args for one in mine]
    assert len({one.doc_id for one in built}) == documents
    assert found["documents"] == found["measured_documents"] == 10 and found["tasks_s"] > 0


def test_lm_eval_encodes_every_kind_of_request_without_a_forward(tiny_model_path, monkeypatch):
    """Catches a kind of request that is skipped, a model that computes, and time of few documents that is not scaled up."""
    encoded = []
    encode, batch_encode = HFLM.tok_encode, HFLM.tok_batch_encode
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda *args, **kwargs: pytest.fail("a forward"))
    monkeypatch.setattr(HFLM, "tok_encode", lambda lm, text, *more, **kw: encoded.append(text) or encode(lm, text, *more, **kw))
    monkeypatch.setattr(
        HFLM, "tok_batch_encode", lambda lm, texts, **kw: encoded.append(list(texts)) or batch_encode(lm, texts, **kw)
    )
    model = str(tiny_model_path("llama"))
    for tasks, path, count in (
        ("demo_boolean_expressions+demo_lambada:6", demo.TASKS_PATH, 4 * 2 + 2 * 2),  # a context with and without its answers
        ("demo_wikitext:3", demo.TASKS_PATH, 2),
        ("gen_boolean:6", str(GENERATION_TASKS), 4),  # once to sort, once to run
    ):
        encoded.clear()
        found = bench_prepare.prepare_by_lm_eval(
            arguments(model=model, tasks=tasks, include_path=path, lm_eval_side=1, lm_eval_limit=2)
        )
        assert len(encoded) == count, tasks
        assert found["measured_documents"] < found["documents"] and min(found["prompts_s"], found["ids_s"]) > 0


@pytest.mark.slow
def test_a_suite_on_two_ranks_for_real(tiny_model_path, monkeypatch):
    """Catches files, flags and phases that the commands no longer have, and parts that do not add up to the whole command."""
    monkeypatch.setattr(bench_prepare, "LM_EVAL_RANKS", (8,))
    monkeypatch.setattr(bench_prepare, "usable_cores", lambda: [])
    args = arguments(model=str(tiny_model_path("llama")), ranks="2")
    row = bench_prepare.measure_suite("demo_boolean_expressions+demo_hellaswag:9", args)
    run = row["ddp_eval"]["2"]
    assert (run["documents"], run["requests"]) == (18, 9 * 2 + 9 * 4)
    assert sum(sum(run[part].values()) for part in ("before_s", "during_s", "after_s")) == pytest.approx(run["wall_s"], abs=0.02)
    assert run["before_s"]["tasks"] > 0 and run["during_s"]["forward"] > 0 and "score" in run["after_s"]
    assert 0 < run["wait_before_s"] <= run["wait_s"] < run["wall_s"]
    assert 100 * 2**20 < run["peak_bytes"] < 4 * 2**30
    assert row["lm_eval"]["8"]["documents"] == 18
    monkeypatch.setattr(bench_prepare, "LM_EVAL_RANKS", (1, 8))
    row["lm_eval"]["1"] = row["lm_eval"]["8"] | {"index_s": 7.0}
    assert len(set(map(len, (line.split("|") for line in bench_prepare.format_comparison([row]))))) == 1
    assert bench_prepare.format_phases([row])[-1].startswith("| demo_boolean_expressions+demo_hellaswag:9 | 18 | 54 | 2 |")
