"""Commands whose output nobody reads to its end: `| head`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from sweeps import entry, write_state

from ddp_eval import __main__ as process


@pytest.mark.parametrize("models", [1, 5000])
def test_a_reader_that_has_gone(models: int, tmp_path: Path) -> None:
    """Catches a traceback of BrokenPipeError, from the command or at the interpreter's end. More than a pipe holds, and less."""
    sweep = write_state(tmp_path / "sweep", [entry(f"model-{number}", "waiting") for number in range(models)])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ddp_eval", "compare", str(sweep)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    os.close(writer)
    assert finished.stderr == "" and finished.returncode in (0, 141)


def test_another_broken_pipe_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a connection that broke passed off as a reader that had enough."""

    def work() -> int:
        raise BrokenPipeError

    monkeypatch.setattr(process, "_is_unread", lambda: False)
    with pytest.raises(BrokenPipeError):
        process._print_all(work)
