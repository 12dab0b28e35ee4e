"""The cache of lm_eval's own task files: always what lm_eval would read, from a small tasks folder and once from the real one."""

from __future__ import annotations

import contextlib
import errno
import gc
import gzip
import json
import logging
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager, _index, _yaml_loader, manager

from ddp_eval.errors import UserError
from ddp_eval.tasks import index_cache, select
from ddp_eval.tasks.index_cache import reuse_index

FILES = {
    "a/one.yaml": "include: _base\ntask: one\ntag: [letters, few]\ndoc_to_text: !function utils.text\n",
    "a/two.yaml": "include: [_base, ../shared.yaml]\ntask: two\noutput_type: loglikelihood\ntag: letters\n",
    "a/_base": "include: deeper/_root\nnum_fewshot: 2\n",
    "a/deeper/_root": "output_type: multiple_choice\ntask_list: [x]\nmetadata: {version: 1.0, seen: true, none: null}\n",
    "b/again.yaml": "task: one\noutput_type: generate_until\n",  # lm_eval warns
    "b/group.yaml": "group: pair\ntask: [one, {task: two, num_fewshot: 3}]\ntag: few\n",
    "b/made.yaml": "task: made\nclass: !function made.Task\n",
    "c.yaml": "task: plain\nnested: [[1, -0.0, 1e300], {'': é, b: '\\ud800'}, 123456789012345678901234567890]\n",
    "shared.yaml": "doc_to_target: 0\n",  # neither task nor group
    "empty.yaml": "",
    "broken.yaml": "task: [\n",
    "circle.yaml": "include: circle.yaml\ntask: circle\n",
    "lost.yaml": "include: nowhere.yaml\ntask: lost\n",
}
UNREADABLE = {"empty.yaml", "broken.yaml", "circle.yaml", "lost.yaml"}  # of which nothing can be kept


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tasks folder that TaskManager takes for lm_eval's own."""
    made = tmp_path / "lm_eval" / "tasks"
    for name, text in FILES.items():
        write(made / name, text)
    monkeypatch.setattr(manager, "__file__", str(made / "manager.py"))
    monkeypatch.setattr(index_cache, "_MANY_FILES", len(UNREADABLE))
    return made


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are parsed from now on."""
    names: list[str] = []
    load = _yaml_loader.yaml.load

    def load_and_note(file: Any, **options: Any) -> Any:
        names.append(os.path.basename(file.name))
        return load(file, **options)

    monkeypatch.setattr(_yaml_loader.yaml, "load", load_and_note)
    return names


def write(path: Path, text: str, age_s: float = 3600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (time.time() - age_s,) * 2)


def read_index(**options: Any) -> dict[str, Any]:
    with reuse_index():
        return dict(TaskManager(**options).task_index)


def described(value: Any) -> Any:
    """For comparisons that tell 1 from 1.0 and True, and one order of keys from another."""
    if isinstance(value, dict):
        return [(described(key), described(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [described(item) for item in value]
    if isinstance(value, set):
        return "set", sorted(map(repr, value))
    if isinstance(value, _index.Entry):
        return [type(value), *map(described, vars(value).items())]
    return type(value), repr(value)


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert described(found[name]) == described(expected[name]), name


def the_cache_file(cache_home: Path) -> Path:
    (file,) = (cache_home / "ddp_eval").iterdir()
    return file


@pytest.mark.slow
def test_lm_evals_own_folder(parsed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Catches any task of lm_eval that comes out changed, missing or elsewhere, and messages that a warm cache changes."""
    caplog.set_level(logging.DEBUG)

    def validate(*tasks: str) -> tuple[int, list[str], str]:
        parsed.clear()
        caplog.clear()
        with pytest.raises(UserError) as refused:
            select.validate_tasks(tasks, None)
        messages = [record.getMessage() for record in caplog.records if record.name.startswith(("lm_eval", "ddp_eval"))]
        return len(parsed), messages, str(refused.value)

    plain = TaskManager().task_index
    count, messages, text = validate("helaswag", "arc_easy")
    assert count > 10_000 and messages.count("looking helaswag, arc_easy up in lm_eval's index of tasks") == 1
    assert text.startswith("there is no task helaswag: did you mean hellaswag")
    warm_count, warm_messages, warm_text = validate("helaswag", "arc_easy")
    assert warm_count < 100 and warm_text == text
    assert warm_messages == [message for message in messages if not message.startswith("looking")]
    parsed.clear()
    check_equal(read_index(), plain)
    assert parsed == []


def test_a_small_folder(folder: Path, parsed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Catches wrong content of any kind of entry, a lost warning about duplicates, and files that are parsed without need."""

    def read(read_once: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[str], list[str]]:
        parsed.clear()
        caplog.clear()
        return read_once(), list(parsed), [record.getMessage() for record in caplog.records]

    caplog.set_level(logging.DEBUG, "lm_eval")
    plain, every_file, messages = read(lambda: dict(TaskManager().task_index))
    assert set(plain) == {"one", "two", "pair", "made", "plain", "letters", "few"} and plain["pair"].kind.name == "GROUP"
    assert any(message.startswith("Duplicate task name 'one'") for message in messages)
    for expected in (every_file, sorted(UNREADABLE), sorted(UNREADABLE)):
        index, names, said = read(read_index)
        check_equal(index, plain)
        assert (names, said) == (expected, messages)


def test_tables_are_the_same(folder: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `ls` that prints other tables from a warm cache, or parses the files once more for the tasks' output types."""
    kinds = ("tasks", "groups", "subtasks", "tags")
    with monkeypatch.context() as patch:
        patch.setattr(select, "reuse_index", contextlib.nullcontext)
        plain = [select.list_tasks(what, None) for what in kinds]
    assert "lm_eval/tasks/a/one.yaml" in plain[0] and "multiple_choice" in plain[2]
    for _ in ("cold", "warm"):
        parsed.clear()
        assert [select.list_tasks(what, None) for what in kinds] == plain
    assert set(parsed) & {os.path.basename(name) for name in FILES} == UNREADABLE, "the demo's are parsed each time"


@pytest.mark.parametrize(
    ("name", "text", "parsed_again"),
    [
        ("a/one.yaml", "task: other\n", ["one.yaml"]),
        ("c.yaml", "task: again\n", ["c.yaml"]),
        ("a/new.yaml", "include: one.yaml\ntask: new\n", ["new.yaml", "one.yaml", "_base", "_root"]),
        ("a/new.txt", "task: new\n", []),
        ("shared.yaml", "doc_to_target: 1\n", ["two.yaml", "_base", "_root", "shared.yaml", "shared.yaml"]),
        (
            "a/deeper/_root",
            "num_fewshot: 7\nrepeats: 2\n",
            ["one.yaml", "_base", "_root", "two.yaml", "_base", "_root", "shared.yaml"],
        ),
        ("nowhere.yaml", "output_type: loglikelihood\n", ["nowhere.yaml", "nowhere.yaml"]),
        ("a/one.yaml", None, []),
        ("a/deeper/_root", None, ["one.yaml", "_base", "two.yaml", "_base"]),
    ],
)
def test_changed_files(folder: Path, parsed: list[str], name: str, text: str | None, parsed_again: list[str]) -> None:
    """Catches an edited, added or removed file, included or not, that goes unseen, and others parsed along with it."""
    read_index()
    if text is None:
        (folder / name).unlink()
    else:
        write(folder / name, text, age_s=1800)
    plain = dict(TaskManager().task_index)
    parsed.clear()
    check_equal(read_index(), plain)
    assert sorted(each for each in parsed if each not in UNREADABLE) == sorted(parsed_again)


def test_a_file_that_changes_within_a_tick_of_the_clock(folder: Path) -> None:
    """Catches the content before a change that leaves a file's size and modification time as they were: it came too soon."""
    now = time.time_ns()
    for text in ("task: before\n", "task: after!\n"):
        (folder / "c.yaml").write_text(text)
        os.utime(folder / "c.yaml", ns=(now, now))
        check_equal(read_index(), TaskManager().task_index)


def test_a_file_that_changes_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches new content kept under the old size and time, or old content under the new ones."""
    load = _yaml_loader.yaml.load

    def load_and_change(file: Any, **options: Any) -> Any:
        content = load(file, **options)
        if os.path.basename(file.name) == "_root":
            write(folder / "a/deeper/_root", "num_fewshot: 7\nrepeats: 2\n", age_s=1800)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(_yaml_loader.yaml, "load", load_and_change)
        read_index()
    check_equal(read_index(), TaskManager().task_index)


def test_includes_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Catches a change of an included file that lies outside the folder."""
    for number, included in enumerate(("../../outside", str(tmp_path / "outside"))):
        write(folder / f"far{number}.yaml", f"include: {included}\ntask: far{number}\n")
    for text in ("repeats: 1\n", "repeats: 2\n"):
        write(tmp_path / "outside", text)
        check_equal(read_index(), TaskManager().task_index)


def test_symbolic_links(folder: Path, tmp_path: Path, cache_home: Path) -> None:
    """Catches an include that another link now leads elsewhere, while no file has changed."""
    write(folder / "linked.yaml", "include: link/_base\ntask: linked\n")
    for name in ("d", "e"):
        write(folder / name / "_base", f"repeats: {ord(name)}\n")
        (folder / "link").unlink(missing_ok=True)
        (folder / "link").symlink_to(name)
        check_equal(read_index(), TaskManager().task_index)
    assert not cache_home.exists()


def test_a_folder_reached_through_a_link(
    folder: Path, tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches entries with the paths of another spelling of the folder, and a folder that is never cached, as under lib64."""
    (tmp_path / "link").symlink_to(folder.parent)
    read_index()
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "link" / "tasks" / "manager.py"))
    plain = dict(TaskManager().task_index)
    parsed.clear()
    check_equal(read_index(), plain)
    assert set(parsed) == UNREADABLE


def test_other_directories_of_tasks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a user's file taken for lm_eval's own because its relative path is the same, and one object in two entries."""
    write(tmp_path / "user" / "a" / "one.yaml", "task: one\nrepeats: 9\n")
    monkeypatch.chdir(tmp_path / "user")
    for paths in (["a"], [str(tmp_path / "user")], [str(folder / "a")]):
        for _ in ("cold", "warm"):
            check_equal(read_index(include_path=paths), TaskManager(include_path=paths).task_index)
    with reuse_index():
        first, second = TaskManager().task_index, TaskManager().task_index
    assert first["one"].cfg == second["one"].cfg and first["one"].cfg is not second["one"].cfg


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("value: 2024-01-01", False),
        ("value: 2024-01-01T00:00:00Z", False),
        ("1: value", False),
        ("true: value", False),
        ("null: value", False),
        ("2024-01-01: value", False),
        ("value: !!set {a, b}", False),
        ("value: !!omap [a: 1]", False),
        ("value: !!binary aGVsbG8=", False),
        ("value: .nan", False),
        ("value: [-.inf]", False),
        ("value: \U0001f600 é", True),
        (f"value: {'[' * 400}{']' * 400}", True),
        ("value: 0x10", True),
        ("value: 0.1", True),
        ("value: &shared [1, yes, ~, '1']\nother: *shared", True),
        ("value: |\n  two\n  lines", True),
    ],
)
def test_content_is_exact(folder: Path, parsed: list[str], line: str, kept: bool) -> None:
    """Catches values of a type that JSON lacks which come out as another, and types it has that are parsed each time."""
    write(folder / "c.yaml", f"task: plain\n{line}\n")
    plain = dict(TaskManager().task_index)
    assert "plain" in plain
    for _ in ("cold", "warm"):
        parsed.clear()
        check_equal(read_index(), plain)
    assert ("c.yaml" not in parsed) == kept


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _edit(change: Callable[[list[Any]], Any]) -> Callable[[bytes], bytes]:
    """Change the lines, as values, in place, and compress them again."""

    def edit(data: bytes) -> bytes:
        lines = [json.loads(line) for line in gzip.decompress(data).split(b"\n")]
        change(lines)
        return gzip.compress(b"\n".join(json.dumps(line).encode() for line in lines))

    return edit


DAMAGES = {
    "empty": lambda data: b"",
    "text": lambda data: b"hello\n",
    "truncated": lambda data: data[:-9],
    "no checksum": lambda data: data[:-8],
    "a bit": _flip,
    "other content, no checksum": lambda data: gzip.compress(gzip.decompress(data).replace(b"_choice", b"_chance"))[:-8],
    "longer": lambda data: data + b"x",
    "twice": lambda data: data + data,
    "plain": gzip.decompress,
    "no text": lambda data: gzip.compress(b"\xff\xfe"),
    "one line": lambda data: gzip.compress(b"{}"),
    "no JSON": lambda data: gzip.compress(gzip.decompress(data).replace(b"[", b"(")),
    "deep": lambda data: gzip.compress(gzip.decompress(data).replace(b"\n[", b"\n" + b"[" * 100_000)),
    "no end": lambda data: gzip.compress(gzip.decompress(data) + b"\n{}"),
    "less": lambda data: gzip.compress(gzip.decompress(data).rpartition(b"\n")[0]),
    "another format": _edit(lambda lines: lines[0].__setitem__(0, 0)),
    "another lm_eval": _edit(lambda lines: lines[0][1].__setitem__(0, "0.4.12")),
    "another folder": _edit(lambda lines: lines[0].__setitem__(2, "/")),
    "no header": _edit(lambda lines: lines.__setitem__(0, None)),
    "no stamps": _edit(lambda lines: lines.__setitem__(1, [1])),
    "null stamps": _edit(lambda lines: lines.__setitem__(1, None)),
    "strange stamps": _edit(lambda lines: lines[1].update({name: {} for name in lines[1]})),
    "no names": _edit(lambda lines: lines.__setitem__(2, 5)),
    "empty names": _edit(lambda lines: lines.__setitem__(2, [[] for _ in lines[2]])),
    "names as dicts": _edit(lambda lines: lines.__setitem__(2, [{"a": 1} for _ in lines[2]])),
    "names in names": _edit(lambda lines: lines.__setitem__(2, [[names] for names in lines[2]])),
    "numbers for names": _edit(lambda lines: lines.__setitem__(2, [1 for _ in lines[2]])),
    "lists for contents": _edit(lambda lines: lines.__setitem__(slice(3, None), [[] for _ in lines[3:]])),
    "null for contents": _edit(lambda lines: lines.__setitem__(slice(3, None), [None for _ in lines[3:]])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_caches(folder: Path, cache_home: Path, parsed: list[str], damage: str) -> None:
    """Catches a damaged or foreign cache file that is believed, raises, or is never replaced."""
    plain = dict(TaskManager().task_index)
    read_index()
    file = the_cache_file(cache_home)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    check_equal(read_index(), plain)
    parsed.clear()
    check_equal(read_index(), plain)
    assert set(parsed) == UNREADABLE


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device", "sparse", "bomb", "nowhere", "loop"])
def test_caches_that_are_no_files(folder: Path, cache_home: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that waits for a FIFO's writer, fills the memory, or stops at what it cannot read."""
    plain = dict(TaskManager().task_index)
    read_index()
    file = the_cache_file(cache_home)
    if kind == "bomb":
        monkeypatch.setattr(index_cache, "_MAX_TEXT_BYTES", len(gzip.decompress(file.read_bytes())) - 1)
    else:
        file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "directory":
        (file / "inner").mkdir(parents=True)
    elif kind == "sparse":
        file.touch()
        os.truncate(file, 1 << 40)
    elif kind != "bomb":
        file.symlink_to({"device": "/dev/zero", "nowhere": "/nowhere/at/all", "loop": file.name}[kind])
    for _ in range(2):
        check_equal(read_index(), plain)


@pytest.mark.parametrize("home", ["a file", "a file's child", "relative", "full disk", "no home"])
def test_caches_that_cannot_be_written(
    folder: Path, tmp_path: Path, parsed: list[str], home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fails for want of a cache, and one that makes a directory named ~ where it was started."""
    (tmp_path / "file").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home") if home == "relative" else "nowhere")
    places = {"a file": tmp_path / "file", "a file's child": tmp_path / "file" / "x", "full disk": tmp_path / "full"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(places.get(home, "here")))

    def fail(*unused: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if home == "full disk":
        monkeypatch.setattr(index_cache, "replace_file", fail)
    plain = dict(TaskManager().task_index)
    for _ in range(2):
        parsed.clear()
        check_equal(read_index(), plain)
    assert (set(parsed) == UNREADABLE) == (home == "relative"), "~/.cache stands in for a relative path"
    assert not list((tmp_path / "work").iterdir()) and (tmp_path / "file").is_file()


def test_processes_that_write_at_once(folder: Path, cache_home: Path, parsed: list[str]) -> None:
    """Catches one process that reads or replaces the half-written cache of another."""
    plain = dict(TaskManager().task_index)

    def write_again_and_again() -> None:
        for _ in range(20):
            shutil.rmtree(cache_home / "ddp_eval", ignore_errors=True)
            check_equal(read_index(), plain)

    processes = [multiprocessing.get_context("fork").Process(target=write_again_and_again) for _ in range(3)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            check_equal(read_index(), plain)
    finally:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    read_index()
    parsed.clear()
    check_equal(read_index(), plain)
    assert set(parsed) == UNREADABLE and the_cache_file(cache_home).is_file()


def test_another_lm_eval(folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that takes part in a version of lm_eval which loads its files in another way."""

    def load_yaml(path: Any, resolve_func: bool = True, recursive: bool = True) -> Any:
        return {"task": os.path.basename(path)}

    for module in (_index, _yaml_loader, manager):
        monkeypatch.setattr(module, "load_yaml", load_yaml)
    with reuse_index() as takes_seconds:
        assert takes_seconds and "one.yaml" in TaskManager().task_index
    monkeypatch.delattr(manager, "load_yaml")
    with reuse_index() as takes_seconds:
        assert takes_seconds and "one.yaml" in TaskManager().task_index
    assert not cache_home.exists()


def test_nothing_stays_patched(folder: Path, cache_home: Path) -> None:
    """Catches lm_eval or the garbage collector left changed for the rest of the process, with or without an error."""
    before = gc.get_threshold()
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), reuse_index():
            assert _index.load_yaml is not _yaml_loader.load_yaml
            if error:
                raise error
        assert _index.load_yaml is manager.load_yaml is _yaml_loader.load_yaml and gc.get_threshold() == before
    assert not cache_home.exists(), "nothing was parsed, so nothing is written"


@pytest.mark.parametrize("name", ["c.yaml", "a/deeper/_root"])
def test_a_file_with_the_size_and_time_of_another(folder: Path, cache_home: Path, name: str) -> None:
    """Catches another content that came with the old size and time, as of a container image whose files all have one time."""
    for digit in "123":
        path, stamp = folder / name, (folder / name).stat().st_mtime_ns
        path.write_text(re.sub(r"(nested|version: )\d?", rf"\g<1>{digit}", path.read_text()))
        os.utime(path, ns=(stamp, stamp))
        check_equal(read_index(), TaskManager().task_index)
    assert the_cache_file(cache_home).exists()


def test_times_that_change_without_content(folder: Path, parsed: list[str]) -> None:
    """Catches 14,000 files parsed again because a container was unpacked anew, or an environment was installed again."""
    plain = dict(TaskManager().task_index)
    read_index()
    for name in FILES:
        os.utime(folder / name, (10**9, 10**9))
    parsed.clear()
    check_equal(read_index(), plain)
    assert set(parsed) == UNREADABLE


def test_the_cache_of_another_user(folder: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache file believed that somebody else has put into a cache home which both can write to."""
    plain = dict(TaskManager().task_index)
    read_index()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    parsed.clear()
    check_equal(read_index(), plain)
    assert "c.yaml" in parsed
