"""What one run left, as arrays: from our run directory, or from the files of lm_eval's --log_samples --output_path."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddp_eval.errors import UserError, one_line
from ddp_eval.output import lm_eval_names, tables, write
from ddp_eval.output.documents import arguments_of, document_metrics, shared_context
from ddp_eval.system import read_back

_LM_EVAL_SAMPLES = re.compile(r"samples_(?P<task>.+?)(?P<date>_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")
# lm_eval's results.json -> where our manifest keeps the same.
_LM_EVAL_FACTS = {
    "lm_eval_version": ("packages", "lm_eval"),
    "transformers_version": ("packages", "transformers"),
    "versions": ("tasks", "versions"),
    "n-samples": ("tasks", "n_samples"),
}


# Keys of results.json and the manifest that had other names before 1.0.
_OLD_NAMES = {"layout_of_requests": "batching", "saved_from_nan": "nan_recovered", "packs_halved": "packs_split"}


# {task: {"metric,filter": [(doc_id, value, weight)]}}
DocumentRows = dict[str, dict[str, list[tuple[int, float, float]]]]


@dataclasses.dataclass(frozen=True)
class Requests:
    """The scored requests of one task, sorted by document and choice.

    doc_id, idx: (N,) int64.  loglikelihood: (N,) float64, nats.  is_greedy: (N,) int8, -1 where there is no such thing.
    """

    doc_id: npt.NDArray[np.int64]
    idx: npt.NDArray[np.int64]
    loglikelihood: npt.NDArray[np.float64]
    is_greedy: npt.NDArray[np.int8]


@dataclasses.dataclass(frozen=True)
class Documents:
    """One metric of one task, document by document: (n,) doc_id, (n,) value, (n,) weight."""

    doc_id: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]


@dataclasses.dataclass
class Run:
    """One run. metrics: {task: {"metric,filter": Documents}}; reported: {task: {"metric,filter": number}} as results.json has it.

    prompts, contexts, documents: {task: {doc_id: hash}}, of the first prompt, of the passage (a document that stands alone has
    none), of all that the document holds; the last of them only where the run tells.
    texts: {task: {(doc_id, idx, repeat): generated answer}}. notes: what a reader should know of the files that were read.
    """

    path: Path
    kind: str
    requests: dict[str, Requests] = dataclasses.field(default_factory=dict)
    metrics: dict[str, dict[str, Documents]] = dataclasses.field(default_factory=dict)
    reported: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    prompts: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    contexts: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: dict[str, Path] = dataclasses.field(default_factory=dict)
    texts: dict[str, dict[tuple[int, int, int], str]] = dataclasses.field(default_factory=dict)
    documents: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def read_run(path: str | Path) -> Run:
    """Read a run directory of ours, a directory of lm_eval's with samples, or one samples_*.jsonl.

    Raises UserError, naming the path, for anything else.
    """
    place = Path(path)
    try:
        if not place.exists():
            raise UserError(f"there is no run at {path}")
        place = lm_eval_names.run_of(place) or place if place.is_dir() else place
        if place.is_dir() and os.path.lexists(place / "manifest.json"):
            return _read_ours(place)
        if place.is_dir() and (place / "scores.parquet").is_file():
            raise UserError(f"the run in {path} is not complete: it has no manifest.json")
        return _read_lm_eval(place)
    except (OSError, ValueError) as error:  # the directory's own: its files are read by read_back
        raise UserError(f"the run in {path} cannot be read ({getattr(error, 'strerror', None) or one_line(error)})") from error


def content_of(sample: Mapping[str, Any]) -> str | None:
    """A hash of all that a sample's document holds, lm_eval's own where it has one."""
    if isinstance(sample.get("doc_hash"), str):
        return str(sample["doc_hash"])
    if "doc" not in sample:
        return None
    text = json.dumps(sample["doc"], indent=2, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Numbering:
    """A number for each document of a samples file: its doc_id, unless another document has that already.

    lm_eval gives one number to different documents where `--samples` repeats some.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, str | None], int] = {}
        self._taken: set[int] = set()

    def number(self, sample: Mapping[str, Any]) -> int:
        name = int(sample["doc_id"]), content_of(sample)
        if name not in self._numbers:
            self._numbers[name] = -1 - len(self._numbers) if name[0] in self._taken else name[0]
            self._taken.add(self._numbers[name])
        return self._numbers[name]


def read_samples(path: Path, run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a samples_*.jsonl; lines end at a newline alone. run: where it was found, its directory or the file itself.

    Raises UserError, with the line's number, for what is no sample.
    """
    from ddp_eval.output import shapes  # a sixth of a second, which those who only read nothing should not wait for

    return read_back.read_lines(path, shapes.SAMPLE, run if run.is_dir() else None)


def _read_ours(place: Path) -> Run:
    from ddp_eval.output import shapes

    run = Run(place, "ddp_eval", manifest=read_back.read_json(place / write.MANIFEST, shapes.MANIFEST, place))
    run.results = read_back.read_json(place / write.RESULTS, shapes.RESULTS, place)
    for section in (run.manifest, run.results.get("ddp_eval")):
        for old, new in _OLD_NAMES.items():
            if isinstance(section, dict) and old in section:
                section[new] = section.pop(old)
    run.reported = _reported(run.results)
    scores = _read_table(place, tables.SCORES)
    columns = [scores[name].values for name in ("doc_id", "idx", "loglikelihood", "is_greedy")]
    for task, chosen in _rows_by_text(scores["task"]):
        run.requests[task] = sort_requests(place, *(column[chosen] for column in columns))
    if os.path.lexists(place / tables.TEXTS):
        texts = _read_table(place, tables.TEXTS)
        for task, *key, text in _rows(texts, "task", "doc_id", "idx", "repeat", "text"):
            of_task = run.texts.setdefault(task, {})
            if tuple(key) in of_task:
                raise UserError(f"{place / tables.TEXTS}: document {key[0]} of the task {task} is there twice")
            of_task[key[0], key[1], key[2]] = text
    rows: DocumentRows = {}
    if os.path.lexists(place / tables.DOCUMENTS):
        documents = _read_table(place, tables.DOCUMENTS, ("doc_hash",))  # which older versions did not write
        for known in _rows(documents, "task", "doc_id", "prompt_hash", "context_hash", "doc_hash"):
            _note_document(run, *known)
        for task, metric, kept, *row in _rows(documents, "task", "metric", "filter", "doc_id", "value", "weight"):
            rows.setdefault(task, {}).setdefault(f"{metric},{kept}", []).append((row[0], row[1], row[2]))
    _settle_documents(run, rows)
    run.samples = {match["task"]: file for file, match in _sample_files(place) if not match["date"]}
    for task, file in run.samples.items():
        if task not in run.documents:  # of a run that kept no metrics, or of an older version
            for sample in read_samples(file, place):
                prompt, context = sample.get("prompt_hash"), shared_context(sample.get("doc"))
                _note_document(run, task, int(sample["doc_id"]), prompt, context, content_of(sample))
    return run


def _read_table(place: Path, name: str, optional: Sequence[str] = ()) -> dict[str, read_back.Column]:
    return read_back.read_table(place / name, tables.schema_of(name), place, optional)


def _rows(table: Mapping[str, read_back.Column], *names: str) -> Iterator[tuple[Any, ...]]:
    columns = (table[name] for name in names)
    return zip(*(column.texts() if column.names else column.values.tolist() for column in columns), strict=True)


def _rows_by_text(column: read_back.Column) -> Iterator[tuple[str, npt.NDArray[np.intp]]]:
    """Each text with the rows that hold it, in the order in which they come first."""
    order = np.argsort(column.values, kind="stable")
    starts = np.flatnonzero(np.diff(column.values[order], prepend=-1))
    for rows in sorted(np.split(order, starts[1:]), key=lambda rows: int(rows[0])) if len(order) else ():
        yield str(column.names[column.values[rows[0]]]), rows


def _read_lm_eval(place: Path) -> Run:
    found = _sample_files(place)
    if not found and place.is_dir():
        folders = [folder for folder in sorted(place.iterdir()) if folder.is_dir() and _sample_files(folder)]
        if len(folders) > 1:
            names = ", ".join(folder.name for folder in folders[:5])
            raise UserError(f"{place} holds lm_eval's samples of several models: name one of {names}")
        found = _sample_files(folders[0]) if folders else []
    if not found:
        raise UserError(f"{place} holds neither a run of ddp_eval (manifest.json) nor lm_eval's samples_*.jsonl")
    run = Run(place, "lm_eval")
    dates: dict[str, str] = {}
    for file, match in found:  # by date: the newest stands
        run.samples[match["task"]], dates[match["task"]] = file, match["date"] or ""
    rows: DocumentRows = {}
    for task, file in run.samples.items():
        _add_samples(run, task, read_samples(file, place), rows.setdefault(task, {}))
    _settle_documents(run, rows)
    _add_summaries(run, found[0][0].parent, dates)
    if place.is_file():  # one task is asked about
        run.reported = {task: values for task, values in run.reported.items() if task in run.samples}
    if len({match["date"] for _, match in found}) > 1:
        taken = ", ".join(f"{task} of {date.strip('_') or 'no date'}" for task, date in sorted(dates.items()))
        run.notes.append(f"{found[0][0].parent} holds samples of several dates, of which the newest are taken: {taken}")
    return run


def _add_summaries(run: Run, folder: Path, dates: Mapping[str, str]) -> None:
    """What each task's results file reports, which has the date of its samples; other facts are of the newest."""
    from ddp_eval.output import shapes

    for date in sorted(set(dates.values())):
        file = folder / f"results{date}.json"
        if not os.path.lexists(file):
            continue
        summary = read_back.read_json(file, shapes.LM_EVAL_RESULTS, run.path if run.path.is_dir() else None)
        of_date = {task for task, its_date in dates.items() if its_date == date}
        if run.results and _manifest_of(summary)["config"] != run.manifest["config"]:
            run.notes.append(f"{folder} holds samples of runs with other model_args: {', '.join(sorted(of_date))} and others")
        run.results, run.manifest = summary, _manifest_of(summary)
        others = run.samples.keys() - of_date
        run.reported |= {task: values for task, values in _reported(summary).items() if task not in others}


def _sample_files(place: Path) -> list[tuple[Path, re.Match[str]]]:
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.is_file()]
    if place.is_dir() and (linked := set(lm_eval_names.linked_files(place.parent))):
        files = [file for file in files if file not in linked] or files  # lm_eval's own beside the other names of a run of ours
    matches = [(file, match) for file in files if (match := _LM_EVAL_SAMPLES.fullmatch(file.name))]
    return sorted(matches, key=lambda pair: (pair[1]["date"] or "", pair[0].name))


def _add_samples(
    run: Run, task: str, samples: Iterable[dict[str, Any]], metrics: dict[str, list[tuple[int, float, float]]]
) -> None:
    rows, first_filter, numbering = [], None, Numbering()
    for sample in samples:
        doc_id, kept = numbering.number(sample), sample.get("filter", "none")
        for metric, value, weight in document_metrics(sample):
            metrics.setdefault(f"{metric},{kept}", []).append((doc_id, value, weight))
        first_filter = first_filter or kept
        if kept != first_filter:
            continue
        _note_document(run, task, doc_id, sample.get("prompt_hash"), shared_context(sample.get("doc")), content_of(sample))
        for idx, (resps, argument) in enumerate(zip(sample["resps"], arguments_of(sample), strict=True)):
            if isinstance(resps[0], list):
                rows.append((doc_id, idx, float(resps[0][0]), int(str(resps[0][1]) == "True")))
            elif len(argument) == 1:  # rolling
                rows.append((doc_id, idx, float(resps[0]), -1))
            else:
                run.texts.setdefault(task, {}).update({(doc_id, idx, repeat): str(text) for repeat, text in enumerate(resps)})
    if rows:
        doc_ids, ids, sums, greedy = (np.array(column) for column in zip(*rows, strict=True))
        run.requests[task] = sort_requests(run.path, doc_ids, ids, sums.astype(np.float64), greedy.astype(np.int8))


def _note_document(run: Run, task: str, doc_id: int, prompt: str | None, context: str | None, content: str | None = None) -> None:
    if prompt is not None:
        run.prompts.setdefault(task, {})[doc_id] = prompt
    if context is not None:
        run.contexts.setdefault(task, {})[doc_id] = context
    if content is not None:
        run.documents.setdefault(task, {})[doc_id] = content


def _settle_documents(run: Run, collected: DocumentRows) -> None:
    for task, metrics in collected.items():
        run.metrics[task] = {}
        for key, rows in metrics.items():
            table = np.array(sorted(rows), dtype=np.float64)  # document numbers are exact up to 2^53
            twice = np.flatnonzero(np.diff(table[:, 0]) == 0)
            if len(twice):
                raise UserError(f"{run.path}: {task} has two values of {key} for document {int(table[twice[0], 0])}")
            run.metrics[task][key] = Documents(table[:, 0].astype(np.int64), table[:, 1], table[:, 2])


def sort_requests(place: Path, doc_id: Any, idx: Any, loglikelihood: Any, greedy: Any) -> Requests:
    order = np.lexsort((idx, doc_id))
    doc_id, idx = doc_id[order].astype(np.int64), idx[order].astype(np.int64)
    twice = np.flatnonzero((np.diff(doc_id) == 0) & (np.diff(idx) == 0))
    if len(twice):
        which = f"request {idx[twice[0]]} of document {doc_id[twice[0]]}"
        raise UserError(f"{which} is there twice in {place}: is this more than one run?")
    return Requests(doc_id, idx, loglikelihood[order], greedy[order])


def _reported(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {
            key: float(value)
            for key, value in values.items()
            if "," in key and "_stderr," not in key and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for task, values in results.get("results", {}).items()
    }


def result_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every metric of every task and group, as a results.json has it: task, metric, filter, value, stderr and documents."""
    rows = []
    for task, values in results.get("results", {}).items():
        for key, value in values.items():
            name, comma, kept = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, (int, float)):
                stderr = values.get(f"{name}_stderr,{kept}")
                stderr = float(stderr) if isinstance(stderr, (int, float)) else None
                documents = results.get("n-samples", {}).get(task, {}).get("effective")
                row = {"task": task, "metric": name, "filter": kept, "value": value, "stderr": stderr, "documents": documents}
                rows.append(row)
    return rows


def _manifest_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What lm_eval's results.json says of the run, where our manifest has it."""
    manifest: dict[str, Any] = {"config": {"model_args": results.get("config", {}).get("model_args") or {}}}
    dtype = results.get("config", {}).get("model_dtype")
    if dtype:
        manifest["engine"] = {"dtype": dtype}
    for key, (section, name) in _LM_EVAL_FACTS.items():
        if key in results:
            manifest.setdefault(section, {})[name] = results[key]
    return manifest
