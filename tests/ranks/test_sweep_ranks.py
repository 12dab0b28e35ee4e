"""Sweeps by real ranks: each model as a run of its own, failures that end no sweep, a watch beside a training run, stops."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from launch import QUICK, Finished, launch, launching, wait_for
from places import PROGRAMS

from ddp_eval.distributed.watchdog import EXIT_PREEMPTED
from ddp_eval.output import status

FAULTY = (str(PROGRAMS / "faulty_main.py"),)
MANY_RUNS = (str(PROGRAMS / "many_runs.py"),)
TASKS = ("--tasks", "demo_lambada", "--limit", "6", "--max_pack_tokens", "1")


def states(output: Path) -> dict[str, str]:
    return {one["name"]: one["state"] for one in json.loads((output / "sweep.json").read_text())["models"]}


def reasons(output: Path) -> dict[str, Any]:
    return {one["name"]: one["reason"] for one in json.loads((output / "sweep.json").read_text())["models"]}


@pytest.mark.parametrize("ranks", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_each_model_is_a_run_of_its_own(ranks: int, tmp_path: Path) -> None:
    """Catches bits that depend on what was evaluated before, a broken model that ends the sweep, and run directories that a
    command of the same flags does not know for its own."""
    place = checkpoints.write_checkpoints(tmp_path / "train", [9, 10, 8])
    (place / "checkpoint-9" / "tokenizer.json").unlink()
    (place / "checkpoint-9" / "tokenizer_config.json").unlink()
    output = tmp_path / "out"
    finished = launch(
        ranks, "sweep", "--models", f"{place}/checkpoint-*", *TASKS, "--output_path", output, program=QUICK, timeout_s=280
    )
    assert finished.returncode == 1, str(finished)
    assert states(output) == {"checkpoint-8": "done", "checkpoint-9": "failed", "checkpoint-10": "done"}
    assert "cannot load a tokenizer" in reasons(output)["checkpoint-9"]
    assert f"the sweep is in {output}: 2 done, 1 failed" in finished.stdout
    assert [line for line in finished.sentences() if "checkpoint-9 failed" in line]
    lines = [["--model_args", f"pretrained={place}/checkpoint-{step}", *TASKS] for step in (8, 10)]
    runs = [[*line, "--output_path", str(where)] for line, step in zip(lines, (8, 10), strict=True)
            for where in (tmp_path / f"alone-{step}", output / f"checkpoint-{step}")]  # fmt: skip
    (tmp_path / "lines.json").write_text(json.dumps(runs))
    alone = launch(0, tmp_path / "lines.json", program=MANY_RUNS, timeout_s=280)
    assert alone.returncode == 0, str(alone)
    assert alone.stderr.count("holds this very run, complete") == 2, str(alone)
    for step in (8, 10):
        swept, own = output / f"checkpoint-{step}", tmp_path / f"alone-{step}"
        for name in ("scores.parquet", "documents.parquet"):
            assert (swept / name).read_bytes() == (own / name).read_bytes()
        manifests = [json.loads((path / "manifest.json").read_text()) for path in (swept, own)]
        for manifest in manifests:
            manifest["config"].pop("output_path")
            manifest.pop("ranks")
            manifest.get("hardware", {}).pop("threads", None)
        assert manifests[0] == manifests[1]
        assert status.read_status(swept)["state"] == status.DONE
    before = (output / "sweep.json").read_bytes()
    for flags, sentence in (
        ((*TASKS[:2], "--limit", "7"), "here it is 7"),
        (("--tasks", "demo_lambad"), "did you mean demo_lambada"),
    ):
        refused = launch(0, "sweep", "--models", f"{place}/checkpoint-*", *flags, "--output_path", output, program=QUICK)
        assert refused.returncode == 2 and sentence in refused.sentences()[0], str(refused)
    assert (output / "sweep.json").read_bytes() == before, "what is done stays done"


def sweep_of_two(place: Path, fault: str, rank: str, state: str, sentence: str) -> Finished:
    """A sweep on two ranks, of which `rank` has each of two models end in `state`, by a reason that holds `sentence`."""
    models = checkpoints.write_checkpoints(place / "train", [1, 2])
    finished = launch(
        2, "sweep", "--models", f"{models}/checkpoint-*", *TASKS, "--output_path", place / "out", program=FAULTY, FAULT=fault,
        FAULT_RANK=rank, timeout_s=280,
    )  # fmt: skip
    assert finished.returncode == 1, str(finished)
    assert states(place / "out") == {"checkpoint-1": state, "checkpoint-2": state}, str(finished)
    assert all(sentence in why for why in reasons(place / "out").values()), str(finished)
    return finished


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("forward_no_memory", "rank 1 ran out of memory"),
        pytest.param("load_user_error", "rank 1: the checkpoint has fallen off the shelf", marks=pytest.mark.slow),
        pytest.param("forward_crash", "a defect in the forward pass", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_fails_on_one_rank(fault: str, sentence: str, tmp_path: Path) -> None:
    """Catches ranks that disagree on what comes next: each model fails on the second rank alone."""
    sweep_of_two(tmp_path, fault, "1", "failed", sentence)
    assert status.read_status(tmp_path / "out" / "checkpoint-1")["state"] == status.FAILED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "state", "sentence", "outcome"),
    [
        ("start_crash", "failed", "ImportError: a module that is half made", ": 2 failed"),
        ("directory_lost", "waiting", "was deleted or taken over by another run", ": 2 at work in another launch"),
    ],
)
def test_a_model_that_fails_on_rank_0(fault: str, state: str, sentence: str, outcome: str, tmp_path: Path) -> None:
    """Catches ranks that wait for the report of one which could not load, that go on with packs nobody wants any more, or that a
    run directory of one model takes along."""
    finished = sweep_of_two(tmp_path, fault, "0", state, sentence)
    assert outcome in finished.stdout, str(finished)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["layers:2", "tensor:2", "shard:2"])
def test_models_over_several_ranks(layout: str, tmp_path: Path) -> None:
    """Catches a second model that meets what the first has left behind, and a broken one that ranks disagree on."""
    place = checkpoints.write_checkpoints(tmp_path / "train", [1, 2, 3])
    (place / "checkpoint-2" / checkpoints.WEIGHTS).write_bytes(b"")
    command = ("sweep", "--models", f"{place}/checkpoint-*", "--layout", layout, *TASKS, "--output_path", tmp_path / "out")
    finished = launch(2, *command, program=QUICK, timeout_s=280)
    assert finished.returncode == 1, str(finished)
    assert states(tmp_path / "out") == {"checkpoint-1": "done", "checkpoint-2": "failed", "checkpoint-3": "done"}, str(finished)


@pytest.mark.slow
def test_models_that_rank_0_sends(tmp_path: Path) -> None:
    """Catches ranks that wait for weights which rank 0 could not read, and for ever."""
    place = checkpoints.write_checkpoints(tmp_path / "train", [1, 2, 3])
    settings = json.loads((place / "checkpoint-2" / "config.json").read_text())
    (place / "checkpoint-2" / "config.json").write_text(json.dumps({**settings, "intermediate_size": 8}))
    command = ("sweep", "--models", f"{place}/checkpoint-*", "--load", "broadcast", *TASKS, "--output_path", tmp_path / "out")
    finished = launch(2, *command, program=QUICK, timeout_s=280)
    assert finished.returncode == 1, str(finished)
    assert states(tmp_path / "out") == {"checkpoint-1": "done", "checkpoint-2": "failed", "checkpoint-3": "done"}, str(finished)


def _train(place: Path) -> None:
    """Writes checkpoints in pieces, the second before the first is whole, and a third that stays broken."""
    first, second = (checkpoints.weights_of(step) for step in (100, 200))
    for step in (100, 200, 300):
        checkpoints.write_checkpoint(place / f"checkpoint-{step}", step)
        weights = place / f"checkpoint-{step}" / checkpoints.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:100_000])
    for data, step in ((second, 200), (first, 100)):
        for end in range(1_000_000, len(data) + 1_000_000, 1_000_000):
            (place / f"checkpoint-{step}" / checkpoints.WEIGHTS).write_bytes(data[:end])
            time.sleep(0.3)
    (place / "over").touch()


def test_watching_a_training_run(tmp_path: Path) -> None:
    """Catches a checkpoint that is evaluated while it is being written, or twice, and a watch that a broken one stops."""
    place, output = tmp_path / "train", tmp_path / "out"
    place.mkdir()
    writer = threading.Thread(target=_train, args=(place,), daemon=True)
    flags = ["--watch", "--every", "0.5", "--until", place / "over", *TASKS, "--output_path", output]
    with launching(0, "sweep", "--models", f"{place}/checkpoint-*", *flags, program=QUICK) as running:
        writer.start()
        finished = running.finish(280)
    assert finished.returncode == 0, str(finished)
    assert states(output) == {"checkpoint-100": "done", "checkpoint-200": "done", "checkpoint-300": "waiting"}
    assert "model.safetensors has 100000 bytes of" in reasons(output)["checkpoint-300"]
    assert finished.stdout.count("the run is in") == 2, str(finished)
    assert not (output / "checkpoint-300").exists()


@pytest.mark.slow
def test_a_stop_and_another_start(tmp_path: Path) -> None:
    """Catches finished models and packs that are computed again, and an exit code that no requeue goes by."""
    place, output = checkpoints.write_checkpoints(tmp_path / "train", [1, 2]), tmp_path / "out"
    command = ("sweep", "--models", f"{place}/checkpoint-*", *TASKS, "--output_path", output)
    variables: dict[str, Any] = {"FAULT": "forward_stuck", "FAULT_RANK": "0", "FAULT_FILE": str(tmp_path / "pid"), "RANK": "0"}
    with launching(0, *command, program=FAULTY, **variables) as running:
        process = int(wait_for(tmp_path / "pid", running))
        os.kill(process, signal.SIGTERM)
        finished = running.finish()
    assert finished.returncode == EXIT_PREEMPTED, str(finished)
    finished = launch(2, *command, program=QUICK)
    assert finished.returncode == 0, str(finished)
    assert "resuming: 1 of 6 packs are done" in finished.stderr, str(finished)
    assert set(states(output).values()) == {"done"}
    again = launch(0, *command, program=QUICK)
    assert again.returncode == 0 and again.stderr.count("holds this very run, complete") == 2, str(again)


@pytest.mark.slow
def test_two_watchers(tmp_path: Path) -> None:
    """Catches two launches that evaluate the same checkpoint, and one that takes the other's work for a failure."""
    place, output = checkpoints.write_checkpoints(tmp_path / "train", [1, 2, 3, 4]), tmp_path / "out"
    flags = ["--watch", "--every", "0.5", "--until", "4", *TASKS, "--output_path", output]
    command = ("sweep", "--models", f"{place}/checkpoint-*", *flags)
    with launching(0, *command, program=QUICK) as one, launching(0, *command, program=QUICK) as two:
        both = [one.finish(280), two.finish(280)]
    assert [finished.returncode for finished in both] == [0, 0], f"{both[0]}\n{both[1]}"
    assert set(states(output).values()) == {"done"}
    assert sum("1.00 of the requests" in finished.stdout for finished in both) <= 2
