"""What ranks tell each other through a store: not what ranks of an earlier attempt said, and not into a dead store in vain."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_eval.distributed import meeting, watchdog
from ddp_eval.distributed import messages as protocol
from ddp_eval.distributed import store as store_module
from ddp_eval.distributed.launch_environment import LaunchEnvironment
from ddp_eval.distributed.meeting import exchange_through
from ddp_eval.distributed.messages import Followers, Journals, Work
from ddp_eval.distributed.world import World
from ddp_eval.errors import LostContact, UserError
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run import execute, self_check

UNUSED: Any = None  # an argument that the function under test passes on, or does not come to


def exchange_all(store, texts, timeout_s=10.0):
    """What each rank has heard; a rank whose text is None does not come."""
    heard: list[Any] = [None] * len(texts)

    def one(rank):
        heard[rank] = exchange_through(store, rank, len(texts), "facts", texts[rank], timeout_s)

    threads = [threading.Thread(target=one, args=(rank,)) for rank, text in enumerate(texts) if text is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_exchange_after_a_restart():
    """Catches the facts of the nodes before an elastic restart taken for those of now: a bad node that was replaced stays bad."""
    store = dist.HashStore()
    assert exchange_all(store, ["a0", "a1", "a2"]) == [["a0", "a1", "a2"]] * 3
    assert exchange_all(store, ["b0", "b1", "b2"]) == [["b0", "b1", "b2"]] * 3


@pytest.mark.parametrize("silent", [0, 1])
def test_exchange_names_the_silent(silent):
    """Catches a rank that died passed off as present because an earlier attempt of it spoke."""
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=1))
    exchange_all(store, ["a0", "a1"])
    texts: list[str | None] = ["b0", "b1"]
    texts[silent] = None
    heard = exchange_all(store, texts, timeout_s=0.5)
    assert heard[1 - silent][silent] is None and heard[1 - silent][1 - silent] == f"b{1 - silent}"


STORE = """
import datetime, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def test_exchange_when_the_store_dies(monkeypatch):
    """Catches a node lost in the middle of the node checks passed off as a defect, with torch's traceback."""
    host = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout is not None
        port = int(host.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=5))
        monkeypatch.setattr(store_module, "_agent_store", lambda: store)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        threading.Timer(0.5, host.kill).start()
        with pytest.raises(LostContact, match=r"^rank 1 lost contact with another rank while exchanging preflight/facts, after"):
            store_module.exchange("preflight/facts", "{}", 30.0)
    finally:
        host.kill()
        host.wait()


def test_absent_ranks_are_named(monkeypatch):
    """Catches a rank on the wrong machine, where not every machine has as many ranks, and one of which nobody knows it."""
    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "n1")
    first = LaunchEnvironment(0, 5, 0, 1)
    known = {0: None, 2: json.dumps({"host": "n2", "local": [1, 4]}), 3: json.dumps({"host": "n2", "local": [1, 4]})}
    assert meeting.name_ranks([1, 4], known, first) == "rank 1 on n2, rank 4 on a machine from which none has come"
    assert meeting.name_ranks([1], {}, LaunchEnvironment(0, 5, 0, 2)) == "rank 1 on n1"


class DeadStore:
    def add(self, *args):
        raise RuntimeError("failed to recv, got 0 bytes")

    set = wait = add


def no_store():
    """It cannot be reached any more."""


@pytest.mark.parametrize(
    ("store", "local_rank", "shared", "said"),
    [
        *((DeadStore, "0", True, 1), (DeadStore, "3", True, 0), (DeadStore, "3", False, 1)),
        *((no_store, "0", True, 1), (no_store, "3", True, 0), (no_store, "3", False, 0)),
    ],
)
def test_report_when_the_store_is_gone(store, local_rank, shared, said, monkeypatch, capsys):
    """Catches a traceback in place of the sentence when the store's host has gone first, one from each of 64 ranks, and none."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setattr(store_module, "_error_store", store)
    store_module.report_once("what to do", shared=shared)
    assert capsys.readouterr().err.count("ddp_eval: what to do") == said


def make_world(**more):
    return World(0, 0, 2, torch.device("cpu"), **more)


@pytest.mark.parametrize(
    ("borrowed", "error", "sent"),
    [(False, UserError, 0), (False, RuntimeError, 0), (True, UserError, 1), (False, None, 1)],
)
def test_leaders_error_waits_for_nobody(borrowed, error, sent, monkeypatch):
    """Catches a user's mistake told when the slowest rank has loaded; a caller's group must work on, so there it must be sent."""
    messages = []
    monkeypatch.setattr(protocol.collectives, "send_message", lambda world, message: messages.append(message))

    def lead():
        with Followers(make_world(borrowed=borrowed)):
            if error:
                raise error("a mistake")

    if error:
        with pytest.raises(error):
            lead()
    else:
        lead()
    assert len(messages) == sent


@pytest.mark.parametrize("error", [LostContact("rank 1 is gone"), UserError("rank 0 ran out of memory")])
def test_trial_that_fails_of_something_else(error):
    """Catches a dead rank or a full device passed off as a model that cannot take packs."""

    def fail(plan):
        raise error

    requests = requests_from_lists([[1, 2, 3], [1, 2, 4]], [1, 1])
    with pytest.raises(type(error)):
        self_check.check_packs(UNUSED, requests, fail)


def test_journal_directory_that_shows_late(tmp_path):
    """Catches a node whose packs are kept nowhere, all run long, because NFS showed the new directory a second late."""
    directory = tmp_path / "journal"
    threading.Timer(0.5, directory.mkdir).start()
    world = World(1, 0, 2, torch.device("cpu"))
    journals = Journals(directory, b"k" * 32)
    work = Work(UNUSED, np.zeros(0, dtype=np.int64), "work", journals)
    with execute._own_journal(world, work, journals) as own:
        assert own is not None and own.path == Path(directory / "work-00001.journal")


def test_closing_of_the_journal_has_a_step(tmp_path, monkeypatch):
    """Catches a rank whose disk hangs in the last fsync, and which is exempt from --timeout: rank 0 is blamed in its place."""
    steps = []
    monkeypatch.setattr(execute.journal.Journal, "close", lambda own: steps.append(watchdog._place.step))
    monkeypatch.setattr(watchdog, "_place", watchdog._Place(watchdog.WAITING))
    work = Work(UNUSED, np.zeros(0, dtype=np.int64), "work", Journals(tmp_path, b"k" * 32))
    with execute._own_journal(make_world(), work, work.journals):
        pass
    assert steps == ["closing the journal"] and watchdog._place.step == watchdog.WAITING


def test_leader_that_asks_for_reports_waits(monkeypatch):
    """Catches the leader blamed for a rank that does not answer."""
    steps = []
    monkeypatch.setattr(watchdog, "_place", watchdog._Place("writing the results"))
    monkeypatch.setattr(protocol.collectives, "send_message", lambda world, message: steps.append(watchdog._place.step))
    monkeypatch.setattr(
        protocol.collectives, "gather_reports", lambda world, report: steps.append(watchdog._place.step) or [report]
    )
    Followers(make_world()).collect_telemetry()
    assert steps == [watchdog.WAITING] * 2 and watchdog._place.step == "writing the results"
