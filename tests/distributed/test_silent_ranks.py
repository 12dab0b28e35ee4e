"""Who waits says so, and not for ever: stores that do not answer, steps before ranks have met, who reports what."""

from __future__ import annotations

import datetime
import io
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import torch.distributed as dist

from ddp_eval import __main__ as command
from ddp_eval.config import Config
from ddp_eval.distributed import launch_environment, meeting, watchdog, world
from ddp_eval.distributed import store as store_module
from ddp_eval.distributed.launch_environment import LaunchEnvironment
from ddp_eval.distributed.watchdog import Watch, _Beats, _Place
from ddp_eval.errors import UserError
from ddp_eval.run import preflight

TWO_RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class Left(Exception):
    """This process would have ended here."""


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """The step of this process, which no other test is to see."""
    monkeypatch.setattr(watchdog, "_place", _Place())
    monkeypatch.setattr(watchdog, "_directory", None)


@pytest.fixture
def leaving(monkeypatch):
    """Leaving raises Left with the exit code and the reason."""

    def leave(code, state, reason, first_hand=True):
        raise Left(code, reason)

    monkeypatch.setattr(watchdog, "leave", leave)


class StoppedStore(dist.HashStore):
    """A store whose host is stopped by SIGSTOP once `stopped` is set: no question is answered any more."""

    def __init__(self):
        super().__init__()
        self.stopped, self.over = threading.Event(), threading.Event()

    def check(self, keys):
        if self.stopped.is_set():
            self.over.wait(30)
        return super().check(keys)


@pytest.fixture
def stopped():
    store = StoppedStore()
    store.stopped.set()
    yield store
    store.over.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ddp_eval "):
            thread.join(20)


def test_rank_0_stopped_while_ranks_meet(stopped, monkeypatch):
    """Catches a rank that waits for ever, and in silence, for the store of a rank 0 that is stopped."""
    monkeypatch.setattr(meeting, "_SILENT_S", 0.3)
    said, started = [], time.monotonic()
    assert meeting.exchange_through(stopped, 1, 2, "facts", "b", 1.5, lambda *notice: said.append(notice)) == [None, "b"]
    assert time.monotonic() - started < 10 and said[0][0] == [0]


def test_what_is_known_of_a_store_that_stops():
    """Catches ranks that have come called absent by a rank 0 whose store falls silent."""
    store, heard = StoppedStore(), dict[int, str]()
    thread = threading.Thread(target=meeting.exchange_through, args=(store, 1, 3, "facts", "b", 3.0))
    thread.start()
    try:
        found = meeting.exchange_through(store, 0, 3, "facts", "a", 2.0, lambda *_: store.stopped.set() if heard else None, heard)
    finally:
        store.over.set()
        thread.join()
    assert found == ["a", "b", None]


def test_exchange_that_is_interrupted_ends(monkeypatch):
    """Catches a thread that goes on to speak of ranks it waits for, after Ctrl-C in a notebook."""

    def interrupt(limit_s, make, on_wait):
        def run():
            with pytest.raises(TimeoutError):
                make()

        threads.append(threading.Thread(target=run))
        threads[0].start()
        raise KeyboardInterrupt

    threads: list[threading.Thread] = []
    monkeypatch.setattr(meeting, "within", interrupt)
    with pytest.raises(KeyboardInterrupt):
        meeting.exchange_through(dist.HashStore(), 1, 2, "facts", "b", 60.0)
    threads[0].join(10)
    assert not threads[0].is_alive()


def make_beats(monkeypatch, rank, timeout_s=60.0, **variables):
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return _Beats(rank, 3, dist.HashStore(), timeout_s, None, threading.Event())


@pytest.mark.parametrize(
    ("rank", "variables", "host", "speaks"),
    [
        (1, {"LOCAL_RANK": "1"}, "rank 0", True),
        (2, {"LOCAL_RANK": "2"}, "rank 0", False),
        (2, {"LOCAL_RANK": "0"}, "rank 0", True),
        (0, {"LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "torchrun", True),
        (1, {"LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "torchrun", False),
    ],
)
def test_store_that_does_not_answer(rank, variables, host, speaks, leaving, monkeypatch, capsys):
    """Catches rank 0 stopped in the middle of a run, for which all others wait for ever; and each of them speaking of it."""
    beats = make_beats(monkeypatch, rank, **variables)
    beats._question = 7
    with pytest.raises(Left) as left:
        for _ in range(100):
            beats.check_store(2.0)
    said = capsys.readouterr().err.splitlines()
    end = f"{host} has shown no sign of life for 62 s: the run ends; look after its machine, then start it again"
    assert left.value.args == (1, end)
    silent = f"ddp_eval: {host} gives no sign of life: the store that it keeps for all ranks does not answer"
    assert said == ([f"{silent}, {seconds} s so far" for seconds in (20, 40)] + [f"ddp_eval: {end}"] if speaks else [])


def test_store_that_answers_slowly(monkeypatch, leaving, capsys):
    """Catches a run that is ended since the store has many questions to answer, or because there is none for hours."""
    beats = make_beats(monkeypatch, 1)
    for question in range(1, 200):
        beats._question = question
        beats.check_store(2.0)
        beats.check_store(2.0)
    beats._question = 0
    for _ in range(100):
        beats.check_store(2.0)
    assert capsys.readouterr().err == ""


def test_beats_count_their_questions(monkeypatch):
    """Catches beats that are watched from the second on: rank 0 may be stopped before the first."""
    beats, asked = make_beats(monkeypatch, 0), []
    beats._store = types.SimpleNamespace(
        set=lambda key, value: asked.append(beats._question),
        check=lambda keys: asked.append(beats._question) or beats._stopped.set(),
    )
    beats._run()
    assert asked == [1, 2, 3] and beats._question == 0


@pytest.mark.parametrize(("rank", "limit_s"), [(0, 60), (3, 60 + 150)])
def test_step_before_ranks_have_met(rank, limit_s, monkeypatch):
    """Catches a step with no time-out under torchrun before the ranks have met: a dead file server, which hangs them all. And
    time in which the process was stopped taken for time of its step."""
    monkeypatch.setenv("RANK", str(rank))
    watching, now = Watch(), [1000.0]
    watching.timeout_s = 60.0
    seconds = iter([3600.0, *[2.0] * 200])
    monkeypatch.setattr(watchdog, "_place", _Place("importing torch", since=1000.0))
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    joined = types.SimpleNamespace(wait=lambda _: now.__setitem__(0, now[0] + next(seconds)))
    monkeypatch.setattr(watching, "_joined", joined)

    def leave_hanging(other, host, step, late_s, report):
        raise Left(other, step, late_s)

    monkeypatch.setattr(watchdog, "_leave_hanging", leave_hanging)
    with pytest.raises(Left) as left:
        watching._await_joining()
    assert left.value.args == (rank, "importing torch", limit_s + 2)


def test_steps_on_the_way_to_the_others(monkeypatch):
    """Catches node checks and a look for the device, which a driver or a disk may stop, under a step that has no time-out."""
    steps = []

    def note(*args, **options):
        steps.append(watchdog._place.step)
        raise Left

    monkeypatch.setattr(world, "choose_device", note)
    monkeypatch.setattr(preflight, "_leave_marker", note)
    monkeypatch.setattr(preflight.store, "exchange", note)
    watchdog.step(watchdog.WAITING)
    for call in (world.join_group, lambda: preflight.check_nodes(Config()), lambda: preflight._exchange("facts", {})):
        with pytest.raises(Left):
            call()
    assert steps == ["looking for this rank's device", "checking this node", watchdog.WAITING]


def test_store_of_torchruns_that_a_node_does_not_reach(monkeypatch):
    """Catches a node that is said to have heard nothing from any rank for 300 s, after no second."""
    monkeypatch.setattr(store_module, "_agent_store", lambda: None)
    for name, value in TWO_RANKS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        meeting.NotMet, match=r"^rank 1 on .* cannot reach torchrun's store at 127.0.0.1:29500 for preflight/facts: "
    ):
        preflight._exchange("facts", {})


@pytest.mark.parametrize(
    ("launch", "speaks"),
    [
        (LaunchEnvironment(2, 4, 2), True),
        (LaunchEnvironment(1, 4, 1, by_torchrun=True), True),
        (LaunchEnvironment(2, 4, 2, by_torchrun=True), False),
        (LaunchEnvironment(2, 4, 0, by_torchrun=True), True),
    ],
)
def test_who_says_for_whom_it_waits(launch, speaks):
    """Catches variables left over with RANK=2, which make a process alone wait in silence."""
    assert meeting._speaks(launch) is speaks


def test_rank_that_rank_0_does_not_count(monkeypatch):
    """Catches a rank beyond rank 0's WORLD_SIZE, which waits for the whole time-out: nobody there looks for its words."""
    store, launch = dist.HashStore(), LaunchEnvironment(2, 3, 0, None, "127.0.0.1", 29500)
    leader = threading.Thread(target=meeting.exchange_through, args=(store, 0, 2, "ddp_eval/join", "{}", 1.0))
    leader.start()
    monkeypatch.setattr(meeting, "open_store", lambda launch, timeout_s: store)
    started = time.monotonic()
    with pytest.raises(
        meeting.NotMet, match=r"^WORLD_SIZE is 3 on rank 2 and 2 on rank 0; the variables WORLD_SIZE=3 and RANK=2"
    ):
        meeting.meet(launch, 30.0)
    assert time.monotonic() - started < 10
    leader.join()


def test_port_that_takes_privileges(monkeypatch):
    """Catches MASTER_PORT=80 blamed on MASTER_ADDR."""

    def refuse(*args, **options):
        raise RuntimeError("The server socket has failed to bind. port: 80, useIpv6: false, code: -13, name: EACCES, message: …")

    monkeypatch.setattr(meeting.dist, "TCPStore", refuse)
    with pytest.raises(meeting.NotMet, match=r"^rank 0 may not open port 80 \(MASTER_PORT\): give one above 1023 to all ranks$"):
        meeting._host_store(LaunchEnvironment(0, 2, 0, None, "127.0.0.1", 80))


@pytest.mark.parametrize("in_parent", [True, False])
def test_way_out_of_variables_of_torchruns(in_parent):
    """Catches advice that leaves TORCHELASTIC_RUN_ID in the shell, and advice about a shell where torchrun has set them."""
    code = "from ddp_eval.distributed import launch_environment; print(launch_environment.read().way_out())"
    variables = {**TWO_RANKS, "TORCHELASTIC_RUN_ID": "left over"}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    start = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], env={{**os.environ, **{variables}}})"
    parent = {**environment, **(variables if in_parent else {})}
    said = subprocess.run([sys.executable, "-c", start], env=parent, capture_output=True, text=True, check=True).stdout.strip()
    assert said.endswith("start with `env -u WORLD_SIZE -u RANK -u TORCHELASTIC_RUN_ID` in front") if in_parent else said == ""


@pytest.mark.parametrize(("by_torchrun", "said"), [(False, 1), (True, 0)])
def test_mistake_on_rank_1_by_hand(by_torchrun, said, monkeypatch, capsys):
    """Catches a mistyped flag with RANK=1 in the environment: exit code 2 and not a word."""
    for name, value in {**TWO_RANKS, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setattr(store_module, "_error_store", lambda: None)
    store_module.report_once("what to do")
    assert capsys.readouterr().err.count("ddp_eval: what to do\n") == said


def test_second_command_of_a_launch_that_fails(monkeypatch, capsys):
    """Catches its error unsaid, since the store still knows who has said that of the first; and one error said by two ranks."""
    store = dist.HashStore()
    monkeypatch.setattr(store_module, "_error_store", lambda: store)
    monkeypatch.setattr(store_module, "process_age_s", lambda: 10.0)
    for message in ("first", "first"):
        store_module.report_once(message)
    monkeypatch.setattr(store_module, "process_age_s", lambda: -10.0)  # a process that starts later
    monkeypatch.setattr(store_module, "_CLAIM_S", 0.2)
    store_module.report_once("second")
    assert capsys.readouterr().err == "ddp_eval: first\nddp_eval: second\n"


def test_mistakes_of_commands_for_rank_0_alone(monkeypatch, capsys, leaving):
    """Catches an error of `compare` that a launch's store keeps from being said."""
    monkeypatch.setattr(sys, "argv", ["ddp_eval", "compare", "/no/such/run", "/no/other"])
    monkeypatch.setattr(command, "_quiet_down", lambda: None)
    monkeypatch.setattr(Watch, "start", lambda watching: None)
    monkeypatch.setattr(store_module, "report_once", lambda *args, **options: pytest.fail("asked a store"))
    with pytest.raises(Left):
        command.main()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("ddp_eval: ") and "/no/such/run" in sentence


@pytest.mark.parametrize(("code", "speaks"), [(0, True), (None, False)])
def test_reproduce_says_that_it_compares(code, speaks, monkeypatch, capsys):
    """Catches the comparison of two large runs in silence."""
    monkeypatch.setattr(watchdog, "NOTICE_S", 0.05)
    monkeypatch.setattr(sys, "argv", ["ddp_eval", "reproduce", "run"])
    monkeypatch.setattr(Watch, "start", lambda watching: None)
    monkeypatch.setattr(command, "_quiet_down", lambda: None)
    monkeypatch.setattr(command, "_run", lambda evaluation, watching: None)
    evaluation = types.SimpleNamespace(conclude=lambda: time.sleep(0.3) or 0)
    module = types.SimpleNamespace(parse=lambda argv: evaluation)
    monkeypatch.setattr(command, "importlib", types.SimpleNamespace(import_module=lambda name: module))
    monkeypatch.setenv("RANK", "0" if speaks else "1")
    monkeypatch.setattr(command, "_check_launch", lambda: None)
    with pytest.raises(SystemExit):
        command.main()
    assert ("ddp_eval: still comparing the two runs, 0 s so far\n" in capsys.readouterr().err) is speaks


def test_sentences_in_evaluate(monkeypatch, capsys):
    """Catches the last step of a training loop's earlier call, hours ago, reported for this one; and ranks that all speak."""
    monkeypatch.setattr(watchdog, "NOTICE_S", 0.05)
    monkeypatch.setattr(watchdog, "_place", _Place("writing the results", began=time.monotonic() - 7200))
    with watchdog.speaking("rank 0", aloud=False):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
    with watchdog.speaking("rank 0"):
        time.sleep(0.2)
        watchdog.step(watchdog.WAITING)
        time.sleep(0.2)
    said = list(dict.fromkeys(capsys.readouterr().err.splitlines()))
    assert said == ["ddp_eval: still starting, 0 s so far", "ddp_eval: waiting for rank 0, 0 s so far"]


@pytest.mark.parametrize(("rank", "first_s"), [(0, 20), (1, 20), (2, 150)])
def test_who_says_that_ranks_have_not_called(rank, first_s, monkeypatch, capsys):
    """Catches a rank 2 that alone calls evaluate and says nothing; and 62 lines where rank 0 only comes half a minute later."""

    def exchange(store, rank, world_size, name, text, limit_s, notify):
        for waited_s in range(1, int(limit_s)):
            notify([0 if rank else 1], float(waited_s))
        return [text] * world_size

    monkeypatch.setattr(world, "exchange_through", exchange)
    monkeypatch.setattr(world, "group_timeout_s", lambda: 360.0)
    monkeypatch.setattr(world.dist.distributed_c10d, "_get_default_store", dist.HashStore)
    world.check_in(rank, 3, "ddp_eval.evaluate", {})
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"ddp_eval: rank {rank} is waiting for rank {0 if rank else 1} to call ddp_eval.evaluate too")
    assert first.endswith(f", {first_s} s so far")


@pytest.mark.parametrize("level", ["OFF", "DETAIL"])
def test_limits_of_the_group_for_messages(level, monkeypatch):
    """Catches a second group whose set-up may take 24 h, and messages that may not, as where torch wraps groups (DETAIL)."""
    made, changed = [], []
    monkeypatch.setattr(world.dist, "get_debug_level", lambda: dist.DebugLevel(int(getattr(dist.DebugLevel, level))))
    monkeypatch.setattr(world.dist, "new_group", lambda **options: made.append(options["timeout"]))
    monkeypatch.setattr(world.dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: changed.append(timeout))
    setup = datetime.timedelta(seconds=7)
    world._message_group(setup)
    assert [*made, *changed] == [setup, world.LEADER_TIMEOUT] if level == "OFF" else made == [world.LEADER_TIMEOUT]


def test_torch_takes_the_limit_of_messages(tmp_path):
    """Catches a release of torch in which the group for messages keeps the short time-out of its set-up."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = world._message_group(datetime.timedelta(seconds=7)).group
        assert group._get_backend(torch.device("cpu")).options._timeout == world.LEADER_TIMEOUT
    finally:
        dist.destroy_process_group()


class Writes(io.StringIO):
    """Every single write."""

    def __init__(self, terminal=False):
        super().__init__()
        self.all, self.terminal = [], terminal

    def write(self, text):
        self.all.append(text)
        return len(text)

    def isatty(self):
        return self.terminal


def test_sentences_are_one_write_each(monkeypatch):
    """Catches lines of two ranks that stand in one with PYTHONUNBUFFERED=1, and another user's text that a terminal obeys."""
    for terminal, start in ((False, ""), (True, "\r\x1b[K")):
        monkeypatch.setattr(sys, "stderr", stream := Writes(terminal))
        watchdog.notice("far\x1b]0;title\x07\nddp_eval: all is well", 3.0)
        watchdog.say("rank 1 has died")
        assert stream.all == [
            start + "ddp_eval: far\\x1b]0;title\\x07\\nddp_eval: all is well, 3 s so far\n",
            "ddp_eval: rank 1 has died\n",
        ]


FULL = """
import os, sys, time
from ddp_eval.distributed import watchdog
watchdog._TELL_S = 0.3
read, write = os.pipe()
os.set_blocking(write, False)
try:
    while True:
        os.write(write, b"x")
except BlockingIOError:
    os.set_blocking(write, True)
os.dup2(write, 2)
watching = watchdog.Watch()
watching.start()
watchdog.step("preparing to join the other ranks")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_sigterm_while_nobody_reads_stderr(unbuffered):
    """Catches a process that SIGTERM does not end while its stderr, a full pipe, is read by nobody."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([sys.executable, "-c", FULL], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == watchdog.EXIT_PREEMPTED
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("text", "rank"), [("+0", 0), ("-0", 0), ("+1", 1), (" 2 ", 2), ("", 0)])
def test_signs_of_ranks(text, rank, monkeypatch):
    """Catches RANK=+0 taken for another rank, which says nothing, where the launch takes it for 0."""
    monkeypatch.setenv("RANK", text)
    assert launch_environment.launch_rank() == rank == Watch().rank
    assert launch_environment.is_first() is (rank == 0)


def test_no_ranks_on_this_machine():
    """Catches LOCAL_WORLD_SIZE=0 that counts as not set in one place, and as 0 in another."""
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE must be 1 or more, got 0"):
        launch_environment.read({**TWO_RANKS, "LOCAL_WORLD_SIZE": "0"})
    assert launch_environment.read({**TWO_RANKS, "LOCAL_WORLD_SIZE": " "}).local_world_size is None
