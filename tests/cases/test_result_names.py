"""What results are filed under: lm_eval's names, of the adapter where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import adapters
from ddp_eval.run import manifest
from ddp_eval.run.runner import run

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def adapter(tiny_model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """model_args of a model with an adapter."""
    peft = pytest.importorskip("peft")
    import transformers

    place, path = tmp_path_factory.mktemp("adapter"), tiny_model_path("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place)
    return {"pretrained": str(path), "peft": str(place)}


class FakeHub:
    """Stands in for HfApi; `calls`: what was asked of any of them."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, token: str | None = None) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, kwargs))
            return {"name": "me"}

        return record


def test_a_run_with_an_adapter(adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an adapter's results filed and pushed under the base model's name (public report), and no peft_sha."""
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import sanitize_model_name

    FakeHub.calls.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(EvaluationTracker, "recreate_metadata_card", lambda self: None)
    config = Config(
        model_args=adapter, tasks=["demo_lambada"], limit=1, bootstrap_iters=0, device="cpu", output_path=str(tmp_path / "out"),
        hf_hub_log_args={"hub_results_org": "org", "push_results_to_hub": True, "push_samples_to_hub": True}, log_samples=True,
    )  # fmt: skip
    assert run(config, World(0, 0, 1, torch.device("cpu"))) is not None
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model_name"] == adapter["peft"]
    assert results["model_name_sanitized"] == sanitize_model_name(adapter["peft"])
    assert results["config"]["peft_sha"] == "" and results["config"]["model_sha"] == ""
    assert list(results["config"]["model_args"].values()) == list(adapter.values())
    pushed = [kwargs for name, kwargs in FakeHub.calls if name in ("upload_file", "upload_folder")]
    assert len(pushed) == 2
    for one in pushed:
        where = one["path_in_repo"]
        assert (
            where.startswith((adapter["peft"], sanitize_model_name(adapter["peft"]))) and adapter["peft"] in one["commit_message"]
        )


@pytest.mark.parametrize(
    "model_args",
    [
        {"pretrained": "org/base", "peft": "org/adapter"},
        {"peft": "~/adapter", "pretrained": "org/base", "revision": "v1"},
        {"pretrained": "./base/"},
    ],
)
def test_names_are_lm_evals(model_args: dict[str, Any]) -> None:
    """Catches another order of peft and pretrained, and a name that is made nicer."""
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker

    assert Config(model_args=model_args).model_name == GeneralConfigTracker._get_model_name(model_args)
    assert Config(model_args={"max_length": 3}).model_name is None


def test_the_model_is_described_as_lm_eval_does(adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a field that lm_eval's results have and these have not: with an adapter, and without."""
    from lm_eval.models.huggingface import HFLM

    engine = {"parameters": 1, "dtype": "torch.float32"}
    for model_args in (adapter, {"pretrained": adapter["pretrained"]}):
        theirs = HFLM(device="cpu", **model_args).get_model_info()
        ours = manifest.model_info(Config(model_args=model_args), None, engine)
        assert list(ours) == list(theirs)
        assert {key: ours[key] for key in ours if "sha" in key} == {key: theirs[key] for key in theirs if "sha" in key}


def test_the_commit_of_an_adapter_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the base model's commit, or none, for an adapter of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--adapter"
    for file, text in (("refs/main", COMMIT), (f"snapshots/{COMMIT}/adapter_config.json", "{}")):
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text(text)
    assert adapters.commit_of({"pretrained": "org/base", "peft": "org/adapter"}) == COMMIT
    assert adapters.commit_of({"pretrained": "org/base", "peft": "org/other"}) == ""
    engine = {"parameters": 1, "dtype": "torch.float32"}
    info = manifest.model_info(Config(model_args={"pretrained": "org/base", "peft": "org/adapter"}), None, engine)
    assert info["peft_sha"] == COMMIT
