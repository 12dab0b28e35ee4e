"""Digits that are no number Python reads, and paths that no file system takes: one sentence, wherever they come from.

Found by damaging manifests (scripts/fuzz_files.py): `--layout layers:` with 5,000 digits and an --include_path of 5,000
characters ended in tracebacks, and so did RANK=² and `reproduce -o` with a long name.
"""

import json
from typing import Any

import pytest

from ddp_eval import demo
from ddp_eval.cli import reproduce
from ddp_eval.config import Config, read_think_end
from ddp_eval.distributed import launch_environment, watchdog
from ddp_eval.distributed.world import choose_device
from ddp_eval.errors import UserError
from ddp_eval.placement.kinds import kept_layout

MANY = "1" * 5000
LONG = "a" * 5000


@pytest.mark.parametrize("count", [MANY, "²", "-2", "2.0", "", "0x2"])
def test_counts_of_layouts(count):
    with pytest.raises(UserError, match="with K of 2 or more"):
        Config(layout=f"layers:{count}")
    assert kept_layout(f"layers:{count}", 2) is None


@pytest.mark.parametrize("rank", [MANY, "²", "x"])
def test_rank_variable(rank, monkeypatch):
    """What reads it before it is checked must not fail: else there is a traceback in place of the sentence."""
    monkeypatch.setenv("RANK", rank)
    assert watchdog.Watch().rank == 0
    assert not launch_environment.is_first()


def test_numbers_of_devices():
    for number in (MANY, "²"):
        with pytest.raises(UserError, match="--device must be cuda or cpu"):
            choose_device(f"cuda:{number}", 0)


def test_ends_of_thinking():
    assert read_think_end({"think_end_token": "12"}) == 12
    assert read_think_end({"think_end_token": MANY}) == MANY
    assert read_think_end({"think_end_token": "²"}) == "²"


@pytest.mark.parametrize("name", ["output_path", "include_path"])
def test_nul_in_a_path(name):
    options: dict[str, Any] = {name: "a\0b"}
    with pytest.raises(UserError, match=f"^--{name} must not hold a NUL character"):
        Config(**options)


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A run whose manifest says as much as is needed to be run again."""
    monkeypatch.chdir(tmp_path)  # `reproduce` goes where the run began
    config = Config(model_args={"pretrained": demo.MODEL_PATH}, tasks=["demo_lambada"]).recorded
    manifest = {"config": config, "working_directory": str(tmp_path), "packages": {}, "prompts_by_task": {"demo_lambada": "1"}}
    manifest |= {"tasks": {"versions": {"demo_lambada": 1}}, "model": {"pretrained": demo.MODEL_PATH}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_long_path_of_a_manifest(earlier):
    manifest = json.loads((earlier / "manifest.json").read_text())
    manifest["config"]["include_path"] = LONG
    (earlier / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--trust_task_files allows it"):
        reproduce.parse([str(earlier)])


def test_long_output_path(earlier):
    """It is refused where the directory is made."""
    path = reproduce.parse([str(earlier), "--output_path", LONG]).config.output_path
    assert path is not None and path.endswith(LONG)
