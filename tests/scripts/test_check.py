"""scripts/check.sh over stand-ins of its tools: what it runs, and what it reports when some of them fail."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT, SCRIPTS

CHECKS = ["ruff check", "ruff format", "mypy", "shellcheck"]
STAND_IN = """#!/bin/sh
echo "${0##*/} $*" >> "$CALLS"
case ",$FAILING," in *",${0##*/} $1,"*) echo "3 errors"; exit 1;; esac
"""


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[int, list[str], list[str]]]:
    """check(failing=tools and their first words, missing=a tool) -> exit code, lines without times, the tools' command lines."""

    def run(failing: str = "", missing: str = "") -> tuple[int, list[str], list[str]]:
        tools, path, calls = tmp_path / "venv" / "bin", tmp_path / "path", tmp_path / "calls"
        tools.mkdir(parents=True)
        path.mkdir()
        for name in {"ruff", "mypy", "shellcheck"} - {missing}:
            (tools / name).write_text(STAND_IN)
            (tools / name).chmod(0o755)
        for name in ("bash", "sh", "dirname", "find", "xargs"):
            (path / name).symlink_to(str(shutil.which(name)))
        variables = {"PATH": str(path), "DDP_EVAL_VENV": str(tmp_path / "venv"), "CALLS": str(calls), "FAILING": failing}
        finished = subprocess.run([SCRIPTS / "check.sh"], env=variables, capture_output=True, text=True, timeout=60)
        assert not finished.stderr
        lines = re.sub(r" \(\d+ s\)$", "", finished.stdout, flags=re.MULTILINE).splitlines()
        return finished.returncode, lines, calls.read_text().splitlines()

    return run


def test_all_pass(check: Callable[..., tuple[int, list[str], list[str]]]) -> None:
    """Catches a shell script that nobody checks, and an exit code that fails a clean tree."""
    code, lines, calls = check()
    assert (code, lines) == (0, [f"{name}: ok" for name in CHECKS])
    assert [call.split(" ./")[0] for call in calls[:3]] == ["ruff check", "ruff format --check", "mypy "]
    checked = {word.removeprefix("./") for word in calls[3].split() if word.endswith((".sh", "/run"))}
    folders = ("examples", "scripts", "slurm")
    assert checked >= {".ci/run", *(str(path.relative_to(ROOT)) for name in folders for path in (ROOT / name).glob("*.sh"))}


def test_some_fail(check: Callable[..., tuple[int, list[str], list[str]]]) -> None:
    """Catches a failure that hides those behind it, or that a later success forgives."""
    code, lines, calls = check(failing="ruff check,mypy ")
    assert (code, len(calls)) == (1, 4)
    assert lines == ["ruff check: FAILED", "3 errors", "ruff format: ok", "mypy: FAILED", "3 errors", "shellcheck: ok"]


def test_a_tool_is_missing(check: Callable[..., tuple[int, list[str], list[str]]]) -> None:
    """Catches a check that is left out without a word."""
    code, lines, calls = check(missing="shellcheck")
    assert (code, len(calls)) == (1, 3)
    assert lines[-1] == "shellcheck: FAILED: it is not installed: pip install -c constraints.txt '.[dev]'"
