"""The run directory: what one evaluation leaves behind, and how it gets there whole.

    results.json           scores by task, in lm_eval's schema
    scores.parquet         one row per scored request, in lm_eval's order
    texts.parquet          one row per generated answer, in lm_eval's order; only where tasks generate
    documents.parquet      one row per document and metric: what `compare` pairs
    samples_<task>.jsonl   with --log_samples, lm_eval's fields
    telemetry.json         where each rank's time and bytes went
    manifest.json          what was run, on what, with which versions; written last, so that it marks a complete run

The leader calls `write_run` after the last score. Before any work the directory is made sure of: by run_directory.py for a
command, which resumes, and by `prepare_directory` for a caller of the API. Each file appears under its name
complete or not at all. No environment variable, host name or token may get in here.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_eval.errors import UserError
from ddp_eval.output import lm_eval_names
from ddp_eval.output.tables import DOCUMENTS, SCORES, TEXTS, replace_or_refuse
from ddp_eval.system.files import TEMPORARY_SUFFIX
from ddp_eval.system.read_back import kind_of

if TYPE_CHECKING:
    pass

RESULTS = "results.json"
MANIFEST = "manifest.json"
TELEMETRY = "telemetry.json"
REPORT = "report.html"


def prepare_directory(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Make sure, before hours of work, that a run can be written to `path`; return it as an absolute path.

    Creates it, and its parents. With `overwrite` removes the files of the run in it, and no others.
    Raises UserError if `path` can't be a directory or written to, or holds a run (or part of one) and `overwrite` is False.
    """
    try:
        directory = make_directory(path)
        refuse_odd_files(directory)
        earlier = run_files(directory)
        if earlier and not overwrite:
            raise UserError(
                f"--output_path {path} already holds a run of {date_of(earlier)}; "
                "give another --output_path, or --overwrite to replace it"
            )
        if earlier:
            lm_eval_names.remove_links(directory)
        for file in [*earlier, *directory.glob(f".*{TEMPORARY_SUFFIX}")]:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return directory


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Create directory `path` and its parents, try to write there, and return it as an absolute path. Raises UserError."""
    try:
        directory = Path(path).absolute()
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--output_path must be a directory, got the file {path}: give another path")
        directory.mkdir(parents=True, exist_ok=True)
        _try_writing(directory)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unwritable(path, error) from error
    return directory


def refuse_odd_files(directory: Path, more: Iterable[str] = ()) -> None:
    """Raise UserError where a pipe, a directory or the like stands under the name of a file that a run writes.

    more: names beside those of a run's results. A symbolic link is replaced like a file.
    """
    for name in (MANIFEST, RESULTS, SCORES, TEXTS, DOCUMENTS, TELEMETRY, *more):
        kind = kind_at(directory / name)
        if kind not in (None, "a regular file", "a symbolic link"):
            raise UserError(f"{directory / name} must be a regular file, and is {kind}: remove it, or give another --output_path")


def kind_at(path: Path) -> str | None:
    """What stands at `path`, links not followed, in words; None where nothing does."""
    try:
        return kind_of(path.lstat().st_mode) or "a regular file"
    except OSError:
        return None


def unwritable(path: str | os.PathLike[str], error: Exception) -> UserError:
    """What to raise over an --output_path that the disk refuses."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"--output_path {path} cannot be written to ({reason}): give a directory that can be")


def date_of(files: Sequence[Path]) -> str:
    """When a run was written, for a sentence."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(files[0].stat().st_mtime))


def write_run(
    directory: str | os.PathLike[str],
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Write what is known at the end of a run, each file atomically, the manifest last. The scores are written before.

    results:  lm_eval's result dict, with our section under "ddp_eval"; a "samples" key in it is left out.
    samples:  {task: lm_eval's samples}, one jsonl file each; None or empty writes none. Not changed, unlike by lm_eval.
    measure:  what goes into telemetry.json, asked for when all but that and the manifest is written; returned.
    Raises UserError when the disk refuses (full, say); files already complete stay, and no file is left half-written.
    """
    directory = Path(directory)
    results_json = _to_json({key: value for key, value in results.items() if key != "samples"}, indent=2)
    manifest_json = _to_json(manifest, indent=2)
    try:
        lm_eval_names.remove_links(directory)  # of a start that was killed here; the next results.json knows only its own
    except OSError as error:
        raise unwritable(directory, error) from error
    sample_files = _sample_files(samples or {})
    for name, task in sample_files.items():
        replace_or_refuse(directory / name, _sample_lines((samples or {})[task]))
    replace_or_refuse(directory / RESULTS, [results_json, b"\n"])
    lm_eval_names.link_files(directory, results, sample_files)
    measured = measure() if measure is not None else None
    if measured is not None:
        replace_or_refuse(directory / TELEMETRY, [_to_json(measured), b"\n"])
    replace_or_refuse(directory / MANIFEST, [manifest_json, b"\n"])
    return measured


def _try_writing(directory: Path) -> None:
    """Permission bits don't tell (root, read-only mounts, full disks): create a file."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".", suffix=TEMPORARY_SUFFIX) as file:
        file.write(b"\n")
        file.flush()


def run_files(directory: Path) -> list[Path]:
    """The files in `directory` that belong to a run; the manifest, which marks it complete, first."""
    files = [directory / name for name in (MANIFEST, RESULTS, SCORES, TEXTS, DOCUMENTS, TELEMETRY, REPORT)]
    files += sorted(directory.glob("samples_*.jsonl"))
    files += lm_eval_names.linked_files(directory)
    return [file for file in files if file.is_file() or file.is_symlink()]


def _to_json(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, indent=indent, default=_plain_value, ensure_ascii=False)
    # Only a lone surrogate has no UTF-8; its backslash form is JSON's own escape for it.
    return text.encode("utf-8", "backslashreplace")


def _plain_value(value: Any) -> Any:
    """What json can't write, as lm_eval.utils.handle_non_serializable makes it, with sets in an order that stays."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, set):
        return sorted(value, key=str)
    # Where a function lies in memory differs from run to run.
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _sample_files(tasks: Iterable[str]) -> dict[str, str]:
    """File name -> task; characters that a file name can't have become "__" as in lm_eval's model directories."""
    files: dict[str, str] = {}
    for task in tasks:
        safe_task = re.sub(r'["<>:/|\\?*\[\]]+', "__", task)
        name = f"samples_{safe_task}.jsonl"
        if name in files:
            raise ValueError(f"tasks {files[name]} and {task} would both write {name}")
        files[name] = task
    return files


def _sample_lines(samples: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """One JSON line per sample, as lm_eval's EvaluationTracker.save_results_samples writes it."""
    for sample in samples:
        line = dict(sample)
        line["resps"] = _nested_strings(sample["resps"])
        line["filtered_resps"] = _nested_strings(sample["filtered_resps"])
        line["arguments"] = {
            f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
            for i, argument in enumerate(sample["arguments"])
        }
        line["target"] = str(sample["target"])
        yield _to_json(line) + b"\n"


def _nested_strings(value: Any) -> Any:
    """lm_eval.utils.sanitize_list: every leaf of nested lists and tuples as a string, so that `datasets` can load them."""
    return [_nested_strings(item) for item in value] if isinstance(value, (list, tuple)) else str(value)
