"""One model after another in one process, and two at once: a loop over checkpoints works, and what cannot is one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import tolerance
from launch import launch
from places import PROGRAMS

from ddp_eval import demo

MOST_TOKENS = 10  # of a word
MAIN = (str(PROGRAMS / "lives_main.py"),)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint with weights of its own."""
    place = shutil.copytree(demo.MODEL_PATH, tmp_path_factory.mktemp("other") / "model")
    weights = safetensors.torch.load_file(place / "model.safetensors")
    safetensors.torch.save_file(
        {name: tensor * 1.1 for name, tensor in weights.items()}, place / "model.safetensors", {"format": "pt"}
    )
    return place


def run(ranks, how, other, place, **variables):
    finished = launch(ranks, place, how, other, program=MAIN, timeout_s=120, **variables)
    assert finished.returncode == 0, str(finished)
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(max(1, ranks))]


@pytest.fixture(scope="module")
def alone(other, tmp_path_factory):
    """The values of both checkpoints on one rank."""
    demo_value, other_value = run(0, "name", other, tmp_path_factory.mktemp("alone"))[0]["values"]
    assert demo_value != other_value
    return demo_value, other_value


def close(perplexities):
    """Equals what is within rounding: a perplexity is exp(-mean log-probability), here of texts of one word."""
    return pytest.approx(list(perplexities), rel=2 * tolerance.of_demo().nats(MOST_TOKENS))


@pytest.mark.parametrize("shared", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_launch_again_and_again(shared, other, alone, tmp_path):
    """Catches a second group that reads the addresses of the first ("Connection refused", or no end), with torchrun's store and
    with one of rank 0's own; a second model opened beside the first that waits for ranks which serve it."""
    leader, follower = run(2, "launch", other, tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=shared)
    first, second = alone
    assert leader["values"] == close([first, first, second, second, first, first])
    assert leader["two at once"].startswith("a model of ddp_eval.lm.launch is still open, and the other ranks serve it")
    assert leader["evaluate meanwhile"] == leader["two at once"]
    assert follower["values"] == []
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [results["results"]["demo_lambada"]["perplexity,none"]] == close([first])


def test_by_name_again_and_again(other, alone, tmp_path):
    """Catches a second `simple_evaluate(model="ddp_eval")` that waits for ranks which serve the first for ever, one that scores
    the first one's weights on them, and a mistake in one checkpoint's path that ends the loop on the others."""
    leader, _ = run(2, "name", other, tmp_path)
    assert leader["values"] == close(alone)
    assert leader["error"] == "the model directory nowhere/at/all does not exist"
    assert leader["evaluate meanwhile"].startswith('the other ranks serve the model that lm_eval opened by its name "ddp_eval"')
