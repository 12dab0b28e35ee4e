"""The config says that the head is the embedding, and the checkpoint has another head: that one is used, however it is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from engine_runs import load
from launch import QUICK, launch
from places import PROGRAMS

IDS = torch.tensor([[5, 9, 30, 7, 12]])
PROGRAM_OF = {"broadcast": (str(PROGRAMS / "broadcast_main.py"),)}


@pytest.fixture(scope="module")
def untied(tiny_model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, which has a head of its own, under a config that denies it."""
    place = shutil.copytree(tiny_model_path("llama"), tmp_path_factory.mktemp("untied") / "model")
    config = json.loads((place / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    (place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return place


def test_the_checkpoints_own_head_is_used_and_that_is_said(
    untied: Path, tiny_model: Callable[[str], transformers.PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches the embedding in place of the head that was trained, and other numbers than lm_eval's without a word."""
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        model = load(untied).model
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, tiny_model("llama")(input_ids=IDS).logits)
    assert [record.getMessage() for record in caplog.records] == [
        f"the config of {untied} ties lm_head.weight to model.embed_tokens.weight, and the checkpoint has another: it is used "
        "as it is, where lm_eval and vLLM tie it"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        load(untied.parent / "model", tie_word_embeddings=False)
    assert not caplog.records, "its config is right then"


def test_lm_eval_ties_it(untied: Path, tiny_model: Callable[[str], transformers.PreTrainedModel]) -> None:
    """Catches a warning that is no longer true of lm_eval or of transformers."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(untied), device="cpu", dtype="float32").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kept = transformers.AutoModelForCausalLM.from_pretrained(untied)
    assert torch.equal(kept.get_output_embeddings().weight, tiny_model("llama").get_output_embeddings().weight)


@pytest.mark.parametrize(
    "flags",
    [
        ("--load", "broadcast"),
        ("--layout", "layers:2"),
        pytest.param(("--layout", "shard:2"), marks=pytest.mark.slow),
    ],
)
def test_same_bits_over_ranks(
    flags: tuple[str, str], untied: Path, tiny_model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches ranks that are built by the config, tied, and so come to other numbers, or to none."""
    found: list[bytes] = []
    for model, more in ((tiny_model_path("llama"), ()), (untied, flags)):
        place = tmp_path / str(len(found))
        command = (
            "--model_args",
            f"pretrained={model}",
            "--tasks",
            "demo_hellaswag",
            "--limit",
            "8",
            "--output_path",
            place,
            *more,
        )
        finished = launch(1 + bool(more), *command, program=PROGRAM_OF.get(more[-1] if more else "", QUICK))
        assert finished.returncode == 0, str(finished)
        found.append((place / "scores.parquet").read_bytes())
    assert found[0] == found[1]
