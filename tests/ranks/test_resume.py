"""Runs that are stopped, killed, stuck or started twice: how they end, what they leave, and that the same command goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import QUICK, launch, launching, wait_for
from places import PROGRAMS, ROOT

from ddp_eval.distributed.watchdog import EXIT_INTERRUPTED, EXIT_PREEMPTED
from ddp_eval.output import status, tables

FAULTY = (str(PROGRAMS / "faulty_main.py"),)
# Six requests in a pack each.
RUN = ("--model_args", "pretrained=demo", "--tasks", "demo_lambada", "--limit", "6", "--max_pack_tokens", "1")
STOP_S = 15
START_S = 150


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """scores.parquet of a run that nothing happens to."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = launch(0, *RUN, "--output_path", path, program=QUICK)
    assert finished.returncode == 0, str(finished)
    return path


@pytest.fixture
def stuck(tmp_path):
    """stuck(ranks, rank, *flags) -> a launch where that rank is stuck in its second pack, and its process id."""
    contexts = []

    def start(ranks, rank, *flags, cold=False, **variables):
        variables |= {"FAULT": "forward_stuck", "FAULT_RANK": str(rank), "FAULT_FILE": str(tmp_path / "pid")}
        if not ranks:
            variables |= {"RANK": "0"}
        command = (*RUN, *flags, "--output_path", tmp_path / "run")
        contexts.append(launching(ranks, *command, program=FAULTY, cold=cold, **variables))
        running = contexts[-1].__enter__()
        return running, int(wait_for(tmp_path / "pid", running, START_S))

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def finish_in_time(running, limit_s=STOP_S):
    started_s = running.elapsed_s()
    finished = running.finish()
    assert finished.elapsed_s - started_s < limit_s, str(finished)
    return finished


def check_resumes(path, undisturbed, ranks=0, program=QUICK, packs=None):
    """The same command ends in the same bits, says what it found, and cleans up."""
    finished = launch(ranks, *RUN, "--output_path", path, program=program)
    assert finished.returncode == 0, str(finished)
    (said,) = [line for line in finished.sentences() if "resuming" in line]
    if packs:
        assert f"resuming: {packs} of 6 packs are done ({packs} of 6 requests), {6 - packs} packs are left" in said, str(finished)
    assert (path / tables.SCORES).read_bytes() == (undisturbed / tables.SCORES).read_bytes()
    assert status.read_status(path)["state"] == status.DONE
    names = sorted(entry.name for entry in path.iterdir())
    assert names == sorted(entry.name for entry in undisturbed.iterdir())


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGUSR1, EXIT_PREEMPTED),
        pytest.param(signal.SIGTERM, EXIT_PREEMPTED, marks=pytest.mark.slow),
        (signal.SIGINT, EXIT_INTERRUPTED),
    ],
)
def test_stopped_by_a_signal(number, code, stuck, tmp_path, undisturbed):
    """Catches a signal that waits for the pack in hand for ever, loses finished packs, or ends in a traceback."""
    running, pid = stuck(0, 0)
    os.kill(pid, number)
    finished = finish_in_time(running)
    assert finished.returncode == code, str(finished)
    (said,) = finished.sentences()
    assert f"stopped by {number.name} while running packs, in pack 4: finished packs are kept" in said, str(finished)
    assert "Traceback" not in finished.stderr, str(finished)
    assert status.read_status(tmp_path / "run")["state"] == status.PREEMPTED
    check_resumes(tmp_path / "run", undisturbed, packs=1)


def test_torchrun_stopped(stuck, tmp_path, undisturbed):
    """Catches ranks that do not hear of it, a sentence from each of them, and a stop that is taken for a failure."""
    running, _ = stuck(2, 1, cold=True)
    running.process.send_signal(signal.SIGTERM)
    finished = finish_in_time(running)
    assert finished.returncode == 1, str(finished)
    (said,) = finished.sentences()
    assert "stopped by SIGTERM" in said, str(finished)
    assert not finished.foreign_frames(), str(finished)
    assert status.read_status(tmp_path / "run")["state"] == status.PREEMPTED
    check_resumes(tmp_path / "run", undisturbed)


def test_torchrun_killed(stuck):
    """Catches ranks that run on, unseen, when their launcher is gone."""
    running, _ = stuck(2, 0, cold=True)
    running.process.kill()
    running.process.wait()
    running.wait_until_gone(grace_s=15)


def test_killed_rank_is_no_preemption(stuck, tmp_path):
    """Catches a scheduler's script that starts a run again and again that always runs out of memory, and an untold death."""
    running, pid = stuck(2, 1)
    os.kill(pid, signal.SIGKILL)
    finished = finish_in_time(running)
    (said,) = finished.sentences()
    assert f"rank 1 (process {pid} on {socket.gethostname()}) has died" in said, str(finished)
    assert said.endswith("the same command resumes from the finished packs"), str(finished)
    assert status.read_status(tmp_path / "run")["state"] == status.FAILED


def test_elastic_restart(stuck, tmp_path, undisturbed):
    """Catches a restart that starts over, wipes what is there because of --fresh, or hangs."""
    flags = (*RUN, "--fresh", "--output_path", tmp_path / "run")
    variables: Any = {"FAULT": "forward_stuck", "FAULT_RANK": "1", "FAULT_FILE": str(tmp_path / "pid")}
    variables |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with launching(2, *flags, program=FAULTY, restarts=1, cold=True, **variables) as running:
        os.kill(int(wait_for(tmp_path / "pid", running, START_S)), signal.SIGKILL)
        finished = running.finish(START_S)
    assert finished.returncode == 0, str(finished)
    assert len([line for line in finished.sentences() if "resuming: " in line]) == 1, str(finished)
    assert (tmp_path / "run" / tables.SCORES).read_bytes() == (undisturbed / tables.SCORES).read_bytes()


def test_stuck_rank_is_named(stuck, tmp_path):
    """Catches a hang that is reported late, by another rank's time-out, or without where it is."""
    running, _ = stuck(2, 1, "--timeout", "15")
    finished = finish_in_time(running, 15 + STOP_S)
    assert finished.returncode == 1, str(finished)
    (said,) = finished.sentences()
    place = f"rank 1 on {re.escape(socket.gethostname())} has shown no progress for [12][0-9] s while running packs, in pack 3"
    assert re.search(place, said), str(finished)
    assert "longer --timeout" in said, str(finished)
    assert status.read_status(tmp_path / "run")["state"] == status.FAILED


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_rank_is_named(rank, stuck, tmp_path):
    """Catches a rank none of whose threads runs any more: only another rank can tell."""
    running, pid = stuck(2, rank, "--timeout", "40")
    os.kill(pid, signal.SIGSTOP)
    finished = running.finish(timeout_s=150)
    said = [line for line in finished.sentences() if "has shown no progress" in line]
    assert len(said) == 1, str(finished)
    assert f"rank {rank} on {socket.gethostname()} has shown no progress for " in said[0], str(finished)


@pytest.mark.slow
def test_frozen_ranks_0_and_1_are_noticed(stuck):
    """Catches a run that stands for ever because the two that look after each other are the two that are frozen."""
    running, pid = stuck(3, 0, "--timeout", "40")
    second = next(other for other in running.processes() if b"RANK=1" in variables_of(other))
    for frozen in (pid, second):
        os.kill(frozen, signal.SIGSTOP)
    finished = running.finish(timeout_s=150)
    (said,) = [line for line in finished.sentences() if "has shown no progress" in line]
    assert f"rank 0 on {socket.gethostname()} has shown no progress for " in said, str(finished)


def variables_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_full_disk(tmp_path, undisturbed):
    """Catches a run that goes on without its journal, or that loses what was in it."""
    path = tmp_path / "run"
    finished = launch(2, *RUN, "--output_path", path, program=FAULTY, FAULT="journal_full", FAULT_RANK="1")
    assert finished.returncode == 1, str(finished)
    (said,) = finished.sentences()
    assert "cannot be written to (No space left on device): make room or repair it, then start the same command again" in said
    assert not finished.foreign_frames(), str(finished)
    assert status.read_status(path)["state"] == status.FAILED
    check_resumes(path, undisturbed)


def test_deleted_directory(stuck, tmp_path):
    """Catches a run that computes for hours what it cannot write anywhere."""
    running, _ = stuck(2, 1)
    (tmp_path / "run").rename(tmp_path / "gone")  # at once, where a deletion takes its time
    finished = finish_in_time(running)
    assert finished.returncode == 1, str(finished)
    (said,) = finished.sentences()
    assert "deleted" in said, str(finished)
    assert not finished.foreign_frames(), str(finished)


def test_two_runs_in_one_directory(stuck, tmp_path):
    """Catches two runs that write into one directory, and a second one that marks the first as failed."""
    _, pid = stuck(0, 0)
    second = launch(2, *RUN, "--output_path", tmp_path / "run", program=QUICK)
    assert second.returncode == 1, str(second)
    (said,) = second.sentences()
    assert f"another run is at work in --output_path {tmp_path / 'run'} (process {pid} on" in said, str(second)
    assert status.read_status(tmp_path / "run")["state"] == status.RUNNING


def test_finished_run_again(undisturbed):
    """Catches a finished run that is computed again, changed, or refused."""

    def files():
        found = [path for path in undisturbed.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    before = files()
    again = launch(2, *RUN, "--output_path", undisturbed, program=QUICK)
    assert again.returncode == 0, str(again)
    assert "holds this very run, complete: nothing is left to do" in again.sentences()[0], str(again)
    assert "demo_lambada" in again.stdout, str(again)
    assert files() == before


@pytest.mark.slow
@pytest.mark.parametrize("trials", [2, 20])
def test_chaos(trials):
    """Catches packs computed twice, bits that depend on when what was killed, and processes left behind; see scripts/chaos.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--trials", str(trials), "--seed", "1"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280 if trials == 2 else 1500)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{trials} trials (seed 1), all bit-identical" in finished.stdout


def test_status_is_whole(tmp_path):
    """Catches a marker that a script finds half-written, and a late rank's word over the first one's."""
    status.write_status(tmp_path, status.RUNNING, "at work")
    status.note_end(tmp_path, status.PREEMPTED, "stopped", first_hand=True)
    status.note_end(tmp_path, status.FAILED, "lost contact", first_hand=False)
    assert json.loads((tmp_path / status.STATUS).read_text())["state"] == "preempted"
    assert [entry.name for entry in tmp_path.iterdir()] == [status.STATUS]
