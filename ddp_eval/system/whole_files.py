"""Whether a checkpoint that something else writes is whole: by what its own files say of their sizes, and by their rest.

Light: no torch, no transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_MAX_JSON_BYTES = 64 * 2**20
_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_WHOLE = ("model.safetensors", "adapter_model.safetensors")  # before which loaders look at no other
_SHARD = re.compile(r"^(pytorch_)?model-\d+-of-\d+\.")
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "trainer_state")


def why_incomplete(folder: str | os.PathLike[str]) -> str | None:
    """A phrase for what a checkpoint's directory lacks; None where nothing is missing."""
    directory = Path(folder)
    try:
        names = _names_in(directory)
    except OSError as error:
        return f"{directory} cannot be read ({error.strerror})"
    config = next((name for name in _CONFIGS if name in names), None)
    if config is None:
        return "config.json is not there yet"
    if _read_json(directory / config) is None:
        return f"{config} is no whole JSON file"
    if not any(name.endswith(".index.json") or _is_weights(name) for name in names):
        return "its weights are not there yet"
    whole = any(name in names for name in (*_WHOLE, "pytorch_model.bin"))
    if not whole and any(map(_SHARD.search, names)) and not any(name.endswith(".index.json") for name in names):
        return "the index of its shards is not there yet"
    return _why_broken(directory, names)


def why_broken(folder: str | os.PathLike[str]) -> str | None:
    """A phrase for a shard that an index names and that is not there, or a safetensors file that is cut short; None if there is
    neither, also where there are no weights at all.

    Of the files that are loaded: where there are safetensors, an index of other files may be left over from a partial download.
    """
    directory = Path(folder)
    try:
        return _why_broken(directory, _names_in(directory))
    except OSError as error:
        return f"{directory} cannot be read ({error.strerror})"


def _names_in(directory: Path) -> set[str]:
    return {entry.name for entry in os.scandir(directory) if entry.is_file()}


def _why_broken(directory: Path, names: Collection[str]) -> str | None:
    shards: set[str] = set()
    for index in _indices(names):
        content = _read_json(directory / index)
        listed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            return f"{index} is no whole index of weights"
        shards |= set(listed.values())
    for shard in sorted(shards):
        if not (directory / shard).is_file():
            return f"{shard} is not there, which the index names"
    whole = {name for name in _WHOLE if name in names}
    weights = whole | shards or {name for name in names if _is_weights(name)}
    tensors = sorted(name for name in weights if name.endswith(".safetensors"))
    return next((why for name in tensors if (why := why_cut_short(directory / name)) is not None), None)


def _indices(names: Collection[str]) -> list[str]:
    """The indices that a loader goes by."""
    found = sorted(name for name in names if name.endswith(".index.json"))
    of_tensors = [name for name in found if name.endswith(".safetensors.index.json")]
    return [] if "model.safetensors" in names else of_tensors or found


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) and not name.startswith(_NO_WEIGHTS)


def why_cut_short(path: Path) -> str | None:
    """A phrase for a safetensors file that is not as long as its own header says; None for a whole one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER_BYTES or size < 8 + length:
                return f"{path.name} has {size} bytes, and its header is not whole"
            header = json.loads(file.read(length))
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"{path.name} has a header that cannot be read"
    return None if size == expected else f"{path.name} has {size} bytes of {expected}"


def look_at(folder: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Equal as long as nobody writes to a directory's files, folders below it left out."""
    found = []
    try:
        for entry in os.scandir(folder):
            if entry.is_file():
                stat = entry.stat()
                found.append((entry.name, stat.st_size, stat.st_mtime_ns))
    except OSError:
        return ()
    return tuple(sorted(found))


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
