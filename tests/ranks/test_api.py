"""`ddp_eval.evaluate` inside a training script: on all ranks of its own group, around its own DDP model."""

import json

import pytest
from launch import launch
from places import PROGRAMS

PROGRAM = (str(PROGRAMS / "api_main.py"),)


def run_on(ranks, place):
    finished = launch(ranks, place, program=PROGRAM)
    assert finished.returncode == 0, str(finished)
    return finished, [json.loads((place / f"{rank}.json").read_text()) for rank in range(max(ranks, 1))], place


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_on(0, tmp_path_factory.mktemp("alone"))[1][0]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def ranks(launched):
    return launched[1]


def test_leader_gets_results_and_the_others_none(ranks):
    """Catches results that all ranks get (and write), or the wrong one."""
    assert set(ranks[0]["numbers"][0]) == {"demo_hellaswag", "demo_lambada", "demo_wikitext"}
    assert ranks[1]["numbers"] == [None, None, None]


def test_same_numbers_as_one_process(ranks, alone):
    """Catches an evaluation that depends on the ranks, or on the random state, which differs by rank here."""
    assert ranks[0]["numbers"][0] == alone["numbers"][0]


def test_same_numbers_each_time(ranks, alone):
    """Catches state that one evaluation leaves for the next: in the group, the model, lm_eval, or after an error."""
    for numbers in (ranks[0]["numbers"], alone["numbers"]):
        assert numbers[0] == numbers[1] == numbers[2]


def test_everything_is_left_as_it_was(ranks, alone):
    """Catches a model left in eval mode, a random state moved on, groups that pile up, a tokenizer given a pad token."""
    for rank in (*ranks, alone):
        assert rank["changed"] == []
        assert rank["changed by errors"] == []


def test_training_goes_on(ranks):
    """Catches tensors made in inference mode that stay in the model, and a DDP model out of step."""
    assert ranks[0]["gradients"] == pytest.approx(ranks[1]["gradients"], rel=1e-6)
    assert ranks[0]["gradients"] > 0
    assert [rank["sum"] for rank in ranks] == [3, 3]


def test_errors_come_to_all_ranks(ranks, alone):
    """Catches ranks that wait for one that has raised, and an error that only the leader can tell apart from success."""
    for rank in (*ranks, alone):
        assert "there is no task demo_lambda: did you mean demo_lambada?" in rank["errors"]["unknown task"]
        assert rank["errors"]["bad option"] == "--num_fewshot must be 0 or more, got -1"


def test_progress_starts_anew(ranks):
    """Catches counts of an earlier evaluation, with the same plan in the same group, that are still in the store."""
    assert 0 < ranks[0]["counted"] <= 2 * ranks[0]["computed"]  # twice, where the sampler gives both ranks the only pack


def test_run_directory_is_written_once(launched):
    """Catches an output path that is only looked at when all the work is done, and an earlier run that is lost."""
    _, (leader, follower), place = launched
    assert leader["errors"]["new output"] is None
    (under_lm_evals_name,) = (place / "run").glob("*/*")
    assert under_lm_evals_name.samefile(place / "run" / "results.json")
    assert sorted(path.name for path in (place / "run").iterdir() if path.is_file()) == [
        "documents.parquet", "manifest.json", "results.json", "scores.parquet", "telemetry.json",
    ]  # fmt: skip
    assert json.loads((place / "run" / "manifest.json").read_text())["ranks"]["world_size"] == 2
    for rank in (leader, follower):
        assert "already holds a run" in rank["errors"]["output in use"]
        assert "--output_path /proc/results cannot be written to" in rank["errors"]["unusable output"]
