"""Files that are there whole or not at all, and that a power cut leaves so. Light: it is imported before torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ddp_eval.errors import UserError
from ddp_eval.system.read_back import read_json

TEMPORARY_SUFFIX = ".ddp_eval.tmp"


def replace_file(path: Path, chunks: Iterable[bytes], still: Callable[[], bool] = lambda: True) -> None:
    """Write `path` beside itself, onto the disk, and put it in place.

    still: asked, when the disk has it, whether to. Raises OSError; what was there before then stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with contextlib.suppress(OSError):
            aside.unlink()  # of a process of this number that died: nothing is ever written into a file that was there before
        with open(aside, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        if still():
            os.replace(aside, path)
            sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def replace_json(path: Path, value: Any, still: Callable[[], bool] = lambda: True) -> None:
    """The same with a value as JSON."""
    replace_file(path, [json.dumps(value).encode() + b"\n"], still)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a run directory; {} where there is none that can be read."""
    try:
        found = read_json(path, within=path.parent)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def sync_directory(directory: Path) -> None:
    """Make a new name survive a power cut, on file systems that can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
