"""The one way in for files that are read back: of an earlier run, of lm_eval, and those that a command line names.

    regular file -> so many bytes at most -> JSON, JSON lines, YAML or Parquet -> checked shape

Any of them may be cut, damaged, of another version, or made by somebody to do harm. Whatever stands in one, reading it ends soon
and takes little memory: with the value, or with a UserError of one sentence that names the file and the place. Nothing in a file
is executed, and no symbolic link is followed out of the directory that it is read from.

Not read here: task files, which lm_eval reads, and the files of a model, which transformers reads. Light: imported before torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ddp_eval.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    import pyarrow.parquet

# Given a parsed value, returns None, or what is wrong where, such as 'ranks.world_size must be a whole number, got "two"'.
Shape = Callable[[Any], str | None]

MAX_JSON_BYTES = 64 * 2**20  # telemetry.json of 1,000 ranks has 40 MB
MAX_LINE_BYTES = 64 * 2**20  # one document of a samples_*.jsonl
MAX_YAML_BYTES = 2**20  # PyYAML takes 10 s for it
MAX_NESTING = 100
MAX_DIGITS = 300  # a float holds no larger number
_MAX_OBJECT_BYTES = 2**29  # of the Python objects that JSON becomes
_MAX_YAML_VALUES = 200_000  # counted again wherever an alias repeats them
# Of Parquet. A file of few bytes can claim any number of rows, and real scores do not compress to less than a byte.
_MAX_ROWS, _MAX_ROWS_OF_SMALL_FILE, _MAX_ROWS_PER_BYTE = 2**26, 2**20, 16
_MAX_UNPACKED_BYTES = 2**34
_MAX_COLUMNS = 1000
_MAX_ROW_GROUPS = 10_000

_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISLNK, "a symbolic link"),
)  # fmt: skip


def kind_of(mode: int) -> str | None:
    """What a file of this st_mode is, for a sentence; None for a regular one."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def open_regular(path: str | os.PathLike[str], within: str | os.PathLike[str] | None = None) -> BinaryIO:
    """Open a regular file for reading, and nothing else: a pipe would wait for a writer, a device may never end.

    within: the directory that symbolic links must not lead out of; None lets them lead anywhere.
    Raises UserError for what is no regular file or lies elsewhere; OSError as `open` does.
    """
    place = os.fspath(path)
    if within is not None:
        place, folder = os.path.realpath(place), os.path.realpath(within)
        if os.path.commonpath([place, folder]) != folder:
            raise UserError(f"{os.fspath(path)} must be a file in {os.fspath(within)}, and is a symbolic link to {place}")
    _refuse_kind(path, os.stat(place).st_mode)  # opening a device can have effects of its own
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (os.O_NOFOLLOW if within is not None else 0)
    descriptor = os.open(place, flags)
    try:
        _refuse_kind(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_kind(path: str | os.PathLike[str], mode: int) -> None:
    if kind := kind_of(mode):
        raise UserError(f"{os.fspath(path)} must be a regular file, and is {kind}")


def read_bytes(path: str | os.PathLike[str], max_bytes: int, within: str | os.PathLike[str] | None = None) -> bytes:
    """The whole of a regular file. Raises UserError for everything that can go wrong."""
    with naming(path), open_regular(path, within) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{os.fspath(path)} is too large: more than {max_bytes:,} bytes")
    return data


def read_json(
    path: str | os.PathLike[str],
    shape: Shape | None = None,
    within: str | os.PathLike[str] | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    unique_keys: bool = True,
) -> Any:
    """The value in a JSON file. Raises UserError for everything that can go wrong."""
    data = read_bytes(path, max_bytes, within)
    with naming(path):
        return _check_shape(parse_json(_decode(data), unique_keys), shape)


def read_lines(
    path: str | os.PathLike[str], shape: Shape | None = None, within: str | os.PathLike[str] | None = None
) -> Iterator[Any]:
    """The value of each line of a JSON Lines file; blank lines are passed over. Raises UserError, with the line's number."""
    with naming(path):
        file = open_regular(path, within)
    with file:
        number = 0
        while True:
            number += 1
            with naming(path, number):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"is too long: more than {MAX_LINE_BYTES:,} bytes")
                if line.isspace():
                    continue
                value = _check_shape(parse_json(_decode(line)), shape)
            yield value


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value in a YAML file. Raises UserError for everything that can go wrong."""
    import yaml

    data = read_bytes(path, MAX_YAML_BYTES)
    with naming(path):
        text = _decode(data)
        try:
            value = yaml.load(text, Loader=_yaml_loader())
        except yaml.YAMLError as error:
            raise ValueError(f"is not YAML: {one_line(error)}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML's, as over !!int ""
            raise ValueError(f"holds a value that is not what its tag says ({one_line(error)})") from None
        _check_tree(value)
        return value


def parse_json(text: str, unique_keys: bool = True) -> Any:
    """JSON as Python's json module takes it, NaN and lone surrogates among it.

    Raises ValueError with what is wrong with it: nested too deep, too many values or digits, a key twice in one object.
    """
    if not text or text.isspace():
        raise ValueError("is empty")
    if 240 * text.count("{") + 64 * text.count("[") + 40 * text.count(",") > _MAX_OBJECT_BYTES:
        raise ValueError("holds too many values")
    try:
        value = (_UNIQUE if unique_keys else _ANY).decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_NESTING:
        _check_nesting(value)
    return value


def read_table(
    path: str | os.PathLike[str],
    schema: pyarrow.Schema,
    within: str | os.PathLike[str] | None = None,
    optional: Sequence[str] = (),
) -> dict[str, Column]:
    """The columns of a Parquet file, which must have those of `schema`, of these types and with values where it wants them.

    optional: columns of text that the file may lack, which are then without a text in each row.
    Whole numbers must be 0 to 2^53. Raises UserError for everything that can go wrong.
    """
    import pyarrow

    with naming(path), open_regular(path, within) as file:
        try:
            return _read_columns(file, schema, optional)
        except pyarrow.ArrowException as error:  # among them OSErrors and MemoryErrors
            if isinstance(error, MemoryError):
                raise
            raise ValueError(f"cannot be read as Parquet: {one_line(error)}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"cannot be read as Parquet: {one_line(error)}") from None


class Column:
    """One column of a Parquet file. Text is kept once for each different value, since a small file may repeat a large one.

    values: (N,) numpy array; of text the index of each row in `names`. names: different texts, None where there is none.
    """

    def __init__(self, values: np.ndarray, names: list[str | None] | None = None) -> None:
        self.values = values
        self.names = names or []

    def __len__(self) -> int:
        return len(self.values)

    def texts(self) -> Iterator[Any]:
        """The text of each row."""
        return (self.names[index] for index in self.values.tolist())


def _read_columns(file: BinaryIO, schema: pyarrow.Schema, optional: Sequence[str]) -> dict[str, Column]:
    import numpy as np
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        metadata, found = parquet.metadata, parquet.schema_arrow
    _check_claims(metadata, os.fstat(file.fileno()).st_size)
    fields = [field for field in schema if field.name in found.names or field.name not in optional]
    texts = [field.name for field in fields if pyarrow.types.is_string(field.type)]
    for field in fields:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            raise ValueError(f"has {'more than one' if places else 'no'} column {field.name}")
        kind = found.field(places[0]).type
        if pyarrow.types.is_dictionary(kind) and field.name in texts:
            kind = kind.value_type
        if kind != field.type:
            raise ValueError(f"column {field.name} must be of the type {field.type}, got {one_line(kind, 60)}")
    with pyarrow.parquet.ParquetFile(file, metadata=metadata, read_dictionary=texts, pre_buffer=False) as parquet:
        table = parquet.read(columns=[field.name for field in fields], use_threads=False)
    if table.num_rows != metadata.num_rows:
        raise ValueError(f"must have {metadata.num_rows:,} rows, as it says, and has {table.num_rows:,}")
    table.validate(full=True)
    lacking = {field.name: Column(np.zeros(metadata.num_rows, dtype=np.int64), [None]) for field in schema if field not in fields}
    return lacking | {field.name: _to_column(table[field.name], field) for field in fields}


def _check_claims(metadata: pyarrow.parquet.FileMetaData, size: int) -> None:
    """Raise ValueError where reading what the footer claims would take too much.

    It asks for no column of a group: pyarrow 26 ends the process over some that are damaged (an exception that nobody catches).
    """
    most = min(_MAX_ROWS, max(_MAX_ROWS_OF_SMALL_FILE, _MAX_ROWS_PER_BYTE * size))
    if not 0 <= metadata.num_rows <= most:
        raise ValueError(f"says that it has {metadata.num_rows:,} rows, in {size:,} bytes")
    if metadata.num_columns > _MAX_COLUMNS or metadata.num_row_groups > _MAX_ROW_GROUPS:
        raise ValueError(f"has too many columns or row groups: {metadata.num_columns:,} and {metadata.num_row_groups:,}")
    rows = group_bytes = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if not 0 <= group.num_rows <= metadata.num_rows:
            raise ValueError(f"says that it has {group.num_rows:,} of {metadata.num_rows:,} rows in one group")
        rows += group.num_rows
        group_bytes += max(0, group.total_byte_size)
    if rows != metadata.num_rows:
        raise ValueError(f"must have {metadata.num_rows:,} rows, as it says, and its groups have {rows:,}")
    if group_bytes > _MAX_UNPACKED_BYTES:
        raise ValueError(f"says that it unpacks to {group_bytes:,} bytes")


def _to_column(column: pyarrow.ChunkedArray, field: pyarrow.Field) -> Column:
    import numpy as np
    import pyarrow.compute

    if not field.nullable and column.null_count:
        raise ValueError(f"column {field.name} must have a value in each row, and {column.null_count:,} rows have none")
    if pyarrow.types.is_string(field.type):
        if not len(column):
            return Column(np.zeros(0, dtype=np.int64))
        array = column.unify_dictionaries().combine_chunks()
        names = array.dictionary.to_pylist()
        return Column(array.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int64), [*names, None])
    if pyarrow.types.is_boolean(field.type):
        return Column(column.cast(pyarrow.int8()).fill_null(-1).to_numpy())
    values = column.to_numpy()
    if pyarrow.types.is_integer(field.type) and len(values) and not 0 <= values.min() <= values.max() <= 2**53:
        row = int(np.flatnonzero((values < 0) | (values > 2**53))[0])
        raise ValueError(f"column {field.name} must be 0 to 2^53, got {values[row]} in row {row}")
    return Column(values)


def an_object(value: Any) -> str | None:
    """The shape of any JSON object."""
    return None if isinstance(value, dict) else f"must hold a JSON object, got {show(value)}"


def show(value: Any) -> str:
    """A value from a file, for a sentence."""
    return one_line(json.dumps(value, ensure_ascii=False, default=str), 60)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None


def _check_shape(value: Any, shape: Shape | None) -> Any:
    problem = shape(value) if shape is not None else None
    if problem:
        raise ValueError(problem)
    return value


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], line: int | None = None) -> Iterator[None]:
    """Make one sentence with the file's name, and the line's number, of what is wrong with it."""
    name = os.fspath(path) if line is None else f"{os.fspath(path)}, line {line}"
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or one_line(error)})") from None
    except ValueError as error:
        problem = one_line(error)
        raise UserError(f"{name}{' ' if problem.startswith(_VERBS) else ': '}{problem}") from None
    except RecursionError:
        raise UserError(f"{name} {_TOO_DEEP}") from None
    except MemoryError:
        raise UserError(f"{name} {OUT_OF_MEMORY}") from None


_VERBS = ("is ", "has ", "holds ", "says ", "must ", "cannot ")  # of the file itself; else a place within it comes first
_TOO_DEEP = f"is nested more than {MAX_NESTING} levels deep"
OUT_OF_MEMORY = "cannot be read: it takes more memory than there is"


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [item for one in level for item in _parts(one) if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_tree(value: Any) -> None:
    """What YAML can hold and JSON cannot: aliases, which may repeat a part without end, and numbers of any length."""
    level, count = [value], 0
    for _ in range(MAX_NESTING + 1):
        count += len(level)
        if count > _MAX_YAML_VALUES:
            raise ValueError("holds too many values")
        if any(isinstance(one, int) and abs(one) >= 10**MAX_DIGITS for one in level):
            raise ValueError(f"holds a whole number of more than {MAX_DIGITS} digits")
        level = [item for one in level for item in _parts(one)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [*value] if isinstance(value, (list, tuple, set)) else ()


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        left = dict(pairs)
        twice = next(key for key, _ in pairs if left.pop(key, pairs) is pairs)
        raise ValueError(f"has the key {json.dumps(one_line(twice, 60))} twice in one object")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"holds a whole number of {len(digits):,} digits")
    return int(digits)


_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique_object, parse_int=_whole_number)
_ANY = json.JSONDecoder(parse_int=_whole_number)


def _yaml_loader() -> Any:
    """yaml.SafeLoader, which makes plain values alone, and refuses a key that stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                    seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    return Loader
