"""Journals: finished packs on disk the moment they are done, and read back by whoever resumes. Pure numpy and files, no ranks.

Every rank of every attempt appends to a file of its own, so that no two processes ever write to one file and a torn end is always
the end of a file that nobody goes on with:

    header   MAGIC, key (32 bytes), length of the origin, origin (text), checksum
    record   unit (uint64), count (uint32), pieces (uint32), kind (uint8), body, checksum
    record   …

    kind SCORES: count items, each a RESULT (packs/results.py).
    kind TEXTS: count int32 numbers; the lengths of a batch's answers, then their tokens. Batches are numbered behind the packs.

The key names the work to the bit: plan, weights and software (`work_key`). Every checksum is keyed by it and covers all that
comes before it in its header or record. Packs under another key are refused; anything torn or corrupt, and all that follows it in
the file, is dropped and reported, never trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ddp_eval.errors import UserError
from ddp_eval.packs.results import NO_RESULTS, RESULT, Results
from ddp_eval.system.files import sync_directory
from ddp_eval.system.read_back import open_regular

SUFFIX = ".journal"
MAGIC = b"ddp_eval journal 3\n"
_ANY_VERSION = re.compile(rb"ddp_eval journal \d+\n.")
SYNC_S = 3.0  # a lost node loses at most what was finished in this time, and the packs in hand

_KEY_BYTES = 32
_CHECKSUM_BYTES = 16
_ORIGIN_LENGTH = struct.Struct("<H")
_RECORD = struct.Struct("<QIIB")
SCORES, TEXTS = 0, 1
_MAX_HEADER_BYTES = 2**17
_MAX_RECORD_BYTES = 2**29  # of a pack's scores or a batch's tokens
_DTYPES = {SCORES: RESULT, TEXTS: np.dtype("<i4")}


def work_key(facts: Mapping[str, Any]) -> bytes:
    """(32 bytes) A name for work whose results may be mixed: equal for equal facts, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


class Journal:
    """One rank's file of this attempt, made at the first pack. Thread-safe: another thread may wait for packs, sync or close it.

    path:    ends in SUFFIX; its directory exists.
    origin:  one short text about the hardware that computes, for those who mix.
    Every method raises UserError when the disk refuses, or when the file has been deleted.
    """

    def __init__(self, path: Path, key: bytes, origin: str) -> None:
        self.path = path
        self._key = key
        self._origin = origin
        self._file: int | None = None
        self._lock = threading.Condition()
        self._unsynced = False
        self._closed = threading.Event()
        self._failure: UserError | None = None
        self._syncer = threading.Thread(target=self._keep_synced, daemon=True)

    def append(self, pack: int, results: Results, pieces: int = 1) -> None:
        """Add one finished pack. When this returns, the death of this process no longer loses it.

        results: of all its items, in their order. pieces: in how many it ran, for lack of memory.
        """
        self._add(_RECORD.pack(pack, len(results), pieces, SCORES) + results.tobytes())

    def append_texts(self, unit: int, answers: Sequence[Sequence[int]], pieces: int = 1) -> None:
        """Add one finished batch of generation: the tokens of every answer. Otherwise as `append`."""
        numbers = np.array([*map(len, answers), *itertools.chain(*answers)], dtype=_DTYPES[TEXTS])
        self._add(_RECORD.pack(unit, len(numbers), pieces, TEXTS) + numbers.tobytes())

    def _add(self, body: bytes) -> None:
        with self._lock:
            if self._failure:
                raise self._failure
            with self._naming_failures():
                if self._file is None:
                    self._open()
                self._write(body + _checksum(self._key, body))
            self._unsynced = True
            self._lock.notify_all()

    def wait_for_pack(self, timeout_s: float) -> None:
        """Wait until one more pack is added, or for so long."""
        with self._lock:
            self._lock.wait(timeout_s)

    def sync(self) -> None:
        """Have everything on the disk, not only with the kernel."""
        with self._lock:
            file, unsynced, self._unsynced = self._file, self._unsynced, False
        if file is not None and unsynced:
            with self._naming_failures():
                os.fsync(file)
                if not os.path.samestat(os.fstat(file), os.stat(self.path)):
                    raise FileNotFoundError(2, "it has been replaced by another file")

    def close(self) -> None:
        """Sync and close. Nothing may be added afterwards."""
        self._closed.set()
        if self._syncer.is_alive():
            self._syncer.join()
        self.sync()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
        if self._failure:
            raise self._failure

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._write(encode_header(self._key, self._origin))
        sync_directory(self.path.parent)
        self._syncer.start()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            assert self._file is not None
            view = view[os.write(self._file, view) :]

    def _keep_synced(self) -> None:
        while not self._closed.wait(SYNC_S):
            try:
                self.sync()
            except UserError as error:  # the next pack raises it
                self._failure = error
                return

    @contextlib.contextmanager
    def _naming_failures(self) -> Any:
        try:
            yield
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            reason = "it or its directory has been deleted" if gone else error.strerror or error
            what_to_do = "give a directory that stays" if gone else "make room or repair it"
            raise UserError(
                f"the journal {self.path} cannot be written to ({reason}): {what_to_do}, then start the same command again"
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class RecoveredWork:
    """What journals hold of one plan.

    packs:    ascending indices of finished packs, each once.
    results:  (items,) RESULT; a pack that several files hold comes as often.
    splits:   (k, 2) int64, packs that ran in several pieces, and in how many.
    lengths:  (n, 2) int64, item of generation and tokens of its answer, as often as there are records of it.
    answers:  (sum of lengths, 1) int64, the tokens of these answers.
    origins:  the texts about hardware of all files that hold packs, sorted.
    notes:    a sentence for each file of which something was dropped.
    """

    packs: npt.NDArray[np.int64]
    results: Results
    splits: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]
    origins: list[str]
    notes: list[str]


class Record(NamedTuple):
    """A finished unit of work. kind: SCORES or TEXTS, which says what `values` are. stop: where the next record starts."""

    unit: int
    pieces: int
    kind: int
    values: Any
    stop: int


NOTHING = RecoveredWork(
    packs=np.zeros(0, dtype=np.int64),
    results=NO_RESULTS,
    splits=np.zeros((0, 2), dtype=np.int64),
    lengths=np.zeros((0, 2), dtype=np.int64),
    answers=np.zeros((0, 1), dtype=np.int64),
    origins=[],
    notes=[],
)


class OtherWork(Exception):
    """A journal is whole and belongs to other work: another plan, other weights or other software."""


class _Starts(NamedTuple):
    """Of the plan that a key names: where each pack's items start, and those of each batch of generation."""

    packs: npt.NDArray[np.integer]
    texts: npt.NDArray[np.integer]

    @property
    def num_packs(self) -> int:
        return len(self.packs) - 1

    def items_of(self, unit: int, kind: int) -> npt.NDArray[np.integer] | None:
        """The items of a unit, None where there is no such unit of that kind. Batches are numbered behind the packs."""
        starts, index = (self.packs, unit) if kind == SCORES else (self.texts, unit - self.num_packs)
        return np.arange(starts[index], starts[index + 1]) if 0 <= index < len(starts) - 1 else None


class _Read:
    """What has been read of one plan so far."""

    def __init__(self, starts: _Starts) -> None:
        self._starts = starts
        self._packs: set[int] = set()
        self._splits: dict[int, int] = {}
        self._origins: set[str] = set()
        self._results = [NO_RESULTS]
        self._lengths = [np.zeros((0, 2), dtype=np.int64)]
        self._answers = [np.zeros((0, 1), dtype=np.int64)]
        self.notes: list[str] = []

    def add(self, record: Record, origin: str) -> bool:
        """Take a record, if it can be one of this plan's."""
        items = self._starts.items_of(record.unit, record.kind)
        if items is None or not (self._add_results if record.kind == SCORES else self._add_answers)(items, record.values):
            return False
        self._packs.add(record.unit)
        if record.pieces > 1:
            self._splits.setdefault(record.unit, record.pieces)
        self._origins.add(origin)
        return True

    def _add_results(self, items: npt.NDArray[np.integer], results: Results) -> bool:
        if not np.array_equal(results["item"], items) or results["greedy"].view(np.uint8).max(initial=0) > 1:
            return False
        self._results.append(results)
        return True

    def _add_answers(self, items: npt.NDArray[np.integer], numbers: npt.NDArray[np.integer]) -> bool:
        sizes, tokens = np.split(numbers.astype(np.int64), [len(items)])
        if len(sizes) != len(items) or sizes.min(initial=0) < 0 or sizes.sum() != len(tokens):
            return False
        self._lengths.append(np.stack([items, sizes], axis=1))
        self._answers.append(tokens[:, None])
        return True

    def found(self) -> RecoveredWork:
        return RecoveredWork(
            packs=np.array(sorted(self._packs), dtype=np.int64),
            results=np.concatenate(self._results),
            splits=np.array(sorted(self._splits.items()), dtype=np.int64).reshape(-1, 2),
            lengths=np.concatenate(self._lengths),
            answers=np.concatenate(self._answers),
            origins=sorted(self._origins),
            notes=self.notes,
        )


def read_journals(
    directory: Path, key: bytes, item_starts: npt.NDArray[np.integer], text_starts: npt.NDArray[np.integer] | None = None
) -> RecoveredWork:
    """Read all journals in `directory`.

    item_starts:  (P+1,) where each pack's items start, of the plan that `key` names.
    text_starts:  (G+1,) where the items of each batch of generation start; None if there are none.
    Raises OtherWork if a file holds finished packs under another key; UserError if a file cannot be read.
    """
    read = _Read(_Starts(item_starts, np.zeros(1, dtype=np.int64) if text_starts is None else text_starts))
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        with _opened(path) as file:
            _read_journal(file, path.name, key, read)
    return read.found()


def _read_journal(file: BinaryIO, name: str, key: bytes, read: _Read) -> None:
    """Add to `read` what one file holds, up to the first record that is not whole, or not of this plan."""
    size = os.fstat(file.fileno()).st_size
    data = file.read(_MAX_HEADER_BYTES)
    if _is_of_other_version(data):
        raise OtherWork(name)
    header = decode_header(data)
    if header is None:
        read.notes.append(f"the journal {name} has no whole header and is dropped ({size} bytes)")
        return
    its_key, origin, stop = header
    if its_key != key:
        if _holds_record(file):
            raise OtherWork(name)
        return
    whole = 0
    for record in _read_records(file, stop, key):
        if not read.add(record, origin):
            break
        stop, whole = record.stop, whole + 1
    if stop < size:
        read.notes.append(
            f"the last {size - stop} bytes of the journal {name} are torn or corrupt and dropped; "
            f"{whole} packs before them are kept"
        )


def holds_work(directory: Path) -> bool:
    """Whether any journal in `directory` holds a finished pack, of whatever work, or cannot be read and so may hold one."""
    for path in directory.glob(f"*{SUFFIX}"):
        try:
            with _opened(path) as file:
                if _holds_record(file):
                    return True
        except UserError:
            return True
    return False


def _holds_record(file: BinaryIO) -> bool:
    file.seek(0)
    data = file.read(_MAX_HEADER_BYTES)
    if _is_of_other_version(data):
        return True  # what it holds cannot be read here, and is not for this start to throw away
    header = decode_header(data)
    return header is not None and any(True for _ in _read_records(file, header[2], header[0]))


def _is_of_other_version(data: bytes) -> bool:
    """Whether a file begins as a journal of another version of this package."""
    return bool(_ANY_VERSION.match(data)) and not data.startswith(MAGIC)


def encode_header(key: bytes, origin: str) -> bytes:
    """The first bytes of a journal."""
    text = origin.encode()[:1000]
    body = MAGIC + key + _ORIGIN_LENGTH.pack(len(text)) + text
    return body + _checksum(key, body)


def decode_header(data: bytes) -> tuple[bytes, str, int] | None:
    """Key, origin and where records start; None if the header is not whole."""
    fixed = len(MAGIC) + _KEY_BYTES + _ORIGIN_LENGTH.size
    if len(data) < fixed or not data.startswith(MAGIC):
        return None
    key = data[len(MAGIC) : len(MAGIC) + _KEY_BYTES]
    stop = fixed + _ORIGIN_LENGTH.unpack_from(data, fixed - _ORIGIN_LENGTH.size)[0]
    if data[stop : stop + _CHECKSUM_BYTES] != _checksum(key, data[:stop]):
        return None
    return key, data[fixed:stop].decode("utf-8", "replace"), stop + _CHECKSUM_BYTES


def decode_records(data: bytes, start: int, key: bytes) -> Iterator[Record]:
    """Each record from `start` on, up to the first that is not whole."""
    return _read_records(io.BytesIO(data), start, key)


def _read_records(file: BinaryIO, start: int, key: bytes) -> Iterator[Record]:
    """`decode_records` of a file, one record in memory at a time: what a damaged length says may be any number."""
    file.seek(start)
    while len(head := file.read(_RECORD.size)) == _RECORD.size:
        unit, count, pieces, kind = _RECORD.unpack(head)
        num_bytes = _DTYPES[kind].itemsize * count if kind in _DTYPES else 0
        if num_bytes > _MAX_RECORD_BYTES:
            return
        values = file.read(num_bytes)
        if len(values) < num_bytes or file.read(_CHECKSUM_BYTES) != _checksum(key, head + values) or kind not in _DTYPES:
            return
        start += _RECORD.size + num_bytes + _CHECKSUM_BYTES
        yield Record(unit, pieces, kind, np.frombuffer(values, dtype=_DTYPES[kind], count=count), start)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path, path.parent) as file:
            yield file
    except UserError as error:
        raise UserError(f"the journal {error}: remove it, or give another --output_path") from None
    except OSError as error:
        raise UserError(f"the journal {path} cannot be read ({error.strerror or error})") from error


def _checksum(key: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES, key=key).digest()
