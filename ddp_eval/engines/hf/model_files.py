"""Which files a model, a tokenizer or an adapter consists of: what its digest covers, and what each start looks at.

Beside the visible files of its directory: shards in folders below that an index names, the file that `transformers_weights` in
config.json names, chat templates in their folder, and where a checkpoint's own code is allowed to run, every module below the
directory. Light: no torch, no transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddp_eval.errors import UserError
from ddp_eval.system.read_back import open_regular

_INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")  # also of a variant
_MAX_JSON_BYTES = 64 * 2**20  # the largest indices have 10 MB
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$")

# What a tokenizer keeps in a model's directory.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def names_of_model(folder: str | os.PathLike[str], own_code: bool = False) -> list[str]:
    """Of the files of a model or an adapter, relative to its directory, sorted. own_code: it may run code that lies there.

    Raises UserError for an index that leads out of the directory.
    """
    directory = Path(folder)
    named = {*_visible(directory), *_shards(directory), *_templates(directory), *(_modules(directory) if own_code else ())}
    return sorted(name for name in named if (directory / name).is_file())


def names_of_tokenizer(folder: str | os.PathLike[str], of_model: bool, own_code: bool = False) -> list[str]:
    """Of a tokenizer's files, as `names_of_model`.

    of_model: the directory is the model's, whose files all count anyway. Elsewhere any file but weights may be the tokenizer's:
    its class says which.
    """
    directory = Path(folder)
    others = [name for name in _visible(directory) if not (_WEIGHTS.search(name) or _INDEX.search(name))]
    top = _TOKENIZER_FILES if of_model else others
    named = {*top, *_templates(directory), *(_modules(directory) if own_code else ())}
    return sorted(name for name in named if (directory / name).is_file())


def names_of_code(folder: str | os.PathLike[str]) -> list[str]:
    """Of the Python modules in a directory and below it, sorted."""
    return sorted(_modules(Path(folder)))


def is_loaded(path: str) -> bool:
    """Whether loading reads a file of a model's directory, by its name: not what a training run keeps there beside the model."""
    name = os.path.basename(path)
    if name.startswith(("optimizer", "scheduler", "training_args", "trainer_state", "rng_state")):
        return False
    known = ("config.json", "generation_config.json", "adapter_config.json", *_TOKENIZER_FILES)
    return name in known or name.endswith(".py") or bool(_WEIGHTS.search(name) or _INDEX.search(name))


def check_shards(folder: str | os.PathLike[str]) -> None:
    """Raise UserError for an index, or a config.json, that names weights outside of the model's directory."""
    _shards(Path(folder))


def code_of_others(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(repository or directory, file) of modules elsewhere that the `auto_map` of a model's or tokenizer's config names."""
    found = set()
    for name in ("config.json", "tokenizer_config.json"):
        named = _read(Path(folder) / name).get("auto_map")
        for reference in _texts_in(named):
            place, dashes, class_name = reference.partition("--")
            if dashes:
                found.add((place, class_name.partition(".")[0] + ".py"))
    return sorted(found)


def _visible(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if not entry.name.startswith(".") and entry.is_file()]


def _templates(directory: Path) -> list[str]:
    return [f"{_TEMPLATES}/{path.name}" for path in (directory / _TEMPLATES).glob("*.jinja")]


def _modules(directory: Path) -> Iterator[str]:
    """Also in folders that a link leads to; one that leads back up is not followed for ever."""
    known: set[str] = set()
    for place, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        if real in known:
            folders.clear()
            continue
        known.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in files:
            if name.endswith(".py"):
                yield (Path(place) / name).relative_to(directory).as_posix()


def _shards(directory: Path) -> set[str]:
    """Files of weights that an index of the directory names, or its config.json, by names as they stand there."""
    indices = [name for name in _visible(directory) if _INDEX.search(name)]
    named = set()
    explicit = _read(directory / "config.json").get("transformers_weights")
    if isinstance(explicit, str):
        _check_inside(explicit, "config.json", directory)
        named.add(explicit)
        indices += [explicit] if _INDEX.search(explicit) else []
    for index in indices:
        shards = _read(directory / index).get("weight_map")
        for shard in set(_texts_in(shards)):
            _check_inside(shard, index, directory)
            named.add(shard)
    return named


def _check_inside(name: str, by: str, directory: Path) -> None:
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise UserError(
            f"{by} in {directory} names weights outside of that directory, {name}: put them into it, where the digest of the "
            "model covers them"
        )


def _texts_in(value: Any) -> list[str]:
    """The texts among the values of a mapping or a list, lists in it included."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in values for text in (one if isinstance(one, list) else [one]) if isinstance(text, str)]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none: what cannot be read is for the loader to report.

    Read as the loader does, and not by read_back's rules: what these refuse and it accepts must not hide a name from the digest.
    """
    if not path.is_file():
        return {}
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except OSError:
        return {}
    if len(data) > _MAX_JSON_BYTES:
        raise UserError(f"{path} is too large: more than {_MAX_JSON_BYTES:,} bytes")
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
