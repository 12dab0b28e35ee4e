"""Pages of mapped files that are given back."""

import mmap
from pathlib import Path

import numpy as np

from ddp_eval.system.mapped_files import drop_pages


def test_pages_of_a_file_come_back(tmp_path: Path) -> None:
    """Catches a range that is rounded outwards, and content that differs when it is read again."""
    path = tmp_path / "weights"
    content = np.arange(5 * mmap.PAGESIZE, dtype=np.uint8)
    content.tofile(path)
    mapped = np.memmap(path, dtype=np.uint8, mode="c")
    mapped[0], mapped[-1] = 99, 98  # on the first and last page: written to, and not to be lost
    assert drop_pages(mapped.ctypes.data + 1, len(mapped) - 2)
    assert (mapped[1:-1] == content[1:-1]).all()
    assert (mapped[0], mapped[-1]) == (99, 98)


def test_other_memory_is_left_alone() -> None:
    """Catches memory of no file, which would be zeros afterwards."""
    own = np.full(64 * mmap.PAGESIZE, 7, dtype=np.uint8)
    assert not drop_pages(own.ctypes.data, own.nbytes)
    assert (own == 7).all()
    assert not drop_pages(own.ctypes.data, 10), "less than a page"
