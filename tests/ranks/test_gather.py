"""The helpers of `distributed` on three gloo ranks, with rows that do not divide and rows that are not there."""

import json
import pickle

import gather_main
import numpy as np
import pytest
import torch
from launch import launch
from places import PROGRAMS

from ddp_eval.distributed import collectives, progress, store, world
from ddp_eval.distributed.world import World

PROGRAM = (str(PROGRAMS / "gather_main.py"),)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    place = tmp_path_factory.mktemp("gather")
    finished = launch(3, place, program=PROGRAM)
    assert finished.returncode == 0, str(finished)
    return finished, [json.loads((place / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.fixture(scope="module")
def ranks(launched):
    return launched[1]


@pytest.fixture
def alone():
    return World(0, 0, 1, torch.device("cpu"))


def test_every_rank_knows_itself(ranks):
    """Catches a rank taken from the wrong variable, and two leaders."""
    assert [rank["rank"] for rank in ranks] == [[0, 3, True], [1, 3, False], [2, 3, False]]


def test_rows_come_to_all_ranks_in_order(ranks):
    """Catches padding taken for rows, rows of a rank that has none, all ranks empty, and floats that do not survive as bits."""
    for rank in ranks:
        assert rank["gathered"] == rank["wanted"]
        assert rank["results"] == np.concatenate(list(map(gather_main.results_of, range(3)))).tobytes().hex()


def test_shards_cover_all_evenly(ranks):
    """Catches a pack that no rank runs, a rank out of step with the others, and an empty plan."""
    for number in (0, 1, 2, 3, 7, 9):
        shards = [rank["shards"][str(number)] for rank in ranks]
        assert {pack for shard in shards for pack in shard} == set(range(number))
        assert len({len(shard) for shard in shards}) == 1
        assert len(shards[0]) == -(-number // 3)


def test_tallies_add_up(ranks):
    """Catches a count per rank taken for the count of all, and tallies that share a key."""
    assert ranks[0]["counted"] == [6, 30]


def test_bytes_are_counted(ranks):
    """Catches bytes of the wrong side, of the wrong type, or of fewer calls than were made."""
    sent = len(pickle.dumps(gather_main.MESSAGE)) + len(pickle.dumps(None))
    assert sent > 12_000_000
    for rank, found in enumerate(ranks):
        assert found["payloads"] == {
            "all_gather (processes)": [1, 8, 8 * 2],
            "all_gather (size)": [5, 5 * 8, 5 * 8 * 2],
            # rows of two int64, padded to the longest rank's 5, 0, 1 and 4, and 3 results; from each of the two others as many
            "all_gather (rows)": [5, (5 + 0 + 1 + 4) * 16 + 3 * 17, ((5 + 0 + 1 + 4) * 16 + 3 * 17) * 2],
            "broadcast (size)": [2, 0, 16] if rank else [2, 16, 0],
            "broadcast (message)": [2, 0, sent] if rank else [2, sent, 0],
        }


def test_messages_arrive_whole(ranks):
    """Catches arrays that lose their type or their bits on the way, and a second message read as the first."""
    assert ranks[0]["message"] == []
    assert ranks[1]["message"] == ranks[2]["message"] == ["Ä", "int32", True, True, True, None]


def test_an_error_is_reported_by_one_rank(launched):
    """Catches the same sentence from every rank, and from none."""
    assert launched[0].sentences() == ["ddp_eval: all ranks say this"]


def test_no_warnings(launched):
    """Catches deprecated collectives, which would print a warning per rank in every run."""
    assert "Warning" not in launched[0].stderr, str(launched[0])


def test_one_rank_needs_no_group(alone, capsys):
    """Catches a helper that wants a process group where there is one rank."""
    rows = np.arange(6).reshape(3, 2)
    assert collectives.all_gather_rows(alone, rows).tolist() == rows.tolist()
    assert collectives.shard(alone, 3) == [0, 1, 2]
    assert collectives.shard(alone, 0) == []
    collectives.send_message(alone, "nobody listens")
    tally = progress.Tally(alone, "alone")
    tally.add(2)
    tally.add(3)
    assert tally.read() == 5
    store.report_once("said once")
    assert capsys.readouterr().err == "ddp_eval: said once\n"
    world.leave_group(alone)
