"""lm_eval's description of the environment: torch's own, collected once, and nothing of the environment's variables."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from torch.utils import collect_env

from ddp_eval.config import Config
from ddp_eval.distributed.world import join_group
from ddp_eval.run import runner
from ddp_eval.system import environment


@pytest.fixture(autouse=True)
def uncollected():
    environment.start_collecting.cache_clear()
    yield
    environment.start_collecting.cache_clear()


def test_no_value_of_a_variable_is_told(monkeypatch):
    """Catches what torch prints of the environment, which may hold anything, and lines lost beside it."""
    plain = environment._collect()
    for name in ("CUDA_MODULE_LOADING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDNN_LIBRARY"):
        monkeypatch.setenv(name, f"secret\nof {name}")
    monkeypatch.setattr(collect_env, "get_cuda_module_loading_config", lambda: "secret")
    found = environment._collect()
    assert "secret" not in found and "CUDA_MODULE_LOADING" not in found and "allocator" not in found
    kept = ("PyTorch version: ", "OS: ", "Python version: ", "CPU:", "Versions of relevant libraries:", "[pip3] torch==")
    assert all(any(line.startswith(start) for line in plain.split("\n")) for start in kept)


def test_packages_are_those_of_pip(monkeypatch):
    """Catches packages that pip would list and this does not, in another order or under another name."""
    listed = subprocess.run([sys.executable, "-mpip", "list", "--format=freeze"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this Python has no pip")
    for patterns in ("PIP_PATTERNS", "COMMON_PATTERNS", "NVIDIA_PATTERNS", "ONEAPI_PATTERNS"):
        monkeypatch.setattr(collect_env, patterns, {""})  # all there are
    assert sorted(environment._list_packages(None)[1].splitlines()) == sorted(listed.stdout.splitlines())


def test_a_run_collects_beside_its_work_and_once(tmp_path, monkeypatch):
    """Catches torch's own collector, which runs pip and more at the end of every evaluation while all ranks wait."""
    calls = []
    collect = collect_env.get_env_info

    def count():
        calls.append(1)
        return collect()

    def refuse():
        raise AssertionError("lm_eval collects by itself")

    monkeypatch.setattr(collect_env, "get_env_info", count)
    monkeypatch.setattr(collect_env, "get_pretty_env_info", refuse)
    for name in ("a", "b"):
        config = Config(
            model_args={"pretrained": "demo"},
            tasks=["demo_lambada"],
            limit=2,
            bootstrap_iters=1000,
            output_path=str(tmp_path / name),
        )
        results = runner.run(config, join_group("cpu"))
        assert results is not None
        telemetry = results["ddp_eval"]["telemetry"]
        saved = json.loads((tmp_path / name / "results.json").read_text())
        assert saved["pretty_env_info"].startswith("PyTorch version: ") and "CUDA_MODULE_LOADING" not in saved["pretty_env_info"]
        assert telemetry["ranks"][0]["phases_s"]["bootstrap"] > 0, "perplexity's standard error is bootstrapped"
        assert telemetry["weights_bytes"] > 1_000_000
    assert len(calls) == 1
