"""Nobody waits in silence: for another rank, a lock, a file system, a download, or a task's own code."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from typing import Any

import pytest
from launch import launch, launching
from places import PROGRAMS

from ddp_eval import demo
from ddp_eval.distributed import meeting, watchdog
from ddp_eval.distributed.launch_environment import LaunchEnvironment
from ddp_eval.errors import UserError
from ddp_eval.output import lock

NOTICE_S = 1.0  # as in waiting_main.py, whose import would hide lm_eval's tasks from every test in this process

MAIN = (str(PROGRAMS / "waiting_main.py"),)
DEMO = ("--model_args", "pretrained=demo", "--tasks", "demo_lambada", "--limit", "2", "--device", "cpu")
HOST = re.escape(socket.gethostname())

UTILS = """\
import re, time
import datasets

def load(**settings):
    rows = [{"question": f"{n} + 1 =", "answer": f" {n + 1}"} for n in range(3)]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))

def never(doc):
    while doc["question"].startswith("1"):
        pass
    return doc["question"]

def never_by_regex(doc):  # it lets no other thread run
    if doc["question"].startswith("1"):
        re.match(r"(x+x+)+y", "x" * 60)
    return doc["question"]

def slow(doc):
    time.sleep(1.5)
    return doc["question"]

def no_results(doc, results):
    never(doc)
    return {"acc": 1.0}

def slow_load(**settings):
    time.sleep(3)
    return load()
"""
TASK = """\
task: {name}
custom_dataset: !function utils.{load}
output_type: loglikelihood
test_split: test
doc_to_text: {text}
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
{more}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks whose code takes its time."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "utils.py").write_text(UTILS)
    plain = '"{{question}}"'
    endless = "{% if question[0] == '1' %}{% for i in range(10**12) %}{% endfor %}{% endif %}{{question}}"
    for name, load, text, more in (
        ("code", "load", "!function utils.never", ""),
        ("regex", "load", "!function utils.never_by_regex", ""),
        ("template", "load", json.dumps(endless), ""),
        ("plain", "load", plain, ""),
        ("results", "load", plain, "process_results: !function utils.no_results"),
        ("slow", "load", "!function utils.slow", ""),
        ("slow_data", "slow_load", plain, ""),
    ):
        (place / f"{name}.yaml").write_text(TASK.format(name=name, load=load, text=text, more=more))
    return place


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def notices(finished):
    """What was said of waiting: the lines, without the seconds."""
    lines = [line for line in finished.stderr.split("\n") if line.endswith(" s so far")]
    return [line.removeprefix("ddp_eval: ").rpartition(", ")[0] for line in lines]


def test_variables_left_over_in_a_shell():
    """Public report: a process alone that stands for an hour because of WORLD_SIZE of an earlier session. Catches its silence,
    and a sentence that does not say which variables make it wait."""
    port = str(free_port())
    left_over: Any = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    finished = launch(0, "none", *DEMO, "--timeout", "4", program=MAIN, timeout_s=60, **left_over)
    assert finished.returncode == 2 and not finished.foreign_frames(), str(finished)
    (sentence,) = finished.sentences()
    assert "rank 3 on " in sentence and " did not come to join the process group" in sentence, sentence
    first, *more = notices(finished)
    assert 1 <= len(more) <= 2 and set(more) == {first}, str(finished)  # after 1, 2 and perhaps 4 s, the timeout
    assert first.startswith("waiting for rank 1 on a machine from which none has come, rank 2 on "), first
    for text in (first, sentence):
        assert "WORLD_SIZE=4 and RANK=0" in text and "`env -u WORLD_SIZE -u RANK`" in text, text


@pytest.fixture
def mute():
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
    for thread in threading.enumerate():  # inside of torch, they would abort the process at its end
        if thread.name == "ddp_eval store":
            thread.join(20)


def test_nobody_at_the_address():
    """Catches a rank whose error nobody prints, since it is rank 0 that usually does: ranks with different MASTER_PORT."""
    port = str(free_port())
    variables: Any = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    finished = launch(0, "none", *DEMO, "--timeout", "3", program=MAIN, timeout_s=60, **variables)
    assert finished.returncode == 2 and not finished.foreign_frames(), str(finished)
    (sentence,) = finished.sentences()
    assert f"rank 0 at 127.0.0.1:{port} (Connection refused) did not answer within 3 s" in sentence, sentence
    assert notices(finished)[0].startswith(f"waiting for rank 0 at 127.0.0.1:{port} ("), str(finished)


@pytest.fixture
def meet(monkeypatch):
    """meet(rank, address, port) -> the error of one of two ranks started by hand, of which the other does not come."""
    monkeypatch.setattr(watchdog, "NOTICE_S", 0.2)
    monkeypatch.setattr(meeting, "_HANDSHAKE_S", 1.0)
    monkeypatch.setattr(meeting, "_CONNECT_S", 1.0)
    monkeypatch.setattr(meeting, "_stores", {})

    def meet(rank, address, port):
        with pytest.raises(UserError) as caught:
            meeting.meet(LaunchEnvironment(rank, 2, 0, None, address, port), 1.0)
        return str(caught.value)

    return meet


def test_address_that_is_wrong(mute, meet, capsys):
    """Catches a rank that waits for ever where something else listens (as torch does), and silence where nobody can."""
    assert f"what listens at 127.0.0.1:{mute} (MASTER_ADDR, MASTER_PORT) is no store of torch's, or rank 0 is frozen" in meet(
        1, "127.0.0.1", mute
    )
    assert capsys.readouterr().err == ""
    assert "rank 0 at no.such.host.invalid:2 (" in meet(1, "no.such.host.invalid", 2)
    assert "waiting for rank 0 at no.such.host.invalid:2 (" in capsys.readouterr().err
    assert f"rank 0 cannot open port {mute} (MASTER_PORT): another program listens there" in meet(0, "127.0.0.1", mute)
    assert "and does not find it at 192.0.2.1: MASTER_ADDR must be an address of the machine" in meet(0, "192.0.2.1", free_port())


def test_ranks_that_contradict_each_other(monkeypatch):
    """Catches two processes with the same RANK, one of which then hangs, and ranks that differ in WORLD_SIZE."""
    port = free_port()
    outcomes: list[Any] = []
    monkeypatch.setattr(meeting, "_stores", {})
    store = meeting.open_store(LaunchEnvironment(0, 2, 0, None, "127.0.0.1", port), 5.0)

    def join(rank, world_size):
        try:
            monkeypatch.setattr(meeting, "open_store", lambda launch, timeout_s: store)
            outcomes.append(meeting.meet(LaunchEnvironment(rank, world_size, 0, None, "127.0.0.1", port), 5.0))
        except UserError as error:
            outcomes.append(str(error))

    for ranks, sentence in (
        ([(0, 2), (1, 2), (1, 2)], "two processes have RANK=1"),
        ([(0, 2), (1, 3)], "WORLD_SIZE is 2 on rank 0 and 3 on rank 1"),
    ):
        outcomes.clear()
        threads = [threading.Thread(target=join, args=one) for one in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert any(sentence in str(outcome) for outcome in outcomes), outcomes


@pytest.mark.slow
def test_rank_0_that_is_stopped(tmp_path):
    """Catches a launch by hand whose other ranks wait for ever: rank 0, which keeps the store, is stopped in the run."""
    common: dict[str, Any] = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = ("directory", *DEMO, "-o", tmp_path / "run", "--timeout", "6")
    with (
        launching(0, *flags, program=MAIN, RANK="0", LOCAL_RANK="0", **common) as leader,
        launching(0, *flags, program=MAIN, RANK="1", LOCAL_RANK="1", **common) as other,
    ):
        deadline = time.monotonic() + 60
        while not any("run directory" in line for _, line in leader._stderr) and time.monotonic() < deadline:
            time.sleep(0.05)
        leader.process.send_signal(signal.SIGSTOP)
        finished = other.finish(60)
    assert finished.returncode == 1 and not finished.foreign_frames(), str(finished)
    assert finished.sentences()[0].startswith("ddp_eval: rank 0 has shown no sign of life for 6 s: the run ends"), str(finished)
    silent = "rank 0 gives no sign of life: the store that it keeps for all ranks does not answer"
    assert silent in notices(finished), str(finished)


def test_rank_that_starts_late():
    """Catches a run that gives up on a rank that is only slow to start, and one that waits for it in silence."""
    finished = launch(2, "late", *DEMO, program=MAIN)
    assert finished.returncode == 0 and not finished.sentences(), str(finished)
    assert re.match(rf"waiting for rank 1 on {HOST} to join \(at most \d+ s\)", notices(finished)[0]), str(finished)


@pytest.mark.slow
def test_rank_that_loads_slowly():
    """Catches a leader that waits in silence, or that blames no rank."""
    finished = launch(2, "loads_slowly", *DEMO, program=MAIN)
    assert finished.returncode == 0 and not finished.sentences(), str(finished)
    waiting = rf"waiting for rank 1 on {HOST} \(loading the model\b"
    assert any(re.match(waiting, line) for line in notices(finished)), str(finished)


@pytest.mark.parametrize(
    ("task", "step", "ranks"),
    [
        ("results", "computing the metrics", 0),
        ("regex", "building the prompts", 0),
        pytest.param("template", "building the prompts", 0, marks=pytest.mark.slow),
        pytest.param("code", "building the prompts", 2, marks=pytest.mark.slow),
    ],
)
def test_task_whose_code_never_ends(task, step, ranks, tasks):
    """Catches a run that ends by --timeout without the task and the document that it hung in, or never ends: a regular expression
    lets no other thread run."""
    flags = ("--model_args", "pretrained=demo", "--include_path", tasks, "--tasks", "plain", task)
    finished = launch(ranks, "impatient", *flags, "--device", "cpu", program=MAIN, timeout_s=90)
    assert finished.returncode == 1 and not finished.foreign_frames(), str(finished)
    (sentence,) = finished.sentences()
    place = rf"{step} \(task {task}, document 1\)"
    end = "look after the task's templates and code, then start it again, or give a longer --timeout"
    assert re.match(rf"ddp_eval: rank 0 on {HOST} has shown no progress for \d+ s while {place}: the run ends; {end}", sentence)
    assert any(re.match(f"still {place}", line) for line in notices(finished)), str(finished)


def test_leader_of_a_callers_group_that_never_comes_back(tasks):
    """Catches ranks of a training run that wait for a day for one that can say nothing any more."""
    program = (str(PROGRAMS / "stuck_leader_main.py"),)
    finished = launch(2, tasks, program=program, timeout_s=60)
    assert finished.elapsed_s < 40, str(finished)
    sentence = (tasks / "1.txt").read_text()
    expected = (
        r"rank 1 waits no longer: rank 0 has shown no sign of life for [4-9] s \(last: .+\); look after its machine and the "
    )
    assert re.match(expected + "tasks' own code, or give the process group a longer timeout$", sentence), sentence


@pytest.mark.slow
def test_chat_template_that_never_ends(tmp_path):
    """Catches the same in the tokenizer's chat template. (Its sandbox refuses one range of more than 100,000 numbers.)"""
    model = shutil.copytree(demo.MODEL_PATH, tmp_path / "model")
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (model / "chat_template.jinja").write_text(endless)
    flags = ("--model_args", f"pretrained={model}", "--tasks", "demo_lambada", "--apply_chat_template")
    finished = launch(0, "impatient", *flags, "--device", "cpu", program=MAIN, timeout_s=90)
    assert finished.returncode == 1 and not finished.foreign_frames(), str(finished)
    (sentence,) = finished.sentences()
    assert "while building the prompts (task demo_lambada, document 0): the run ends" in sentence, sentence


@pytest.mark.slow
def test_ctrl_c_in_a_regular_expression(tasks):
    """Catches a process that only SIGKILL ends: its signal handler waits for a thread that never gets its turn."""
    flags = ("--model_args", "pretrained=demo", "--include_path", tasks, "--tasks", "regex", "--device", "cpu")
    with launching(0, "none", *flags, program=MAIN) as running:
        deadline = time.monotonic() + 60
        while not any("document 1" in line for _, line in running._stderr) and time.monotonic() < deadline:
            time.sleep(0.1)
        running.process.send_signal(2)
        finished = running.finish(20)
    assert finished.returncode == 130, str(finished)
    assert "stopped by SIGINT while building the prompts (task regex, document 1)" in finished.sentences()[0], str(finished)


@pytest.mark.slow
def test_leader_that_takes_long_speaks_alone(tasks):
    """Catches ranks that all tell of the same wait, a line for each document, and intervals that do not grow."""
    flags = ("--model_args", "pretrained=demo", "--include_path", tasks, "--tasks", "slow", "slow_data", "--device", "cpu")
    finished = launch(2, "none", *flags, program=MAIN)
    assert finished.returncode == 0 and not finished.sentences(), str(finished)
    building = [line for line in notices(finished) if line.startswith("still building the prompts (")]
    assert 2 <= len(building) <= 5, str(finished)  # after 1, 2, 4 and 8 s of about 7.5, or more on a busy machine
    assert any("task slow" in line for line in building), str(finished)
    assert not any(line.startswith("waiting for rank 0") for line in notices(finished)), str(finished)


def test_file_system_that_does_not_answer(tmp_path):
    """Catches a run that stands for ever in front of a directory on a dead file server."""
    finished = launch(0, "directory", *DEMO, "-o", tmp_path / "run", "--timeout", "3", program=MAIN, timeout_s=60)
    assert finished.returncode == 1 and not finished.foreign_frames(), str(finished)
    (sentence,) = finished.sentences()
    assert f"while looking into the run directory {tmp_path}/run: the run ends" in sentence, sentence
    assert notices(finished)[0] == f"still looking into the run directory {tmp_path}/run", str(finished)


@pytest.mark.slow
def test_file_system_that_answers_late(tmp_path):
    """Catches a run that a slow file server ends though it comes within --timeout."""
    finished = launch(0, "directory_later", *DEMO, "-o", tmp_path / "run", program=MAIN, timeout_s=90)
    assert finished.returncode == 0 and not finished.sentences(), str(finished)
    assert notices(finished)[0] == f"still looking into the run directory {tmp_path}/run", str(finished)


def test_lock_of_another_machine(tmp_path):
    """Catches 25 s of silence in front of a lock whose holder cannot be seen from here."""
    (tmp_path / "run").mkdir()
    held = {"host": "far", "pid": 7, "born": "1", "machine": "elsewhere", "token": "0" * 32}
    path = tmp_path / "run" / ".ddp_eval.lock"
    path.write_text(json.dumps(held))
    touching = threading.Event()

    def touch():
        while not touching.wait(3):  # a file system that shows it late
            os.utime(path)

    thread = threading.Thread(target=touch)
    with launching(0, "none", *DEMO, "-o", tmp_path / "run", program=MAIN) as running:
        deadline = time.monotonic() + 60
        while not any("held by" in line for _, line in running._stderr) and time.monotonic() < deadline:
            time.sleep(0.1)
        thread.start()
        finished = running.finish(30)
        touching.set()
        thread.join()
    assert finished.returncode == 2, str(finished)
    assert "another run is at work in --output_path" in finished.sentences()[0], str(finished)
    assert any(f"{path} is held by process 7 on far: looking whether" in line for line in notices(finished)), str(finished)


def test_dangling_lock(tmp_path):
    """Catches a lock that is a link to nothing: it can neither be made nor read, and was looked at without end."""
    (tmp_path / "lock").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"lock must be a lock file of ddp_eval, and is a symbolic link: remove it$"):
        lock.Lock(tmp_path / "lock", lambda: None).acquire()


class _Silent(http.server.BaseHTTPRequestHandler):
    """A hub that has the model, and never sends what it was asked for."""

    def do_HEAD(self):
        if self.path == "/":
            self.send_response(200)
            self.end_headers()
        else:
            time.sleep(60)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_download_that_does_not_come(tmp_path):
    """Catches a run that says nothing while it waits for a hub, and does not name it at the end."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        variables: Any = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "60"}
        flags = ("--model_args", "pretrained=lab/model", "--tasks", "demo_lambada", "--timeout", "6", "--device", "cpu")
        finished = launch(0, "none", *flags, program=MAIN, timeout_s=60, **variables)
    finally:
        server.shutdown()
        server.server_close()
    assert finished.returncode == 1, str(finished)
    (sentence,) = finished.sentences()
    place = f"reading the model's config and tokenizer (lab/model, from the cache or {address})"
    assert f"while {place}" in sentence, sentence
    assert f"still {place}" in notices(finished), str(finished)


def test_intervals_grow():
    """Catches a line every few seconds for hours, and none for the first minutes."""
    patience = watchdog.Patience()
    due = [second for second in range(4000) if patience.is_due(second)]
    assert due == [20, 40, 80, 160, 320, 640, 1280, 2560]


def test_rank_that_is_frozen_is_named(monkeypatch, capsys):
    """Catches a leader whose process is stopped or holds the interpreter: nobody else says a word until --timeout."""
    monkeypatch.setattr(watchdog, "NOTICE_S", NOTICE_S)
    store, over = _Store(), threading.Event()
    store.set("ddp_eval/beat/0", json.dumps([3, "n1", "building the prompts (task t, document 4)"]))
    for rank in (1, 2):
        beats = watchdog._Beats(rank, 3, store, 60.0, None, over)
        for _ in range(3):
            beats._check_peers()
            beats._looked -= 2
    said = "rank 0 on n1 gives no sign of life (last: building the prompts (task t, document 4)), 4 s so far"
    assert [line for line in capsys.readouterr().err.splitlines() if "sign of life" in line][-1].endswith(said)


class _Store:
    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)
