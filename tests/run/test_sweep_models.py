"""Which models a sweep is over, what their run directories are called, and when those of a watch are ready: no process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest

from ddp_eval.cli.sweep import parse
from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.output import sweep_file
from ddp_eval.run import sweep_watch
from ddp_eval.run.sweep import config_of
from ddp_eval.run.sweep_models import SweptModel, list_models
from ddp_eval.run.sweep_options import SweepOptions, Until, read_until
from ddp_eval.run.sweep_watch import Watcher
from ddp_eval.system.whole_files import why_incomplete

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
    with pytest.raises(UserError, match="--models runs/logs would be evaluated in logs, which a sweep has for itself"):
        names("runs/logs")
    with pytest.raises(UserError, match="p/x/y and q/x/y would both be evaluated in x-y"):
        names("p/x/y", "q/x/y")


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
