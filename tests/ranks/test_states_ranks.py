"""A model whose layers keep a state: shared caches come to the same bits on any number of ranks, and after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from launch import QUICK, launch, launching, wait_for
from places import PROGRAMS

from ddp_eval.output import tables, write

FAULTY = (str(PROGRAMS / "faulty_main.py"),)
TASKS = "demo_mmlu_philosophy", "demo_hellaswag", "demo_lambada"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = tiny_models.save_model("qwen3_5", tmp_path_factory.mktemp("model"))
    return ["--model_args", f"pretrained={model},dtype=float32", "--tasks", *TASKS, "--limit", "12", "--max_pack_tokens", "2048"]


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    finished = launch(0, *flags, "--output_path", path, program=QUICK)
    assert finished.returncode == 0, str(finished)
    said = "".join(finished.sentences())
    assert "its layers of the kind linear_attention keep a state instead of attending" in said
    assert "running each shared prefix once, with copies of the model's cache" in said
    return path


def test_after_a_kill_on_another_number_of_ranks(flags: list[str], alone: Path, tmp_path: Path) -> None:
    """Catches batches whose rows depend on the ranks, and packs of shared caches that are run again or lost."""
    path = tmp_path / "run"
    variables: Any = {"FAULT": "forward_stuck", "FAULT_RANK": "1", "FAULT_FILE": str(tmp_path / "pid")}
    with launching(2, *flags, "--output_path", path, program=FAULTY, **variables) as running:
        wait_for(tmp_path / "pid", running, 150)
        running.kill()
    finished = launch(3, *flags, "--output_path", path, program=QUICK, timeout_s=400)
    assert finished.returncode == 0, str(finished)
    assert (path / tables.SCORES).read_bytes() == (alone / tables.SCORES).read_bytes()
    manifest = json.loads((path / write.MANIFEST).read_text())
    assert manifest["batching"] == "states" and manifest["resumed_packs"] > 0
    assert manifest["computed_tokens"] < manifest["request_tokens"] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(1, ()), (2, ()), (2, ("--layout", "shard:2"))])
def test_on_any_number_of_ranks(ranks: int, more: tuple[str, ...], flags: list[str], alone: Path, tmp_path: Path) -> None:
    """Catches packs cut by the number of ranks, and sharded ranks out of step where packs take several forwards."""
    finished = launch(ranks, *flags, *more, "--output_path", tmp_path / "run", program=QUICK, timeout_s=400)
    assert finished.returncode == 0, str(finished)
    assert (tmp_path / "run" / tables.SCORES).read_bytes() == (alone / tables.SCORES).read_bytes()
