"""Ways to damage a file, for scripts/fuzz_files.py and tests/cases/test_files.py: bytes, JSON values, tables, kinds of file.

Every function takes a `random.Random`, so that the same seed gives the same damage, and hypothesis can make it smaller.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import yaml

Damage = bytes | Callable[[Path], None]  # new content, or what makes something else than a file


class Raw(str):
    """JSON text that stands for itself, where `json.dumps` has no way to write it."""


# Of other types, too large, too deep, too long, obeyed by a terminal, a browser or a shell, or leading elsewhere.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 5e-324, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**299,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("1" * 400), Raw("-" + "9" * 5000), Raw("nan"), Raw(""),
    Raw("[" * 99 + "]" * 99), Raw("[" * 150 + "]" * 150), Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 5000 + "1" + "}" * 5000),
    "", "text", "two", "NaN", "1e999", "-1.5", "9" * 5000, "N/A", "True", "layers:" + "9" * 5000, "x" * 100_000, "\0", "a\nb",
    "\ud800", "\udfff\ud800", "\x1b[2J\x1b]0;owned\x07", "\u202eabc", "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "$\\frac{", "{{ 7 * 7 }}", "%s%n", "../../etc/passwd", "/etc/passwd", "a/b", "..", "/", "~", "!!python/name:os.system",
    [], {}, [[]], [{}], [None], [1, 2], ["a"], {"a": 1}, {"": {}}, {"a": {"b": {"c": []}}}, [[1, "a"], [2]],
]  # fmt: skip


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, cuts, insertions and the like: what disks, transfers and editors do."""
    kind = rng.randrange(10)
    data_now = bytearray(data or b"\0")
    place = rng.randrange(len(data_now))
    if kind <= 3:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            data_now[rng.randrange(len(data_now))] ^= 1 << rng.randrange(8)
    elif kind == 4:
        del data_now[place:]
    elif kind == 5:
        del data_now[place : place + rng.choice((1, 4, 100))]
    elif kind == 6:
        data_now[place:place] = rng.choice(
            (b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\xed\xa0\x80", b"\n", b"}", b"[" * 2000, b"\x1b[2J")
        )
    elif kind == 7:
        stop = place + rng.choice((1, 8, 512))
        data_now[place:stop] = bytes(len(data_now[place:stop]))
    elif kind == 8:
        data_now[place:place] = data_now[: rng.randrange(len(data_now)) + 1]
    else:
        return rng.choice((b"", b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16"), b"\n\n", b"null", b"\0" * 4096))
    return bytes(data_now)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """One to three values of a JSON text replaced, removed, doubled, renamed, moved or wrapped."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _damage_value(value, rng)
    return _dump(value).encode("utf-8", "surrogatepass" if rng.randrange(4) == 0 else "backslashreplace")


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """The same in a line of JSON Lines; or lines lost, doubled, moved."""
    lines = [line for line in data.split(b"\n") if line] or [b"{}"]
    kind, place = rng.randrange(8), rng.randrange(len(lines))
    if kind == 0:
        lines.insert(rng.randrange(len(lines)), lines[place])
    elif kind == 1:
        del lines[place]
    elif kind == 2:
        rng.shuffle(lines)
    else:
        lines[place] = damage_json(lines[place], rng)
    return b"\n".join(lines) + b"\n"


YAML_TEXTS = [
    "a: &a [x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
    "model_args: &m {pretrained: demo, more: *m}", "tasks: &t [*t]", "limit: !!int ''", "limit: !!float x", "seed: !!bool x",
    "timeout: !!timestamp x", "limit: 2020-13-45", "limit: 2020-01-01", "tasks: !!python/object/apply:os.system [exit 3]",
    "tasks: !!python/name:os.system", "samples: !!binary x", "samples: !!set {a, b}", "? [a, b]\n: c", "? {a: b}\n: c", "{}: {}",
    "seed: 1\nseed: 2", "<<: {limit: 2}", "limit: 0x" + "f" * 5000, "limit: " + "9" * 5000, "limit: " + ":".join(["59"] * 9000),
    "tasks: " + "[" * 5000, "- " * 3000 + "a", "a: b: c", "\tlimit: 3", "--- 1\n--- 2", "limit: .nan", "limit: .inf",
    "%YAML 9.9\n---\na",
    "limit: 3\0", "model_args: 2020-01-01", "gen_kwargs: {1: 2, null: 3}", "tasks: [2020-01-01]", "metadata: !!omap [a: b]",
]  # fmt: skip


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.randrange(4) == 0:
        return rng.choice(YAML_TEXTS).encode() + (b"\n" + data if rng.randrange(2) else b"")
    text = damage_json(json.dumps(yaml.safe_load(data)).encode(), rng)
    return text  # JSON is YAML, but for some of its escapes, which are damage enough


def damage_gzip(data: bytes, rng: random.Random) -> bytes:
    """Of JSON Lines under gzip: within it."""
    kind = rng.randrange(5)
    if kind == 0:
        return gzip.compress(bytes(2**28), 1)  # 256 MB in 1 MB
    text = damage_lines(gzip.decompress(data), rng) if kind < 4 else damage_bytes(gzip.decompress(data), rng)
    return gzip.compress(text, 1)


def damage_table(data: bytes, rng: random.Random) -> bytes:
    """Parquet: another table under the same name, or bytes of the footer, whose length stands in the last eight."""
    if rng.randrange(3) == 0:
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        if rng.randrange(4) == 0:
            length = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, len(data), rng.randrange(2**16)))
            return data[:-8] + length.to_bytes(4, "little") + data[-4:]
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            changed[rng.randrange(footer, len(data) - 8)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        return bytes(changed)
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    settings: dict[str, Any] = {"compression": rng.choice(("zstd", "snappy", "none", "gzip"))}
    for _ in range(rng.choice((1, 1, 2))):
        table, more = _damage_columns(table, rng)
        settings |= more
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, **settings)
    return stream.getvalue()


def damage_journal(data: bytes, rng: random.Random) -> bytes:
    """A record of other lengths and kinds, under a checksum that is right, as only somebody who means harm writes it."""
    from ddp_eval.output import journal

    key, _, start = journal.decode_header(data) or (bytes(32), "", 0)
    counts = (0, 1, 2, 3, 5, 1000, 2**31, 2**32 - 1)
    head = struct.pack(
        "<QIIB", rng.choice((0, 1, 2, 3, 2**40, 2**64 - 1)), rng.choice(counts), rng.choice(counts), rng.randrange(4)
    )
    body = rng.choice(
        (b"", struct.pack("<4i", -1, 3, 5, 6), struct.pack("<4i", 1, 1, -7, 2**31 - 1), bytes(17 * rng.randrange(1, 9)))
    )
    body = body[: rng.randrange(len(body) + 1)] if rng.randrange(2) else body
    stop = start if rng.randrange(2) else len(data)
    return data[:stop] + head + body + journal._checksum(key, head + body) + (data[start:] if rng.randrange(2) else b"")


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The length of the header, or the JSON in it."""
    length = int.from_bytes(data[:8], "little")
    if rng.randrange(3) == 0:
        return rng.choice((0, 1, 2, 2**31, 2**40, 2**63, 2**64 - 1, length + 1, len(data))).to_bytes(8, "little") + data[8:]
    header = damage_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_kind(rng: random.Random) -> Callable[[Path], None]:
    """Something else under the file's name."""
    return rng.choice(ODD_KINDS)


def _make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def _make_huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(5 * 2**30)


def _link_outside(path: Path) -> None:
    outside = path.parent.parent / f"outside_{path.name}"
    shutil.copyfile("/etc/passwd", outside)
    path.symlink_to(outside)


ODD_KINDS: list[Callable[[Path], None]] = [
    os.mkfifo, Path.mkdir, _make_socket, _make_huge, _link_outside,
    lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/dev/tty"), lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to(path.name), lambda path: path.symlink_to(".."), lambda path: None,
]  # fmt: skip


def _damage_value(value: Any, rng: random.Random) -> Any:
    places = _places(value)
    holder, key = rng.choice(places) if places else (None, None)
    new = rng.choice(VALUES)
    if holder is None or rng.randrange(40) == 0:
        return new
    kind = rng.randrange(12)
    if kind <= 5:
        holder[key] = new
    elif kind == 6:
        del holder[key]
    elif kind == 7 and isinstance(holder, dict):  # a key that stands twice
        holder[Raw(json.dumps(key))] = new
    elif kind == 8 and isinstance(holder, dict):
        holder[new if isinstance(new, str) and not isinstance(new, Raw) else "new"] = holder.pop(key)
    elif kind == 9:
        other, other_key = rng.choice(places)
        holder[key] = json.loads(_plain(other[other_key]))
    elif kind == 10:
        holder[key] = [holder[key]] if rng.randrange(2) else {"a": holder[key]}
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), new)
    else:
        holder["more"] = new
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found.append((value, key))
        found += _places(item)
    return found


def _plain(value: Any) -> str:
    return json.dumps(value if not isinstance(value, Raw) else None, default=lambda one: None)


def _dump(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{key if isinstance(key, Raw) else json.dumps(key)}: {_dump(one)}" for key, one in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _damage_columns(table: pyarrow.Table, rng: random.Random) -> tuple[pyarrow.Table, dict[str, Any]]:
    """Another table, and settings to write it with."""
    kind = rng.randrange(12)
    place = rng.randrange(table.num_columns)
    name, rows = table.column_names[place], table.num_rows
    if kind <= 3:
        return table.set_column(place, name, rng.choice(_COLUMNS)(rows, rng)), {}
    if kind == 4:
        return table.remove_column(place) if table.num_columns > 1 else table, {}
    if kind == 5:
        return table.rename_columns(
            [rng.choice(("x", "", "\ud7ff", "task", "doc_id")) if one == name else one for one in table.column_names]
        ), {}
    if kind == 6:
        return table.slice(0, rng.choice((0, 1, rows))), {}
    if kind == 7 and rows:
        return table.take(np.array([rng.randrange(rows) for _ in range(rng.choice((1, rows, 2 * rows)))])), {}
    if kind == 8:
        return pyarrow.concat_tables([table] * rng.choice((2, 50))), {"row_group_size": rng.choice((1, 7, 1000))}
    if kind == 9:
        return table.replace_schema_metadata({b"k" * rng.choice((1, 10_000)): b"v" * rng.choice((1, 1_000_000))}), {}
    if kind == 10:
        kept = pyarrow.array([rng.randrange(2) == 1 for _ in range(rows)], type=pyarrow.bool_())
        column = table.column(place)
        return table.set_column(place, name, pyarrow.compute.if_else(kept, column, pyarrow.scalar(None, column.type))), {}
    return table, {
        "use_dictionary": rng.randrange(2) == 0,
        "data_page_version": rng.choice(("1.0", "2.0")),
        "version": rng.choice(("1.0", "2.6")),
    }


def _repeat(value: Any, kind: pyarrow.DataType | None = None) -> Callable[[int, random.Random], pyarrow.Array]:
    return lambda rows, rng: pyarrow.array([value] * rows, type=kind)


_COLUMNS: list[Callable[[int, random.Random], pyarrow.Array]] = [
    *(
        _repeat(value)
        for value in (
            "text",
            "\x1b[2J<script>alert(1)</script>",
            "x" * 1_000_000,
            "$\\frac{",
            b"\xff\xfe",
            1.5,
            0.0,
            -1e308,
            True,
        )
    ),
    *(_repeat(value) for value in (float("nan"), float("inf"), None, [1, 2], {"a": [1]}, [])),
    *(_repeat(value, pyarrow.int64()) for value in (1, -1, 2**62, None)),
    *(_repeat(1, kind()) for kind in (pyarrow.int8, pyarrow.int32, pyarrow.uint64, pyarrow.float32)),
    _repeat("a", pyarrow.large_string()),
    _repeat("b", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    lambda rows, rng: pyarrow.array([b"\xff\xfe"] * rows, type=pyarrow.binary()).view(pyarrow.string()),
    lambda rows, rng: pyarrow.array([str(row) for row in range(rows)]),
    lambda rows, rng: pyarrow.array([rng.randrange(-3, 3) for _ in range(rows)], type=pyarrow.int64()),
    lambda rows, rng: pyarrow.array([rng.randrange(3) for _ in range(rows)], type=rng.choice((pyarrow.int64(), pyarrow.int32()))),
    lambda rows, rng: pyarrow.array([rng.choice((0.0, 1.0, -1e300, 1e300, float("nan"))) for _ in range(rows)]),
]


# By the kind of content; bytes and kinds of file can be damaged in any.
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": damage_json, "lines": damage_lines, "yaml": damage_yaml, "gzip": damage_gzip, "table": damage_table,
    "journal": damage_journal, "safetensors": damage_safetensors,
}  # fmt: skip


def damage(content: str, data: bytes, rng: random.Random) -> Damage:
    """What becomes of a file. content: of DAMAGES."""
    kind = rng.randrange(50)
    if kind == 0:
        return damage_kind(rng)
    if kind < 18:
        return damage_bytes(data, rng)
    try:
        return DAMAGES[content](data, rng)
    except (pyarrow.ArrowException, RecursionError):  # of a table or a nesting that cannot be written
        return damage_bytes(data, rng)


def put(path: Path, damaged: Damage) -> None:
    """Have the damaged file, or what is there instead of one, at `path`."""
    path.unlink(missing_ok=True)
    if isinstance(damaged, bytes):
        path.write_bytes(damaged)
    else:
        damaged(path)
