"""Where results also go, against modules that stand in for the trackers' packages and record what they are told."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.run.runner import run
from ddp_eval.tasks import trackers

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")

WANDB = """
__version__ = "0.20.0"
calls = []
run = None

class Record:
    def __init__(self, name):
        self._name = name
    def __getattr__(self, name):
        return lambda *args, **kwargs: calls.append((f"{self._name}.{name}", args, kwargs))

class Run(Record):
    def __init__(self):
        super().__init__("run")
        self.config, self.summary = Record("config"), Record("summary")

def init(**kwargs):
    calls.append(("init", (), kwargs))
    if kwargs.get("project") == "forbidden":
        raise PermissionError("no such project")
    return Run()

class Table:
    def __init__(self, columns):
        self.columns, self.rows = columns, []
    def add_data(self, *row):
        self.rows.append(row)

class Artifact:
    def __init__(self, name, type):
        self.name = name
    def new_file(self, name, **kwargs):
        import io
        return io.StringIO()
"""
TRACKIO = """
calls, steps = [], []
def init(**kwargs):
    calls.append(("init", kwargs))
def log(values, step=None):
    calls.append(("log", values))
    steps.append(step)
    if "break" in values:
        raise ConnectionError("gone")
def finish():
    calls.append(("finish", None))
class config:
    @staticmethod
    def update(values):
        calls.append(("config", values))
class Trace:
    def __init__(self, messages, metadata):
        self.messages = messages
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """fakes(name) -> the module that stands in for the package."""
    place = tmp_path / "fakes"
    for path, text in (
        ("wandb/__init__.py", WANDB),
        ("wandb/sdk/lib/printer.py", "new_printer = object"),
        ("trackio/__init__.py", TRACKIO),
    ):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    monkeypatch.syspath_prepend(str(place))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")]:
        monkeypatch.delitem(sys.modules, name)
    yield __import__
    for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")]:
        del sys.modules[name]


def evaluate(directory: Path, **options: Any) -> dict[str, Any]:
    config = Config(
        model_args={"pretrained": "demo"}, tasks=["demo_lambada"], limit=1, bootstrap_iters=0, device="cpu",
        output_path=str(directory), **options,
    )  # fmt: skip
    results = run(config, World(0, 0, 1, torch.device("cpu")))
    assert results is not None
    return results


def everything_in(directory: Path) -> str:
    return "".join(path.read_bytes().decode("latin-1") for path in directory.rglob("*") if path.is_file())


def test_weights_and_biases(fakes: Callable[[str], Any], tmp_path: Path) -> None:
    """Catches arguments that do not reach wandb.init, results that are not logged, samples without the flag, a secret kept."""
    secret = {"wandb_args": {"project": "p", "notes": "hush-hush"}, "wandb_config_args": {"lr": "psst"}}
    results = evaluate(tmp_path / "out", **secret)
    calls = fakes("wandb").calls
    assert calls[0] == ("init", (), {"project": "p", "notes": "hush-hush"})
    assert calls[1] == ("config.update", ({"lr": "psst"},), {})
    logged = {key: value for name, args, _ in calls if name == "run.log" for key, value in args[0].items()}
    accuracy = results["results"]["demo_lambada"]["acc,none"]
    assert logged["demo_lambada/acc"] == accuracy and "evaluation/eval_results" in logged
    assert not any("demo_lambada_eval_results" in key for key in logged)
    assert [name for name, *_ in calls].index("run.log_artifact") < [name for name, *_ in calls].index("run.finish")
    kept = everything_in(tmp_path / "out")
    assert "hush-hush" not in kept and "psst" not in kept and "wandb" not in kept


def test_trackio_and_samples(fakes: Callable[[str], Any], tmp_path: Path) -> None:
    """Catches samples left out although --log_samples was given."""
    evaluate(tmp_path / "out", trackio_args={"project": "p"}, log_samples=True)
    calls = fakes("trackio").calls
    assert calls[0] == ("init", {"project": "p"}) and calls[-1][0] == "finish"
    logged = {key: value for name, values in calls if name == "log" for key, value in values.items()}
    assert "demo_lambada/acc,none" in logged or "demo_lambada/acc" in logged
    assert logged["demo_lambada/sample"].messages[0]["role"] == "user"


def results_of(accuracy: float) -> dict[str, Any]:
    """What a run of one task comes to, as far as trackers read it."""
    return {"results": {"t": {"alias": "t", "acc,none": accuracy}}, "configs": {"t": {}}, "config": {"model": str(accuracy)}}


STEPS = {1000: 0.7, 100: 0.2, 200: 0.4}  # a watch takes checkpoints as they come


def log_steps(**settings: Any) -> None:
    with trackers.tracking(Config(**settings)) as track:
        for step, accuracy in STEPS.items():
            track(results_of(accuracy), step=step)


def test_steps_are_the_axis_of_weights_and_biases(fakes: Callable[[str], Any]) -> None:
    """Catches W&B's own step, which drops every checkpoint that is logged behind a later one."""
    log_steps(wandb_args={"project": "p"})
    calls = fakes("wandb").calls
    assert ("run.define_metric", ("t/*",), {"step_metric": "step"}) in calls
    logged = [(args[0], kwargs) for name, args, kwargs in calls if name == "run.log"]
    assert [(values["step"], values["t/acc"]) for values, _ in logged if "t/acc" in values] == [*STEPS.items()]
    assert all("step" in values and not kwargs for values, kwargs in logged)
    updates = [kwargs for name, _, kwargs in calls if name == "config.update"]
    assert updates == [{"allow_val_change": True}] * 3  # another model is another config
    names = [name for name, *_ in calls]
    assert names.count("init") == names.count("run.finish") == 1


def test_steps_are_the_axis_of_trackio(fakes: Callable[[str], Any]) -> None:
    """Catches checkpoints numbered 0, 1, 2, and a step given to the tracker lost for runs that have none."""
    log_steps(trackio_args={"project": "p"})
    assert fakes("trackio").steps == [*STEPS]
    with trackers.tracking(Config(trackio_args={"project": "p", "step": 7})) as track:
        track(results_of(0.1))
        track(results_of(0.1), step=8)
        track(results_of(0.1))
    assert fakes("trackio").steps[3:] == [7, 8, 7]


def test_steps_in_the_real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches calls that only the stand-in takes."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    seen = []
    finish = wandb.sdk.wandb_run.Run.finish
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", lambda run: (seen.append(dict(run.summary)), finish(run)))
    log_steps(wandb_args={"project": "p"})
    assert [(summary["step"], summary["t/acc"]) for summary in seen] == [[*STEPS.items()][-1]]


def test_steps_in_the_real_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    log_steps(trackio_args={"project": "p"})
    with contextlib.closing(sqlite3.connect(tmp_path / "p.db")) as database:
        assert database.execute("SELECT step FROM metrics ORDER BY step").fetchall() == [(step,) for step in sorted(STEPS)]


def test_a_tracker_that_fails_behind_the_run(
    fakes: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of work lost over a tracker: by then the results are written."""

    def refuse(values: Any, step: Any = None) -> None:
        raise ConnectionError("gone away")

    monkeypatch.setattr(fakes("trackio"), "log", refuse)
    evaluate(tmp_path / "out", trackio_args={"project": "p"})
    assert "--trackio_args: the results were not logged: ConnectionError: gone away" in caplog.messages
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_tracker_that_cannot_be_opened(fakes: Callable[[str], Any], tmp_path: Path) -> None:
    """Catches a bad key that shows only after the run."""
    with pytest.raises(UserError, match=r"^--wandb_args cannot be used: PermissionError: no such project$"):
        evaluate(tmp_path / "out", wandb_args={"project": "forbidden"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that finds out at its end."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == package else object())
    settings: Any = {f"{package}_args": {"project": "p"}}
    with pytest.raises(UserError, match=f"^--{package}_args needs the package {package}, which is not installed: pip install"):
        trackers.check_installed(Config(**settings))
    trackers.check_installed(Config())


class FakeHub:
    """Stands in for HfApi. `calls`: what was asked of any of them."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, token: str) -> None:
        self.calls.append(("token", {"token": token}))

    def __getattr__(self, name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            if "path_or_fileobj" in kwargs:
                kwargs["content"] = Path(kwargs["path_or_fileobj"]).read_text()
            self.calls.append((name, kwargs))
            return {"name": "me"}

        return record


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    from lm_eval.loggers import EvaluationTracker

    FakeHub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setattr(EvaluationTracker, "recreate_metadata_card", lambda self: FakeHub.calls.append(("card", {})))
    return FakeHub.calls


def test_the_hub(hub: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    """Catches results that are not uploaded, or without the model's name, and a token in a file of the run."""
    settings = {"hub_results_org": "org", "details_repo_name": "runs", "push_results_to_hub": True, "push_samples_to_hub": True}
    results = evaluate(tmp_path / "out", hf_hub_log_args=settings, log_samples=True)
    assert hub[0] == ("token", {"token": "hf_secretsecret"})
    uploads = [kwargs for name, kwargs in hub if name == "upload_file"]
    assert uploads and all(one["repo_id"] == "org/runs-private" for one in uploads)
    sent = json.loads(uploads[0]["content"])
    assert sent["results"] == json.loads(json.dumps(results["results"])) and sent["model_name"] == "demo"
    assert hub[-1][0] == "card"
    assert any(name == "upload_folder" or "samples" in str(kwargs.get("path_in_repo", "")) for name, kwargs in hub)
    assert "hf_secretsecret" not in everything_in(tmp_path / "out") and "hub_results_org" not in everything_in(tmp_path / "out")


def test_hub_settings_that_lm_eval_does_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a TypeError, and samples that the user waits for in vain."""
    with pytest.raises(
        UserError, match=r"--hf_hub_log_args cannot be used: TypeError: .*unexpected keyword argument 'organisation'"
    ):
        evaluate(tmp_path / "out", hf_hub_log_args={"organisation": "o"})
    with (
        caplog.at_level(logging.WARNING, logger="ddp_eval"),
        pytest.raises(UserError, match="--hf_hub_log_args cannot be used: ValueError: Hugging Face token is not defined"),
    ):
        evaluate(tmp_path / "out", hf_hub_log_args={"push_samples_to_hub": True})
