"""Which models a sweep is over, what their run directories are called, and when those of a watch are ready: no process."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from ddp_eval.cli.sweep import parse
from ddp_eval.config import Config
from ddp_eval.distributed import collectives
from ddp_eval.distributed.messages import Followers
from ddp_eval.distributed.progress import Progress
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.output import directory as run_directory
from ddp_eval.output import lock, sweep_file
from ddp_eval.output.lock import LOCK
from ddp_eval.run import sweep_watch
from ddp_eval.run.replica import PendingReplica
from ddp_eval.run.runner import Swept, lead_run
from ddp_eval.run.sweep import SweepEnd, config_of, run_sweep
from ddp_eval.run.sweep_models import SweptModel, is_removed, list_models
from ddp_eval.run.sweep_options import SweepOptions, Until, read_until
from ddp_eval.run.sweep_states import SweepStates
from ddp_eval.run.sweep_watch import Watcher
from ddp_eval.system.processes import birth, machine
from ddp_eval.system.whole_files import why_broken, why_incomplete
from ddp_eval.tasks import trackers
from ddp_eval.tasks.kept_setup import KeptSetup

Look = Callable[..., list[str]]


def names(*models: str, revisions: tuple[str, ...] = ()) -> list[tuple[str, int | None]]:
    return [(one.name, one.step) for one in list_models(SweepOptions(models, revisions, "out"))]


def test_patterns_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Catches checkpoint-10 before checkpoint-9, a file taken for a model, and a name that depends on where the sweep starts."""
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "checkpoint-7").write_text("")
    found = names(str(tmp_path / "runs/checkpoint-*"))
    assert found == [("checkpoint-9", 9), ("checkpoint-10", 10), ("checkpoint-100", 100)]
    (tmp_path / "runs" / "checkpoint-9²").mkdir()
    assert names(str(tmp_path / "runs/checkpoint-9*")) == [("checkpoint-9", 9), ("checkpoint-9²", 9)]
    assert names(f"{tmp_path}/*/checkpoint-9") == [("runs-checkpoint-9", 9)]


def test_names_and_steps() -> None:
    """Catches two models in one directory, and the size of a model taken for a step."""
    assert names("EleutherAI/pythia-70m", revisions=("step1000", "step512")) == [
        ("pythia-70m-step1000", 1000), ("pythia-70m-step512", 512),
    ]  # fmt: skip
    assert names("a/final", "b/final", "a/final") == [("a-final", None), ("b-final", None)]
    assert names("models/Qwen3-0.6B", "run/iter_0000500", "run/2000/") == [
        ("Qwen3-0.6B", None), ("iter_0000500", 500), ("2000", 2000),
    ]  # fmt: skip
    assert names("models/.") == [("models", None)]
    with pytest.raises(UserError, match="--revisions are of models on the hub, and / is a directory"):
        names("/", revisions=("step5",))
    with pytest.raises(UserError, match="--models runs/logs would be evaluated in logs, which a sweep has for itself"):
        names("runs/logs")
    with pytest.raises(UserError, match="p/x/y and q/x/y would both be evaluated in x-y"):
        names("p/x/y", "q/x/y")


def test_a_name_is_kept_when_others_come(tmp_path: Path) -> None:
    """Catches a checkpoint of a watch that is evaluated twice: another of its name, in another training, came later."""
    options = SweepOptions((f"{tmp_path}/a/checkpoint-*", f"{tmp_path}/b/checkpoint-*"), (), "out")
    (tmp_path / "a" / "checkpoint-1").mkdir(parents=True)
    before = list_models(options)
    assert [one.name for one in before] == ["checkpoint-1"]
    (tmp_path / "b" / "checkpoint-1").mkdir(parents=True)
    known = {(one.model, one.revision): one.name for one in before}
    assert [one.name for one in list_models(options, known)] == ["checkpoint-1", "b-checkpoint-1"]
    assert [one.name for one in list_models(options, {key: "../out" for key in known})] == ["a-checkpoint-1", "b-checkpoint-1"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--output_path o", "sweep needs --models"),
        ("--models A", "sweep needs --output_path DIR"),
        ("--models A --output_path o --model vllm", "cannot give way to another"),
        ("--models A --output_path o --until 3", "--until needs --watch"),
        ("--models A --output_path o --watch --every 0", "--every must be more than 0"),
        ("--models A --output_path o --watch --until 0", "--until must be 1 or more"),
        ("--models A --output_path o --watch --marker a/b", "--marker must be the name"),
        ("--models A --output_path o --model_args revision=x", "give --revisions"),
        ("--models A, --output_path o", "something between its commas"),
        ("--models A --output_path o --bogus", "unknown flag --bogus"),
        ("--models A --output_path o --watch --untill 3", r"unknown flag --untill: did you mean --until\?"),
        ("--modles A --output_path o", r"unknown flag --modles: did you mean --models or --model"),
    ],
)
def test_flags_that_cannot_be_meant(flags: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(flags.split())


def test_flags() -> None:
    """Catches the demo model in the place of the sweep's, and revisions out of order."""
    flags = "--models A,B C --revisions step10,step9 --watch --until 12h --limit 4 --output_path o"
    found = parse(flags.split())
    assert found.sweep is not None
    assert found.config.model_args == {}
    assert (found.sweep.models, found.sweep.revisions) == (("A", "B", "C"), ("step9", "step10"))
    assert (found.sweep.until, found.config.limit) == (Until(seconds=43200.0), 4)
    assert read_until("runs/done") == Until(file="runs/done")


def test_settings_of_each_model() -> None:
    """Catches a run that a command of the same flags does not take for its own, and adapters taken for whole models."""
    model = SweptModel("checkpoint-3", "runs/checkpoint-3", "main", 3)
    base = Config(model_args={"dtype": "float32"}, output_path="out")
    whole = config_of(base, model)
    assert whole.model_args == {"dtype": "float32", "pretrained": "runs/checkpoint-3", "revision": "main"}
    assert whole.output_path == "out/checkpoint-3"
    adapter = config_of(Config(model_args={"pretrained": "base"}, output_path="out"), model._replace(revision=None))
    assert adapter.model_args == {"pretrained": "base", "peft": "runs/checkpoint-3"}


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """look(seconds_passed, settled=(), **options) -> names that are ready."""
    monkeypatch.setattr(sweep_watch, "_OLD_S", 1e9)
    now = [1000.0]
    watchers: dict[str, Watcher] = {}
    monkeypatch.setattr(sweep_watch.time, "monotonic", lambda: now[0])

    def look(passed_s: float, settled: tuple[str, ...] = (), **more: object) -> list[str]:
        now[0] += passed_s
        options = SweepOptions((f"{tmp_path}/checkpoint-*",), (), "out", watch=True, every_s=2.0, **more)  # type: ignore[arg-type]
        watcher = watchers.setdefault("one", Watcher(options))
        watcher.look(list_models(options), settled)
        look.reasons = watcher.reasons  # type: ignore[attr-defined]
        return [one.name for one in watcher.ready]

    return look


def test_a_checkpoint_in_pieces(look: Look, tmp_path: Path) -> None:
    """Catches a checkpoint that is taken while half of it is there, or before its tokenizer has followed."""
    place = checkpoints.write_checkpoint(tmp_path / "checkpoint-3", 3)
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:1000])
    assert look(0) == look(10) == []
    assert "model.safetensors has 1000 bytes" in look.reasons["checkpoint-3"]  # type: ignore[attr-defined]
    (place / "model.safetensors").write_bytes(whole)
    assert look(0.1) == []
    (place / "late.json").write_text("{}")
    assert look(1.9) == []
    assert look(2.1) == ["checkpoint-3"]
    assert look(5, ("checkpoint-3",)) == []


def test_a_failed_checkpoint_that_is_written_again(look: Look, tmp_path: Path) -> None:
    """Catches one that is evaluated for ever, and one that was repaired and is never looked at again."""
    place = checkpoints.write_checkpoint(tmp_path / "checkpoint-3", 3)
    look(0)
    assert look(3) == ["checkpoint-3"]
    assert look(3, ("checkpoint-3",)) == []
    (place / "config.json").write_text((place / "config.json").read_text() + " ")
    assert look(3, ("checkpoint-3",)) == []
    assert look(3, ("checkpoint-3",)) == ["checkpoint-3"]


def test_a_marker(look: Look, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert look(100, marker="DONE") == []
    (tmp_path / "checkpoint-3" / "DONE").touch()
    assert look(0, marker="DONE") == ["checkpoint-3"]


def test_what_is_missing(tmp_path: Path) -> None:
    """Catches shards that an index names and nobody has written yet."""
    place = tmp_path / "model"
    place.mkdir()
    assert why_incomplete(place) == "config.json is not there yet"
    (place / "config.json").write_text('{"model_type": "llama"')
    assert why_incomplete(place) == "config.json is no whole JSON file"
    (place / "config.json").write_text("{}")
    (place / "optimizer.pt").write_text("")
    assert why_incomplete(place) == "its weights are not there yet"
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (place / "one.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert why_incomplete(place) == "two.safetensors is not there, which the index names"
    (place / "two.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{")
    assert why_incomplete(place) == "two.safetensors has 9 bytes, and its header is not whole"
    (place / "two.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert why_incomplete(place) is None


def test_what_is_not_loaded_is_not_missed(tmp_path: Path) -> None:
    """Catches a checkpoint that is refused for the index of files which nobody downloaded and nobody loads, and one that is
    taken between its shards, before their index is there."""
    whole = b"\x02\0\0\0\0\0\0\0{}"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(whole)
    assert why_incomplete(tmp_path) == "the index of its shards is not there yet"
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')
    assert why_broken(tmp_path) == "pytorch_model-00001-of-00001.bin is not there, which the index names"
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert why_incomplete(tmp_path) is None
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert why_broken(tmp_path) == "model-00001-of-00002.safetensors is not there, which the index names"
    (tmp_path / "model.safetensors").write_bytes(whole)
    assert why_broken(tmp_path) is None


class Trained:
    """A watch in which every run comes out, or fails, at once. before_look: called before each look at the files, by number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before_look: Callable[[int], object] = lambda number: None) -> None:
        self.ran: list[str] = []
        self.failing: set[str] = set()
        self.raising: dict[str, Exception] = {}
        looks: list[int] = []
        look = Watcher.look

        def looking(watcher: Watcher, *args: Any) -> None:
            looks.append(1)
            assert len(looks) < 50, "the watch does not end"
            look(watcher, *args)
            before_look(len(looks))

        def lead_run(config: Config, *args: object) -> dict[str, Any]:
            name = Path(str(config.output_path)).name
            self.ran.append(name)
            if name in self.failing:
                raise UserError("it fails")
            if name in self.raising:
                raise self.raising[name]
            Path(str(config.output_path)).mkdir(exist_ok=True)
            return {"ddp_eval": {}, "results": {}}

        monkeypatch.setattr(Watcher, "look", looking)
        monkeypatch.setattr(Watcher, "_rest_s", 0.0)
        monkeypatch.setattr("ddp_eval.run.sweep.lead_run", lead_run)
        monkeypatch.setattr("ddp_eval.run.sweep._Sweep._refuse_at_once", lambda sweep, models: None)
        monkeypatch.setattr("ddp_eval.run.sweep._Sweep._tidy", lambda sweep: None)
        monkeypatch.setattr("ddp_eval.run.sweep_states.sweep_files.write_tables", lambda directory: None)

    def sweep(self, place: Path, until: Until | None = None, models: tuple[str, ...] = (), **more: Any) -> SweepEnd:
        """until: of a watch. models: others than checkpoint-*."""
        config = Config(output_path=str(place / "out"), tasks=["demo_lambada"], **more)
        models = models or (f"{place}/checkpoint-*",)
        options = SweepOptions(models, (), str(place / "out"), watch=until is not None, every_s=0.01, until=until or Until())
        end = run_sweep(config, options, World(0, 0, 1, torch.device("cpu")), lambda config, results: None)
        assert end is not None
        return end

    def watch(self, place: Path, until: Until, **more: Any) -> dict[str, str]:
        """The states that the sweep returns."""
        return {one["name"]: one["state"] for one in self.sweep(place, until, **more).entries}


def test_until_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a watch that never ends because training removes its old checkpoints, one that does not try again what failed in
    the last launch, and one that takes for done what --fresh is to replace."""
    place = checkpoints.write_checkpoints(tmp_path, [1, 2])

    def rotate(number: int) -> None:
        if trained.ran == ["checkpoint-1"] and (place / "checkpoint-1").exists():
            (place / "checkpoint-1").rename(place / "removed")

    trained = Trained(monkeypatch, rotate)
    trained.failing = {"checkpoint-2"}
    assert trained.watch(place, Until(count=2)) == {"checkpoint-1": "done", "checkpoint-2": "failed"}
    trained.failing = set()
    assert trained.watch(place, Until(count=2)) == {"checkpoint-2": "done"}
    assert trained.ran == ["checkpoint-1", "checkpoint-2", "checkpoint-2"]
    trained.watch(place, Until(count=1), fresh=True)
    assert trained.ran[3:] == ["checkpoint-2"]


def test_the_last_checkpoint_before_the_file_of_until(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a watch that ends without the checkpoint which came, with the file, just after its last look."""
    place = checkpoints.write_checkpoints(tmp_path, [1])

    def end(number: int) -> None:
        if number == 2:
            checkpoints.write_checkpoint(place / "checkpoint-2", 2)
            (place / "over").touch()

    trained = Trained(monkeypatch, end)
    assert trained.watch(place, Until(file=str(place / "over"))) == {"checkpoint-1": "done", "checkpoint-2": "done"}


def test_what_is_done_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint that is evaluated again because its optimizer was written later."""
    place = checkpoints.write_checkpoints(tmp_path, [1])

    def go_on(number: int) -> None:
        if number < 6:
            (place / "checkpoint-1" / "optimizer.pt").write_text("x" * number)
        else:
            (place / "over").touch()

    trained = Trained(monkeypatch, go_on)
    assert trained.watch(place, Until(file=str(place / "over"))) == {"checkpoint-1": "done"}
    assert trained.ran == ["checkpoint-1"]


def test_a_folder_of_each_checkpoint(look: Look, tmp_path: Path) -> None:
    """Catches a watch that waits for ever where models lie in a folder of their checkpoints."""
    checkpoints.write_checkpoint(tmp_path / "checkpoint-3" / "hf", 3)
    assert look(0, subfolder="hf") == []
    assert look(3, subfolder="hf") == ["checkpoint-3"]
    sweep = parse(["--models", "A", "--output_path", "o", "--watch", "--model_args", "subfolder=hf"]).sweep
    assert sweep is not None and sweep.subfolder == "hf"


def entry(name: str, state: str = "waiting", **more: Any) -> dict[str, Any]:
    found = {"name": name, "model": name, "revision": None, "step": None, "state": state, "reason": None, "seconds": None}
    return {**found, "logged": [], **more}


def launch_in(place: Path) -> SweepStates:
    """What one launch knows of a sweep in `place`."""
    return SweepStates(place, SweepOptions((f"{place}/train/checkpoint-*",), (), str(place)))


def states_in(place: Path) -> dict[str, str]:
    return {name: one["state"] for name, one in sweep_file.read_earlier(place).items()}


def test_what_several_launches_know(tmp_path: Path) -> None:
    """Catches a launch that forgets, or takes back, what another has done, and a run that is waited for though it is there."""
    models = [SweptModel(name, name, None, None) for name in "abcd"]
    one, two = launch_in(tmp_path), launch_in(tmp_path)
    one.note(entry("b", "failed"))
    one.write(models[:2], {})
    two.note(entry("a", "done", seconds=2.0))
    two.note(entry("b", "done", seconds=3.0))
    two.write(models, {})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("{}")
    one.note(entry("a", "done"))  # it has found it complete
    found = one.write(models, {"c": "it is not complete"})
    assert states_in(tmp_path) == {"a": "done", "b": "done", "c": "waiting", "d": "done"}
    assert [(one["seconds"], one["reason"]) for one in found[:3]] == [(2.0, None), (3.0, None), (None, "it is not complete")]
    assert (tmp_path / "sweep.csv").read_text().count("unreadable") == 3, "tables are of the same models"
    assert SweptModel("a", str(tmp_path), None, None).is_local
    for state in ("waiting", "gone"):  # it found it held, or removed, before the other came to its end
        one.note(entry("b", state))
        assert one.write(models, {})[1] == entry("b", "done", seconds=3.0)
    assert one.held_by_others(lambda name: True) == []
    one.note(entry("b"))
    assert one.held_by_others(lambda name: False) == ["b"], "--fresh waits for it, too"


def test_two_launches_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches lines that are lost because two launches read the file, and both write it."""
    monkeypatch.setattr("ddp_eval.run.sweep_states.sweep_files.write_tables", lambda directory: time.sleep(0.01))
    names = [[f"{writer}{number}" for number in range(6)] for writer in "ab"]

    def work(own: list[str]) -> None:
        states = launch_in(tmp_path)
        for name in own:
            states.note(entry(name, "done"))
            states.write([], {})

    threads = [threading.Thread(target=work, args=(own,)) for own in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert states_in(tmp_path) == {name: "done" for own in names for name in own}
    assert not (tmp_path / LOCK).exists()


def test_a_launch_that_died_or_hangs_while_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a sweep that waits for ever for the lock of a dead launch, and one that ends over the lock of one that hangs."""
    holder = {"host": "h", "pid": 2**22 + 1, "born": "x", "machine": machine(), "token": "0" * 32}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    launch_in(tmp_path).write([SweptModel("a", "a", None, None)], {})
    assert states_in(tmp_path) == {"a": "waiting"}
    monkeypatch.setattr(sweep_file, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(lock, "DYING_S", 0.1)
    (tmp_path / LOCK).write_text(json.dumps({**holder, "pid": os.getpid(), "born": birth(os.getpid())}))
    states = launch_in(tmp_path)
    states.note(entry("a", "done"))
    assert states.write([], {})[0]["state"] == "done" and states.has_news, "what this launch knows"
    assert states_in(tmp_path) == {"a": "waiting"} and "sweep.json is not written for now: process" in caplog.text
    (tmp_path / LOCK).unlink()
    states.write([], {})
    assert states_in(tmp_path) == {"a": "done"} and not states.has_news


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches what others have written replaced because it could not be read, and a sweep that ends in its middle over it, or as
    if all of it were in the file."""
    launch_in(tmp_path).write([SweptModel("a", "a", None, None)], {})
    states = launch_in(tmp_path)
    states.note(entry("b", "done"))

    def refuse(path: object, within: object = None) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sweep_file, "_PATIENCE_S", 0.0)
    with monkeypatch.context() as patch:  # nor can the lock be removed
        patch.setattr(sweep_file.read_back, "open_regular", refuse)
        states.write([], {})
    assert states.has_news and states_in(tmp_path) == {"a": "waiting"} and "sweep.json is not written for now" in caplog.text
    assert "anew" not in caplog.text
    states.write([], {})
    assert states_in(tmp_path) == {"a": "waiting", "b": "done"}
    place = checkpoints.write_checkpoints(tmp_path / "train", [1])
    trained = Trained(monkeypatch)
    monkeypatch.setattr(sweep_file, "write_sweep", refuse)
    assert not trained.sweep(place).is_written and "lacks what this launch did last" in caplog.text


def test_a_state_file_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches what other launches wrote thrown away, as a later version's file, and a sweep that ends in its middle over it."""
    states = launch_in(tmp_path)
    states.note(entry("a", "done"))
    states.write([], {})
    (tmp_path / "sweep.json").write_text('{"version": 2, "models": []}')
    with pytest.raises(UserError, match="the version that this ddp_eval reads, got 2: remove it, and the same command finds"):
        launch_in(tmp_path)
    states.write([], {})
    assert states_in(tmp_path) == {"a": "done"} and "it is written anew" in caplog.text


def test_a_checkpoint_that_is_removed_before_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one that waits for ever, in this launch and the next, is named at each look, or is taken for a failure."""
    place = checkpoints.write_checkpoints(tmp_path, [1, 3])
    (place / "checkpoint-2").mkdir()  # incomplete
    (place / "checkpoint-4").mkdir()

    def rotate(number: int) -> None:
        if number == 2 and not (place / "removed").exists():  # the third is removed between the look at it and its turn
            (place / "checkpoint-2").rmdir()
            (place / "checkpoint-3").rename(place / "removed")

    trained = Trained(monkeypatch, rotate)
    trained.failing = {"checkpoint-3"}
    end = trained.sweep(place, Until(count=3))
    states = {"checkpoint-1": "done", "checkpoint-2": "gone", "checkpoint-3": "gone", "checkpoint-4": "waiting"}
    assert {one["name"]: one["state"] for one in end.entries} == states == states_in(place / "out")
    assert end.describe() == "1 done, 2 gone, 1 waiting"
    assert caplog.text.count("checkpoint-2 is gone: its files were removed before it was evaluated") == 1
    assert "checkpoint-3 is gone" in capsys.readouterr().err
    (place / "checkpoint-4").rmdir()
    caplog.clear()
    assert trained.sweep(place, Until(count=4)).describe() == "1 done, 1 gone", "those of this launch"
    assert "checkpoint-4 is gone" in caplog.text and "checkpoint-2" not in caplog.text
    (place / "removed").rename(place / "checkpoint-3")
    trained.failing = set()
    assert trained.watch(place, Until(count=4))["checkpoint-3"] == "done", "it has come back"


def test_a_path_that_is_removed_before_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one that is named by its path, and waits for ever once it is removed, or is tried again."""
    place = checkpoints.write_checkpoints(tmp_path, [1, 2])
    trained = Trained(monkeypatch)
    trained.failing = {"checkpoint-2"}

    def remove(config: Config, model: SweptModel) -> None:
        if model.name == "checkpoint-2" and model.is_local:
            Path(model.model).rename(place / "removed")

    monkeypatch.setattr("ddp_eval.run.sweep._refuse_broken", remove)
    paths = tuple(str(place / f"checkpoint-{step}") for step in (1, 2))
    assert trained.sweep(place, Until(count=2), paths).describe() == "1 done, 1 gone"
    assert trained.ran == ["checkpoint-1", "checkpoint-2"] and states_in(place / "out")["checkpoint-2"] == "gone"


def test_a_directory_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches models taken for gone, all at once, because their file system is not mounted, or a disk does not answer."""
    options = SweepOptions((f"{tmp_path}/runs/*/checkpoint-*",), (), "out")
    model = f"{tmp_path}/runs/a/checkpoint-1"
    assert not is_removed(options, model), "nobody can look into runs/"
    Path(model).mkdir(parents=True)
    assert not is_removed(options, model)
    Path(model).rmdir()
    assert is_removed(options, model) and not is_removed(options, f"{tmp_path}/runs/a/other")
    stat = os.stat

    def refuse(path: Any, **more: Any) -> os.stat_result:
        if path == model:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert not is_removed(options, model)
    (tmp_path / "runs" / "a").rmdir()
    assert is_removed(options, model), "the training was removed"


def test_models_that_another_launch_is_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sweep that ends as if all of its models were done, while another launch holds one; and one whose run directory
    was taken away, which ends the other models, or writes into what is another's by now."""
    place = checkpoints.write_checkpoints(tmp_path, [1, 2, 3])
    trained = Trained(monkeypatch)
    trained.raising = {
        "checkpoint-1": run_directory.AtWork("another run is at work"),
        "checkpoint-2": run_directory.Lost("it was taken over"),
    }
    end = trained.sweep(place)
    assert trained.ran == [*(f"checkpoint-{step}" for step in (1, 2, 3)), "checkpoint-1", "checkpoint-2"], "once more, at the end"
    assert end.held == ["checkpoint-1", "checkpoint-2"] and end.describe() == "1 done, 2 at work in another launch"
    assert not (place / "out" / "checkpoint-2").exists()
    assert trained.sweep(place, Until(seconds=0.05)).held == [], "its time is over, whatever waits"


def test_a_pattern_that_finds_the_sweep_itself(tmp_path: Path) -> None:
    """Catches the directory of a sweep, and its runs, taken for checkpoints; checkpoints that lie there are some."""
    for name in ("checkpoint-1", "sweep", "sweep/checkpoint-1", "sweep/logs", "sweep/checkpoint-2", "sweep-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweep" / "checkpoint-1" / "status.json").write_text("{}")
    for name in ("status.json", "config.json"):
        (tmp_path / "sweep" / "checkpoint-2" / name).write_text("{}")
    found = [list_models(SweepOptions((f"{tmp_path}/{pattern}",), (), f"{tmp_path}/sweep/")) for pattern in ("*", "*/*")]
    assert [one.name for one in found[0]] == ["checkpoint-1", "sweep-2"]
    assert [one.name for one in found[1]] == ["sweep-checkpoint-2"]


def test_results_are_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tracker that gets finished models again at each restart, and one that never gets those it could not take."""
    place = checkpoints.write_checkpoints(tmp_path, [1, 2])
    sent: list[int | None] = []
    refused: list[int | None] = []

    def send(results: dict[str, Any], samples: object, step: int | None) -> None:
        sent.append(step)
        if not refused:
            refused.append(step)
            raise ConnectionError("not now")

    monkeypatch.setattr(trackers, "_open_trackio", lambda config: (send, lambda: None))
    trained = Trained(monkeypatch)
    for project, steps in (("hushed", [1, 2]), ("hushed", [1]), ("hushed", []), ("another", [1, 2])):
        sent.clear()
        assert trained.sweep(place, trackio_args={"project": project}).count("done") == 2
        assert sent == steps, project
    assert "hushed" not in (place / "out" / "sweep.json").read_text()


def test_a_failure_behind_the_message_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that load, and wait for ever for the report of one which failed before it could load."""

    def fail(replica: PendingReplica) -> None:
        raise ImportError("half a module")

    reports: list[Any] = []
    gather = collectives.gather_reports
    monkeypatch.setattr(PendingReplica, "start", fail)
    monkeypatch.setattr(collectives, "gather_reports", lambda world, report: (reports.append(report), gather(world, report))[1])
    world = World(0, 0, 1, torch.device("cpu"), goes_on=True)
    followers = Followers(world, stays=True)
    config = Config(model_args={"pretrained": "demo"}, tasks=["demo_lambada"])
    with pytest.raises(UserError, match=r"^ImportError: half a module$"):
        lead_run(config, world, followers, None, Swept(KeptSetup(), lambda: None))
    assert reports == ["ImportError: half a module"] and followers.listening


def test_ranks_hear_of_a_failure_in_their_packs() -> None:
    """Catches ranks that run the rest of their packs, for an hour, for a model that has failed on another."""
    for goes_on in (True, False):
        with Progress(World(0, 0, 1, torch.device("cpu"), goes_on=goes_on), "work", 4, silent=True) as progress:
            progress.push()
            assert not progress.is_stopped
            progress.stop()
            progress.push()
            assert progress.is_stopped is goes_on
