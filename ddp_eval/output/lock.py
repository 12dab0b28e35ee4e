"""One run at a time in a directory: a lock file that network file systems do not break and that the dead do not keep.

The file is made atomically (O_EXCL, which NFS honours; flock it does not). Its holder writes down who it is and touches the file
every few seconds. Whoever finds it looks first whether the holder is a process of this very machine, and dead; on another
machine, whether the file is still touched, by watching it, since the clocks of two machines cannot be compared.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_eval.errors import UserError, one_line
from ddp_eval.output import status
from ddp_eval.system import read_back
from ddp_eval.system.launch_id import slurm_job
from ddp_eval.system.processes import birth, machine

LOCK = ".ddp_eval.lock"  # the name of the file, in the directory that it is for
BEAT_S = 5.0
WATCH_S = 25.0  # a holder that touches nothing for so long is gone; NFS may show a touch a few seconds late
_MAX_BYTES = 2**16
DYING_S = 4.0  # workers whose launcher was killed end within a second or two


# Called while a lock is waited for: with what it is about once, then with None again and again.
OnWait = Callable[[str | None], None]


def not_at_all(detail: str | None) -> None:
    """An OnWait that does nothing."""


_left: set[Any] = set()  # tokens of locks that this process let go of while the disk refused to remove them


class LockHeldError(Exception):
    """Another process that is alive holds the lock. The text names it."""


class Lock:
    """Holds `path` from `acquire` to `release`.

    on_lost: called, once, from a thread, if the file goes away meanwhile; `is_lost` says so, too. on_wait: see `OnWait`.
    """

    def __init__(self, path: Path, on_lost: Callable[[], None], on_wait: OnWait = not_at_all) -> None:
        self.path = path
        self._on_wait = on_wait
        self._on_lost = on_lost
        self.is_lost = False
        self._me = {**_describe_process(), "token": uuid.uuid4().hex}
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> None:
        """Raises LockHeldError when another run is alive, after watching it for up to WATCH_S. OSError when the disk refuses.

        UserError when the path holds no file, but a pipe, a directory or a link.
        """
        while not self._create():
            holder, seen = _read(self.path)
            if holder is None:
                continue
            self._on_wait(f"{self.path} is held by {_name(holder)}: looking whether that lives")
            if holder.get("token") in _left:
                stale: bool | None = True
            elif _is_alive_here(holder) is None:
                stale = self._watch(seen, WATCH_S, lambda: False)
            else:
                stale = self._watch(None, DYING_S, functools.partial(_is_dead_here, holder))
            if stale is False:
                job = f", SLURM job {one_line(holder['slurm_job'], 40)}" if holder.get("slurm_job") else ""
                raise LockHeldError(f"{_name(holder)}{job}")
            if stale and self._take_over(holder):
                break
        self._on_wait("")
        self._beating.start()

    def release(self) -> None:
        """Raises OSError when the disk refuses: the file stays, and this process may take it over."""
        self._released.set()
        try:
            if self._owns(self.path):
                self.path.unlink(missing_ok=True)
        except OSError:
            _left.add(self._me["token"])
            raise

    def _create(self) -> bool:
        return self._place(self.path)

    def _place(self, path: Path) -> bool:
        """A file that appears with its content: written aside, then linked, which fails where there is one already.

        Even if it is this very one: NFS repeats a link whose answer was lost.
        """
        aside = self._write_aside()
        try:
            try:
                os.link(aside, path)
            except FileExistsError:
                return self._owns(path)
            except OSError:  # a file system without hard links
                try:
                    with open(path, "x") as file:
                        file.write(json.dumps(self._me))
                except FileExistsError:
                    return False
            return True
        finally:
            aside.unlink(missing_ok=True)

    def _write_aside(self) -> Path:
        aside = self.path.with_name(f"{self.path.name}.{self._me['token']}")
        aside.write_text(json.dumps(self._me))
        return aside

    def _watch(self, seen: Any, limit_s: float, is_gone: Callable[[], bool]) -> bool | None:
        """True: the holder is gone. False: it lives. None: the file went away, try again. seen: None to trust is_gone alone."""
        deadline = time.monotonic() + limit_s
        while True:
            if is_gone():
                return True
            holder, now = _read(self.path)
            if holder is None:
                return None
            if seen is not None and now != seen:
                return False
            if time.monotonic() > deadline:
                return seen is not None
            self._on_wait(None)
            time.sleep(0.2)

    def _take_over(self, holder: dict[str, Any]) -> bool:
        """Replaces the dead holder's file, unless another has.

        Of many who find the same dead holder, the one who places its claim may; it looks again first, as another may have been
        and gone. The lock's path is never without a file meanwhile, so that nobody can create one in between.
        """
        claim = self.path.with_name(f"{self.path.name}.{holder.get('token')}.claim")
        if not self._place(claim):
            _, seen = _read(claim)
            if seen is not None and self._watch(None, WATCH_S, lambda: _read(claim)[1] != seen) is False:
                claim.unlink(missing_ok=True)  # of one that died within this very function
            return False
        try:
            now, _ = _read(self.path)
            if now is None or now.get("token") != holder.get("token"):
                return False
            os.replace(self._write_aside(), self.path)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _owns(self, path: Path) -> bool:
        try:
            holder, _ = _read(path)
        except UserError:  # something that is no file has taken its place
            return False
        return holder is not None and holder.get("token") == self._me["token"]

    def _beat(self) -> None:
        answered = time.monotonic()
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self.path)
                mine = self._owns(self.path)
                answered = time.monotonic()
            except FileNotFoundError:
                mine = False
            except OSError:  # a disk that does not answer has not taken the file away; after WATCH_S another run may
                mine = time.monotonic() - answered < WATCH_S
            if not mine and not self._released.is_set():
                self.is_lost = True
                self._on_lost()
                return


def gave_way_to_restart(path: Path) -> bool:
    """Of a run directory's lost lock, whether SLURM has started this very job again, and its script has removed the lock.

    Without a holder another launch may also have taken it over, ended there and let go of it: it has left its status.
    """
    try:
        if slurm_job() is None or not path.parent.is_dir():
            return False
        holder, _ = _read(path)
    except (OSError, UserError):
        return False
    if holder is not None:  # this very process where a silent disk answers again
        is_own = (holder.get("pid"), holder.get("machine")) == (os.getpid(), machine())
        return holder.get("slurm_job") == slurm_job() and not is_own
    launch = status.read_status(path.parent).get("launch")
    return launch is None or (isinstance(launch, dict) and launch.get("slurm") == slurm_job())


def _read(path: Path) -> tuple[dict[str, Any] | None, Any]:
    """The holder and a value that changes with each of its touches; None when there is no file. Opening makes NFS look again."""
    try:
        if path.is_symlink():  # one that leads nowhere would be neither there nor free
            raise UserError(f"{path} must be a lock file of ddp_eval, and is a symbolic link: remove it")
        with read_back.open_regular(path) as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
            data = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None, None
    return _parse_holder(data), (touched, data)


def _parse_holder(data: bytes) -> dict[str, Any]:
    """What is known of a holder: the fields of `_describe_process` that are as it makes them, and its token."""
    try:
        holder = read_back.parse_json(data.decode())
    except ValueError:
        return {}
    kinds = {"host": str, "pid": int, "born": str, "machine": str, "since": str, "slurm_job": str, "token": str}
    found = {name: holder.get(name) for name in kinds} if isinstance(holder, dict) else {}
    found = {name: value for name, value in found.items() if type(value) is kinds[name]}
    if not re.fullmatch("[0-9a-f]{32}", str(found.get("token"))):  # it becomes part of a file's name
        found.pop("token", None)
    return found


def _name(holder: dict[str, Any]) -> str:
    if not {"pid", "host"} <= holder.keys():
        return "an unknown process (the file does not name it)"
    return f"process {one_line(holder['pid'], 20)} on {one_line(holder['host'], 100)}"


def _describe_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": birth(os.getpid()),
        "machine": machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "slurm_job": slurm_job(),
    }


def _is_alive_here(holder: dict[str, Any]) -> bool | None:
    """Whether a holder on this machine lives; None for one on another machine, and for another user's that /proc hides."""
    if not holder.get("machine") or holder["machine"] != machine():
        return None
    if "born" not in holder or "pid" not in holder:
        return False
    born = birth(holder["pid"])
    if born is None and _is_hidden(holder["pid"]):
        return None
    return born == holder["born"]


def _is_hidden(pid: int) -> bool:
    """Whether it lives as another user's, of whom /proc shows nothing here (hidepid=2)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _is_dead_here(holder: dict[str, Any]) -> bool:
    return _is_alive_here(holder) is False
