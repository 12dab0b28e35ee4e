"""A request that overflows to NaN among others, on several ranks: it alone is lost, in every layout, with the same bits."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from launch import QUICK, launch
from task_files import write_pairs_task

from ddp_eval.output import tables, write

BAD = 33  # "@", whose embedding is NaN
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(ranks, layout) -> (scores, scores.parquet's bytes, what results.json says of the run, launch); each once."""
    place, done = tmp_path_factory.mktemp("poisoned"), {}
    model = tiny_models.make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    for part in (model, tokenizer):
        part.save_pretrained(place / "model")
    texts = [f"Once more the {word} of them" for word in [*NUMBERS, f"seventh {tokenizer.decode([BAD])}"]]
    assert [BAD in tokenizer.encode(text) for text in texts] == [False] * len(NUMBERS) + [True]
    tasks = write_pairs_task(
        place / "tasks", [{"context": text, "continuation": f" {word} left"} for text in texts for word in NUMBERS]
    )

    def go(ranks, layout):
        if (ranks, layout) not in done:
            path = tmp_path_factory.mktemp("run")
            flags = f"--model_args pretrained={place / 'model'} --tasks pairs --include_path {tasks} --max_pack_tokens 128"
            finished = launch(ranks, *flags.split(), "--layout", layout, "--output_path", str(path), program=QUICK, timeout_s=200)
            assert finished.returncode == 0, str(finished)
            facts = json.loads((path / write.RESULTS).read_text())["ddp_eval"]
            scores = path / tables.SCORES
            done[ranks, layout] = tables.read_scores(scores), scores.read_bytes(), facts, finished
        return done[ranks, layout]

    return go


@pytest.mark.parametrize(("ranks", "layout"), [(0, "replicas"), (2, "layers:2"), (2, "shard:2"), (3, "replicas")])
def test_only_the_request_itself_is_nan(ranks, layout, run):
    """Catches neighbours in a pack that are lost with it, and ranks that do not know of the second run."""
    scores, content, facts, finished = run(ranks, layout)
    assert facts["batching"] == "packs", "else nothing shares a forward"
    broken = np.isnan(scores.loglikelihood)
    assert broken.tolist() == [doc >= len(NUMBERS) ** 2 for doc in scores.doc_id]
    assert facts["nan_recovered"] > 0 and facts["not_finite"]["pairs"]["requests"] == len(NUMBERS)
    assert f"{len(NUMBERS)} requests of the task pairs came to numbers that are NaN" in finished.stderr
    assert content == run(0, "replicas")[1]
