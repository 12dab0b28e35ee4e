"""One progress bar for all ranks, or a line now and then where nobody watches."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any, TextIO

from tqdm import tqdm

from ddp_eval.distributed import watchdog
from ddp_eval.distributed.contact import naming_lost_ranks
from ddp_eval.distributed.store import common_store
from ddp_eval.distributed.world import World


class Progress:
    """Counts finished requests and tokens of all ranks; on the leader, shows them until the block ends.

    On a terminal: a bar. Elsewhere: a line every `quiet_s` seconds, and one at the end. With `silent`, or no requests, nothing.
    requests: those that are left; done: those that an earlier start has done, which count as the first of the whole.
    is_stopped: whether some rank has called `stop`, when this one last pushed its counts; only where ranks agree on failures.
    """

    PUSH_S = 0.5  # a rank tells its counts at most this often

    def __init__(
        self,
        world: World,
        name: str,
        requests: int,
        stream: TextIO | None = None,
        quiet_s: float = 30.0,
        silent: bool = False,
        done: int = 0,
    ) -> None:
        self._requests, self._tokens = Tally(world, f"{name}/requests"), Tally(world, f"{name}/tokens")
        self._stops = Tally(world, f"{name}/stops") if world.agrees_on_failures else None
        self.is_stopped = False
        self._left, self._done, self._total = requests, done, done + requests
        self._stream = stream or sys.stderr
        self._quiet_s = quiet_s
        self._unsent = [0, 0]
        self._pushed_at = self._started = time.monotonic()
        self._finished = threading.Event()
        shown = world.is_leader and requests and not silent
        self._aside = contextlib.ExitStack()
        self._shower = threading.Thread(target=self._show, daemon=True) if shown else None

    def __enter__(self) -> Progress:
        if self._shower:
            self._aside.enter_context(watchdog.shown())
            self._shower.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._finished.set()
        if self._shower:
            self._shower.join()
        self._aside.close()

    def add(self, requests: int, tokens: int) -> None:
        """Some more are done on this rank."""
        self._unsent[0] += requests
        self._unsent[1] += tokens
        if time.monotonic() - self._pushed_at >= self.PUSH_S:
            self.push()

    def push(self) -> None:
        """Flush pending counts; call once when this rank is done."""
        for tally, amount in zip((self._requests, self._tokens), self._unsent, strict=True):
            if amount:
                tally.add(amount)
        self._unsent = [0, 0]
        self._pushed_at = time.monotonic()
        if self._stops is not None:
            self.is_stopped = self._stops.read() > 0

    def stop(self) -> None:
        """This rank has failed: the others should stop."""
        if self._stops is not None:
            self._stops.add(1)

    def _show(self) -> None:
        if self._stream.isatty():
            form = {"unit": " requests", "desc": "ddp_eval", "dynamic_ncols": True}
            with tqdm(total=self._total, initial=self._done, file=self._stream, **form) as bar:
                while not self._finished.wait(self.PUSH_S):
                    self._update(bar)
                self._update(bar)
        else:
            while not self._finished.wait(self._quiet_s):
                self._print_line()
            self._print_line()

    def _read(self) -> tuple[int, float]:
        """Requests done by this start (the sampler's repeats do not count) and tokens per second so far."""
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        return min(self._requests.read(), self._left), self._tokens.read() / elapsed_s

    def _update(self, bar: Any) -> None:
        done, rate = self._read()
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update(self._done + done - bar.n)

    def _print_line(self) -> None:
        done, rate = self._read()
        elapsed_s = time.monotonic() - self._started
        left = f"{elapsed_s * (self._left - done) / done:.0f} s left" if done else "time left unknown"
        whole = f"{self._done + done:,} of {self._total:,} requests"
        watchdog.say(f"{whole}, {rate:,.0f} tokens/s, {elapsed_s:.0f} s so far, {left}", stream=self._stream)


class Tally:
    """A count that all ranks add to and read, without any rank waiting for another."""

    def __init__(self, world: World, name: str) -> None:
        self._key = f"ddp_eval/tally/{name}"
        self._store = common_store(world)
        self._total = 0

    def add(self, amount: int) -> None:
        with naming_lost_ranks("telling its progress"):
            self._total = self._store.add(self._key, amount) if self._store is not None else self._total + amount

    def read(self) -> int:
        with contextlib.suppress(RuntimeError):  # a store that is gone ends the run elsewhere
            self._total = self._store.add(self._key, 0) if self._store is not None else self._total
        return int(self._total)
