"""Generated texts, greedy and drawn, the same to the bit on any number of ranks, after a kill, and in one run with scores."""

import json
import shlex
from typing import Any

import pytest
from launch import QUICK, launch, launching, wait_for
from places import GENERATION_TASKS, PROGRAMS

from ddp_eval.cli.compare import main as compare
from ddp_eval.output import tables, write

FAULTY = (str(PROGRAMS / "faulty_main.py"),)
COMMON = f"--model_args pretrained=demo --include_path {GENERATION_TASKS} --bootstrap_iters 0 "
RUNS = {
    # 3 batches of the drawn task, 2 of the others, and packs
    "mixed": COMMON + "--tasks gen_boolean gen_drawn gen_story demo_lambada --limit 24 --log_samples",
    "other seed": COMMON + "--tasks gen_boolean gen_drawn gen_story demo_lambada --limit 24 --seed 7",
    "one by one": COMMON + "--tasks gen_drawn --limit 2 --no_packing",
    "one text": COMMON + "--tasks gen_story --limit 1 --predict_only",
}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_texts_on_any_number_of_ranks(ranks, run_on, capsys):
    """Catches draws by rank, batches cut by the number of ranks, answers that change places, and a rank without a tokenizer."""
    alone, many = run_on(0), run_on(ranks)
    for name in RUNS:
        for file in (tables.TEXTS, tables.SCORES):
            assert (alone[name] / file).read_bytes() == (many[name] / file).read_bytes(), (name, file)
        reports = [json.loads((directory[name] / write.RESULTS).read_text())["results"] for directory in (alone, many)]
        assert reports[0] == reports[1]
        assert compare([str(alone[name]), str(many[name]), "--expect", "identical"]) == 0
    capsys.readouterr()
    manifest = json.loads((many["mixed"] / write.MANIFEST).read_text())
    assert manifest["generation"]["batches"] > ranks
    assert manifest["requests"] == 24 * 6
    measured = json.loads((many["mixed"] / write.TELEMETRY).read_text())
    assert measured["generated_tokens_per_s"] > 0
    counts = [rank["counts"].get("generated_tokens", 0) for rank in measured["ranks"]]
    assert min(counts) > 0
    assert sum(counts) >= manifest["generation"]["generated_tokens"] // 2  # greedy answers of equal requests count once


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "one by one"])
def test_texts_of_sharded_weights(name, run_on, tmp_path):
    """Catches a rank that is done and keeps the others waiting, and rows that end at other tokens."""
    finished = launch(2, *shlex.split(RUNS[name]), "--layout", "shard:2", "--output_path", tmp_path, program=QUICK, timeout_s=400)
    assert finished.returncode == 0, str(finished)
    for file in (tables.TEXTS, tables.SCORES):
        assert (run_on(0)[name] / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_texts_that_differ_are_counted(run_on, capsys):
    """Catches a comparison that takes other texts for the same."""
    runs = [str(run_on(0)[name]) for name in ("mixed", "other seed")]
    assert compare([*runs, "--json", "--expect", "identical"]) == 3
    tasks = json.loads(capsys.readouterr().out)["comparisons"][0]["tasks"]
    assert tasks["gen_story"]["texts_differing"] == tasks["gen_boolean"]["texts_differing"] == 0
    assert tasks["gen_drawn"]["texts_differing"] > 50
    assert tasks["gen_drawn"]["texts"] == 72


def test_texts_after_a_kill(run_on, tmp_path):
    """Catches finished batches that are generated again, lost, or come back as other texts, on another number of ranks."""
    path = tmp_path / "run"
    flags = [*shlex.split(RUNS["mixed"]), "--output_path", path]
    variables: Any = {"FAULT": "killed_after", "FAULT_RANK": "1", "FAULT_FILE": str(tmp_path / "pid")}
    with launching(2, *flags, program=FAULTY, **variables) as running:
        wait_for(tmp_path / "pid", running, 150)
        assert running.finish(400).returncode != 0
    finished = launch(3, *flags, program=QUICK, timeout_s=400)
    assert finished.returncode == 0, str(finished)
    assert "resuming: " in "".join(finished.sentences())
    alone = run_on(0)["mixed"]
    for file in (tables.TEXTS, tables.SCORES):
        assert (alone / file).read_bytes() == (path / file).read_bytes()
    assert json.loads((path / write.MANIFEST).read_text())["resumed_packs"] > 0
