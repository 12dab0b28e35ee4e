"""Ranks that die, fail or are told to stop: the others end within seconds, and one of them says what happened."""

import json
import os
import re
import signal
import socket
from typing import Any

import pyarrow.parquet
import pytest
import tolerance
from launch import QUICK, launch, launching, wait_for
from places import PROGRAMS

from ddp_eval.output import status

FAULTY = (str(PROGRAMS / "faulty_main.py"),)
END_S = 25  # torchrun itself would give a rank that does not end 30 s

# Three requests in a pack each: two packs for each of two ranks.
RUN = ("--model_args", "pretrained=demo", "--tasks", "demo_lambada", "--limit", "3", "--max_pack_tokens", "1")

SLOW_TASK = """\
task: slow
dataset_path: json
custom_dataset: !function slow_task.load
output_type: loglikelihood
test_split: test
doc_to_text: ""
doc_to_target: ""
"""
SLOW_TASK_CODE = """\
import os, pathlib, time

def load(**settings):
    pathlib.Path(os.environ["FAULT_FILE"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def building(tmp_path):
    """A launch of two ranks whose leader is building a task, which takes ten minutes, and the leader's process id."""
    (tmp_path / "slow.yaml").write_text(SLOW_TASK)
    (tmp_path / "slow_task.py").write_text(SLOW_TASK_CODE)
    flags = ("--model_args", "pretrained=demo", "--tasks", "slow", "--include_path", tmp_path)
    with launching(2, *flags, program=QUICK, FAULT_FILE=str(tmp_path / "pid")) as running:
        yield running, int(wait_for(tmp_path / "pid", running))


@pytest.fixture
def stuck(tmp_path):
    """stuck(rank) -> a launch of two ranks where that one is stuck in its second pack, and its process id."""
    contexts = []

    def start(rank):
        variables: Any = {"FAULT": "forward_stuck", "FAULT_RANK": str(rank), "FAULT_FILE": str(tmp_path / "pid")}
        contexts.append(launching(2, *RUN, program=FAULTY, **variables))
        running = contexts[0].__enter__()
        return running, int(wait_for(tmp_path / "pid", running))

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def finish_in_time(running, limit_s=END_S):
    started_s = running.elapsed_s()
    finished = running.finish()
    assert finished.elapsed_s - started_s < limit_s, str(finished)
    return finished


def check_killed(finished, pid, rank):
    """torchrun names the rank that was killed by its signal; another rank says in one sentence who died and what to do."""
    assert finished.returncode == 1, str(finished)
    assert f"exitcode  : -9 (pid: {pid})" in finished.stderr, str(finished)
    (sentence,) = finished.sentences()
    assert f"rank {rank} (process {pid} on {socket.gethostname()}) has died" in sentence, str(finished)
    assert sentence.endswith("the run ends; start it again"), str(finished)
    assert not finished.foreign_frames(), str(finished)


def test_leader_killed_while_it_builds_tasks(building):
    """Catches workers that wait for hours for a leader that is gone."""
    running, leader = building
    os.kill(leader, signal.SIGKILL)
    check_killed(finish_in_time(running), leader, 0)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rank_killed_while_it_runs_packs(rank, stuck):
    """Catches ranks that wait in the gather for one that is gone, and an exit code of 0 without results."""
    running, pid = stuck(rank)
    os.kill(pid, signal.SIGKILL)
    check_killed(finish_in_time(running), pid, rank)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_model_that_one_rank_cannot_load(rank):
    """Catches a sentence that comes twice, that other ranks' words follow, or that comes when the leader has built all tasks."""
    finished = launch(2, *RUN, program=FAULTY, FAULT="load_user_error", FAULT_RANK=str(rank))
    check_sentence(finished, "ddp_eval: the checkpoint has fallen off the shelf")


def test_leaders_error_waits_for_nobody():
    """Catches a mistake that is told, and a job that ends, only when the slowest rank has loaded its weights."""
    finished = launch(2, *RUN, program=FAULTY, FAULT="load_user_error_early", FAULT_RANK="0")
    check_sentence(finished, "ddp_eval: the checkpoint has fallen off the shelf")
    assert "exitcode  : 2" in finished.stderr, str(finished)


@pytest.mark.parametrize("rank", [0, 1])
def test_pack_that_does_not_fit_one_rank(rank):
    """Catches a rank that stops in the middle while the others wait in the gather until its time-out, half an hour later."""
    finished = launch(2, *RUN, program=FAULTY, FAULT="forward_no_memory", FAULT_RANK=str(rank))
    check_sentence(finished, f"ddp_eval: rank {rank} ran out of memory")


def test_packs_that_one_rank_runs_in_pieces(tmp_path):
    """Catches pieces that lose or swap items, a run that ends over a pack too large, and pieces that nobody is told of."""
    flags = ("--model_args", "pretrained=demo", "--tasks", "demo_hellaswag", "--limit", "20", "--max_pack_tokens", "1500")
    faults = {"whole": "none", "pieces": "forward_little_memory"}
    scores, manifests = {}, {}
    for name, fault in faults.items():
        out = tmp_path / name
        finished = launch(2, *flags, "--output_path", out, program=FAULTY, FAULT=fault, FAULT_RANK="1")
        assert finished.returncode == 0, str(finished)
        scores[name] = pyarrow.parquet.read_table(out / "scores.parquet").to_pydict()
        manifests[name] = json.loads((out / "manifest.json").read_text())
    whole, pieces = (scores[name].pop("loglikelihood") for name in faults)
    tolerance.of_demo().assert_close(pieces, whole, scores["whole"]["num_tokens"])
    assert scores["whole"] == scores["pieces"]
    assert manifests["whole"]["packs_split"] == {}
    splits = manifests["pieces"]["packs_split"]
    assert splits and all(count > 2 for count in splits.values())
    assert manifests["whole"]["plan_sha256"] == manifests["pieces"]["plan_sha256"]
    assert f"{len(splits)} packs did not fit the memory" in finished.stderr


@pytest.mark.parametrize(
    "layout",
    ["replicas", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layers:2", "tensor:2", "measure"))],
)
def test_trees_where_the_fastest_attention_fails(layout, tmp_path):
    """Catches packs given up where the model's own attention serves them, and ranks that do not hear which one is taken."""
    flags = ("--model_args", "pretrained=demo", "--tasks", "demo_hellaswag", "--limit", "20", "--max_pack_tokens", "1500")
    runs = {"whole": (1, "none", "replicas"), "one": (1, "no_compiler", "replicas"), "two": (2, "no_compiler", layout)}
    scores, manifests = {}, {}
    for name, (ranks, fault, chosen) in runs.items():
        out = tmp_path / name
        more = ("--output_path", out, "--layout", chosen)
        finished = launch(ranks, *flags, *more, program=FAULTY, FAULT=fault, FAULT_RANK="0")
        assert finished.returncode == 0, str(finished)
        scores[name] = pyarrow.parquet.read_table(out / "scores.parquet").to_pydict()
        manifests[name] = json.loads((out / "manifest.json").read_text())
    said = "packs run with sdpa attention, not with ddp_eval_blocks, the fastest here: it fails on packs"
    assert said in finished.stderr, str(finished)
    for name in ("one", "two"):
        assert manifests[name]["batching"] == "packs" and manifests[name]["engine"]["attention"] == "sdpa"
        whole = scores["whole"]
        tolerance.of_demo().assert_close(scores[name]["loglikelihood"], whole["loglikelihood"], whole["num_tokens"])
    if layout != "tensor:2" and layout != "measure":
        assert scores["two"] == scores["one"], "the same bits"


def check_sentence(finished, text):
    assert finished.returncode == 1, str(finished)
    (sentence,) = finished.sentences()
    assert sentence.startswith(text), str(finished)
    assert not finished.foreign_frames(), str(finished)
    assert finished.seconds_after(text) < END_S, str(finished)


@pytest.mark.parametrize(
    ("fault", "rank", "error"),
    [
        ("load_crash", 0, "RuntimeError: a defect in the loader"),
        pytest.param("load_crash", 1, "RuntimeError: a defect in the loader", marks=pytest.mark.slow),
        pytest.param("forward_crash", 0, "RuntimeError: a defect in the forward pass", marks=pytest.mark.slow),
        ("forward_crash", 1, "RuntimeError: a defect in the forward pass"),
    ],
)
def test_defect_on_one_rank(fault, rank, error, tmp_path):
    """Catches a defect whose traceback is lost, or that is passed off as a mistake of the user, as another rank's death, or as
    nothing that would come again."""
    out = () if fault == "load_crash" else ("--output_path", tmp_path)
    finished = launch(2, *RUN, *out, program=FAULTY, FAULT=fault, FAULT_RANK=str(rank))
    assert finished.returncode == 1, str(finished)
    assert finished.seconds_after(error) < END_S, str(finished)
    (sentence,) = finished.sentences()
    assert re.match(rf"ddp_eval: rank {rank} on .* has failed while .* \({error}\): its traceback says where", sentence), str(
        finished
    )
    assert "resumes" not in finished.stderr, str(finished)
    if out:
        assert "while running packs, in pack " in sentence and "finished packs are kept, but the same" in sentence, str(finished)
        assert status.read_status(tmp_path)["reason"] == sentence.removeprefix("ddp_eval: ")
    root_cause = finished.stderr.partition("Root Cause")[2]
    assert re.search(rf"rank +: {rank} ", root_cause), str(finished)
    assert error in root_cause, str(finished)


def test_interrupted_while_tasks_are_built(building):
    """Catches Ctrl-C that leaves workers behind or ends in a traceback of ours. torchrun passes it on to the workers."""
    running, _ = building
    running.process.send_signal(signal.SIGINT)
    check_interrupted(finish_in_time(running))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_while_packs_run(rank, stuck):
    """Catches an interrupted rank that waits for one that is in a collective, where Python does not see the signal."""
    running, _ = stuck(rank)
    running.process.send_signal(signal.SIGINT)
    check_interrupted(finish_in_time(running))


def check_interrupted(finished):
    assert finished.returncode != 0, str(finished)
    assert not finished.foreign_frames(), str(finished)
    assert len(finished.sentences()) <= 1, str(finished)
