"""The commands of README and docs that are marked as `runs`, page by page, as a reader would paste them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import documents
import pytest
from launch import launch
from places import ROOT

EXEC = ("-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])")
SCRIPTS = {
    page: [block.text for block in documents.blocks_of(page) if block.marker == documents.RUNS] for page in documents.PAGES
}
PAGES = [page for page, blocks in SCRIPTS.items() if blocks]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_of_a_page(page: Path, tmp_path: Path) -> None:
    """Catches a command in the docs that fails where it is pasted, one behind the other, into one shell."""
    for name in ("examples", "scripts", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(SCRIPTS[page])
    finished = launch(0, "bash", "-euo", "pipefail", "-c", script, program=EXEC, cwd=tmp_path, PATH=path, timeout_s=280)
    assert finished.returncode == 0, str(finished)
