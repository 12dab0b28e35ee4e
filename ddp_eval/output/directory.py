"""What the leader finds in --output_path, before all else, and does with it: begin, go on, or leave a finished run alone.

    DIR/status.json              how the run stands, and which launch did it last (status.py)
    DIR/.ddp_eval.lock           while a run is at work (lock.py)
    DIR/journal/run.json         while unfinished: the flags that began it, its layout, and the launch whose --fresh is obeyed
    DIR/journal/*.journal        while unfinished: finished packs (journal.py)

A complete run has a manifest.json and no journal. One that is to be replaced stays until the new one has passed every check
and begins to score: a mistake in the command, or a reproduction that is refused, costs nobody a finished run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ddp_eval.config import Config
from ddp_eval.errors import UserError, one_line
from ddp_eval.layout import TENSOR
from ddp_eval.output import journal, lm_eval_names, status, write
from ddp_eval.output.lock import LOCK, Lock, LockHeldError, OnWait, not_at_all
from ddp_eval.output.versions import describe_packages
from ddp_eval.system import digests, launch_id
from ddp_eval.system.files import read_object, replace_json
from ddp_eval.system.read_back import Shape, read_json

log = logging.getLogger("ddp_eval")

JOURNALS = "journal"
_RUN = "run.json"

_NO_MATTER = {  # to any run
    "output_path", "overwrite", "fresh", "timeout", "load", "preflight", "show_config", "cache_requests",
    "confirm_run_unsafe_code",
}  # fmt: skip
_FOR_METRICS = {"log_samples", "predict_only", "write_out", "bootstrap_iters"}  # to the scores of an unfinished one
_MODEL = ("pretrained", "peft", "revision", "subfolder")  # of model_args: which model it is
_MORE = {"log_samples", "write_out"}  # add to what a run gives: one that has given more serves who asks for less


class AtWork(UserError):
    """Another run holds the directory, or held it a moment ago and has finished there."""


class Lost(AtWork):
    """The directory was deleted, or taken over by another run, while this one was at work in it."""


class Kept(NamedTuple):
    """Where finished packs are kept, and under which key."""

    journals: Path
    key: bytes


class Directory(Protocol):
    """Where the finished work of a run is kept and found: a RunDirectory, or a NoDirectory."""

    @property
    def layout(self) -> str | None: ...
    def check(self) -> None: ...
    def resume(
        self, make_key: Callable[[], bytes], item_starts: Any, text_starts: Any, layout: str | None = None
    ) -> tuple[journal.RecoveredWork, Kept | None]: ...
    def begin_replacing(self, config: Config, layout: str | None = None) -> None: ...
    def finish(self) -> None: ...


class NoDirectory:
    """Keeps nothing and has nothing to resume from."""

    layout: str | None = None

    def check(self) -> None:
        pass

    def resume(
        self, make_key: Callable[[], bytes], item_starts: Any, text_starts: Any, layout: str | None = None
    ) -> tuple[journal.RecoveredWork, Kept | None]:
        return journal.NOTHING, None

    def begin_replacing(self, config: Config, layout: str | None = None) -> None:
        pass

    def finish(self) -> None:
        pass


class RunDirectory:
    """A directory that this run holds the lock of, from `open_directory` until `close`."""

    def __init__(self, path: Path, lock: Lock | None = None, replace: bool = False) -> None:
        self.path = path
        self.journals = path / JOURNALS
        self.files_to_remove: list[Path] = []  # files of a complete run that `begin_replacing` removes
        self.previous_status: dict[str, Any] = {}  # the status of that run
        self._lock = lock
        self._replace = replace

    @property
    def is_lost(self) -> bool:
        return self._lock is not None and self._lock.is_lost

    def check(self) -> None:
        """Raise Lost where the directory is no longer this run's to write to: cheap enough for every pack."""
        if self.is_lost:
            raise Lost(lost_sentence(self.path))

    def recover(self, key: bytes, item_starts: Any, text_starts: Any = None, layout: str | None = None) -> journal.RecoveredWork:
        """What is done of the work that `key` names. Journals of other work are removed if they may be replaced.

        layout: that of this start. Raises UserError if they may not.
        """
        while True:
            try:
                return journal.read_journals(self.journals, key, item_starts, text_starts)
            except journal.OtherWork as other:
                if not self._replace:
                    raise UserError(self._why_other_work(str(other), layout)) from None
                (self.journals / str(other)).unlink(missing_ok=True)

    def resume(
        self, make_key: Callable[[], bytes], item_starts: Any, text_starts: Any, layout: str | None = None
    ) -> tuple[journal.RecoveredWork, Kept | None]:
        """What is done of the work that the key names, and where each rank keeps what it does now. layout: that of this start."""
        key = make_key()
        return self.recover(key, item_starts, text_starts, layout), Kept(self.journals, key)

    def _why_other_work(self, name: str, layout: str | None) -> str:
        """Why the journal `name` is of no use to this start. Of the layouts only tensor parallelism decides the numbers' bits."""
        kind, _, each = (self.layout or "").partition(":")
        if kind == TENSOR and layout != self.layout:
            return (
                f"--output_path {self.path} holds unfinished work that was begun with layout {self.layout}, and this start has "
                f"layout {layout}, which gives other bits: start a multiple of {each} ranks, or --fresh to start over"
            )
        return (
            f"--output_path {self.path} holds unfinished work on other requests, weights or package versions than now ({name}): "
            "give another --output_path, or --fresh to start over"
        )

    @property
    def layout(self) -> str | None:
        """How the model lay over the ranks when the unfinished work was begun."""
        found = read_object(self.journals / _RUN).get("layout")
        return found if isinstance(found, str) else None

    def begin_replacing(self, config: Config, layout: str | None = None) -> None:
        """Do what --fresh and --overwrite ask for, and not again when the launcher starts this command again.

        layout: the one that was chosen, which a resume keeps.
        """
        try:
            if self.files_to_remove:
                lm_eval_names.remove_links(self.path)  # before results.json, which says which they are
            for file in reversed(self.files_to_remove):  # the manifest last: without it the others would pass for this run's
                file.unlink(missing_ok=True)
            self.files_to_remove = []
            replace_json(
                self.journals / _RUN, {"flags": _flags(config), "launch": launch_id.launches(), "layout": layout or self.layout}
            )
        except OSError as error:
            raise write.unwritable(self.path, error) from error

    def finish(self) -> None:
        """The manifest is written: nothing is left to resume.

        The journals go last: until the run is marked as done, their run.json says that --fresh is obeyed.
        """
        status.write_status(self.path, status.DONE, "the run is complete")
        self.files_to_remove = []
        self.forget_journals()

    def forget_journals(self) -> None:
        if self.journals.is_dir():
            torn = self.journals.glob(f".*{write.TEMPORARY_SUFFIX}")
            for file in [*self.journals.glob(f"*{journal.SUFFIX}"), *torn, self.journals / _RUN]:
                file.unlink(missing_ok=True)
            if not any(self.journals.iterdir()):
                self.journals.rmdir()

    def close(self) -> None:
        """Let go of the directory; a complete run that was to be replaced and was not is as it was.

        A start that has finished no work leaves nothing that would bind the next one. A journal stays, even an empty one: another
        rank may be writing to it.
        """
        if self._lock is not None and self.is_lost:  # what lies there is another's; the lock is not if only the disk was silent
            with contextlib.suppress(OSError):
                self._lock.release()
            return
        with contextlib.suppress(OSError):
            if self.files_to_remove and self.previous_status:
                self.forget_journals()
                replace_json(self.path / status.STATUS, self.previous_status)
            elif not (write.run_files(self.path) or any(self.journals.glob(f"*{journal.SUFFIX}"))):
                self.forget_journals()
        self.files_to_remove = []
        if self._lock is not None:
            self._lock.release()


def find_finished(
    config: Config, is_same_model: Callable[[dict[str, Any]], bool], on_wait: OnWait = not_at_all
) -> dict[str, Any] | None:
    """The results of the complete run that --output_path holds, if it is what these flags ask for and nobody asks to replace it.

    is_same_model: whether the model's files are still those of a manifest. on_wait: see `Lock`.
    Raises UserError if it holds a complete run of other flags or another model, or one without the samples that are asked for.
    """
    if not config.output_path:
        return None
    directory = Path(config.output_path)
    if (config.overwrite or config.fresh) and not already_replaced_by_this_launch(directory):
        return None
    if not os.path.isfile(directory / write.MANIFEST):
        return None
    from ddp_eval.output import shapes  # it takes a sixth of a second

    manifest = _read_finished(directory, write.MANIFEST, shapes.MANIFEST)
    flags = manifest.get("config")
    if flags is None:
        raise _refuse(directory, f"its {write.MANIFEST} names no flags")
    has = {name for name in _MORE if flags.get(name)}
    difference = _difference(flags, config, _NO_MATTER | has) or _changed_task_file(manifest)
    if not difference and not is_same_model(manifest):  # it may read all files: only where nothing else tells
        difference = "the files of the model have changed since"
    if difference:
        raise _refuse(directory, difference, _where_else(directory, flags, config))
    found = _read_finished(directory, write.RESULTS, shapes.FINISHED_RESULTS)
    found["ddp_eval"].pop("telemetry", None)  # that of a run that has just ended
    if status.read_status(directory).get("state") != status.DONE or (directory / JOURNALS).exists():
        # One was killed in its last steps or before it replaced this run, or is at work to do either.
        with contextlib.suppress(OSError):
            lock = _take_lock(directory, lambda: None, on_wait)
            try:
                if not os.path.isfile(directory / write.MANIFEST):
                    return None
                RunDirectory(directory).finish()
            finally:
                lock.release()
    _say_other_versions(directory, manifest)
    return found


def _read_finished(directory: Path, name: str, shape: Shape) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(directory / name, shape, directory)
        return found
    except UserError as error:
        raise _refuse(directory, f"its {name} cannot be read: {error}") from None


def _changed_task_file(manifest: dict[str, Any]) -> str:
    """A phrase for the first of the tasks' files whose content has changed since a run, "" if none has. Lost ones are ignored."""
    files = manifest.get("task_files")
    for path, digest in files.items() if isinstance(files, dict) else ():
        try:
            now = digests.digest_directory(os.path.dirname(path), [os.path.basename(path)])["files"]
        except OSError as error:
            return f"the task file {path} cannot be read: {error.strerror}"
        if list(now.values()) not in ([], [digest]):
            return f"the task file {path} has changed since"
    return ""


def _say_other_versions(directory: Path, manifest: dict[str, Any]) -> None:
    """A complete run is what it is; with which software it was made, one line says where that is another now."""
    before, now = manifest.get("packages"), describe_packages()
    others = [name for name in now if isinstance(before, dict) and before.get(name, now[name]) != now[name]]
    if isinstance(before, dict) and others:
        versions = ", ".join(f"{name} {before[name]} (now {now[name]})" for name in others)
        log.warning("the run in %s was made with %s", directory, versions)


def open_directory(config: Config, on_lost: Callable[[], None], on_wait: OnWait = not_at_all) -> RunDirectory:
    """Take --output_path for this run: lock it, clear what may be replaced, keep what can be resumed.

    on_lost: called from a thread when the directory or its lock goes away. on_wait: see `Lock`.
    Raises UserError if it cannot be written, belongs to another run at work, or holds what may not be replaced.
    """
    assert config.output_path
    path = write.make_directory(config.output_path)
    _refuse_odd_names(path)
    try:
        lock = _take_lock(path, on_lost, on_wait)
    except OSError as error:
        raise write.unwritable(config.output_path, error) from error
    obeyed = already_replaced_by_this_launch(path)
    fresh, replace = config.fresh and not obeyed, (config.fresh or config.overwrite) and not obeyed
    directory = RunDirectory(path, lock, replace)
    try:
        _settle_contents(directory, config, fresh, replace)
        directory.previous_status = status.read_status(path)
        status.write_status(path, status.RUNNING, "the run is at work")
    except OSError as error:
        directory.close()
        raise write.unwritable(config.output_path, error) from error
    except BaseException:
        directory.close()
        raise
    return directory


def _refuse_odd_names(directory: Path) -> None:
    """Raise UserError where no file stands under a name that a run writes: it would wait for a pipe, or fail at its end."""
    write.refuse_odd_files(directory, (status.STATUS, LOCK))
    journals = directory / JOURNALS
    kind = write.kind_at(journals)
    if kind is not None and kind != "a directory":
        raise UserError(f"{journals} must be a directory, and is {kind}: remove it, or give another --output_path")
    if kind is not None:
        write.refuse_odd_files(journals, (_RUN,))


def _take_lock(directory: Path, on_lost: Callable[[], None], on_wait: OnWait) -> Lock:
    lock = Lock(directory / LOCK, on_lost, on_wait)
    try:
        lock.acquire()
    except LockHeldError as held:
        raise AtWork(f"another run is at work in --output_path {directory} ({held}): wait for it, or give another") from None
    return lock


def lost_sentence(directory: Path) -> str:
    return f"--output_path {directory} was deleted or taken over by another run"


def is_at_work(directory: Path, on_wait: OnWait = not_at_all) -> bool:
    """Whether another run holds a run directory now; the lock of a dead one is removed. on_wait: see `Lock`."""
    if not os.path.lexists(directory / LOCK):
        return False
    try:
        _take_lock(directory, lambda: None, on_wait).release()
    except AtWork:
        return True
    except (OSError, UserError):  # nobody can be told
        return False
    return False


def already_replaced_by_this_launch(directory: Path) -> bool:
    """Whether an earlier start of this very launch has done what --fresh and --overwrite ask for, or the whole run."""
    stands = status.read_status(directory)
    marks = [
        read_object(directory / JOURNALS / _RUN).get("launch"),
        stands.get("launch") if stands.get("state") == status.DONE else None,
    ]
    return any(launch_id.is_restart_of(mark) for mark in marks)


def _settle_contents(directory: RunDirectory, config: Config, fresh: bool, replace: bool) -> None:
    files = write.run_files(directory.path)
    flags = read_object(directory.journals / _RUN).get("flags")  # lost or unreadable, the key of each journal decides
    packs = journal.holds_work(directory.journals)
    complete = (directory.path / write.MANIFEST).is_file()
    difference = ""
    if complete:
        difference = "complete"
    elif not (files or packs):
        pass  # whatever was started here has finished nothing
    elif isinstance(flags, dict):
        difference = _difference(flags, config, _NO_MATTER | _FOR_METRICS)
    elif not packs:
        difference = "it has no journal to resume from"
    if difference and not replace:
        earlier = read_object(directory.path / write.MANIFEST).get("config") if complete else flags
        refusal = _refuse(directory.path, difference, _where_else(directory.path, earlier, config))
        raise AtWork(str(refusal)) if complete else refusal  # `find_finished` found none
    if complete:
        directory.files_to_remove = files
    elif difference or fresh:
        lm_eval_names.remove_links(directory.path)
        for file in files:
            file.unlink(missing_ok=True)
    launch, layout = (None if replace else read_object(directory.journals / _RUN).get("launch")), directory.layout
    if difference or fresh or not packs:
        directory.forget_journals()
        layout = directory.layout
    for file in directory.path.glob(f".*{write.TEMPORARY_SUFFIX}"):
        file.unlink(missing_ok=True)
    directory.journals.mkdir(exist_ok=True)
    replace_json(directory.journals / _RUN, {"flags": _flags(config), "launch": launch, "layout": layout})


def _refuse(directory: Path, why: str, where_else: str = "give another --output_path") -> UserError:
    date = write.date_of(write.run_files(directory) or [directory / JOURNALS / _RUN])
    kind = "a run" if (directory / write.MANIFEST).is_file() else "an unfinished run"
    return UserError(
        f"--output_path {directory} already holds {kind} of {date} ({why}); {where_else}, or --overwrite to replace it"
    )


def _where_else(directory: Path, earlier: Any, config: Config) -> str:
    """What to do instead. lm_eval keeps several models in one directory; a run directory holds one run."""
    before = earlier.get("model_args") if isinstance(earlier, dict) else None
    if not isinstance(before, dict) or all(before.get(key) == config.model_args.get(key) for key in _MODEL):
        return "give another --output_path"
    name = os.path.basename(str(config.model_args.get("peft") or config.model_args.get("pretrained")).rstrip("/")) or "other"
    return f"give each model an --output_path of its own, such as {directory}-{name}"


def _difference(earlier: dict[str, Any], config: Config, ignored: set[str]) -> str:
    """A phrase for each flag in which an earlier run differs, "" if none does. Flags that it did not know had their default."""
    now = _flags(config)
    before = {**_flags(Config()), **earlier}
    phrases = {name: f"there {name} was {_show(before[name])}, here it is {_show(now[name])}" for name in now}
    phrases["log_samples"] = "it has no samples, and --log_samples cannot make them from what it keeps"
    return "; ".join(phrases[name] for name in now if name not in ignored and before[name] != now[name])


def _show(value: Any) -> str:
    return one_line(json.dumps(value))


def _flags(config: Config) -> dict[str, Any]:
    """The flags as they come back out of JSON."""
    flags: dict[str, Any] = json.loads(json.dumps(config.recorded, default=str))
    return flags
