"""Files that are about to be loaded, read into the page cache by a thread, as far as memory is free."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from ddp_eval.system import machine

_BLOCK_BYTES = 8 * 2**20
_SHARE = 0.5  # of the memory that is available: what else is cached there is in use, too


class ReadAhead:
    """One reading at a time; `start` gives up the one before. What it does is of no matter to results: it never raises."""

    def __init__(self) -> None:
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None
        self.read_bytes = 0  # by all readings

    def start(self, paths: Iterable[Path]) -> None:
        self.stop()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(list(paths), self._given_up), daemon=True, name="ddp_eval ahead")
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended, after a block at most."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _read(self, paths: list[Path], given_up: threading.Event) -> None:
        left_bytes = _SHARE * machine.free_bytes()
        buffer = bytearray(_BLOCK_BYTES)
        for path in paths:
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while not given_up.is_set() and left_bytes >= _BLOCK_BYTES and (count := file.readinto(buffer)):
                    left_bytes -= count
                    self.read_bytes += count
