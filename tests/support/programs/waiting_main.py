"""`quick_main` that runs out of patience early, with a fault named by its first argument; the rest are the command's own.

none             no fault
late             rank 1 starts 4 s late
loads_slowly     rank 1 takes 7 s to load the model
impatient        --timeout is short while a document is in hand, and long otherwise
directory        the file system of the run directory does not answer
directory_later  it answers after 4 s
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from quick_main import main

from ddp_eval import __main__ as command
from ddp_eval.distributed import meeting, watchdog
from ddp_eval.output import status

NOTICE_S = 1.0


def hang(*args: object, **options: object) -> Any:
    time.sleep(600)


def slowly(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def do(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **options)

    return do


def be_impatient() -> None:
    watches: list[watchdog.Watch] = []
    step, renew = watchdog.step, watchdog.touch
    start = watchdog.Watch.start

    def start_and_note(watching: watchdog.Watch) -> None:
        watches.append(watching)
        start(watching)

    def step_patiently(*args: Any, **options: Any) -> None:
        watches[0].timeout_s = 600
        step(*args, **options)

    def renew_impatiently(detail: str | None = None) -> None:
        if detail is not None:
            watches[0].timeout_s = 2.5 if ", document " in detail else 600
        renew(detail)

    mock.patch.object(watchdog.Watch, "start", start_and_note).start()
    watchdog.step, watchdog.touch = step_patiently, renew_impatiently


def break_it(fault: str) -> None:
    is_rank_1 = os.environ.get("RANK") == "1"
    if fault == "late" and is_rank_1:
        time.sleep(4)
    elif fault == "loads_slowly" and is_rank_1:
        from ddp_eval.run import runner

        runner.load_replica = slowly(runner.load_replica, 7)  # its last step shows up to 4 s late
    elif fault == "impatient":
        be_impatient()
    elif fault == "directory":
        status.read_status = hang
    elif fault == "directory_later":
        status.read_status = slowly(status.read_status, 4)


if __name__ == "__main__":
    watchdog.NOTICE_S = NOTICE_S
    command.MIN_JOIN_S = 1.0
    meeting._HANDSHAKE_S = 2.0
    break_it(sys.argv.pop(1))
    main()
