"""Which models a sweep is over, what their run directories are called, and when those of a watch are ready: no process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from ddp_eval.cli.sweep import parse
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.output import sweep_file
from ddp_eval.run import sweep_watch
from ddp_eval.run.sweep import config_of, run_sweep
from ddp_eval.run.sweep_models import SweptModel, list_models
from ddp_eval.run.sweep_options import SweepOptions, Until, read_until
from ddp_eval.run.sweep_watch import Watcher
from ddp_eval.system.whole_files import why_broken, why_incomplete

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
            Path(str(config.output_path)).mkdir(exist_ok=True)
            return {"ddp_eval": {}, "results": {}}

        monkeypatch.setattr(Watcher, "look", looking)
        monkeypatch.setattr(Watcher, "_rest_s", 0.0)
        monkeypatch.setattr("ddp_eval.run.sweep.lead_run", lead_run)
        monkeypatch.setattr("ddp_eval.run.sweep.sweep_files.write_tables", lambda directory: None)

    def watch(self, place: Path, until: Until, **more: Any) -> dict[str, str]:
        """The states that the sweep returns."""
        config = Config(output_path=str(place / "out"), tasks=["demo_lambada"], **more)
        options = SweepOptions((f"{place}/checkpoint-*",), (), str(place / "out"), watch=True, every_s=0.01, until=until)
        entries = run_sweep(config, options, World(0, 0, 1, torch.device("cpu")), lambda config, results: None)
        assert entries is not None
        return {one["name"]: one["state"] for one in entries}


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


def test_what_several_launches_know(tmp_path: Path) -> None:
    """Catches a launch that forgets what another has done, and a run that is waited for though its directory holds it."""

    def entry(name: str, state: str = "waiting") -> dict[str, object]:
        return {"name": name, "model": name, "revision": None, "step": None, "state": state, "reason": None, "seconds": None}

    both = [entry("a"), entry("b")]
    sweep_file.write_sweep(tmp_path, both, {"b": entry("b", "failed")})
    sweep_file.write_sweep(tmp_path, [*both, entry("c"), entry("d")], {"a": entry("a", "done")})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("{}")
    sweep_file.write_sweep(tmp_path, [*both, entry("c"), entry("d")], {})
    states = {name: one["state"] for name, one in sweep_file.read_sweep(tmp_path).items()}
    assert states == {"a": "done", "b": "failed", "c": "waiting", "d": "done"}
    assert SweptModel("a", str(tmp_path), None, None).is_local
