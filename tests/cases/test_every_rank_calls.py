"""`evaluate` and `launch` in a caller's group, where ranks do not call alike: one sentence, within the group's timeout."""

from __future__ import annotations

import json

import pytest
from launch import launch
from places import PROGRAMS

MAIN = (str(PROGRAMS / "calls_main.py"),)
GROUP_S = 7  # the group's timeout in calls_main.py


def run(how, place, ranks=2):
    finished = launch(ranks, place, how, program=MAIN)
    return finished, [
        json.loads((place / f"{rank}.json").read_text()) for rank in range(ranks) if (place / f"{rank}.json").exists()
    ]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    finished, outcomes = run("apart", tmp_path_factory.mktemp("apart"))
    assert finished.returncode == 0, str(finished)
    return finished, outcomes


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_alone(rank, apart):
    """Public report: an evaluation on rank 0 alone, as one saves a checkpoint, stands for hours. Catches a wait beyond the
    group's own timeout, and a sentence that does not say that every rank must call."""
    sentence, waited_s = apart[1][rank][f"rank {rank} alone"]
    start = f"every rank of the process group must call ddp_eval.evaluate, at the same time: rank {1 - rank} did not within"
    assert sentence.startswith(start) and sentence.endswith(f"(the group's timeout is {GROUP_S} s)"), sentence
    assert waited_s < 0.8 * GROUP_S


def test_one_rank_twice(apart):
    """Catches a second call that finds the answers to the first."""
    first, second = apart[1][0]["rank 0 twice"]
    assert isinstance(first[0], float) and "must call ddp_eval.evaluate, at the same time: rank 1 did not" in second[0]


@pytest.mark.parametrize(
    ("case", "difference"),
    [
        ("other tasks", "ddp_eval.evaluate with the same arguments: tasks is demo_lambada on rank 0 and demo_wikitext on rank 1"),
        ("other options", "ddp_eval.evaluate with the same arguments: num_fewshot is 0 on rank 0 and 1 on rank 1"),
    ],
)
def test_other_arguments(case, difference, apart):
    """Catches ranks that take rank 0's arguments for theirs without a word."""
    for outcome in apart[1]:
        assert outcome[case][0] == f"every rank must call {difference}"


def test_launch_with_other_arguments(apart):
    """Catches ranks that score with other weights than rank 0: wrong numbers without a word."""
    assert "must call ddp_eval.lm.launch, at the same time: rank 1 did not" in apart[1][0]["launch on rank 0 alone"]
    for outcome in apart[1]:
        sentence = outcome["launch of other models"]
        assert sentence.startswith("every rank must call ddp_eval.lm.launch with the same arguments: loader_args is {"), sentence
        assert "'float32'" in sentence and "'bfloat16'" in sentence, sentence


def test_ranks_that_come_together_again(apart):
    """Catches a mistake that spoils later calls, where those who gave up are still in the store, and a rank that is late."""
    leader, other = apart[1]
    values = [leader[name][0] for name in ("after that", "rank 1 late", "at the end")]
    assert isinstance(values[0], float) and values == values[:1] * 3
    assert [other[name][0] for name in ("after that", "rank 1 late", "at the end")] == [None] * 3


def test_notices_of_those_who_wait(apart):
    """Catches a rank that says nothing until it gives up."""
    waiting = "is waiting for rank {} to call ddp_eval.evaluate too (at most 4 s)"
    for rank in (0, 1):
        assert f"ddp_eval: rank {rank} {waiting.format(1 - rank)}" in apart[0].stderr, str(apart[0])


@pytest.mark.slow  # the rule is the same as above; this one sees that its sentence comes first
def test_others_in_a_barrier(tmp_path):
    """Catches a sentence that comes after the other ranks' barrier has timed out, whose traceback then hides it."""
    finished, outcomes = run("barrier", tmp_path)
    sentence, waited_s = outcomes[0]["alone"]
    assert "every rank of the process group must call ddp_eval.evaluate" in sentence and waited_s < 0.8 * GROUP_S, str(finished)


def test_no_group_under_torchrun(tmp_path):
    """Catches a TypeError on ranks other than 0, to whom lm_eval gives no results, and ranks that write over each other's."""
    finished, (leader, other) = run("no_group", tmp_path)
    assert finished.returncode == 0, str(finished)
    assert isinstance(leader["alone"][0], float) and leader["alone"][0] == other["alone"][0] == leader["writes"][0]
    assert finished.stderr.count("this process is in no process group and evaluates everything by itself, as will any rank") == 2
    assert "only rank 0 may write to output_path" in other["writes"][0], other
