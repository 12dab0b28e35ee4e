"""What `test_gather.py` runs on every rank: each helper of `distributed` once; rank R writes what it got to DIRECTORY/R.json."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ddp_eval.distributed import collectives, progress, store
from ddp_eval.distributed.world import World, join_group, leave_group
from ddp_eval.packs.results import RESULT

FLOATS = np.array([-0.0, np.nan, -np.inf, 5e-324, -1.0 / 3.0])


def rows_of(rank: int, counts: list[int]) -> np.ndarray:
    """(counts[rank], 2): a number that says whose row it is, and the bits of a float."""
    numbers = 1000 * rank + np.arange(counts[rank])
    return np.stack([numbers, np.resize(FLOATS.view(np.int64), counts[rank])], axis=1)


def results_of(rank: int) -> np.ndarray:
    """One result for each rank before, and one: of a type with three fields of different sizes."""
    return np.array([(10 * rank + item, FLOATS[item], item == rank) for item in range(rank + 1)], dtype=RESULT)


def count(world: World) -> list[int]:
    """What the leader reads after each rank has added its number plus one to one tally and ten to another."""
    first, second = progress.Tally(world, "first"), progress.Tally(world, "second")
    first.add(world.rank + 1)
    second.add(10)
    deadline = time.monotonic() + 10  # no rank waits for another
    while second.read() < 10 * world.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
    return [first.read(), second.read()]


MESSAGE: dict[str, Any] = {
    "text": "Ä",
    "numbers": np.arange(3_000_000, dtype=np.int32),
    "floats": FLOATS,
    "empty": np.zeros((0, 3)),
}


def exchange(world: World) -> list[Any]:
    message = MESSAGE
    if world.is_leader:
        collectives.send_message(world, message)
        collectives.send_message(world, None)
        return []
    first, second = collectives.receive_message(world), collectives.receive_message(world)
    same = [np.array_equal(first[key], message[key], equal_nan=True) for key in ("numbers", "floats", "empty")]
    return [first["text"], first["numbers"].dtype.name, *same, second]


def main() -> None:
    world = join_group("cpu")
    counts = ([2, 0, 5], [0, 0, 0], [1, 1, 1], [0, 0, 4])
    got = {
        "rank": [world.rank, world.world_size, world.is_leader],
        "gathered": [collectives.all_gather_rows(world, rows_of(world.rank, sizes)).tolist() for sizes in counts],
        "wanted": [np.concatenate([rows_of(rank, sizes) for rank in range(3)]).tolist() for sizes in counts],
        "results": collectives.all_gather_rows(world, results_of(world.rank)).tobytes().hex(),
        "shards": {number: collectives.shard(world, number) for number in (0, 1, 2, 3, 7, 9)},
        "counted": count(world),
        "message": exchange(world),
    }
    got["payloads"] = {
        name: [used["calls"], used["sent_bytes"], used["received_bytes"]] for name, used in world.meter.collectives.items()
    }
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(got))
    store.report_once("all ranks say this")
    leave_group(world)


if __name__ == "__main__":
    main()
