"""`--load broadcast`: one rank reads the weights, all have them."""

import json
import shutil

import pytest
from launch import QUICK, launch
from places import GENERATION_TASKS, PROGRAMS

BROADCAST = (str(PROGRAMS / "broadcast_main.py"),)
TASKS = ("--tasks", "demo_hellaswag,demo_lambada", "--limit", "8", "--max_pack_tokens", "600")
STORIES = ("--include_path", GENERATION_TASKS, "--tasks", "gen_story,gen_boolean")


def bits_of(path, program, model, *flags, file="scores.parquet"):
    finished = launch(2, "--model_args", f"pretrained={model}", *TASKS, *flags, "--output_path", path, program=program)
    assert finished.returncode == 0, str(finished)
    assert json.loads((path / "manifest.json").read_text())["ranks"]["world_size"] == 2
    return (path / file).read_bytes()


@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow)]
)
def test_same_bits_with_one_reader(kind, tmp_path, tiny_model_path):
    """Catches weights, tied ones or buffers that stay empty on the other ranks, and ranks that read the checkpoint after all."""
    model = tiny_model_path(kind)
    from_disk = bits_of(tmp_path / "disk", QUICK, model)
    assert bits_of(tmp_path / "broadcast", BROADCAST, model, "--load", "broadcast") == from_disk


@pytest.mark.slow
def test_same_texts_with_one_reader(tmp_path, tiny_model_path):
    """Catches ranks that generate without the checkpoint's generation_config, which no weight tells of."""
    model = shutil.copytree(tiny_model_path("llama"), tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 40, 50, 60, 70], "repetition_penalty": 1.3}))
    from_disk = bits_of(tmp_path / "disk", QUICK, model, *STORIES, file="texts.parquet")
    broadcast = bits_of(tmp_path / "broadcast", BROADCAST, model, *STORIES, "--load", "broadcast", file="texts.parquet")
    assert broadcast == from_disk


def test_reader_that_fails_ends_all(tmp_path, tiny_model_path):
    """Catches ranks that wait for weights which never come."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model_path("llama").iterdir():
        (broken / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    finished = launch(2, "--model_args", f"pretrained={broken}", *TASKS, "--load", "broadcast", program=QUICK)
    assert finished.returncode == 1
    assert any("cannot load the model" in sentence for sentence in finished.sentences()), str(finished)
