"""Pages of files that are mapped into memory: which they are, and giving back those that are no longer needed."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_MADV_DONTNEED = 4


def drop_pages(address: int, size: int) -> bool:
    """Give back the pages that lie whole in a range, if it is mapped from a file: who reads them again gets the file's content.

    Nobody may have written to the range. Returns whether any were given back: never of other memory, whose content would be lost.
    """
    start, stop = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if start >= stop or not _is_of_file(start, stop):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return int(madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)) == 0


def _is_of_file(start: int, stop: int) -> bool:
    """Whether one mapping of a file on disk holds the whole range."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    for line in lines:
        span, _, _, device, inode, *path = line.split(maxsplit=5)
        first, last = (int(edge, 16) for edge in span.split("-"))
        if first <= start and stop <= last:
            return bool(path) and inode != "0" and device != "00:00" and path[0].startswith("/")
    return False
