"""A server that has imported everything and forks launches of test programs: most of a start is imports.

    python warm.py SOCKET       started by launch.py, once a pytest worker

A launch is a process forked from the server, in a session of its own, with the environment, directory, arguments and output that
are asked for. With ranks it is torchrun's own elastic agent, whose ranks are forked instead of started; without ranks it runs the
program itself. The server starts no thread: it would be missing in the forked processes.

Over the socket come JSON objects with the file descriptors of stdout and stderr. The answer is the process id, and at the end the
exit code. What libraries read from the environment when they are imported is the server's: launch.py starts programs the usual
way where a test sets such variables.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

MODULES = (
    "torch.distributed.launcher.api", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
    "pyarrow.parquet", "lm_eval.evaluator", "ddp_eval.tasks.harness", "ddp_eval.run.runner", "ddp_eval.lm", "ddp_eval.api",
    "ddp_eval.output.shapes", "ddp_eval.cli.plan",
)  # fmt: skip


def serve(path: str) -> None:
    """Until the other end of the first connection is gone: that of the pytest worker."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen()
    for module in MODULES:
        importlib.import_module(module)
    _describe_machine()
    gc.freeze()  # a forked process that looks through these objects for garbage would copy their pages
    owner, _ = listening.accept()
    owner.sendall(b"ready\n")
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process id, connection
    while True:
        waited_for: list[Any] = [owner, listening, *running]
        ready, _, _ = select.select(waited_for, [], [])
        if owner in ready:
            return
        for pidfd in set(ready) & set(running):
            pid, connection = running.pop(pidfd)
            os.close(pidfd)
            _, status = os.waitpid(pid, 0)
            with connection:
                _send(connection, os.waitstatus_to_exitcode(status))
        if listening in ready:
            connection, _ = listening.accept()
            order, files = _receive(connection)
            pid = os.fork()
            if pid == 0:
                listening.close()
                owner.close()
                connection.close()
                _run(order, files)
            for file in files:
                os.close(file)
            running[os.pidfd_open(pid)] = pid, connection
            _send(connection, pid)


def _describe_machine() -> None:
    """Ask a dozen programs about the machine, which forked processes need not ask again."""
    from ddp_eval.system import environment

    environment.start_collecting().result()
    while threading.active_count() > 1:
        time.sleep(0.01)


def _send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        connection.sendall(f"{number}\n".encode())


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, files, _, _ = socket.recv_fds(connection, 2**20, 2)
    while not data.endswith(b"\n"):
        data += connection.recv(2**20)
    return json.loads(data), files


def _run(order: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """The forked process: become the launch that was asked for, and exit as it does."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, file in zip((0, 1, 2), (nothing, *files), strict=True):
            os.dup2(file, target)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["cwd"])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code = _exit_code_of(lambda: _launch(order))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code)


def _exit_code_of(run: Any) -> int:
    """What Python exits with behind `run`, which may end by SystemExit or another exception; atexit handlers included."""
    import atexit

    try:
        run()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    return 0 if code is None else int(code) & 0xFF


def _launch(order: dict[str, Any]) -> None:
    program = order["program"]
    if not order["ranks"]:
        run_program(program)
        return
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def is_done(context: MultiprocessContext) -> bool:
        """A forked function is done when it has returned a value, which a program that ends by `os._exit` never does."""
        assert context._pc is not None
        if any(process.is_alive() for process in context._pc.processes):
            return False
        context._return_values = dict.fromkeys(range(context.nprocs))
        return True

    mock.patch.object(MultiprocessContext, "_is_done", is_done).start()

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=order["ranks"],
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=order["restarts"],
        monitor_interval=0.1,
        start_method="fork",
    )
    record(lambda: elastic_launch(config, run_rank)(program))()


def run_rank(program: Sequence[str]) -> None:
    """One rank: the program, and its exit code."""
    code = _exit_code_of(lambda: run_program(program))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run_program(program: Sequence[str]) -> None:
    """`python PROGRAM`, or `python -m MODULE`, with its arguments, in this process."""
    if program[0] == "-m":
        module, *arguments = program[1:]
        sys.path.insert(0, os.getcwd())
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        sys.argv = list(program)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
