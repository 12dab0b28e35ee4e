"""The commands of README and docs that are marked as `runs`, page by page, as a reader would paste them."""

from __future__ import annotations

from pathlib import Path

import documents
import pytest
from launch import launch
from places import ROOT

BLOCKS = {page: [block.text for block in documents.blocks_of(page) if block.marker == documents.RUNS] for page in documents.PAGES}
PAGES = [page for page, blocks in BLOCKS.items() if blocks]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_of_a_page(page: Path, tmp_path: Path) -> None:
    """Catches a command in the docs that fails where it is pasted, one behind the other, in one directory."""
    for block in BLOCKS[page]:
        for ranks, words in documents.starts_in(block):
            finished = launch(ranks, *words, cwd=tmp_path)
            assert finished.returncode == 0, f"{words}\n{finished}"
