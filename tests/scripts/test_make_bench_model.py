"""Models of a benchmark's shape, as scripts/make_bench_model.py makes them."""

from __future__ import annotations

import make_bench_model
import pytest
import torch
import transformers
from launch import launch

from ddp_eval import demo

SCRIPT = make_bench_model.__file__


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        *[
            ("tiny", 1.0),
            ("rehearsal", 4.4),
            ("llama23m", 22.9),
            ("llama100m", 109.5),
            ("llama150k", 69.0),
            ("llama1b", 1235.8),
            ("llama8b", 8030.3),
        ],
        *[("qwen3_5_28m", 27.6), ("mamba2_26m", 25.4), ("falcon_h1_27m", 27.7), ("bloom20m", 20.3)],
    ],
)
def test_number_of_parameters(shape, millions):
    """Catches a shape that is not the one that the records and their readers speak of."""
    tokenizer = make_bench_model.train_tokenizer(["some text"])
    with torch.device("meta"):
        model = make_bench_model.make_model(make_bench_model.make_config(shape, tokenizer))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)


def make(directory, *more, shape="llama23m", **environment):
    """By a forked process, or, with PYTHONHASHSEED, by one that starts anew."""
    flags = ["--shape", shape, "--tasks", "demo_boolean_expressions", "--include_path", demo.TASKS_PATH, "--out", directory]
    done = launch(0, *flags, *more, program=(SCRIPT,), **environment)
    assert done.returncode == 0, str(done)
    return directory


@pytest.mark.slow
def test_same_files_twice(tmp_path):
    """Catches weights or tokens that depend on the process, so that nobody could make a record's model again."""
    first, second = make(tmp_path / "1", shape="tiny"), make(tmp_path / "2", shape="tiny", PYTHONHASHSEED="2")
    names = sorted(path.name for path in first.iterdir())
    assert "model.safetensors" in names and "tokenizer.json" in names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_tokenizer_knows_the_tasks_words_and_weights_are_left_out(tmp_path):
    """Catches a tokenizer that learnt nothing of the prompts, and gigabytes of weights that nobody asked for."""
    make(tmp_path, "--config_only")
    assert not list(tmp_path.glob("*.safetensors"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("not ( True ) and False is").input_ids) <= 8
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == 384
