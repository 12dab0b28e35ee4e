"""Start real ranks, watch their output, and leave no process behind. Linux only: it looks for leftovers in /proc.

torchrun puts every worker into a session of its own, so killing one process group is not enough. Each launch marks its processes
by an environment variable instead.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest
from places import PROGRAMS, ROOT

COMMAND = ("-m", "ddp_eval")
QUICK = (str(PROGRAMS / "quick_main.py"),)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

_MARK = "DDP_EVAL_TEST_LAUNCH"
# Libraries read these when they are imported, which the server of warm.py has done; that of torch's stores they read at a launch.
_READ_AT_IMPORT = re.compile(
    r"(?!TORCH_DISABLE_SHARE_RDZV_TCP_STORE)"
    r"(HF_|XDG_|TRANSFORMERS_|TOKENIZERS_|OMP_|MKL_|KMP_|ATEN_|ONEDNN_|DNNL_|TORCH_|PYTHON|LD_|CUDA_|TQDM_|PET_)"
)
_LAUNCHER_VARIABLES = re.compile(r"(LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|PET_|SLURM_|DDP_EVAL_)|(RANK|WORLD_SIZE)$")
_PROGRESS = re.compile(r" s so far|^ddp_eval: layout |^ddp_eval: looking | requests, of them ")
_FRAME = re.compile(r'^(?:\[rank\d+\]:)?\s*File "([^"]+)", line \d+', re.MULTILINE)
# torchrun shows its own ChildFailedError with these frames whenever a worker fails; nothing of ours is in them.
_TORCHRUN_FRAME = re.compile(r"<frozen runpy>|/torch/distributed/(run\.py|elastic/|launcher/)|/support/warm\.py")


@dataclasses.dataclass(frozen=True, repr=False)
class Finished:
    """What a launch left: its exit code, its output, and when each line of stderr came (seconds since the start).

    A line ends at a newline alone: words glued to a progress bar by a carriage return are no line of their own.
    """

    returncode: int
    stdout: str
    stderr: str
    elapsed_s: float
    stderr_times: list[tuple[float, str]]

    def sentences(self) -> list[str]:
        """The lines on stderr that are ddp_eval's own words, progress, what is under way and the choice of a layout left out."""
        lines = [line for line in self.stderr.split("\n") if line.startswith("ddp_eval: ")]
        return [line for line in lines if not _PROGRESS.search(line)]

    def foreign_frames(self) -> list[str]:
        """Files of all traceback frames on stderr but those of torchrun's own summary."""
        return [file for file in _FRAME.findall(self.stderr) if not _TORCHRUN_FRAME.search(file)]

    def seconds_after(self, text: str) -> float:
        """From the first line of stderr that holds `text` to the end of the last process."""
        return self.elapsed_s - next(moment for moment, line in self.stderr_times if text in line)

    def __repr__(self) -> str:
        return f"exit code {self.returncode} after {self.elapsed_s:.1f} s\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class WarmProcess:
    """A launch that the server of warm.py has forked, with the members of subprocess.Popen that are used here."""

    def __init__(self, order: dict[str, object], server: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(server)
        (read_out, write_out), (read_err, write_err) = os.pipe(), os.pipe()
        socket.send_fds(self._connection, [json.dumps(order).encode() + b"\n"], [write_out, write_err])
        os.close(write_out)
        os.close(write_err)
        self.stdout, self.stderr = os.fdopen(read_out, "rb"), os.fdopen(read_err, "rb")
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout_s: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired("the forked launch", timeout_s or 0.0)
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _warm_server() -> str:
    """The socket of this process's server, which is started, and has imported everything when this returns."""
    scratch = tempfile.TemporaryDirectory(prefix="warm_")
    path = os.path.join(scratch.name, "socket")
    command = [sys.executable, str(ROOT / "tests" / "support" / "warm.py"), path]
    server = subprocess.Popen(command, env={**_plain_environment(), "TQDM_DISABLE": "1"}, start_new_session=True)
    owner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            owner.connect(path)
            break
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the server of tests/support/warm.py does not start")
        time.sleep(0.02)
    owner.settimeout(120)
    if owner.recv(6) != b"ready\n":
        raise RuntimeError("the server of tests/support/warm.py does not get ready")

    def stop() -> None:
        owner.close()  # which ends it
        server.wait(10)
        scratch.cleanup()

    atexit.register(stop)
    return path


def _plain_environment() -> dict[str, str]:
    """The environment of a launch: CPU, one thread if no other number is set, no network, and nothing that a launcher sets."""
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHER_VARIABLES.match(name)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


class Launch:
    """A running command. `finish` waits for it; leaving the block of `launching` ends whatever still runs."""

    def __init__(self, process: subprocess.Popen[bytes] | WarmProcess, mark: str, started: float) -> None:
        self._mark = mark
        self._started = started
        self._stdout: list[tuple[float, str]] = []
        self._stderr: list[tuple[float, str]] = []
        self.process = process
        pipes = ((self.process.stdout, self._stdout), (self.process.stderr, self._stderr))
        self._readers = [threading.Thread(target=self._read, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: IO[bytes], lines: list[tuple[float, str]]) -> None:
        for line in io.TextIOWrapper(pipe, encoding="utf-8", errors="replace", newline="\n"):
            lines.append((self.elapsed_s(), line))

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def finish(self, timeout_s: float = 120.0) -> Finished:
        """Wait for the command. Fails the test if it takes longer than that, or leaves a process behind."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still running after {timeout_s:.0f} s, killed\n{self._so_far()}")
        self.wait_until_gone()
        return self._so_far()

    def wait_until_gone(self, grace_s: float = 10.0) -> None:
        deadline = time.monotonic() + grace_s
        while left := self.processes():
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"processes {left} outlive the command, killed\n{self._so_far()}")
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """Ids of the processes of this launch that are still alive."""
        if isinstance(self.process, WarmProcess):
            return _processes_of_session(self.process.pid)
        mark = f"{_MARK}={self._mark}".encode()
        alive = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if mark in (directory / "environ").read_bytes().split(b"\0"):
                    alive.append(int(directory.name))
        return alive

    def kill(self) -> None:
        """SIGKILL for all of them, again until none is left: torchrun may be starting workers meanwhile."""
        while alive := self.processes():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)

    def _so_far(self) -> Finished:
        for reader in self._readers:
            reader.join(5)
        elapsed_s = self.elapsed_s()
        stdout, stderr = ("".join(line for _, line in lines) for lines in (self._stdout, self._stderr))
        returncode = self.process.poll()
        return Finished(-1 if returncode is None else returncode, stdout, stderr, elapsed_s, list(self._stderr))


def _processes_of_session(session: int) -> list[int]:
    """Ids of the living processes of a session; those that have ended and are not yet waited for do not count."""
    alive = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = (directory / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                alive.append(int(directory.name))
    return alive


@contextlib.contextmanager
def launching(
    ranks: int,
    *args: object,
    program: Sequence[str] = COMMAND,
    cwd: Path | None = None,
    restarts: int = 0,
    cold: bool = False,
    **variables: str,
) -> Iterator[Launch]:
    """Start `program` on `ranks` ranks of torchrun, or with 0 ranks as plain Python. CPU, one thread each, no network.

    restarts:   how often torchrun may start all ranks again.
    cold:       start torchrun and Python themselves: for what the launcher promises (its exit codes, a stop, its death, a dead
                rank, a restart, one sentence from all ranks). Otherwise processes are forked that have imported everything,
                unless `variables` sets what is read by imports.
    variables:  added to the environment, from which everything that a launcher sets is taken out first.
    """
    mark = uuid.uuid4().hex
    command = [*program, *map(str, args)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # torchrun leaves its logs there
        environment = {**_plain_environment(), "TMPDIR": scratch, _MARK: mark, **variables}
        if program != COMMAND:  # which sees to it by itself, before libraries with bars are imported
            environment["TQDM_DISABLE"] = "1"
        started = time.monotonic()
        process: subprocess.Popen[bytes] | WarmProcess
        is_python = program[0] == "-m" or program[0].endswith(".py")
        if cold or not is_python or any(map(_READ_AT_IMPORT.match, variables)):
            launcher = (*TORCHRUN, f"--nproc_per_node={ranks}", f"--max_restarts={restarts}") if ranks else (sys.executable,)
            process = subprocess.Popen(
                [*launcher, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        else:
            order = {"ranks": ranks, "restarts": restarts, "program": command, "environment": environment}
            process = WarmProcess({**order, "cwd": str(cwd or Path.cwd())}, _warm_server())
        launch = Launch(process, mark, started)
        try:
            yield launch
        finally:
            launch.kill()


def launch(
    ranks: int,
    *args: object,
    timeout_s: float = 120.0,
    program: Sequence[str] = COMMAND,
    cwd: Path | None = None,
    restarts: int = 0,
    cold: bool = False,
    **variables: str,
) -> Finished:
    """Run `python -m ddp_eval` (or `program`) with `args` on `ranks` ranks of torchrun, or with 0 ranks as plain Python."""
    with launching(ranks, *args, program=program, cwd=cwd, restarts=restarts, cold=cold, **variables) as running:
        return running.finish(timeout_s)


def wait_for(path: Path, running: Launch, timeout_s: float = 200.0) -> str:
    """The content of a file that the launched program writes when it has come to some point."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        if running.process.poll() is not None or time.monotonic() > deadline:
            running.kill()
            pytest.fail(f"{path.name} was never written\n{running.finish()}")
        time.sleep(0.02)
    return path.read_text()
