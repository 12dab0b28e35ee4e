"""scores.parquet, texts.parquet and documents.parquet: rows, schemas, bytes that depend on content alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_eval.errors import UserError
from ddp_eval.system.files import replace_file
from ddp_eval.system.read_back import read_table

if TYPE_CHECKING:
    import pyarrow


SCORES = "scores.parquet"


TEXTS = "texts.parquet"


DOCUMENTS = "documents.parquet"


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
    replace_or_refuse(Path(directory) / SCORES, [_encode_scores(scores)])


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
    replace_or_refuse(Path(directory) / TEXTS, [_encode_table(pyarrow.Table.from_arrays(columns, schema=schema), ["task"])])


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
    replace_or_refuse(Path(directory) / DOCUMENTS, [_encode_table(pyarrow.Table.from_arrays(columns, schema=schema), names)])


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read a scores.parquet back; numbers come as numpy arrays, task and is_greedy as lists."""
    table = read_table(path, schema_of(SCORES))
    numbers = {name: table[name].values for name in ("doc_id", "idx", "loglikelihood", "num_tokens")}
    greedy = [None if flag < 0 else bool(flag) for flag in table["is_greedy"].values.tolist()]
    return Scores(task=list(table["task"].texts()), is_greedy=greedy, **numbers)


def schema_of(name: str) -> pyarrow.Schema:
    """The columns of SCORES, TEXTS or DOCUMENTS."""
    return {SCORES: _scores_schema, TEXTS: _texts_schema, DOCUMENTS: _documents_schema}[name]()


def replace_or_refuse(path: Path, chunks: Iterable[bytes]) -> None:
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
