"""Files read into the page cache before they are loaded."""

from pathlib import Path

import pytest

from ddp_eval.system import machine
from ddp_eval.system.read_ahead import ReadAhead


def test_within_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reading that pushes out what is in use, one that fails with its file, and one that nothing stops."""
    (tmp_path / "weights").write_bytes(bytes(3 * 2**20))
    files = [tmp_path / "gone", tmp_path / "weights"]
    ahead = ReadAhead()
    monkeypatch.setattr(machine, "free_bytes", lambda: 2**30)
    ahead.start(files)
    ahead.wait()
    assert ahead.read_bytes == 3 * 2**20
    monkeypatch.setattr(machine, "free_bytes", lambda: 2**20)
    ahead.start(files)
    ahead.wait()
    assert ahead.read_bytes == 3 * 2**20
    ahead.stop()


def test_what_the_system_says() -> None:
    assert machine.free_bytes() > 2**20
