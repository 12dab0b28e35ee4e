"""Tasks as their files are now: other libraries' caches that know a file by less than its content are not read. Leader only.

What is cached, and by what it is found (lm_eval 0.4.13, datasets 5.2):

    data files of this machine                path and modification time   here: SHA-256 of the content
    `Dataset.map`, `filter` (process_docs)    the function's name          here: a folder of this evaluation's own
    `Dataset.from_generator`                  the generator's name         here: not cached
    Python files of tasks                     modification time            here: SHA-256 of the content
    bytecode of Python files                  size and time in seconds     here: not read for files of tasks

A function's name says nothing of what its code does today, of the modules that it imports and the files that it opens. The files
that tasks were made of are noted: a complete run is not taken for this one if any has changed.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib.util
import io
import os
import sys
import tempfile
import threading
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.data_files
import datasets.io.generator
from huggingface_hub.constants import HF_HOME
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import _factory, _yaml_loader

from ddp_eval.system.digests import digest_directory
from ddp_eval.tasks.patch import Patch, apply

_LM_EVALS_TASKS = os.path.join(os.path.dirname(os.path.realpath(_yaml_loader.__file__)), "")


class TaskSources:
    """The files of this machine that tasks were made of. files: {absolute path: SHA-256}.

    looks: how each file looked just before it was read (`look_at`). folders: what was in theirs when the first of them was.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.looks: dict[str, str] = {}
        self.folders: dict[str, frozenset[str]] = {}

    def see(self, path: str | Path) -> None:
        """To be called before a file is read: what is written to it from now on, or put beside it, will show."""
        whole = os.path.abspath(path)
        self.looks.setdefault(whole, look_at(whole))
        folder = os.path.dirname(whole)
        if folder not in self.folders:
            self.folders[folder] = names_in(folder)

    def note(self, path: str | Path) -> str:
        """Read the file, and return its SHA-256; "" if it is gone."""
        self.see(path)
        folder, name = os.path.split(os.path.abspath(path))
        found = digest_directory(folder, [name])["files"]
        self.files.update({os.path.join(folder, name): digest for name, digest in found.items()})
        return str(found.get(name, ""))

    def note_imported(self, modules: Iterable[str], folder: str) -> None:
        """Note those of the modules, by name, that lie in `folder` or beneath lm_eval's tasks: helpers of a task's code."""
        for name in modules:
            path = getattr(sys.modules.get(name), "__file__", None) or ""
            if os.path.dirname(path) == folder or path.startswith(_LM_EVALS_TASKS):
                self.note(path)


def look_at(path: str) -> str:
    """Equal as long as nobody writes to a file; "" for one that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{os.path.realpath(path)} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def names_in(folder: str) -> frozenset[str]:
    with contextlib.suppress(OSError):
        return frozenset(name for name in os.listdir(folder) if not name.startswith((".", "__pycache__")))
    return frozenset()


@contextlib.contextmanager
def reading_anew() -> Iterator[TaskSources]:
    """Have tasks made of their files as these are now, and note them. Everything is put back when the block ends."""
    sources = TaskSources()
    with contextlib.ExitStack() as stack:
        apply(_patches(sources, _folders_of_its_own(stack)), stack)
        yield sources


def _patches(sources: TaskSources, new_folder: Callable[[], str]) -> list[Patch]:
    library = "datasets 5.2"
    return [
        Patch(
            _yaml_loader, "_load_module_with_cache", _loader_of_modules(sources),
            "finds a Python file by its modification time, and its bytecode by size and seconds",
        ),
        Patch(_factory, "load_yaml", _loader_of_yaml(sources), "does not return which files it has read"),
        Patch(ConfigurableTask, "download", _download_and_note(sources), "calls a task's code, which may open any file"),
        Patch(
            datasets.data_files, "_get_single_origin_metadata", _identity_of_data(sources),
            "finds data files of this machine by path and modification time", library,
        ),
        Patch(
            datasets.Dataset, "_get_cache_file_path", _place_of_transformed(new_folder),
            "finds what `map` and `filter` made by the function's name", library,
        ),
        Patch(
            datasets.io.generator, "GeneratorDatasetInputStream", _stream_without_cache(new_folder),
            "finds what a generator made by the generator's name", library,
        ),
    ]  # fmt: skip


_FOLDER = "ddp_eval_documents_"


def _folders_of_its_own(stack: contextlib.ExitStack) -> Callable[[], str]:
    """Returns what makes a new folder at each call; all are removed at the end."""
    made: list[str] = []

    def make() -> str:
        if not made:
            made.append(stack.enter_context(tempfile.TemporaryDirectory(prefix=_FOLDER, ignore_cleanup_errors=True)))
        return tempfile.mkdtemp(dir=made[0])

    return make


def _download_and_note(sources: TaskSources) -> Callable[..., None]:
    """Stands in for lm_eval's method, and notes what a `custom_dataset` opens, other than in caches and packages."""
    download = ConfigurableTask.download
    places = (HF_HOME, str(datasets.config.HF_CACHE_HOME), str(datasets.config.HF_DATASETS_CACHE), sys.prefix, "/proc", "/sys")
    elsewhere = tuple(os.path.join(os.path.realpath(place), "") for place in places)

    def download_and_note(task: ConfigurableTask, *args: Any, **options: Any) -> None:
        if not callable(task.config.custom_dataset):
            download(task, *args, **options)
            return
        this_thread = threading.get_ident()  # the model is being loaded in another

        def open_and_note(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            found = io_open(file, mode, *more, **options)
            if threading.get_ident() == this_thread and "r" in mode and isinstance(file, (str, os.PathLike)):
                path = os.path.realpath(os.fspath(file))
                if os.path.isfile(path) and not path.startswith(elsewhere) and _FOLDER not in path:
                    sources.note(path)
            return found

        io_open = io.open
        with unittest.mock.patch.object(builtins, "open", open_and_note), unittest.mock.patch.object(io, "open", open_and_note):
            download(task, *args, **options)

    return download_and_note


def _place_of_transformed(new_folder: Callable[[], str]) -> Callable[[Any, str], str]:
    """Documents that a task's code has changed stay for this evaluation, in which lm_eval asks for them five times."""
    elsewhere = datasets.Dataset._get_cache_file_path
    folder: list[str] = []

    def place(dataset: datasets.Dataset, fingerprint: str) -> str:
        if not dataset.cache_files:  # datasets caches none of these
            return str(elsewhere(dataset, fingerprint))
        if not folder:
            folder.append(new_folder())
        return os.path.join(folder[0], f"cache-{fingerprint}.arrow")

    return place


def _stream_without_cache(new_folder: Callable[[], str]) -> Callable[..., Any]:
    stream = datasets.io.generator.GeneratorDatasetInputStream

    def generate(**options: Any) -> Any:
        return stream(**{**options, "cache_dir": new_folder()})

    return generate


def _identity_of_data(sources: TaskSources) -> Callable[..., tuple[str, ...]]:
    describe = datasets.data_files._get_single_origin_metadata

    def known_by(data_file: str, download_config: Any = None) -> tuple[str, ...]:
        path = data_file.removeprefix("file://")
        if "://" not in path and os.path.isfile(path):
            return (sources.note(path),)
        return tuple(describe(data_file, download_config=download_config))

    return known_by


def _loader_of_yaml(sources: TaskSources) -> Callable[..., Any]:
    load_yaml = _yaml_loader.load_yaml

    def load(path: str | Path, **options: Any) -> Any:
        seen: set[Path] = set()  # lm_eval adds each file that it opens
        content = load_yaml(path, **{"_seen": seen, **options})
        for file in seen:
            sources.note(file)
        return content

    return load


def _loader_of_modules(sources: TaskSources) -> Callable[[Path], Any]:
    """Stands in for lm_eval's function, of which it keeps the names of modules."""

    def load(path: Path) -> Any:
        sources.see(path)
        source = path.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        sources.files[os.path.abspath(path)] = digest
        name = _name_of_module(path)
        if getattr(sys.modules.get(name), "__ddp_eval_source__", None) == (str(path), digest):
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None:
            raise ImportError(f"Cannot load module from {path}")
        module: Any = importlib.util.module_from_spec(spec)
        module.__mtime__ = path.stat().st_mtime_ns  # by which lm_eval's own function finds it
        module.__ddp_eval_source__ = str(path), digest
        before = set(sys.modules)
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        sources.note_imported(sys.modules.keys() - before, os.path.dirname(path))
        sys.modules[name] = module
        return module

    return load


def _name_of_module(path: Path) -> str:
    """As lm_eval names it. A copy of lm_eval's own task elsewhere has the name of its path, not that of the original."""
    plain = str(path.with_suffix(""))
    if plain.startswith(_LM_EVALS_TASKS):
        return "lm_eval.tasks." + plain.removeprefix(_LM_EVALS_TASKS).replace(os.sep, ".")
    return plain
