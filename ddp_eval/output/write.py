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

import dataclasses
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
from ddp_eval.system.files import TEMPORARY_SUFFIX, replace_file
from ddp_eval.system.read_back import kind_of, read_table

if TYPE_CHECKING:
    import pyarrow

RESULTS = "results.json"
SCORES = "scores.parquet"
TEXTS = "texts.parquet"
DOCUMENTS = "documents.parquet"
MANIFEST = "manifest.json"
TELEMETRY = "telemetry.json"
REPORT = "report.html"


_ROWS_PER_GROUP = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """One row per request, as columns of equal length, in lm_eval's order.

    task:          the task's name.
    doc_id:        int64, the document within the task's split.
    idx:           int32, the choice within the document (0 where there is only one).
    loglikelihood: float64, nats, summed over the continuation.
    is_greedy:     bool, or None for a rolling request, which has no such thing.
    num_tokens:    int32, tokens of the continuation.
    Raises ValueError, naming the column, if the lengths differ.
    """

    task: Sequence[str]
    doc_id: Sequence[int] | np.ndarray
    idx: Sequence[int] | np.ndarray
    loglikelihood: Sequence[float] | np.ndarray
    is_greedy: Sequence[bool | None] | np.ndarray
    num_tokens: Sequence[int] | np.ndarray

    def __post_init__(self) -> None:
        for name, column in vars(self).items():
            if len(column) != len(self.task):
                raise ValueError(f"column {name} must have {len(self.task)} rows as task has, got {len(column)}")

    def __len__(self) -> int:
        return len(self.task)


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """One row per generated answer, as columns of equal length, in lm_eval's order.

    task, doc_id, idx: as in Scores. repeat: int32, which of the answers to the same request. text: as the filters get it.
    num_tokens: int32, generated, the stop string included. at_limit: bool, whether the answer has as many tokens as it may.
    not_finite: bool, whether it ends where the model's scores were NaN or infinite.
    """

    task: Sequence[str]
    doc_id: Sequence[int]
    idx: Sequence[int]
    repeat: Sequence[int]
    text: Sequence[str]
    num_tokens: Sequence[int]
    at_limit: Sequence[bool]
    not_finite: Sequence[bool]

    def __len__(self) -> int:
        return len(self.task)


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
        _replace_file(directory / name, _sample_lines((samples or {})[task]))
    _replace_file(directory / RESULTS, [results_json, b"\n"])
    lm_eval_names.link_files(directory, results, sample_files)
    measured = measure() if measure is not None else None
    if measured is not None:
        _replace_file(directory / TELEMETRY, [_to_json(measured), b"\n"])
    _replace_file(directory / MANIFEST, [manifest_json, b"\n"])
    return measured


def find_not_finite(scores: Scores, texts: Texts) -> dict[str, dict[str, Any]]:
    """Requests whose log-probability is NaN or infinite, and answers that end at such scores, by task.

    Those without a token, which are -inf by rule (irregular.py), are not among them.
    Returns {task: {"requests": how many, "first": up to 5 [doc_id, idx]}}. A request with several answers is one.
    """
    values = np.asarray(scores.loglikelihood, dtype=np.float64)
    broken = ~np.isfinite(values) & (np.asarray(scores.num_tokens) > 0)
    found: dict[str, dict[tuple[int | None, ...], None]] = {}
    for kept, rows in ((scores, np.flatnonzero(broken)), (texts, np.flatnonzero(texts.not_finite))):
        for row in rows.tolist():
            place = kept.doc_id[row], kept.idx[row]  # None for requests that a program made itself
            found.setdefault(kept.task[row], {})[tuple(part if part is None else int(part) for part in place)] = None
    return {task: {"requests": len(names), "first": [list(name) for name in [*names][:5]]} for task, names in found.items()}


def write_scores(directory: str | os.PathLike[str], scores: Scores) -> None:
    """Write scores.parquet, atomically. Raises UserError when the disk refuses."""
    _replace_file(Path(directory) / SCORES, [_encode_scores(scores)])


def write_texts(directory: str | os.PathLike[str], texts: Texts) -> None:
    """Write texts.parquet, atomically. Raises UserError when the disk refuses."""
    import pyarrow

    schema = _texts_schema()
    # A lone surrogate, which a tokenizer may come to, is no UTF-8.
    safe = [text.encode("utf-8", "replace").decode("utf-8") for text in texts.text]
    columns = [
        pyarrow.array(safe if field.name == "text" else getattr(texts, field.name), type=field.type, from_pandas=False)
        for field in schema
    ]
    _replace_file(Path(directory) / TEXTS, [_encode_table(pyarrow.Table.from_arrays(columns, schema=schema), ["task"])])


def write_documents(directory: str | os.PathLike[str], documents: Sequence[Mapping[str, Any]]) -> None:
    """Write documents.parquet, atomically. documents: rows with the columns of its schema, see `_documents_schema`.

    Raises UserError when the disk refuses.
    """
    import pyarrow

    schema = _documents_schema()
    columns = [
        pyarrow.array(
            [row.get(field.name) if field.nullable else row[field.name] for row in documents], type=field.type, from_pandas=False
        )
        for field in schema
    ]
    names = ["task", "filter", "metric", "prompt_hash", "context_hash", "doc_hash"]
    _replace_file(Path(directory) / DOCUMENTS, [_encode_table(pyarrow.Table.from_arrays(columns, schema=schema), names)])


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read a scores.parquet back; numbers come as numpy arrays, task and is_greedy as lists."""
    table = read_table(path, schema_of(SCORES))
    numbers = {name: table[name].values for name in ("doc_id", "idx", "loglikelihood", "num_tokens")}
    greedy = [None if flag < 0 else bool(flag) for flag in table["is_greedy"].values.tolist()]
    return Scores(task=list(table["task"].texts()), is_greedy=greedy, **numbers)


def schema_of(name: str) -> pyarrow.Schema:
    """The columns of SCORES, TEXTS or DOCUMENTS."""
    return {SCORES: _scores_schema, TEXTS: _texts_schema, DOCUMENTS: _documents_schema}[name]()


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


def _replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    try:
        replace_file(path, chunks)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}): make room, or give another --output_path") from error


def _scores_schema() -> pyarrow.Schema:
    import pyarrow

    return pyarrow.schema(
        [
            pyarrow.field("task", pyarrow.string(), nullable=False),
            pyarrow.field("doc_id", pyarrow.int64(), nullable=False),
            pyarrow.field("idx", pyarrow.int32(), nullable=False),
            pyarrow.field("loglikelihood", pyarrow.float64(), nullable=False),
            pyarrow.field("is_greedy", pyarrow.bool_()),
            pyarrow.field("num_tokens", pyarrow.int32(), nullable=False),
        ]
    )


def _texts_schema() -> pyarrow.Schema:
    import pyarrow

    kinds = {
        "task": pyarrow.string(), "doc_id": pyarrow.int64(), "idx": pyarrow.int32(), "repeat": pyarrow.int32(),
        "text": pyarrow.string(), "num_tokens": pyarrow.int32(), "at_limit": pyarrow.bool_(),
        "not_finite": pyarrow.bool_(),
    }  # fmt: skip
    return pyarrow.schema([pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()])


def _documents_schema() -> pyarrow.Schema:
    """prompt_hash: of the first request's context, as in lm_eval's samples; context_hash: of the passage asked about, if any;
    doc_hash: of all that the document holds, lm_eval's own.

    A metric of the documents is Σ value / Σ weight, or a function of that.
    """
    import pyarrow

    return pyarrow.schema(
        [
            pyarrow.field("task", pyarrow.string(), nullable=False),
            pyarrow.field("doc_id", pyarrow.int64(), nullable=False),
            pyarrow.field("filter", pyarrow.string(), nullable=False),
            pyarrow.field("metric", pyarrow.string(), nullable=False),
            pyarrow.field("value", pyarrow.float64(), nullable=False),
            pyarrow.field("weight", pyarrow.float64(), nullable=False),
            pyarrow.field("prompt_hash", pyarrow.string(), nullable=False),
            pyarrow.field("context_hash", pyarrow.string()),
            pyarrow.field("doc_hash", pyarrow.string()),
        ]
    )


def _encode_scores(scores: Scores) -> bytes:
    import pyarrow

    schema = _scores_schema()
    # from_pandas=False keeps a NaN a NaN; it would become a null otherwise.
    columns = [pyarrow.array(getattr(scores, field.name), type=field.type, from_pandas=False) for field in schema]
    return _encode_table(pyarrow.Table.from_arrays(columns, schema=schema), ["task"])


def _encode_table(table: pyarrow.Table, dictionaries: list[str]) -> bytes:
    """Parquet whose bytes depend on the content and pyarrow's version alone: layout settings are fixed here, not by default."""
    import pyarrow
    import pyarrow.parquet

    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        table,
        stream,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        compression_level=3,
        use_dictionary=dictionaries,
        version="2.6",
        data_page_version="1.0",
    )
    data: bytes = stream.getvalue().to_pybytes()
    return data


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
