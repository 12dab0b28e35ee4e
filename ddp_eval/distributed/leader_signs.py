"""In a caller's process group: rank 0 shows that it lives, and the others wait for its next message only as long as it does.

A message is a collective, which nobody can leave while rank 0 is stuck, as in a task's regular expression that never ends and
lets no other thread run. So the others enter it when rank 0 has said in the group's store that the message is coming.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

from ddp_eval.distributed import watchdog
from ddp_eval.errors import LostContact

BEAT_S = 2.0
_LONGEST_LOOK_S = 1.0  # between two looks for the message: a thousand ranks ask one store


class LeaderSigns:
    """One call's signs in the group's store: rank 0's beats, and the number of messages that it has announced.

    store: of the group, which all ranks reach. call: a name that no other call has.
    timeout_s: how long rank 0 may be silent. rank: this one; 1 speaks of it meanwhile.
    """

    def __init__(self, store: Any, call: str, rank: int, timeout_s: float) -> None:
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._beat_key, self._message_key = f"ddp_eval/alive/{call}", f"ddp_eval/message/{call}"
        self._messages = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if rank == 0:
            self._thread = threading.Thread(target=self._beat, daemon=True, name="ddp_eval signs of life")
            self._thread.start()

    def announce(self) -> None:
        """On rank 0: the next message is on its way."""
        self._messages += 1
        self._store.set(self._message_key, str(self._messages))

    def await_message(self) -> None:
        """On the others: until the next message is on its way. Raises LostContact when rank 0 is silent for too long."""
        self._messages += 1
        started = heard = time.monotonic()
        last, place, patience = "", "starting", watchdog.Patience()
        while int(self._read(self._message_key) or 0) < self._messages:
            now = time.monotonic()
            beat = self._read(self._beat_key)
            if beat and beat != last:
                last, heard, patience = beat, now, watchdog.Patience()
                place = json.loads(beat)[1]
            silent_s = now - heard
            if self._rank == 1 and patience.is_due(silent_s):
                watchdog.notice(f"rank 0 gives no sign of life (last: {place})", silent_s)
            if silent_s > self._timeout_s:
                raise LostContact(
                    f"rank {self._rank} waits no longer: rank 0 has shown no sign of life for {silent_s:.0f} s (last: {place}); "
                    "look after its machine and the tasks' own code, or give the process group a longer timeout"
                )
            time.sleep(min(_LONGEST_LOOK_S, self._timeout_s / 10, max(0.001, (now - started) / 20)))

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(BEAT_S)  # it may be in a store that does not answer

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store has gone with its host
            while not self._stopped.wait(min(BEAT_S, self._timeout_s / 4) if count else 0):
                count += 1
                self._store.set(self._beat_key, json.dumps([count, watchdog.where()]))
