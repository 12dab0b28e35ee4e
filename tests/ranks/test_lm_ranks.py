"""`ddp_eval.lm`: lm_eval leads, two ranks compute, and the numbers are the command's."""

import json

import lm_main
import pyarrow.parquet
import pytest
import tolerance
from launch import QUICK, launch
from lm_eval_answers import close_metric
from places import PROGRAMS

from ddp_eval.output import tables, write

MAIN = (str(PROGRAMS / "lm_main.py"),)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(results, scores, texts) of the command, on one rank. texts: {task: those of its documents, in order}."""
    path = tmp_path_factory.mktemp("command")
    tasks = ("--include_path", lm_main.GENERATION, "--tasks", *lm_main.TASKS, *lm_main.GENERATING)
    flags = ("--model_args", "pretrained=demo", *tasks, "--limit", 3, "--device", "cpu", "-o", path)
    finished = launch(0, *flags, program=QUICK)
    assert finished.returncode == 0, str(finished)
    rows = pyarrow.parquet.read_table(path / tables.TEXTS).to_pylist()
    texts = {task: [row["text"] for row in rows if row["task"] == task] for task in lm_main.GENERATING}
    return json.loads((path / write.RESULTS).read_text()), tables.read_scores(path / tables.SCORES), texts


@pytest.mark.parametrize("how", ["object", *(pytest.param(how, marks=pytest.mark.slow) for how in ("name", "borrowed"))])
def test_lm_eval_leads_and_two_ranks_compute(how, command, tmp_path):
    """Catches a rank that computes alone, one that is left behind, prompts drawn by rank, texts that change places, a group that
    is not given back, and ranks that all show bars of the weights, or lm_eval's warnings of nothing."""
    finished = launch(2, tmp_path, how, program=MAIN, TQDM_DISABLE="")
    assert finished.returncode == 0, str(finished)
    assert "Loading weights" not in finished.stderr and "Custom kwargs" not in finished.stderr, str(finished)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    (theirs, scores, texts), rounding = command, tolerance.of_demo()
    for task, metrics in first["results"]["metrics"].items():
        for name, value in metrics.items():
            if "stderr" in name:  # no resampling there
                continue
            expected = theirs["results"][task][name]
            samples = first["results"]["samples"][task]
            assert value == close_metric(name, expected, samples, rounding, float32_sums=False), (task, name)
    answers = [answer for task in lm_main.TASKS for one in first["results"]["answers"][task] for (answer,) in one]
    values = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    rounding.assert_close(values, scores.loglikelihood, scores.num_tokens)
    given = {task: [text for one in first["results"]["answers"][task] for (text,) in one] for task in lm_main.GENERATING}
    assert given == texts and all(any(of_task) for of_task in texts.values())
    assert second["results"] is None and ("after" in second) == (how != "name")
    assert first["group"] == second["group"] == (how == "borrowed")
    assert ("closed" in first) == (how != "name")
    if how == "object":  # one that lives on can abort the process at its end
        assert first["threads"] == second["threads"] == []


def test_a_mistake_is_told_on_every_rank(tmp_path):
    """Catches ranks that wait for a leader that has failed."""
    finished = launch(2, tmp_path, "wrong", program=MAIN)
    assert finished.returncode == 0, str(finished)
    errors = [json.loads((tmp_path / f"{rank}.json").read_text())["error"] for rank in (0, 1)]
    assert errors == ["the model directory nowhere/at/all does not exist"] * 2
