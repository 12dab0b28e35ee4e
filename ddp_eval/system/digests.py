"""SHA-256 of files and of strings: what tells one model, task or prompt from another."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ddp_eval

_DIGESTS_AT_ONCE = 4
_BLOCK_BYTES = 2**20


def digest_directory(path: str | os.PathLike[str], names: Iterable[str] | None = None, read_all: bool = False) -> dict[str, Any]:
    """SHA-256 of the files of a model or tokenizer directory: {"sha256": over all, "files": {name: sha256}}, names sorted.

    names: which files, relative to `path`; those that are absent are passed over. None: every visible file at the top level.
    A snapshot in the Hugging Face cache and a plain copy of it give the same digests: the blobs of large files are named
    by their SHA-256, which is taken at its word instead of reading the file, unless it was written to since or `read_all`.
    """
    directory = Path(path)
    if names is None:
        names = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    found = [name for name in sorted(set(names)) if (directory / name).is_file()]
    with concurrent.futures.ThreadPoolExecutor(_DIGESTS_AT_ONCE) as pool:  # the parts of a large model
        files = dict(zip(found, pool.map(lambda name: _digest_file(directory / name, read_all), found), strict=True))
    return {"sha256": digest_strings(part for item in files.items() for part in item), "files": files}


def digest_code(names: Iterable[str] = ("",)) -> str:
    """A few letters that differ when modules of this package do, or those of the modules and folders that are named."""
    package = Path(ddp_eval.__file__).parent
    places = [package / name for name in names]
    digest = hashlib.sha256()
    for path in sorted({path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place])}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def digest_strings(strings: Iterable[str]) -> str:
    """One SHA-256, in hex, of strings in order; each is prefixed by its length, so ["ab", "c"] differs from ["a", "bc"]."""
    digest = hashlib.sha256()
    for string in strings:
        digest.update(as_record(string))
    return digest.hexdigest()


def as_record(string: str) -> bytes:
    """A string as `digest_strings` takes it: its length, then its UTF-8."""
    data = string.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def _digest_file(path: Path, read_all: bool) -> str:
    blob = Path(os.path.realpath(path))
    is_named = path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    # The hub's client links a blob once it is whole.
    if is_named and not read_all and blob.stat().st_mtime_ns <= path.lstat().st_mtime_ns:
        return blob.name
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
