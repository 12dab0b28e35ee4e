"""Ranks that hang before their run: who, where and in what is said within --timeout. Later hangs are in test_resume.py."""

import os
import re
import signal
import socket
from typing import Any

import pytest
from launch import launch, launching, wait_for
from places import PROGRAMS

from ddp_eval.output import status

HANGING = (str(PROGRAMS / "hanging_main.py"),)
RUN = ("--model_args", "pretrained=demo", "--tasks", "demo", "--timeout", "8")


def sentence_of(*flags, **variables):
    """The one sentence of a launch of two ranks that fails in time."""
    finished = launch(2, *RUN, *flags, program=HANGING, timeout_s=100, **variables)
    assert finished.returncode == 1, str(finished)
    assert not finished.foreign_frames(), str(finished)
    (sentence,) = finished.sentences()
    return sentence


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rank_that_never_joins(rank):
    """Catches the rank that waits in vain blamed, and the one that does not come left unnamed."""
    sentence = sentence_of(FAULT="before_join", FAULT_RANK=str(rank))
    did = (
        r"has shown no progress for \d+ s while preparing to join the other ranks: the run ends",  # it ends by itself
        r"did not come to join the process group within \d+ s",
    )
    assert re.match(rf"ddp_eval: rank {rank} on {re.escape(socket.gethostname())} {did[rank]}", sentence), sentence


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rank_that_hangs_in_an_import(rank):
    """Catches a rank that hangs between joining and its run, and is found after 24 hours: a stale disk of packages."""
    sentence = sentence_of(FAULT="import", FAULT_RANK=str(rank))
    start = rf"ddp_eval: rank {rank} on {re.escape(socket.gethostname())} has shown no progress for \d+ s while importing transf"
    assert re.match(start, sentence), sentence


@pytest.mark.parametrize("flags", [(), pytest.param(("--preflight",), marks=pytest.mark.slow)])
def test_rank_that_hangs_in_the_first_all_reduce(flags):
    """Catches node checks without their all-reduce before a run, and one that stalls with nobody watching."""
    sentence = sentence_of(*flags, FAULT="all_reduce", FAULT_RANK="1")
    assert re.search(r"has shown no progress for \d+ s while trying an all-reduce", sentence), sentence


@pytest.fixture
def waiting(tmp_path):
    """A launch of two ranks that wait within a run in tmp_path; torchrun passes SIGUSR1 on."""
    status.write_status(tmp_path, status.RUNNING, "the run is at work")
    variables: Any = {"FAULT": "none", "FAULT_FILE": str(tmp_path / "pid"), "FAULT_OUT": str(tmp_path)}
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    with launching(2, *RUN, program=HANGING, PET_SIGNALS_TO_HANDLE=signals, **variables) as running:
        for rank in range(2):
            wait_for(tmp_path / f"pid.{rank}", running)
        yield running


def test_warning_that_torchrun_passes_on(waiting, tmp_path):
    """Catches a run that a scheduler's SIGUSR1 marks as failed."""
    waiting.process.send_signal(signal.SIGUSR1)
    finished = waiting.finish(30)
    assert finished.returncode == 1, str(finished)
    (sentence,) = finished.sentences()
    assert "stopped by SIGUSR1 while waiting" in sentence, str(finished)
    assert status.read_status(tmp_path)["state"] == status.PREEMPTED


def test_torchrun_that_is_killed(waiting, tmp_path):
    """Catches a run that says it was started by process 1, which takes in those whose launcher has died."""
    torchrun = waiting.process.pid
    os.kill(torchrun, signal.SIGKILL)
    waiting.finish(30)
    found = status.read_status(tmp_path)
    assert found["state"] == status.FAILED and found["launch"]["torchrun"].startswith(f"process {torchrun} "), found
