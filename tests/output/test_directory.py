"""What a command does with what it finds in --output_path: begin, go on, leave alone, or refuse."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.output import directory as run_directory
from ddp_eval.output import journal, lock, status, tables, write
from ddp_eval.output.directory import find_finished, open_directory
from ddp_eval.output.journal import Journal, work_key
from ddp_eval.packs.results import RESULT
from ddp_eval.system.processes import machine

KEY = work_key({"plan": "a"})
ITEM_STARTS = np.array([0, 1, 2])
RESULTS = {"results": {"demo_lambada": {"acc,none": 0.5}}, "versions": {}, "ddp_eval": {}}
NEW = {**RESULTS, "results": {"new": {}}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(**changes) -> the flags of a run in tmp_path/run."""
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "SLURM_"))]:
        monkeypatch.delenv(name)
    base = {"tasks": ["demo_lambada"], "model_args": {"pretrained": "demo"}, "output_path": str(tmp_path / "run")}
    return lambda **changes: Config(**{**base, **changes})


@pytest.fixture
def opening():
    """opening(config) -> the open directory; closed at the end of the test."""
    opened = []

    def open_it(config):
        opened.append(open_directory(config, lambda: None))
        return opened[-1]

    yield open_it
    for directory in opened:
        directory.close()


@pytest.fixture
def unfinished(config):
    """A directory with one of two packs done."""
    directory = open_directory(config(), lambda: None)
    own = Journal(directory.journals / "a.journal", KEY, "cpu")
    own.append(1, np.array([(1, -1.5, True)], dtype=RESULT))
    own.close()
    tables.write_scores(directory.path, tables.Scores([], [], [], [], [], []))
    directory.close()
    return directory.path


@pytest.fixture
def finished(config):
    """A directory with a complete run, as its files go."""
    directory = open_directory(config(), lambda: None)
    manifest = {"config": dataclasses.asdict(config()), "model": {"seen": "f"}}
    write.write_run(directory.path, RESULTS, manifest)
    directory.finish()
    directory.close()
    return directory.path


def packs_in(directory):
    return directory.recover(KEY, ITEM_STARTS).packs.tolist()


def test_a_new_directory(config, opening, tmp_path):
    """Catches a run that does not mark that it is at work, or leaves its lock behind."""
    directory = opening(config(output_path=str(tmp_path / "a" / "b")))
    assert status.read_status(directory.path)["state"] == status.RUNNING
    assert packs_in(directory) == []
    directory.finish()
    directory.close()
    assert [entry.name for entry in directory.path.iterdir()] == [status.STATUS]
    assert status.read_status(directory.path)["state"] == status.DONE


def test_unfinished_work_is_found(config, opening, unfinished):
    """Catches work that is thrown away or refused when the same command comes again, killed within its metrics too."""
    directory = opening(config())
    assert packs_in(directory) == [1]
    assert (directory.path / tables.SCORES).exists()


@pytest.mark.parametrize("changes", [{"log_samples": True}, {"timeout": 5.0}, {"bootstrap_iters": 0}, {"overwrite": True}])
def test_flags_that_change_no_score_resume(changes, config, opening, unfinished):
    """Catches twenty hours lost because --log_samples was forgotten, or because a script always says --overwrite."""
    assert packs_in(opening(config(**changes))) == [1]


@pytest.mark.parametrize("changes", [{"limit": 2.0}, {"num_fewshot": 1}, {"model_args": {"pretrained": "other"}}])
def test_other_flags_are_refused(changes, config, unfinished):
    """Catches another evaluation that takes a directory over, and one that marks it as failed."""
    (name,) = changes
    with pytest.raises(
        UserError, match=rf"already holds an unfinished run of .* \(there {name} was .*, here it is .*--overwrite"
    ):
        open_directory(config(**changes), lambda: None)
    assert status.read_status(unfinished)["state"] == status.RUNNING
    assert not (unfinished / run_directory.LOCK).exists()


@pytest.mark.parametrize("changes", [{"fresh": True}, {"overwrite": True, "limit": 2.0}])
def test_starting_over(changes, config, opening, unfinished):
    """Catches packs of a run that was to be forgotten, and scores of it that outlive it."""
    directory = opening(config(**changes))
    assert packs_in(directory) == []
    assert not (directory.path / tables.SCORES).exists()


LAUNCHERS = {
    "torchrun": ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}, "TORCHELASTIC_RESTART_COUNT"),
    "several nodes": (
        {"TORCHELASTIC_RUN_ID": "llama", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"},
        "TORCHELASTIC_RESTART_COUNT",
    ),
    "slurm": ({"SLURM_JOB_ID": "7"}, "SLURM_RESTART_COUNT"),
    "array": ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "SLURM_RESTART_COUNT"),
}


@pytest.fixture(params=LAUNCHERS)
def start(request, config, monkeypatch):
    """start(again, **changes) -> a directory opened as by the launcher's first start of the command, or by a later one."""
    variables, count = LAUNCHERS[request.param]

    def open_it(again, **changes):
        for name, value in {**variables, count: "1" if again else "0"}.items():
            monkeypatch.setenv(name, value)
        found = find_finished(config(**changes), lambda *_: True)
        return found or open_directory(config(**changes), lambda: None)

    return open_it


def do_pack(directory, pack):
    own = Journal(directory.journals / f"{pack}.journal", KEY, "cpu")
    own.append(pack, np.array([(pack, -1.5, True)], dtype=RESULT))
    own.close()
    directory.close()


@pytest.mark.parametrize("changes", [{"fresh": True}, {"overwrite": True, "limit": 2.0}])
def test_a_restart_does_not_start_over(changes, config, start, unfinished):
    """Catches --fresh obeyed again when a launcher starts the same command again: the run would never end."""
    directory = start(False, **changes)
    assert packs_in(directory) == []
    directory.begin_replacing(config(**changes))
    do_pack(directory, 0)
    directory = start(True, **changes)
    assert packs_in(directory) == [0]
    directory.close()


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("changes", [{"fresh": True}, {"overwrite": True}])
def test_a_start_that_died_early_has_obeyed_nothing(changes, opened, config, start, finished):
    """Catches --fresh dropped because the first start of a job died while it loaded: the old run passes for the new one."""
    if opened:
        start(False, **changes).close()
    directory = start(True, **changes)
    assert packs_in(directory) == []
    directory.begin_replacing(config(**changes))
    assert write.run_files(directory.path) == []
    directory.finish()
    directory.close()


@pytest.mark.parametrize("changes", [{"fresh": True}, {"overwrite": True, "limit": 2.0}])
def test_a_finished_run_outlives_one_that_never_begins(changes, config, opening, finished):
    """Catches results destroyed by a mistake in the command that replaces them, or by a reproduction that is refused."""
    kept = write.run_files(finished)
    opening(config(**changes)).close()
    assert write.run_files(finished) == kept != []
    assert find_finished(config(), lambda *_: True) == RESULTS
    with pytest.raises(UserError, match="already holds a run"):
        open_directory(config(limit=3.0), lambda: None)
    directory = opening(config(**changes))
    directory.begin_replacing(config(**changes))
    assert write.run_files(finished) == []


def test_a_run_that_is_about_to_be_replaced_is_nobodys(config, opening, finished):
    """Catches the same command beside one that replaces the run: it would take away the journal that the other writes."""
    directory = opening(config(fresh=True))
    with pytest.raises(UserError, match="another run is at work"):
        find_finished(config(), lambda *_: True)
    assert directory.journals.is_dir() and status.read_status(finished)["state"] == status.RUNNING


@pytest.mark.parametrize("changes", [{"fresh": True}, {"overwrite": True, "limit": 2.0}])
def test_a_run_that_was_not_replaced_is_as_it_was(changes, config, opening, finished):
    """Catches a complete run that passes for failed, because a command that was to replace it was refused."""
    before = status.read_status(finished)
    directory = opening(config(**changes))
    status.note_end(finished, status.FAILED, "there is no such task", first_hand=True)
    directory.close()
    assert status.read_status(finished) == before and before["state"] == status.DONE
    assert not directory.journals.exists() and find_finished(config(), lambda *_: True) is not None


def test_a_restart_leaves_what_its_launch_has_finished(config, start, finished):
    """Catches a run that is replaced again because a rank died on its way out, or SLURM lost the node in the last second."""
    directory = start(False, fresh=True)
    manifest = {"config": dataclasses.asdict(config(fresh=True))}
    write.write_run(directory.path, NEW, manifest)
    directory.finish()
    directory.close()
    assert start(True, fresh=True) == NEW
    assert start(False, fresh=True).close() is None


@pytest.mark.parametrize("last", ["write_status", "unlink"])
def test_a_restart_leaves_what_was_killed_while_it_was_marked(last, config, start, finished, monkeypatch):
    """Catches --fresh obeyed again, on the complete run, because its start was killed between two of its last steps."""
    directory = start(False, fresh=True)
    directory.begin_replacing(config(fresh=True))
    write.write_run(directory.path, NEW, {"config": dataclasses.asdict(config(fresh=True))})

    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((status, last) if last == "write_status" else (Path, last)), die)
        with pytest.raises(KeyboardInterrupt):
            directory.finish()
    directory.close()
    assert start(True, fresh=True) == NEW
    assert not directory.journals.exists()


def test_interactive_jobs_launches_are_told_apart(config, opening, unfinished, monkeypatch):
    """Catches the --fresh of a second torchrun in one job dropped, because the first one's was obeyed."""
    for name, value in {"SLURM_JOB_ID": "7", **LAUNCHERS["several nodes"][0]}.items():
        monkeypatch.setenv(name, value)
    directory = open_directory(config(fresh=True), lambda: None)
    directory.begin_replacing(config(fresh=True))
    do_pack(directory, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert packs_in(opening(config(fresh=True))) == []


def test_other_work_is_refused(config, opening, unfinished):
    """Catches numbers of other weights mixed in though the flags are the same."""
    with pytest.raises(UserError, match=r"holds unfinished work on other requests, weights or package versions .*--fresh"):
        opening(config()).recover(work_key({"plan": "b"}), ITEM_STARTS)


@pytest.mark.parametrize(
    ("earlier", "now", "sentence"),
    [
        (
            "tensor:8",
            "tensor:4",
            "begun with layout tensor:8, and this start has layout tensor:4, .*: start a multiple of 8 ranks, or --fresh",
        ),
        (
            "tensor:2",
            "replicas",
            "begun with layout tensor:2, and this start has layout replicas, .*: start a multiple of 2 ranks",
        ),
        ("tensor:8", "tensor:8", "holds unfinished work on other requests, weights or package versions"),
        ("layers:2", "replicas", "holds unfinished work on other requests, weights or package versions"),  # of the same bits
    ],
)
def test_another_layout_is_named(earlier, now, sentence, config, opening, unfinished):
    """Catches a job requeued on fewer nodes that is told to look for other weights or packages."""
    opened = opening(config())
    opened.begin_replacing(config(), earlier)
    with pytest.raises(UserError, match=sentence):
        opened.recover(work_key({"plan": "b"}), ITEM_STARTS, layout=now)
    with pytest.raises(UserError, match=sentence):
        opened.resume(lambda: work_key({"plan": "b"}), ITEM_STARTS, None, now)


def test_other_work_is_replaced_when_asked(config, opening, unfinished):
    """Catches --overwrite refused because the weights have changed."""
    directory = opening(config(overwrite=True))
    assert directory.recover(work_key({"plan": "b"}), ITEM_STARTS).packs.tolist() == []
    assert list(directory.journals.glob(f"*{journal.SUFFIX}")) == []
    assert directory.journals.is_dir()


def same(manifest):
    assert manifest["model"] == {"seen": "f"}
    return True


def test_finished_run_is_left_alone(config, finished):
    """Catches a finished run that is run again, changed or refused."""
    before = sorted(entry.stat().st_mtime_ns for entry in finished.iterdir())
    assert find_finished(config(), same) == RESULTS
    assert sorted(entry.stat().st_mtime_ns for entry in finished.iterdir()) == before


def test_finished_run_of_another_kind_is_refused(config, finished):
    """Catches the numbers of another command or of older weights shown as this one's."""
    with pytest.raises(
        UserError,
        match=r"already holds a run of .* \(there num_fewshot was null, here it is 1; there limit was null, here it is 2\.0\)",
    ):
        find_finished(config(num_fewshot=1, limit=2.0, timeout=5.0), same)
    with pytest.raises(UserError, match=r"the files of the model have changed since"):
        find_finished(config(), lambda manifest: False)


def test_finished_run_without_the_samples_that_are_asked_for(config, finished):
    """Catches --log_samples that is said to be another run, or that passes for done and writes none."""
    for changes, more in (({}, ""), ({"limit": 2.0}, "there limit was null, here it is 2.0; ")):
        with pytest.raises(UserError) as refused:
            find_finished(config(log_samples=True, **changes), same)
        why = f"({more}it has no samples, and --log_samples cannot make them from what it keeps); give another --output_path"
        assert why in str(refused.value)


@pytest.mark.parametrize("changes", [{}, {"log_samples": True}, {"log_samples": True, "confirm_run_unsafe_code": True}])
def test_finished_run_that_has_more_than_is_asked_for(changes, config, finished):
    """Catches a finished run refused because it wrote its samples, too."""
    manifest = {"config": dataclasses.asdict(config(log_samples=True, write_out=True)), "model": {"seen": "f"}}
    (finished / write.MANIFEST).write_text(json.dumps(manifest))
    assert find_finished(config(**changes), same) == RESULTS


def test_manifest_that_names_no_flags(config, finished):
    """Catches a torn manifest told as thirty differences."""
    (finished / write.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"\(its manifest\.json cannot be read: "):
        find_finished(config(), same)


@pytest.mark.parametrize("changes", [{"fresh": True}, {"overwrite": True}])
def test_finished_run_is_replaced_when_asked(changes, config, opening, finished):
    """Catches --fresh that finds nothing to do."""
    assert find_finished(config(**changes), same) is None
    directory = opening(config(**changes))
    directory.begin_replacing(config(**changes))
    assert write.run_files(directory.path) == []


@pytest.mark.parametrize("state", [status.RUNNING, status.DONE])
def test_killed_right_behind_the_manifest(state, config, finished):
    """Catches a complete run that stays marked as running for ever, with its journals beside it."""
    status.write_status(finished, state, "")
    (finished / "journal").mkdir()
    (finished / "journal" / "a.journal").write_bytes(b"")
    (finished / "journal" / "run.json").write_text("{}")
    assert find_finished(config(), same)
    assert status.read_status(finished)["state"] == status.DONE
    assert not (finished / "journal").exists()


def test_files_without_a_journal_are_refused(config, tmp_path):
    """Catches somebody's scores overwritten because they lack a manifest."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / tables.SCORES).write_text("mine")
    with pytest.raises(UserError, match=r"already holds an unfinished run of .* \(it has no journal to resume from\)"):
        open_directory(config(), lambda: None)


def test_second_run_is_refused(config, opening, monkeypatch):
    """Catches two runs in one directory."""
    monkeypatch.setattr("ddp_eval.output.lock.DYING_S", 0.1)
    opening(config())
    with pytest.raises(UserError, match=r"^another run is at work in --output_path .*run \(process \d+ on .*\): wait for it"):
        open_directory(config(), lambda: None)


@pytest.mark.parametrize(
    "harm", [lambda path: path.write_text('{"fla'), lambda path: path.write_text(""), lambda path: path.unlink()]
)
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}])
def test_packs_outlive_the_file_of_flags(changes, harm, config, opening, unfinished):
    """Catches hours of packs deleted because a node went down while run.json was new, or because a disk refused to read it."""
    harm(unfinished / "journal" / "run.json")
    assert packs_in(opening(config(**changes))) == [1]


def test_replacing_other_work_keeps_the_flags(config, unfinished):
    """Catches --overwrite of other weights that leaves a directory which the next start takes for nobody's."""
    key = work_key({"plan": "b"})
    for number in range(2):
        directory = open_directory(config(overwrite=number == 0), lambda: None)
        assert directory.recover(key, ITEM_STARTS).packs.tolist() == [0][:number]
        own = Journal(directory.journals / f"b{number}.journal", key, "cpu")
        own.append(number, np.array([(number, -2.5, True)], dtype=RESULT))
        own.close()
        directory.close()
    assert sorted(path.name for path in (unfinished / "journal").iterdir()) == ["b0.journal", "b1.journal", "run.json"]


def test_small_files_reach_the_disk(config, opening, monkeypatch):
    """Catches run.json and status.json that a power cut leaves empty, beside journals that it does not."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    opening(config())
    for name in ("run.json", "status.json"):
        assert any(f"/.{name}." in path for path in synced), synced


def test_a_resume_knows_the_layout(config, opening, unfinished):
    """Catches a layout that is chosen anew, by a clock or by the memory free today, and refuses the work that is done."""
    directory = opening(config())
    assert directory.layout is None
    directory.begin_replacing(config(), "layers:2")
    directory.close()
    directory = opening(config())
    assert directory.layout == "layers:2"
    directory.close()
    assert opening(config(fresh=True)).layout is None


@pytest.mark.parametrize("harm", ["deleted", "taken over"])
def test_a_directory_that_is_lost(harm, config, finished, monkeypatch):
    """Catches a run that writes into what is another's by now, and takes that one's unfinished work away when it ends."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    lost = threading.Event()
    directory = open_directory(config(overwrite=True), lost.set)
    directory.check()
    if harm == "deleted":
        shutil.rmtree(directory.path)
    else:
        (directory.path / run_directory.LOCK).unlink()
    assert lost.wait(20)
    before = {} if harm == "deleted" else {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()}
    with pytest.raises(run_directory.Lost, match="was deleted or taken over by another run"):
        directory.check()
    directory.close()
    assert {path: path.read_bytes() for path in directory.path.rglob("*") if path.is_file()} == before
    assert directory.path.exists() is (harm != "deleted")


def test_a_directory_that_a_silent_disk_has_lost(config, monkeypatch):
    """Catches a sweep that keeps its own later look at a model out, by a lock that nobody touches any more."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    monkeypatch.setattr(lock, "WATCH_S", 0.1)
    lost = threading.Event()
    directory = open_directory(config(), lost.set)

    def refuse(*names):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        assert lost.wait(20)
    directory.close()
    assert not (directory.path / run_directory.LOCK).exists()
    open_directory(config(), lambda: None).close()


def test_a_job_that_slurm_has_started_again(config, monkeypatch):
    """Catches the earlier start of a sweep, on a node that SLURM has lost, that goes on with other models beside the new one."""
    config()
    path = Path(config().output_path) / run_directory.LOCK
    path.parent.mkdir()
    assert not lock.gave_way_to_restart(path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert lock.gave_way_to_restart(path), "eval.sh has removed it"
    for job, gave_way in (("7", True), ("8", False)):
        path.write_text(json.dumps({"slurm_job": job, "token": "0" * 32}))
        assert lock.gave_way_to_restart(path) is gave_way
    path.write_text(json.dumps({"slurm_job": "7", "pid": os.getpid(), "machine": machine(), "token": "0" * 32}))
    assert not lock.gave_way_to_restart(path), "a silent disk has the lock still, and answers again"
    path.unlink()
    for launch, gave_way in (({"slurm": "7"}, True), ({"slurm": "8"}, False), ({"torchrun": "x"}, False)):
        (path.parent / "status.json").write_text(json.dumps({"state": "done", "launch": launch}))
        assert lock.gave_way_to_restart(path) is gave_way, "another launch has taken it over and ended"
    shutil.rmtree(path.parent)
    assert not lock.gave_way_to_restart(path), "somebody has deleted the whole directory"


def test_whether_a_run_is_at_work(config):
    """Catches a directory that is taken to be at work for good because of the lock of a dead run."""
    directory = open_directory(config(), lambda: None)
    holder = json.loads((directory.path / run_directory.LOCK).read_text())
    directory.close()
    assert not run_directory.is_at_work(directory.path)
    (directory.path / run_directory.LOCK).write_text(json.dumps({**holder, "born": "another"}))
    assert not run_directory.is_at_work(directory.path) and not (directory.path / run_directory.LOCK).exists()
