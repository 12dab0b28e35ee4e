"""The lock of a run directory: held by the living, taken over from the dead, missed when it goes away."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from ddp_eval.output import lock
from ddp_eval.output.lock import Lock, LockHeldError

HOLD = """
import sys, time
from pathlib import Path
from ddp_eval.output.lock import Lock
Lock(Path(sys.argv[1]), lambda: None).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "WATCH_S", 1.0)
    monkeypatch.setattr(lock, "DYING_S", 0.5)


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(path):
    """The holder is on another machine."""
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "machine": "elsewhere", "host": "far", "pid": 1}))


def test_second_is_refused_until_the_first_leaves(path, holder):
    """Catches two runs in one directory, and a directory that stays locked."""
    second = Lock(path, lambda: None)
    with pytest.raises(LockHeldError, match=f"process {holder.pid} on "):
        second.acquire()
    holder.kill()
    holder.wait()
    second.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    second.release()
    assert list(path.parent.iterdir()) == []


def test_dying_holder_is_waited_for(path, holder, monkeypatch):
    """Catches a resume that is refused because the killed run's ranks need a moment to end."""
    monkeypatch.setattr(lock, "DYING_S", 30.0)
    threading.Timer(0.2, holder.kill).start()
    threading.Timer(0.2, holder.wait).start()
    second = Lock(path, lambda: None)
    second.acquire()
    second.release()


def test_process_id_used_again(path):
    """Catches a lock kept for ever by an unrelated process that got the dead holder's number."""
    first = Lock(path, lambda: None)
    assert first._create()
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "born": "1"}))
    second = Lock(path, lambda: None)
    second.acquire()
    second.release()


def test_holder_on_another_machine(path):
    """Catches the process table of this machine asked about another, both ways."""
    first = Lock(path, lambda: None)
    assert first._create()
    elsewhere(path)
    touching = threading.Event()

    def touch():
        while not touching.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(LockHeldError, match="process 1 on far"):
            Lock(path, lambda: None).acquire()
    finally:
        touching.set()
        thread.join()
    started = time.monotonic()
    second = Lock(path, lambda: None)
    second.acquire()
    assert time.monotonic() - started >= lock.WATCH_S
    second.release()


def test_holder_that_proc_hides(path, monkeypatch):
    """Catches the lock of another user's living run taken over where /proc hides that user's processes (hidepid)."""
    assert Lock(path, lambda: None)._create()

    def hide(pid, number):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(lock, "birth", lambda pid: None)
    monkeypatch.setattr(lock.os, "kill", hide)
    toucher = threading.Timer(0.3, os.utime, (path,))
    toucher.start()
    with pytest.raises(LockHeldError, match=f"process {os.getpid()} on "):
        Lock(path, lambda: None).acquire()
    toucher.join()


def test_holder_that_writes_to_the_terminal(path):
    """Catches another user's lock file whose names of itself forge a line, or take the screen."""
    held = {
        "host": "far\nddp_eval: all is well" + "x" * 500,
        "pid": 10**40,
        "born": "1",
        "machine": "elsewhere",
        "slurm_job": "1\n2",
    }
    said: list[str] = []
    for text in (json.dumps(held), "no JSON"):
        path.write_text(text)
        waiting = Lock(path, lambda: None, lambda words: said.append(words or ""))
        threading.Timer(0.3, os.utime, (path,)).start()
        with pytest.raises(LockHeldError) as caught:
            waiting.acquire()
        said.append(str(caught.value))
    said = [text for text in said if text]
    assert all("\n" not in text and len(text) < 400 for text in said)
    assert said[1].endswith("..., SLURM job 1 2") and said[3] == "an unknown process (the file does not name it)"


def test_only_one_of_many_takes_over(path):
    """Catches two that both remove the dead holder's file, one of them the other's new one."""
    assert Lock(path, lambda: None)._create()
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "born": "1"}))
    locks = [Lock(path, lambda: None) for _ in range(8)]
    outcomes = []

    def take(one):
        try:
            one.acquire()
            outcomes.append("taken")
        except LockHeldError:
            outcomes.append("held")

    threads = [threading.Thread(target=take, args=(one,)) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] * 7 + ["taken"]
    for one in locks:
        one.release()
    assert list(path.parent.iterdir()) == []


def test_slow_taker_leaves_the_quick_ones_lock(path, monkeypatch):
    """Catches one that finds a dead holder, is held up, and then removes the file of the run that took over meanwhile."""
    assert Lock(path, lambda: None)._create()
    dead = json.loads(path.read_text())
    path.write_text(json.dumps({**dead, "born": "1"}))
    quick, slow, third = (Lock(path, lambda: None) for _ in range(3))
    quick.acquire()
    moved = []
    monkeypatch.setattr(os, "rename", lambda *names: moved.append(names))
    monkeypatch.setattr(os, "replace", lambda *names: moved.append(names))
    assert not slow._take_over(dead)
    assert not third._create() and not moved and quick._owns(path)
    quick.release()
    assert list(path.parent.iterdir()) == []


def test_claim_of_a_dead_taker_goes(path):
    """Catches a directory locked for ever because one was killed in the act of taking over."""
    assert Lock(path, lambda: None)._create()
    dead = json.loads(path.read_text())
    path.write_text(json.dumps({**dead, "born": "1"}))
    path.with_name(f"{path.name}.{dead['token']}.claim").write_text("{}")
    second = Lock(path, lambda: None)
    second.acquire()
    second.release()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), elsewhere, lambda path: path.write_text("")])
def test_lost_lock_is_noticed(path, harm):
    """Catches a run that goes on in a directory that was deleted or that another run has taken over."""
    lost = threading.Event()
    first = Lock(path, lost.set)
    first.acquire()
    if harm is elsewhere:
        path.write_text(json.dumps({"token": "another"}))
    else:
        harm(path)
    assert lost.wait(5)
    first.release()


def test_release_leaves_anothers_lock(path):
    """Catches a run that ends and unlocks the directory of the one that took it over."""
    first = Lock(path, lambda: None)
    first.acquire()
    path.write_text(json.dumps({"token": "another"}))
    first.release()
    assert path.exists()


def test_disk_that_fails_once(path, monkeypatch):
    """Catches a run that gives itself up because the disk refused one touch, while its file is there."""
    lost, touch = threading.Event(), os.utime
    failures: list[Any] = []

    def fail_twice(*names):
        if len(failures) < 2:
            failures.append(names)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        touch(*names)

    monkeypatch.setattr(os, "utime", fail_twice)
    first = Lock(path, lost.set)
    first.acquire()
    assert not lost.wait(1.5) and len(failures) == 2
    first.release()


def test_disk_that_fails_for_long(path, monkeypatch):
    """Catches a run that goes on beside the one that took its silent lock over, since the disk hides that from it."""
    lost = threading.Event()
    first = Lock(path, lost.set)
    first.acquire()

    def refuse(*names):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "utime", refuse)
    assert not lost.wait(0.5)
    assert lost.wait(5)
    monkeypatch.undo()
    first.release()


def test_link_that_is_repeated(path, monkeypatch):
    """Catches a run that takes its own lock for another's: NFS repeats a call whose answer was lost, and finds it done."""
    link = os.link

    def link_twice(*names):
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", link_twice)
    first, second = Lock(path, lambda: None), Lock(path, lambda: None)
    first.acquire()
    with pytest.raises(LockHeldError):
        second.acquire()
    first.release()
    assert list(path.parent.iterdir()) == []


def test_lock_names_its_slurm_job(path, monkeypatch):
    """Catches a requeued job that cannot tell its own lost start's lock from another job's (eval.sh reads it)."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    first = Lock(path, lambda: None)
    first.acquire()
    assert '"slurm_job": "12_3"' in path.read_text()
    with pytest.raises(LockHeldError, match=r"process \d+ on .*, SLURM job 12_3$"):
        Lock(path, lambda: None).acquire()
    first.release()
