"""The watching threads, without processes: who looks after whom, what counts as progress, who has died."""

from __future__ import annotations

import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch.distributed as dist

from ddp_eval.distributed import watchdog
from ddp_eval.distributed.watchdog import Watch, _Beats
from ddp_eval.tasks import bootstrap, lm_eval_patches, task_errors


class Hanging(Exception):
    pass


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): time passes. A rank that is found hanging raises Hanging with its number."""
    now = [1000.0]
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def leave_hanging(rank, host, place, late_s, report):
        raise Hanging(rank)

    monkeypatch.setattr(watchdog, "_leave_hanging", leave_hanging)
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def look_for(clock):
    """look_for(beats, seconds): it looks after the others every two seconds."""

    def look(beats, seconds):
        for _ in range(seconds // 2):
            clock(2)
            beats._check_peers()

    return look


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank_looks_after_the_leader(rank, look_for):
    """Catches ranks 0 and 1 frozen together, which nobody notices: the run stands for ever."""
    store = dist.HashStore()
    beats = _Beats(rank, 4, store, 60.0, None, threading.Event())
    store.set("ddp_eval/beat/0", '[1, "n1", "running packs, in pack 3"]')
    beats._check_peers()
    look_for(beats, 24)
    with pytest.raises(Hanging, match="0"):
        look_for(beats, 2)


def test_suspended_job_goes_on(look_for, clock):
    """Catches a job that is suspended for a minute (SIGSTOP to all, SIGCONT to one after the other) ended as a hang."""
    store = dist.HashStore()
    beats = _Beats(0, 2, store, 60.0, None, threading.Event())
    store.set("ddp_eval/beat/1", '[1, "n1", "running packs, in pack 3"]')
    look_for(beats, 10)
    clock(3600)
    look_for(beats, 14)
    with pytest.raises(Hanging, match="1"):
        look_for(beats, 2)


def test_suspended_step_goes_on(clock, monkeypatch):
    """Catches the same in a rank's watch over its own steps: an hour in which it was stopped is no hour of its step."""
    monkeypatch.setattr(watchdog, "_place", watchdog._Place("loading the model", since=1000.0))
    watching = Watch()
    watching.timeout_s = 60.0
    seconds = iter([2, 3600, 2, *[2] * 100])
    monkeypatch.setattr(watchdog.select, "select", lambda *_: clock(next(seconds)) or ([], [], []))
    with pytest.raises(Hanging):
        watching._watch()
    assert len(list(seconds)) == 100 - 27  # 2 + 4 + 2 + 27 * 2 = 62 s


def test_living_leader_is_left_alone(clock):
    """Catches a healthy run ended by its own watch."""
    store = dist.HashStore()
    beats = _Beats(2, 4, store, 60.0, None, threading.Event())
    for count in range(10):
        store.set("ddp_eval/beat/0", f'[{count}, "n1", "building the prompts"]')
        beats._check_peers()
        clock(50)


def test_leader_that_never_began(look_for):
    """Catches a look that waits for a key that never comes."""
    beats = _Beats(2, 4, dist.HashStore(), 60.0, None, threading.Event())
    with pytest.raises(Hanging, match="0"):
        look_for(beats, 64)


@pytest.fixture
def renewed(monkeypatch):
    """How often a step was renewed."""
    calls: list[None] = []
    monkeypatch.setattr(watchdog, "touch", lambda: calls.append(None))
    return calls


@pytest.mark.parametrize("step", ["building the prompts", watchdog.WAITING])
def test_renewed_step_begins_anew(step, monkeypatch):
    """Catches a leader that is killed for building prompts longer than --timeout, document after document."""
    monkeypatch.setattr(watchdog, "_place", watchdog._Place(step, since=0.0))
    watchdog.touch()
    assert watchdog._place.step == step
    assert (watchdog._place.since > 0) is (step != watchdog.WAITING)


@pytest.mark.parametrize("patience_s", [100.0, 0.0])
def test_bootstraps_chunks_are_progress(patience_s, renewed, monkeypatch):
    """Catches 100,000 resamples of a slow metric taken for a hang, in one process and over several."""
    monkeypatch.setattr(bootstrap, "PATIENCE_S", patience_s)
    bootstrap.bootstrap_stderr(np.mean, [0.0, 1.0, 2.0], 3000)
    assert len(renewed) == 2
    renewed.clear()

    def perplexity(values):
        raise AssertionError("computed in numpy")

    bootstrap.bootstrap_stderr(perplexity, [0.0, 1.0, 2.0], 3000)
    assert len(renewed) == 3


def test_between_keeps_the_documents():
    """Catches documents lost or built twice by the one who counts them, and an error that lm_eval takes for a task's."""
    calls: list[None] = []
    assert list(lm_eval_patches.call_between(lambda: calls.append(None), range(3))) == [0, 1, 2] and len(calls) == 3

    def fail():
        raise RuntimeError("the loader has failed")

    with pytest.raises(task_errors.OwnError, match="the loader has failed"):
        list(lm_eval_patches.call_between(task_errors.errors_pass_through()(fail), range(3)))


def test_dead_sibling_is_named(monkeypatch):
    """Catches a killed rank that nobody names: the screen shows torchrun's summary alone."""
    monkeypatch.setattr(watchdog, "_directory", None)  # a run before this may have had one
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watching = Watch()
    watching._siblings = {3: process.pid}
    try:
        assert watching.await_death(0) is None
        process.kill()
        said = watching.await_death(5)  # nobody has asked for its exit code yet: it is a zombie
        assert said is not None
        assert said.startswith(f"rank 3 (process {process.pid} on ") and said.endswith(
            " has died (its output above, or torchrun's summary below, may say why): the run ends; start it again"
        )
    finally:
        process.kill()
        process.wait()
