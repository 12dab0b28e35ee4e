"""A persistent cache of lm_eval's own task files, as its index reads them.

`TaskManager(...)` parses the 14,000 YAML files in lm_eval's tasks folder each time, which takes seconds. Within `reuse_index`,
the content of a file is taken from the cache if that file and all that it includes are as they were when it was parsed: by size
and times, of which the time of the last change to the file's data or times cannot be set, or else by a digest of their bytes.
lm_eval parses the rest. It still finds the files, makes the entries, logs the warnings, and builds the tasks, for which it reads
their YAML files again and never the cache.

The cache lies in $XDG_CACHE_HOME/ddp_eval or ~/.cache/ddp_eval, one file for each installation of lm_eval, and may be deleted at
any time. A cache file that is missing, damaged or another user's, or that cannot be written, is ignored. What comes out must
equal what lm_eval reads. Parsed in every run are therefore: content that JSON cannot hold exactly, files that include others
outside the folder, and all files of a folder with symbolic links in it.

The file is JSON Lines under gzip: `_header`, which must be equal; {name: [size, mtime_ns, ctime_ns, digest]} of all files read;
for each content, the names of the files that it was read from, the main one first; then each content on a line of its own.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import inspect
import json
import os
import time
import unittest.mock
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ddp_eval.errors import UserError
from ddp_eval.system.files import replace_file
from ddp_eval.system.read_back import open_regular

_FORMAT = 2
_MAX_FILE_BYTES = 32 << 20  # lm_eval 0.4.13 makes 1.8 MB,
_MAX_TEXT_BYTES = 256 << 20  # and 17 MB of text
_MANY_FILES = 1000  # lm_eval parses as many in a third of a second
# A file changed twice within one tick of the file system's clock may have one time for both contents. Ticks last up to 2 s.
_TICK_NS = 2_000_000_000
_IGNORED_DIRECTORIES = ("__pycache__", ".ipynb_checkpoints")  # lm_eval's index ignores them too
_LOADER_FILE = "_yaml_loader.py"

LoadYaml = Callable[..., Any]


class Content(NamedTuple):
    """What lm_eval reads from a task file. names: of that file, then of those that it includes; text: the merged dict as JSON."""

    names: list[str]
    text: str


@contextlib.contextmanager
def reuse_index() -> Iterator[bool]:
    """Have TaskManager take lm_eval's own task files from the cache, and save at the end what had to be parsed.

    Yields whether so many files have to be parsed that it takes seconds.
    Nothing is cached where lm_eval's internals are not those of 0.4.13: `TaskIndex.build` and `TaskManager.list_all_tasks` call
    the `load_yaml` of their own modules, for each file, as `load_yaml(path, resolve_func=False, recursive=True)`.
    """
    with _no_full_collections(), contextlib.ExitStack() as patches:
        cache, modules = _open_cache()
        if cache is None:
            yield True
            return
        for module in modules:
            patches.enter_context(unittest.mock.patch.object(module, "load_yaml", cache.load_yaml))
        yield cache.count_missing() > _MANY_FILES
        cache.save()


class IndexCache:
    """The contents of lm_eval's task files, by name: the path relative to the folder."""

    def __init__(self, folder: str, load_yaml: LoadYaml, versions: list[str]) -> None:
        """folder: as TaskManager spells it; load_yaml: lm_eval's own; versions: of whatever decides what it returns.

        Raises OSError if the folder holds symbolic links, or cannot be listed.
        """
        self._folder = os.path.join(folder, "")
        self._real_folder = os.path.join(os.path.realpath(folder), "")
        self._load_yaml = load_yaml
        self._listed_at = time.time_ns()
        self._stamps = _list_files(self._real_folder)  # before any of them is opened
        # The folder, since lm_eval makes absolute paths of !function; the loader, which may be edited where lm_eval is developed.
        self._header = [_FORMAT, versions, self._real_folder, self._stamps.get(_LOADER_FILE)]
        self._changed = False
        self._contents = self._read_valid()

    def count_missing(self) -> int:
        """The task files that have to be parsed."""
        return sum(name.endswith(".yaml") and name not in self._contents for name in self._stamps)

    def load_yaml(self, path: str | Path, **options: Any) -> Any:
        """Stands in for lm_eval's function, which also returns a new object at each call."""
        name = _name_in(self._folder, path)
        if name not in self._stamps or options != {"resolve_func": False, "recursive": True}:
            return self._load_yaml(path, **options)
        if name in self._contents:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(self._contents[name].text)
                if isinstance(content, dict):
                    return content
        return self._parse(path, name)

    def save(self) -> None:
        """Write what was parsed and what was valid before. A cache that cannot be written is left as it is."""
        if not self._changed:
            return
        stamps = self._stamps_to_keep()
        contents = [content for content in self._contents.values() if stamps.keys() >= set(content.names)]
        head = [self._header, stamps, [content.names for content in contents]]
        text = "\n".join([*map(json.dumps, head), *(content.text for content in contents)])
        with contextlib.suppress(OSError):
            self._path().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path(), [gzip.compress(text.encode(), compresslevel=1, mtime=0)])

    def _parse(self, path: str | Path, name: str) -> Any:
        seen: set[Path] = set()  # lm_eval adds each file that it opens, resolved, to find circular includes
        content = self._load_yaml(path, resolve_func=False, recursive=True, _seen=seen)
        names = [_name_in(self._real_folder, file) for file in seen]
        if name in names and all(each in self._stamps for each in names):
            text = _to_exact_json(content)
            if text is not None:
                self._contents[name] = Content(sorted(names, key=lambda each: (each != name, each)), text)
                self._changed = True
        return content

    def _stamps_to_keep(self) -> dict[str, list[Any]]:
        """[size, mtime_ns, ctime_ns, digest] of the files that are as they were when they were listed.

        Times of a moment ago are left out: a change that comes now would not show in them, so the digest is to decide.
        """
        stamps: dict[str, list[Any]] = {}
        for name in dict.fromkeys(name for content in self._contents.values() for name in content.names):
            size, *times = self._stamps[name]
            settled = all(abs(self._listed_at - moment) > _TICK_NS for moment in times)
            with contextlib.suppress(OSError):
                digest = _digest_file(self._real_folder + name)
                if _stamp_of(os.stat(self._real_folder + name)) == self._stamps[name]:
                    stamps[name] = [size, *(times if settled else (None, None)), digest]
        return stamps

    def _is_same(self, name: str, stamp: list[Any]) -> bool:
        """Whether the file's content is that of the stamp."""
        now = self._stamps.get(name)
        if now is None or now == stamp[:3]:
            return now is not None
        self._changed = True  # its times, at least
        return now[0] == stamp[0] and _digest_file(self._real_folder + name) == stamp[3]

    def _read_valid(self) -> dict[str, Content]:
        """What is in the cache file and still valid."""
        try:
            header, stamps, names, *texts = _read_limited(self._path()).split("\n")
            if json.loads(header) != self._header:
                return {}
            contents = [Content(*pair) for pair in zip(json.loads(names), texts, strict=True)]
            valid = {name for name, stamp in json.loads(stamps).items() if self._is_same(name, stamp)}
            return {content.names[0]: content for content in contents if content.names and valid.issuperset(content.names)}
        except (OSError, UserError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return {}

    def _path(self) -> Path:
        installation = hashlib.sha256(os.fsencode(self._real_folder)).hexdigest()[:16]
        return _cache_home() / "ddp_eval" / f"task_index-{installation}.jsonl.gz"


def _open_cache() -> tuple[IndexCache | None, list[Any]]:
    """The cache, and the modules of lm_eval that are to load from it; None if the folder or lm_eval is not as expected."""
    try:
        import lm_eval
        import yaml
        from lm_eval.tasks import _index, _yaml_loader, manager

        load_yaml, modules = _yaml_loader.load_yaml, [_index, manager]
        expected = {"path", "resolve_func", "recursive", "_seen"} <= set(inspect.signature(load_yaml).parameters)
        if not expected or any(module.load_yaml is not load_yaml for module in modules):
            return None, []
        versions = [lm_eval.__version__, yaml.__version__, _yaml_loader._Base.__name__]
        return IndexCache(os.path.dirname(manager.__file__), load_yaml, versions), modules
    except (ImportError, AttributeError, TypeError, ValueError, OSError):
        return None, []


@contextlib.contextmanager
def _no_full_collections() -> Iterator[None]:
    """Keep the garbage collector from searching all objects of the process while the index, none of which is garbage, grows.

    Such a search takes 0.2 s once torch is imported, half as long as all else from a warm cache.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _name_in(folder: str, path: str | Path) -> str:
    """`path` relative to `folder`, which ends with a separator; "" if it is not beneath."""
    text = str(path)
    return text[len(folder) :] if text.startswith(folder) else ""


def _list_files(folder: str) -> dict[str, list[int]]:
    """[size, mtime_ns, ctime_ns] of the regular files beneath `folder`, by their path in it. Raises OSError.

    Refuses symbolic links: through one, an include can lead to another file with no file in the folder changed.
    """
    stamps: dict[str, list[int]] = {}
    directories = [""]
    while directories:
        directory = directories.pop()
        with os.scandir(folder + directory) as entries:
            for entry in entries:
                name = directory + entry.name
                if entry.is_symlink():
                    raise OSError(f"{name} is a symbolic link")
                if entry.is_dir():
                    directories += [] if entry.name in _IGNORED_DIRECTORIES else [name + os.sep]
                elif entry.is_file():
                    stamps[name] = _stamp_of(entry.stat())
    return stamps


def _stamp_of(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def _to_exact_json(content: Any) -> str | None:
    """None where JSON would change it: dates, sets, tuples, bytes, keys that are no strings, NaN, and more."""
    try:
        text = json.dumps(content, allow_nan=False)
        return text if json.loads(text) == content else None
    except (TypeError, ValueError, RecursionError):
        return None


def _cache_home() -> Path:
    """Raises OSError where the user has none."""
    # The XDG specification: a path that is not absolute must be ignored.
    for home in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(home):
            return Path(home)
    raise OSError("there is no home directory to keep a cache in")


def _read_limited(path: Path) -> str:
    """The text of a gzip file of this user's.

    Raises OSError, UserError or ValueError if it is no regular file, another user's, too large, damaged or truncated.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise OSError(f"{path} belongs to another user")
        compressed = file.read(_MAX_FILE_BYTES + 1)
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = stream.decompress(compressed, _MAX_TEXT_BYTES)
    except zlib.error as error:
        raise ValueError(f"{path} is damaged") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(f"{path} is truncated or too large")
    return text.decode()
