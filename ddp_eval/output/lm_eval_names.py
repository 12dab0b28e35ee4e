"""The files of a run under lm_eval's names too, where tools that read lm_eval's output look for them.

    DIR/results.json            DIR/<model>/results_<date>.json
    DIR/samples_<task>.jsonl    DIR/<model>/samples_<task>_<date>.jsonl

They are hard links where the file system has them, else copies. results.json says in its ddp_eval section which they are: what
else lies in that folder, such as output of lm_eval's own, is no part of the run and is left alone.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddp_eval.system.files import TEMPORARY_SUFFIX, read_object, replace_file

log = logging.getLogger("ddp_eval")

SECTION = "lm_eval_files"
_RESULTS = "results.json"
_MOST_BYTES = 200  # of a folder's name; file systems take 255
_RESERVED = re.compile(
    r"\.\.?|journal|logs|(manifest|results|telemetry|status)\.json|(scores|texts|documents)\.parquet|report\.html|"
    r"samples_.*\.jsonl|\..*ddp_eval.*",
    re.IGNORECASE,
)
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?")
_BLOCK_BYTES = 8 * 2**20


def choose_names(results: Mapping[str, Any]) -> dict[str, str]:
    """{"folder", "date"}, by the rules of lm_eval's EvaluationTracker, for results["ddp_eval"][SECTION].

    A model whose name leads elsewhere ("..") or may be that of a file of the run has "__" before it; a very long name loses its
    start.
    """
    name = str(results.get("model_name_sanitized") or "model").replace("\0", "__")
    name = name.encode("utf-8", "replace")[-_MOST_BYTES:].decode("utf-8", "ignore")
    return {
        "folder": f"__{name}" if _is_reserved(name) else name,
        "date": datetime.datetime.now().isoformat().replace(":", "-"),
    }


def linked_files(directory: Path) -> list[Path]:
    """The other names of the run in `directory`, by its results.json, as far as they are there."""
    place = _place_of(read_object(directory / _RESULTS))
    if place is None:
        return []
    ours = re.compile(rf"(results|samples_.+)_{re.escape(place[1])}\.jsonl?")
    return [file for file in _files_in(directory / place[0]) if ours.fullmatch(file.name)]


def remove_links(directory: Path) -> None:
    """The other names of an earlier results.json, torn copies, and their folder if nothing else is in it. Raises OSError."""
    linked = linked_files(directory)
    for folder in {file.parent for file in linked}:
        for file in [*linked, *folder.glob(f".*{TEMPORARY_SUFFIX}")]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def link_files(directory: Path, results: Mapping[str, Any], samples: Iterable[str]) -> None:
    """Give results.json and the files `samples` their other names; nothing where `results` chose none.

    What the disk refuses is one line: the run has its files by then.
    """
    place = _place_of(results)
    if place is None:
        return
    folder = directory / place[0]
    try:
        if folder.is_symlink():
            raise OSError("it is a link")
        folder.mkdir(exist_ok=True)
        for name in [*samples, _RESULTS]:
            stem, dot, kind = name.rpartition(".")
            _link_or_copy(directory / name, folder / f"{stem}_{place[1]}{dot}{kind}")
    except OSError as error:
        log.warning("the files of the run are not under lm_eval's names in %s too: %s", folder, error.strerror or error)


def run_of(folder: Path) -> Path | None:
    """The complete run whose other names are all that `folder` holds; None if there is none."""
    directory = folder.absolute().parent
    linked = set(linked_files(directory)) if (directory / "manifest.json").is_file() else set()
    return directory if linked and set(_files_in(folder.absolute())) == linked else None


def _place_of(results: Mapping[str, Any]) -> tuple[str, str] | None:
    """Folder and date; None where `results` has none, or has what cannot be names: it may come from anybody."""
    section = results.get("ddp_eval")
    names = section.get(SECTION) if isinstance(section, dict) else None
    folder, date = (names.get("folder"), names.get("date")) if isinstance(names, dict) else (None, None)
    if not (isinstance(folder, str) and isinstance(date, str) and _DATE.fullmatch(date)):
        return None
    return None if not folder or "/" in folder or "\0" in folder or _is_reserved(folder) else (folder, date)


def _is_reserved(name: str) -> bool:
    return _RESERVED.fullmatch(name) is not None


def _files_in(folder: Path) -> list[Path]:
    """Of a folder that is none by a link: one may lead anywhere."""
    with contextlib.suppress(OSError):
        return sorted(file for file in folder.iterdir() if file.is_file()) if not folder.is_symlink() else []
    return []


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links; one that is full says so once more
        with open(source, "rb") as file:
            replace_file(target, iter(lambda: file.read(_BLOCK_BYTES), b""))
