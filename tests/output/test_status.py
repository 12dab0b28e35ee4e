"""status.json: the last word of a run, said by whoever knows best."""

from __future__ import annotations

import pytest

from ddp_eval.output import status
from ddp_eval.system import files


@pytest.mark.parametrize("first_hand", [True, False])
def test_done_is_never_replaced(first_hand, tmp_path):
    """Catches a job that is requeued though it is done, because SIGTERM came while it printed its table."""
    status.write_status(tmp_path, status.DONE, "the run is complete")
    status.note_end(tmp_path, status.PREEMPTED, "stopped by SIGTERM", first_hand)
    assert status.read_status(tmp_path)["state"] == status.DONE
    assert [entry.name for entry in tmp_path.iterdir()] == [status.STATUS]


def test_done_that_comes_meanwhile_stays(tmp_path, monkeypatch):
    """Catches a rank that looks, finds the run at work, and writes its word over the leader's that has come in between."""
    status.write_status(tmp_path, status.RUNNING, "at work")
    sync = files.os.fsync

    def finish_meanwhile(descriptor):
        monkeypatch.setattr(files.os, "fsync", sync)
        sync(descriptor)
        (tmp_path / status.STATUS).write_text('{"state": "done"}')

    monkeypatch.setattr(files.os, "fsync", finish_meanwhile)
    status.note_end(tmp_path, status.PREEMPTED, "stopped by SIGTERM", first_hand=True)
    assert status.read_status(tmp_path)["state"] == status.DONE


def test_own_word_replaces_what_others_guess(tmp_path):
    """Catches a pre-emption passed off as a failure by ranks that only saw their peer go."""
    status.write_status(tmp_path, status.RUNNING, "at work")
    status.note_end(tmp_path, status.FAILED, "a rank has died", first_hand=False)
    status.note_end(tmp_path, status.PREEMPTED, "stopped by SIGTERM", first_hand=True)
    assert status.read_status(tmp_path)["state"] == status.PREEMPTED
