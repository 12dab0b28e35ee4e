"""Files that are read back: whatever stands in one, it is read or refused in one sentence that names the file and the place."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import damage_files
import fuzz_files
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from places import ROOT

from ddp_eval.analysis import plots
from ddp_eval.analysis.difference import compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.verdict import format_comparison
from ddp_eval.cli import flags, reproduce
from ddp_eval.config import Config
from ddp_eval.engines.hf import checkpoint
from ddp_eval.errors import UserError, printable
from ddp_eval.output import directory as run_directory
from ddp_eval.output import journal, lock, status
from ddp_eval.system import read_back
from ddp_eval.system.files import replace_json

GIB = 2**30


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Real files of every kind, by a real tiny run."""
    place = tmp_path_factory.mktemp("files") / "source"
    fuzz_files.make_source(place, with_lm_eval=False)
    return place


@pytest.fixture(scope="module")
def child(source):
    """A process that reads what is damaged: one that hangs or dies fails its test and no other."""
    one = fuzz_files.Child(source)
    yield one
    one.close()


@pytest.fixture
def run(source, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    shutil.copytree(source / "run", tmp_path / "run")
    return tmp_path / "run"


def check(child, source: Path, work: Path, name: str, damaged: damage_files.Damage) -> str:
    """Read one damaged file; returns what came of it."""
    file = fuzz_files.find_file(source, fuzz_files.READERS[name])
    outcome, detail, _ = fuzz_files.read_damaged(child, name, source, file, damaged, work, seconds=30, most_bytes=GIB)
    assert outcome in ("read", "refused"), detail
    return outcome


NEVER_REFUSED = (
    "the index cache", "*.journal: resuming", "*.safetensors: which layers",
    "results.json: report of a sweep",  # which shows it among the models without scores
)  # fmt: skip


def is_slow(name: str) -> bool:
    return "report" in name  # draws four figures


@pytest.mark.parametrize("examples", [30, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("name", fuzz_files.READERS)
def test_damaged_files(name, examples, child, source, tmp_path):
    """Catches tracebacks, hangs, crashes and memory over 1 GiB: a public report saw 33 of some 100 shapes end in tracebacks."""
    reader = fuzz_files.READERS[name]
    data = (source / fuzz_files.find_file(source, reader)).read_bytes()
    outcomes = set()
    examples = examples // 5 if is_slow(name) else examples

    @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(rng=st.randoms(use_true_random=False))
    def damage_and_read(rng: random.Random) -> None:
        outcomes.add(check(child, source, tmp_path / "work", name, damage_files.damage(reader.content, data, rng)))

    damage_and_read()
    assert "refused" in outcomes or name in NEVER_REFUSED


@pytest.mark.parametrize("make", damage_files.ODD_KINDS, ids=range(len(damage_files.ODD_KINDS)))
def test_what_is_no_file(make, child, source, tmp_path):
    """Catches a pipe that is waited for, a device without an end, a link that leads to another user's files (public report)."""
    for name in fuzz_files.READERS:
        if not is_slow(name) and name != "*.safetensors: which layers":  # transformers has opened those before
            check(child, source, tmp_path / "work", name, make)


@pytest.mark.parametrize("name", fuzz_files.READERS)
def test_undamaged_files_are_read(name, child, source, tmp_path):
    """Catches a shape that refuses what the program itself writes."""
    data = (source / fuzz_files.find_file(source, fuzz_files.READERS[name])).read_bytes()
    assert check(child, source, tmp_path / "work", name, data) == "read" or name.startswith("manifest.json: reproduce")


def change(path: Path, *keys, to) -> None:
    """Put another value at a place in a JSON file."""
    value = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("file", "keys", "to", "sentence"),
    [
        ("manifest.json", ("ranks", "world_size"), "two", 'ranks.world_size must be a whole number, got "two"'),
        ("manifest.json", ("config", "samples"), {"t": [1, "x"]}, 'config.samples.t[1] must be a whole number, got "x"'),
        ("manifest.json", ("hardware", "gpus"), [{"name": 3}], "hardware.gpus[0].name must be text, got 3"),
        ("results.json", ("results",), [], "results must be an object, got []"),
        ("results.json", ("group_subtasks",), {"a": ["b"], "b": ["a"]}, "group_subtasks must not hold a group within itself"),
        ("results.json", ("results", "demo_mmlu_philosophy", "acc_stderr,none"), -1, "acc_stderr,none must be a number of 0"),
        ("results.json", ("ddp_eval", "not_finite"), {"t": {"requests": -1, "first": []}}, "t.requests must be 0 or more"),
    ],
)
def test_the_place_is_in_the_sentence(file, keys, to, sentence, run):
    """Catches `'str' object has no attribute 'get'` in place of what is wrong where."""
    change(run / file, *keys, to=to)
    with pytest.raises(UserError) as error:
        read_run(run)
    assert str(run / file) in str(error.value) and sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": 1', "is not JSON: Expecting ',' delimiter"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at 7"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8: byte 0xff at 0"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', 'has the key "b" twice in one object'),
        (b"[" * 100_000 + b"]" * 100_000, "is nested more than 100 levels deep"),
        (b"[" * 102 + b"]" * 102, "is nested more than 100 levels deep"),
        (b"9" * 5000, "holds a whole number of 5,000 digits"),
        (b"[" + b"{}," * 3_000_000 + b"{}]", "holds too many values"),
    ],
)
def test_text_that_is_no_json(text, sentence, tmp_path):
    """Catches RecursionError, the limit on digits, bytes of another encoding, and the last of two values taken in silence."""
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_back.read_json(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path}/a.json {sentence}")


def test_json_that_is_read(tmp_path):
    """Catches strictness where files of ours need none: NaN metrics, lone surrogates, a byte order mark of an editor."""
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [NaN, -Infinity, 1e999, "\\ud800"], "b": ' + b"[" * 99 + b"]" * 99 + b"}")
    value = read_back.read_json(path)
    assert np.isnan(value["a"][0]) and value["a"][1:] == [-np.inf, np.inf, "\ud800"]


def test_a_file_that_is_too_large(tmp_path):
    """Catches a file read whole before anybody asks how long it is."""
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="is too large: more than 67,108,864 bytes"):
        read_back.read_json(tmp_path / "a.json")


def test_links(tmp_path):
    """Catches secrets of the reader's own that a run directory has linked into a report, and links within it refused."""
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "run" / "there.json").write_text("{}")
    (tmp_path / "run" / "inside.json").symlink_to("there.json")
    (tmp_path / "run" / "outside.json").symlink_to("../secret")
    (tmp_path / "alias").symlink_to("run")
    for place in (tmp_path / "run", tmp_path / "alias"):
        assert read_back.read_json(place / "inside.json", within=place) == {}
        with pytest.raises(UserError, match=r"outside\.json must be a file in .*, and is a symbolic link to .*/secret"):
            read_back.read_json(place / "outside.json", within=place)
    assert read_back.read_json(tmp_path / "run" / "outside.json") == {}  # one that a command line names


DOUBLED = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi"))
YAML_ENDS = {
    "seed: 1\nseed: 2": "the key 'seed' stands twice",
    "limit: !!int ''": "holds a value that is not what its tag says",
    "limit: 2020-13-45": "holds a value that is not what its tag says",
    "tasks: " + "[" * 5000: "is nested more than 100 levels deep",
    "model_args: &m {more: *m}": "is nested more than 100 levels deep",
    "limit: 0x" + "f" * 5000: "holds a whole number of more than 300 digits",
    "tasks: !!python/object/apply:os.system [exit 3]": "could not determine a constructor",
    f"a: &a [x, x, x, x, x, x, x, x]\n{DOUBLED}": "holds too many values",
}


@pytest.mark.parametrize(("text", "sentence"), YAML_ENDS.items())
def test_yaml_that_never_ends(text, sentence, tmp_path):
    """Catches aliases that multiply or turn back on themselves, and what PyYAML raises besides its own errors."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        flags.parse(["--config", str(tmp_path / "a.yaml")])
    assert str(tmp_path / "a.yaml") in str(error.value) and sentence in str(error.value)


def parquet(path: Path, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"doc_id": pyarrow.array([0, -1])}, "column doc_id must be 0 to 2^53, got -1 in row 1"),
        ({"doc_id": pyarrow.array([0, None])}, "column doc_id must have a value in each row, and 1 rows have none"),
        ({"doc_id": pyarrow.array(["0", "1"])}, "column doc_id must be of the type int64, got string"),
        ({"idx": pyarrow.array([0, 1])}, "column idx must be of the type int32, got int64"),
        ({"task": pyarrow.array([b"\xff", b"a"]).view(pyarrow.string())}, "Invalid UTF8"),
        ({"is_greedy": None}, "has no column is_greedy"),
        ({"doc_id": pyarrow.array([1, 1])}, "request 0 of document 1 is there twice in"),
    ],
)
def test_other_tables(columns, sentence, run):
    """Catches other columns, types and rows taken for scores."""
    scores = {
        "task": pyarrow.array(["t", "t"]), "doc_id": pyarrow.array([0, 1]), "idx": pyarrow.array([0, 0], pyarrow.int32()),
        "loglikelihood": pyarrow.array([-1.0, -2.0]), "is_greedy": pyarrow.array([True, None]),
        "num_tokens": pyarrow.array([1, 1], pyarrow.int32()),
    }  # fmt: skip
    parquet(run / "scores.parquet", **scores)
    assert read_run(run).requests["t"].is_greedy.tolist() == [1, -1]
    parquet(run / "scores.parquet", **{name: one for name, one in (scores | columns).items() if one is not None})
    with pytest.raises(UserError) as error:
        read_run(run)
    assert str(run) in str(error.value) and sentence in str(error.value)


def test_a_small_file_of_many_rows(run):
    """Catches a footer, or a column of one value, that makes gigabytes of kilobytes."""
    rows = 3_000_000
    columns = {
        "task": pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["t"]), "doc_id": np.zeros(rows, np.int64),
        "idx": np.zeros(rows, np.int32), "loglikelihood": np.zeros(rows), "is_greedy": np.zeros(rows, bool),
        "num_tokens": np.zeros(rows, np.int32),
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), run / "scores.parquet", compression="zstd", use_dictionary=True)
    with pytest.raises(UserError, match=r"scores\.parquet says that it has 3,000,000 rows, in [\d,]+ bytes"):
        read_run(run)


def test_long_texts_that_repeat(tmp_path):
    """Catches a text kept once for each row, where the file has it once: 1 MB in 100,000 rows would be 100 GB."""
    texts = pyarrow.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["x" * 1_000_000])
    parquet(tmp_path / "a.parquet", text=texts)
    column = read_back.read_table(tmp_path / "a.parquet", pyarrow.schema([("text", pyarrow.string())]))["text"]
    assert len(column) == 100_000 and len(column.names) == 2


@pytest.mark.parametrize("name", ["status.json", "results.json", "manifest.json", ".ddp_eval.lock", "journal", "scores.parquet"])
def test_odd_things_in_the_output_directory(name, tmp_path):
    """Catches a start that waits for a pipe for ever (public report), or fails at its end since it cannot replace a directory."""
    config = Config(tasks=["t"], model_args={"pretrained": "demo"}, output_path=str(tmp_path))
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} must be a (regular file|directory), and is a named pipe: remove it"):
        assert run_directory.find_finished(config, lambda manifest: True) is None
        run_directory.open_directory(config, lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == [name]


FOREIGN = [b"", b"[]", b"\xff", b'{"state": ["done"], "launch": [1]}', b"[" * 100_000, b'{"layout": {}}', b'{"a": ' + b"9" * 5000]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("name", ["status.json", "journal/run.json"])
def test_foreign_content_in_the_output_directory(name, content, tmp_path):
    """Catches a new run that fails since another program has a status.json, too."""
    config = Config(tasks=["t"], model_args={"pretrained": "demo"}, output_path=str(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    assert run_directory.find_finished(config, lambda manifest: True) is None
    directory = run_directory.open_directory(config, lambda: None)
    assert status.read_status(tmp_path)["state"] == "running" and directory.layout is None
    directory.close()


def test_a_start_beside_a_pipe(tmp_path):
    """The same by the command: one sentence, exit code 2, no traceback, nothing left behind."""
    os.mkfifo(tmp_path / "status.json")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ddp_eval", "--limit", "1", "--tasks", "demo_lambada", "--output_path", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in ended.stderr.splitlines() if "must be a regular file" in line]
    assert ended.returncode == 2 and len(lines) == 1 and "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.fixture
def quick_lock(monkeypatch):
    monkeypatch.setattr(lock, "WATCH_S", 0.3)
    monkeypatch.setattr(lock, "DYING_S", 0.3)


HOLDER = {"host": "h", "pid": 1, "born": "1", "machine": "m", "token": "0" * 32}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000,
        *(json.dumps(HOLDER | {"token": token}).encode() for token in ("a/b", "../../x", "..", "\0", "x" * 5000, 7, None, ["a"])),
        *(json.dumps(HOLDER | {"machine": lock.machine(), "pid": pid}).encode() for pid in ("one", -1, 10**30, None, "1/../2")),
    ],
)  # fmt: skip
def test_locks_of_others(content, tmp_path, quick_lock):
    """Catches a token that leads out of the directory, a pid that is text, and what is no lock at all: nobody holds these."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "lock"
    path.write_bytes(content)
    own = lock.Lock(path, lambda: None)
    own.acquire()
    assert json.loads(path.read_text())["token"] == own._me["token"]
    own.release()
    assert [*tmp_path.rglob("*")] == [tmp_path / "run"]


@pytest.mark.parametrize("make", damage_files.ODD_KINDS[:3] + damage_files.ODD_KINDS[4:10], ids=range(9))
def test_locks_that_are_no_files(make, tmp_path, quick_lock):
    """Catches a start that waits for ever: for a pipe's writer, or for a link that leads nowhere to be there or free."""
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "lock")
    with pytest.raises(UserError, match="lock must be a"):
        lock.Lock(tmp_path / "run" / "lock", lambda: None).acquire()


def test_a_lock_that_turns_into_a_pipe(tmp_path, monkeypatch):
    """Catches the thread that keeps the lock waiting for a pipe, or dying, where it should say that the lock is lost."""
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    lost = threading.Event()
    own = lock.Lock(tmp_path / "lock", lost.set)
    own.acquire()
    own.path.unlink()
    os.mkfifo(own.path)
    assert lost.wait(10)
    own.release()


def test_a_journal_without_an_end(tmp_path):
    """Catches a journal read whole into memory, and lengths in it that are believed."""
    fuzz_files.make_journal(tmp_path)
    with open(tmp_path / "a.journal", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(2**40)
    found = journal.read_journals(tmp_path, fuzz_files.KEY, np.array([0, 3, 4, 9]), np.array([0, 2, 3]))
    assert found.packs.tolist() == [0, 1, 2, 3, 4]
    assert found.notes == [
        f"the last {2**40 - size} bytes of the journal a.journal are torn or corrupt and dropped; 5 packs before them are kept"
    ]


def test_names_in_a_terminal(run, source):
    """Catches escape sequences in names of tasks, metrics and packages that clear a screen or retitle a window."""
    evil = "\x1b[2J\x1b]0;owned\x07\u202e\nddp_eval: all is well"
    for keys in (("packages", evil), ("packages", "torch"), ("config", "system_instruction")):
        change(run / "manifest.json", *keys, to=evil)
    change(run / "results.json", "results", evil, to={f"{evil},none": 0.5})
    rows = pyarrow.parquet.read_table(run / "scores.parquet")
    tasks = pyarrow.array([evil + task for task in rows["task"].to_pylist()])
    parquet(run / "scores.parquet", **{name: rows[name] for name in rows.column_names} | {"task": tasks})
    for other in (run, source / "run"):
        text = format_comparison(compare_runs(read_run(run), read_run(other)))
        assert printable(text, keep="\n") == text and "\\x1b[2J" in text
        assert not any(line.startswith("ddp_eval:") for line in text.splitlines())
    assert printable(f"a{evil}") == "a\\x1b[2J\\x1b]0;owned\\x07\\u202e\\nddp_eval: all is well"


def test_names_in_the_report(run):
    """Catches markup and formulas in names: a script that runs, a page that breaks, a traceback of matplotlib's."""
    from ddp_eval.analysis.report import render

    evil = "<script>alert(1)</script>$\\frac{ {{ 7 * 7 }} font: x' \"y"
    found = json.loads((run / "results.json").read_text())
    found["results"][evil] = {"alias": evil, f"{evil},{evil}": 0.5}
    found["model_name"] = evil
    (run / "results.json").write_text(json.dumps(found))
    change(run / "telemetry.json", "ranks", 0, "timeline", to=[[0.0, evil]])
    sent = {"calls": 1, "seconds": 1.0, "sent_bytes": 1, "received_bytes": 1}
    change(run / "telemetry.json", "ranks", 0, "collectives", to={evil: sent})
    sample = {"doc_id": 0, "doc": evil, "target": evil, "arguments": [[evil, evil]], "resps": [[["-1", "True"]]], "filter": evil}
    (run / "samples_evil.jsonl").write_text(json.dumps({**sample, "metrics": [evil], evil: 1.0}))
    page = render([read_run(run), read_run(run)], 10)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page


def test_plots_of_odd_names():
    """Catches a plot of a megabyte's name, or of a hundred thousand rows, that takes minutes."""
    began = time.monotonic()
    assert "the first 500 of 100000" in plots.intervals([("x" * 1_000_000, 0.5, 0.1)] * 100_000, "share")
    assert time.monotonic() - began < 60


def test_plot_of_a_rank_without_a_timeline():
    """Catches a traceback over a telemetry.json whose timeline is empty."""
    rank = {"rank": 0, "began_unix_s": 0.0, "wall_s": 2.0, "timeline": []}
    assert "rank 1" in plots.timeline([rank, {**rank, "rank": 1, "timeline": [[0.5, "forward"]]}])


@pytest.mark.parametrize(
    ("keys", "to", "sentence"),
    [
        (("config", "model_args"), {"pretrained": "demo", "weights_only": False}, "the settings weights_only, which"),
        (("config", "model_args"), {"pretrained": "demo", "use_kernels": True}, "the settings use_kernels, which"),
        (("config", "gen_kwargs"), {"custom_generate": "a/b", "num_beams": 2}, "the settings custom_generate, which"),
        (("config", "tasks"), [{"task": "t", "doc_to_text": "{{ ''.__class__ }}"}], "was given its tasks by a program"),
        (("config", "model_args"), {"pretrained": ["demo"]}, 'config.model_args.pretrained must be text, got ["demo"]'),
        (("config", "include_path"), "/", "task files in /: --trust_task_files allows it"),
    ],
)
def test_no_code_runs_on_a_manifests_word(keys, to, sentence, run):
    """Catches a manifest that has transformers unpickle or fetch code, or lm_eval render a template of its own."""
    change(run / "manifest.json", "config", "include_path", to=None)
    change(run / "manifest.json", *keys, to=to)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        reproduce.parse([str(run)])
    assert sentence in str(error.value) and time.monotonic() - began < 20


@pytest.mark.parametrize("text", ['{"model_type": "llama"', "[]", "", '"llama"', "\x00" * 100])
def test_config_of_a_model(text, tmp_path):
    """Catches `'list' object has no attribute 'get'` over a config.json that was cut on its way."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        checkpoint.load_config({"pretrained": str(tmp_path)})
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_pipe_where_a_file_is_written_aside(tmp_path):
    """Catches a write that waits for a reader, or goes where a link leads."""
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to(tmp_path / "victim"))):
        make(tmp_path / f".{number}.json.{os.getpid()}.ddp_eval.tmp")
        replace_json(tmp_path / f"{number}.json", {"a": 1})
        assert json.loads((tmp_path / f"{number}.json").read_text()) == {"a": 1}
    assert not (tmp_path / "victim").exists()


@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_ordinary_json_comes_out_as_json_reads_it(value):
    """Catches a number, a text or an order of keys that the checks change on their way."""
    text = json.dumps(value)
    assert json.dumps(read_back.parse_json(text)) == text
