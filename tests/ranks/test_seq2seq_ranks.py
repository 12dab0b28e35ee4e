"""Encoder-decoders on real ranks."""

import json

import pytest
import tiny_models
from launch import QUICK, launch

from ddp_eval.output import tables, write

TASKS = ("--tasks", "demo_boolean_expressions", "demo_mmlu_global_facts", "--limit", 4, "--max_pack_tokens", 600)


@pytest.mark.parametrize("others", [[3], pytest.param([1, 2], marks=pytest.mark.slow)], ids=str)
def test_an_encoder_decoder_on_some_ranks(others, tmp_path):
    """Catches batches cut by rank, a pair lost or counted twice, and an engine that only the leader knows to load."""
    model = tiny_models.save_model("t5", tmp_path / "t5")
    scores = []
    for ranks in (0, *others):
        path = tmp_path / str(ranks)
        finished = launch(ranks, "--model_args", f"pretrained={model}", *TASKS, "--output_path", path, program=QUICK)
        assert finished.returncode == 0, str(finished)
        scores.append((path / tables.SCORES).read_bytes())
    assert all(one == scores[0] for one in scores)
    section = json.loads((path / write.RESULTS).read_text())["ddp_eval"]
    assert section["packs"] > 3 and section["engine"]["class"] == "T5ForConditionalGeneration"
