"""A checkpoint whose config does not say in which dtype its weights are: every rank loads them in their own, in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from launch import QUICK, launch

from ddp_eval.engines.hf import checkpoint, engine, limits


@pytest.fixture(scope="module")
def silent(tiny_model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("silent")
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path("llama"), dtype=torch.bfloat16).save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(tiny_model_path("llama")).save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_what_is_asked_before_loading_leaves_the_config_alone(silent: Path) -> None:
    """Catches float32 for the rank that has looked at sizes first: transformers writes into the config that it builds from."""
    args = {"pretrained": str(silent)}
    config = checkpoint.load_config(args)
    checkpoint.whole_model(args, config)
    limits.limits_of(checkpoint.whole_model(args, config))
    assert config.dtype is None
    assert engine.load_engine(args, config, torch.device("cpu")).dtype == torch.bfloat16


@pytest.mark.parametrize("flags", [(), ("--layout", "layers:2"), pytest.param(("--layout", "shard:2"), marks=pytest.mark.slow)])
def test_ranks_agree_with_one(flags: tuple[str, ...], silent: Path, tmp_path: Path) -> None:
    """Catches a rank that computes in float32 beside one in bfloat16: results of both are mixed without a word."""
    found: list[bytes] = []
    for ranks, more in ((1, ()), (2, flags)):
        place = tmp_path / str(ranks)
        asked = ("--model_args", f"pretrained={silent}", "--tasks", "demo_hellaswag", "--limit", "8", "--max_pack_tokens", "600")
        finished = launch(ranks, *asked, *more, "--output_path", place, program=QUICK)
        assert finished.returncode == 0, str(finished)
        found.append((place / "scores.parquet").read_bytes())
    assert found[0] == found[1]
