"""Journals: what is whole comes back to the bit, and nothing else comes back at all."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from ddp_eval.errors import UserError
from ddp_eval.output import journal
from ddp_eval.output.journal import MAGIC, Journal, OtherWork, holds_work, read_journals, work_key
from ddp_eval.packs.results import RESULT, fill_slots
from ddp_eval.run.execute import fill_texts

KEY = work_key({"plan": "a"})
ITEM_STARTS = np.array([0, 2, 3, 3, 6])  # four packs; the third has no items
SUMS = {0: [-1.25, np.nan], 1: [-np.inf], 2: [], 3: [-0.0, 5e-324, -1 / 3]}
GREEDY = {0: [True, False], 1: [True], 2: [], 3: [False, False, True]}


def add(own: Journal, *packs: int) -> None:
    for pack in packs:
        own.append(pack, results_of(pack))


def write(directory: Path, name: str, *packs: int, key: bytes = KEY, origin: str = "cpu") -> Path:
    own = Journal(directory / f"{name}.journal", key, origin)
    add(own, *packs)
    own.close()
    return own.path


def results_of(*packs: int) -> np.ndarray:
    """The results of these packs, by hand."""
    items = [item for pack in packs for item in range(ITEM_STARTS[pack], ITEM_STARTS[pack + 1])]
    sums, greedy = ([value for pack in packs for value in column[pack]] for column in (SUMS, GREEDY))
    return np.array(list(zip(items, sums, greedy, strict=True)), dtype=RESULT)


def test_what_is_written_comes_back_to_the_bit(tmp_path):
    """Catches NaN, signed zeros or denormals changed on the way, a pack without items, and the files of other ranks forgotten."""
    write(tmp_path, "a", 3, 0, origin="one machine")
    write(tmp_path, "b", 2, 0, origin="another")
    found = read_journals(tmp_path, KEY, ITEM_STARTS)
    assert found.packs.tolist() == [0, 2, 3]
    assert found.results.tobytes() == results_of(3, 0, 2, 0).tobytes()
    assert (found.origins, found.notes) == (["another", "one machine"], [])


def test_packs_in_pieces(tmp_path):
    """Catches a resumed run that does not say which packs were cut for lack of memory."""
    own = Journal(tmp_path / "a.journal", KEY, "cpu")
    own.append(3, results_of(3), pieces=2)
    add(own, 1)
    own.close()
    assert read_journals(tmp_path, KEY, ITEM_STARTS).splits.tolist() == [[3, 2]]


def test_no_file_before_the_first_pack(tmp_path):
    """Catches a file per rank and attempt, thousands in the end, of ranks that had nothing to do."""
    own = Journal(tmp_path / "a.journal", KEY, "cpu")
    own.close()
    assert list(tmp_path.iterdir()) == []
    assert len(read_journals(tmp_path / "nowhere", KEY, ITEM_STARTS).packs) == 0


def test_a_pack_is_with_the_kernel_when_append_returns(tmp_path):
    """Catches a buffer in the process, which kill -9 would lose."""
    own = Journal(tmp_path / "a.journal", KEY, "cpu")
    for pack, count in ((1, 1), (3, 2)):
        add(own, pack)
        assert len(read_journals(tmp_path, KEY, ITEM_STARTS).packs) == count
    own.close()


def test_truncated_at_every_byte(tmp_path):
    """Catches half a record that is taken for a whole one, and whole ones that are lost with it."""
    data = write(tmp_path, "whole", 0, 3, 1).read_bytes()
    ends = []
    for stop in range(len(data) + 1):
        (tmp_path / "whole.journal").write_bytes(data[:stop])
        found = read_journals(tmp_path, KEY, ITEM_STARTS)
        packs = [0, 3, 1][: len(found.packs)]
        assert found.packs.tolist() == sorted(packs), stop
        assert found.results.tobytes() == results_of(*packs).tobytes(), stop
        if not found.notes:
            ends.append(stop)
    assert len(ends) == 4, "the header and each of three records end somewhere, and only there nothing is dropped"
    assert ends[-1] == len(data)


OTHER_VERSION = b"ddp_eval journal 2\n"


def test_a_journal_of_another_version_is_kept(tmp_path):
    """Catches unfinished work of an earlier version thrown away without --fresh: what cannot be read here may be read there."""
    path = write(tmp_path, "a", 0, 3)
    path.write_bytes(path.read_bytes().replace(MAGIC, OTHER_VERSION))
    assert holds_work(tmp_path)
    with pytest.raises(OtherWork, match=r"a\.journal"):
        read_journals(tmp_path, KEY, ITEM_STARTS)


def test_every_byte_flipped_to_every_bit_pattern_of_one(tmp_path):
    """Catches a record or header that is trusted though a bit of it has changed: always fewer packs, never other numbers."""
    path = write(tmp_path, "whole", 0, 3, 1)
    data = path.read_bytes()
    for place in range(len(data)):
        for mask in (0x01, 0x10, 0x80, 0xFF):
            broken = bytearray(data)
            broken[place] ^= mask
            path.write_bytes(broken)
            if broken.startswith(OTHER_VERSION):  # which nobody throws away
                with pytest.raises(OtherWork):
                    read_journals(tmp_path, KEY, ITEM_STARTS)
                continue
            found = read_journals(tmp_path, KEY, ITEM_STARTS)
            packs = [0, 3, 1][: len(found.packs)]
            assert len(packs) < 3, (place, mask)
            assert found.results.tobytes() == results_of(*packs).tobytes(), (place, mask)
            assert len(found.notes) == 1, (place, mask)


def test_a_dropped_tail_is_told(tmp_path):
    """Catches packs that are computed again without a word, and a word that does not say which file and how much."""
    path = write(tmp_path, "a", 0, 1)
    path.write_bytes(path.read_bytes()[:-3])
    (tmp_path / "b.journal").write_bytes(b"ddp_eval jour")
    notes = read_journals(tmp_path, KEY, ITEM_STARTS).notes
    record_bytes = 8 + 4 + 4 + 1 + 17 + 16
    assert notes == [
        f"the last {record_bytes - 3} bytes of the journal a.journal are torn or corrupt and dropped; "
        "1 packs before them are kept",
        "the journal b.journal has no whole header and is dropped (13 bytes)",
    ]


def test_other_work_is_refused(tmp_path):
    """Catches numbers of other weights or another plan mixed in."""
    write(tmp_path, "a", 0)
    with pytest.raises(OtherWork, match=r"a\.journal"):
        read_journals(tmp_path, work_key({"plan": "b"}), ITEM_STARTS)


def test_a_record_of_another_file_is_no_record(tmp_path):
    """Catches a checksum that does not depend on the key: blocks of an old file that a broken disk shows in a new one."""
    data = write(tmp_path, "a", 0).read_bytes()
    other_key = work_key({"plan": "b"})
    header = journal.encode_header(KEY, "cpu")
    path = write(tmp_path, "a2", 1, key=other_key)
    path.write_bytes(journal.encode_header(other_key, "cpu") + data[len(header) :])
    (tmp_path / "a.journal").unlink()
    found = read_journals(tmp_path, other_key, ITEM_STARTS)
    assert (found.packs.tolist(), len(found.notes)) == ([], 1)


def test_a_pack_of_another_shape_is_dropped(tmp_path):
    """Catches an index past the end of the plan, or results that would go into other items."""
    write(tmp_path, "a", 3)
    assert read_journals(tmp_path, KEY, ITEM_STARTS[:2]).packs.tolist() == []
    assert read_journals(tmp_path, KEY, np.array([0, 2, 3, 3, 7])).packs.tolist() == []
    assert read_journals(tmp_path, KEY, np.array([0, 2, 2, 2, 5])).packs.tolist() == [], "as many items, and others"


def test_keys_do_not_depend_on_order():
    """Catches a resume that is refused because a dictionary was made in another order, and a key that forgets a fact."""
    assert work_key({"a": 1, "b": {"c": 2, "d": 3}}) == work_key({"b": {"d": 3, "c": 2}, "a": 1})
    assert work_key({"a": 1}) != work_key({"a": 2}) != work_key({"b": 2})
    assert len(work_key({})) == 32


def test_full_disk(tmp_path):
    """Catches a traceback, or a run that goes on without a journal; what was whole before stays readable."""
    own = Journal(tmp_path / "a.journal", KEY, "cpu")
    add(own, 0)
    size = os.path.getsize(own.path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.journal cannot be written to \(File too large\): make room or repair it"):
            add(own, 1, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = read_journals(tmp_path, KEY, ITEM_STARTS)
    assert found.packs.tolist() == [0]
    assert "10 bytes" in found.notes[0]


def test_disk_that_fails_behind_the_back(tmp_path, monkeypatch):
    """Catches a failure in the syncing thread that nobody hears of."""
    monkeypatch.setattr(journal, "SYNC_S", 0.01)
    own = Journal(tmp_path / "a.journal", KEY, "cpu")
    add(own, 0)

    def refuse(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal.os, "fsync", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        for _ in range(1000):
            add(own, 1)
            own._syncer.join(0.01)


@pytest.mark.parametrize("remove", [lambda path: path.unlink(), lambda path: shutil.rmtree(path.parent)])
def test_deleted_journal(tmp_path, remove):
    """Catches packs written for hours into a file that has no name any more."""
    (tmp_path / "journal").mkdir()
    own = Journal(tmp_path / "journal" / "a.journal", KEY, "cpu")
    add(own, 0)
    remove(own.path)
    with pytest.raises(UserError, match="it or its directory has been deleted"):
        own.sync()


def test_journal_that_cannot_be_read(tmp_path, monkeypatch):
    """Catches a file that is passed over as if it held nothing."""
    (tmp_path / "a.journal").mkdir()
    with pytest.raises(UserError, match=r"a\.journal must be a regular file, and is a directory"):
        read_journals(tmp_path, KEY, ITEM_STARTS)


TEXT_STARTS = np.array([0, 3, 5])  # two batches of texts, numbered 4 and 5
TEXTS = {4: [[7, 8, 9], [], [2**31 - 1]], 5: [[1], [2, 3]]}


def test_texts_come_back_whole(tmp_path):
    """Catches answers that change places, an empty one that swallows the next, and texts taken for scores."""
    own = Journal(tmp_path / "a.journal", KEY, "cpu")
    own.append_texts(5, TEXTS[5])
    add(own, 3)
    own.append_texts(4, TEXTS[4], pieces=2)
    own.close()
    found = read_journals(tmp_path, KEY, ITEM_STARTS, TEXT_STARTS)
    assert found.packs.tolist() == [3, 4, 5]
    assert found.results.tobytes() == results_of(3).tobytes()
    assert found.splits.tolist() == [[4, 2]]
    texts, differing = fill_texts(found.lengths, found.answers, 5)
    assert (texts, differing) == ([*TEXTS[4], *TEXTS[5]], 0)


def test_texts_that_do_not_fit_the_plan(tmp_path):
    """Catches lengths that are not those of the tokens behind them, and a batch that the plan does not have."""
    for name, unit, answers in (("a", 4, TEXTS[5]), ("b", 6, TEXTS[4]), ("c", 3, TEXTS[5])):
        own = Journal(tmp_path / f"{name}.journal", KEY, "cpu")
        own.append_texts(unit, answers)
        own.close()
    found = read_journals(tmp_path, KEY, ITEM_STARTS, TEXT_STARTS)
    assert len(found.packs) == len(found.lengths) == len(found.answers) == 0
    assert len(found.notes) == 3


def test_results_in_their_slots():
    """Catches an item that no rank has brought, a NaN that passes for a difference, and a later rank's result that is taken."""
    results = np.array([(1, -1.0, True), (0, np.nan, False), (1, -1.5, False), (0, np.nan, False)], dtype=RESULT)
    filled, differing = fill_slots(results, 2)
    assert filled.tobytes() == results[[1, 0]].tobytes() and differing == 0.5
    with pytest.raises(RuntimeError, match="1 of 3 items came back from no rank, the first of them item 2"):
        fill_slots(results, 3)


def test_answers_in_their_slots():
    """Catches an answer that no rank has brought, and two ranks' different answers taken for one."""
    lengths, answers = np.array([[1, 2], [0, 1], [1, 2]]), np.array([[5], [6], [7], [5], [8]])
    assert fill_texts(lengths, answers, 2) == ([[7], [5, 6]], 1)
    with pytest.raises(RuntimeError, match="1 of 3 answers came back from no rank, the first of them answer 2"):
        fill_texts(lengths, answers, 3)
