"""Watches this process from a thread: signals, a launcher that is gone, steps that take too long, other ranks that are silent.

Python runs signal handlers in the main thread and between two of its own instructions: never while that thread waits for another
rank or a kernel. So the handlers do nothing, and this thread, which the wake-up file descriptor tells at once, does all: have
the journal on the disk, mark the run directory, say one sentence and leave. There is one per process, as there is of signals; a
caller's process (`ddp_eval.evaluate`) is not watched. Light: it is imported before torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ddp_eval.distributed.launch_environment import known_rank, launch_local_rank
from ddp_eval.errors import one_line, printable
from ddp_eval.output import status
from ddp_eval.system.processes import birth

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
EXIT_INTERRUPTED = 130
WAITING = ""  # the step of a rank that others are to blame for

_GRACE_S = 3.0  # for the pack in hand
_DISK_S = 4.0  # for a disk that does not answer
_TELL_S = 2.0  # for a store that does not
_TICK_S = 0.5
_GIVE_WAY_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_BEAT_S = 2.0
_LOOK_S = 2 * _BEAT_S  # more time than that between two looks is none of the others': this process was stopped, as by SIGSTOP
_SILENCE_S = 25.0  # of a rank in the middle of its packs, whose threads have nothing else to do
NOTICE_S = 20.0  # who waits, or takes long over a step, says so by then, and again each time it has taken twice as long
_AFTER_RANK_0_S = 150.0  # by how much ranks outwait rank 0 before they have met: it names those that do not come
PACKS = "running packs"


@dataclasses.dataclass
class _Place:
    """Where this process is. step: WAITING while it waits for other ranks.

    since: when it last came further; began: when the step did. detail: which task, document or file is in hand.
    """

    step: str = "starting"
    pack: int | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)
    detail: str = ""
    began: float = dataclasses.field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return self.step + ("" if self.pack is None else f", in pack {self.pack}") + (f" ({self.detail})" if self.detail else "")


_place = _Place()
_directory: Path | None = None
_resumes = False
_journal: Any = None
_exit_hook: Callable[[], None] | None = None
_leaving = threading.Lock()
_ending: int | None = None  # the thread that ends this process


def step(name: str, pack: int | None = None, detail: str = "") -> None:
    """This rank begins something that must end within --timeout; WAITING: it waits for others. detail: as for `renew`."""
    global _place
    _place = _Place(name, pack, detail=detail)
    _give_way(False)


def touch(detail: str | None = None) -> None:
    """The step under way has come further: it may take --timeout from now on. Cheap enough for every document.

    detail: what it is about now, such as a task and a document; None: the same as before.
    """
    global _place
    if _place.step != WAITING:
        _place = dataclasses.replace(_place, since=time.monotonic(), detail=_place.detail if detail is None else detail)
        _give_way(bool(_place.detail))


def where() -> str:
    """What this process is at, in words."""
    return _describe_step(_place)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Within the step under way, this rank waits for others; then the step starts again."""
    before = _place
    step(WAITING)
    yield
    step(before.step, before.pack)


class Patience:
    """When to say that something takes long: after NOTICE_S, then each time that it has taken twice as long."""

    def __init__(self, first_s: float | None = None) -> None:
        self._next_s = NOTICE_S if first_s is None else first_s

    def is_due(self, waited_s: float) -> bool:
        due = waited_s >= self._next_s
        while waited_s >= self._next_s:
            self._next_s *= 2
        return due


_may_give_way = False  # set where the signals of this process are ours
_gives_way = False


def _give_way(wanted: bool) -> None:
    """Have the main thread interrupted every few seconds that it computes, or no longer.

    A task's code may hold the interpreter for good, as a regular expression does that never ends: in a signal's handler, and
    only there, the watching thread gets its turn.
    """
    global _gives_way
    if _may_give_way and wanted != _gives_way:
        _gives_way = wanted
        signal.setitimer(signal.ITIMER_VIRTUAL, _GIVE_WAY_S if wanted else 0, _GIVE_WAY_S)


_bars = 0  # how many bars, or lines now and then, show the step under way already


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within the block the step under way shows how far it is: nothing else is said of it."""
    global _bars
    _bars += 1
    try:
        yield
    finally:
        _bars -= 1


@contextlib.contextmanager
def speaking(waiting_for: str = "the other ranks", aloud: bool = True) -> Iterator[None]:
    """Say of steps that take long what they are, for the length of the block: in a caller's process, which nobody watches.

    aloud: whether this rank is the one to say it.
    """
    step("starting")  # the last step of this process may have begun hours ago
    if not aloud:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_speak, args=(over, lambda: waiting_for), daemon=True, name="ddp_eval notices")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def notice(sentence: str, waited_s: float) -> None:
    """A line about what takes long. On a terminal it takes the place of a bar, which comes back by itself."""
    say(f"{sentence}, {waited_s:.0f} s so far", clear=True)


def say(sentence: str, clear: bool = False, stream: TextIO | None = None) -> None:
    """One line on stderr, or on another stream. clear: it takes the place of a bar."""
    line, stream = f"ddp_eval: {printable(sentence)}\n", stream or sys.stderr
    with contextlib.suppress(OSError, ValueError):
        # One write: `print` writes the line's end separately, and another rank or process may write in between.
        stream.write(f"\r\x1b[K{line}" if clear and stream.isatty() else line)
        stream.flush()


def _speak(over: threading.Event, whom: Callable[[], str]) -> None:
    """whom: for whom this rank waits; "" if that is said elsewhere."""
    began, patience = 0.0, Patience()
    while not over.wait(min(_TICK_S, NOTICE_S / 4)):
        place = _place
        if place.began != began:
            began, patience = place.began, Patience()
        waited_s = time.monotonic() - began
        if not _bars and patience.is_due(waited_s):
            if place.step != WAITING:
                notice(f"still {place}", waited_s)
            elif others := whom():
                notice(f"waiting for {others}", waited_s)


def set_run_directory(directory: Path | None, resumes: bool = False) -> None:
    """From now on this process speaks for the run in `directory`.

    resumes: the same command goes on from what is finished, also where no run is at work now.
    """
    global _directory, _resumes
    _directory, _resumes = directory, resumes or directory is not None


def use_journal(journal: Any) -> None:
    """What to have on the disk before leaving: a journal.Journal, or None."""
    global _journal
    _journal = journal


def on_exit(action: Callable[[], None]) -> None:
    """What to do last, when this process leaves before its run is over."""
    global _exit_hook
    _exit_hook = action


def leave(code: int, state: str, reason: str, first_hand: bool = True) -> NoReturn:
    """End this process now, from any thread: no waiting for loader threads, or for peers in a collective that will never come."""
    global _ending
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    _ending = threading.get_ident()
    _within(_DISK_S, lambda: _tidy_up(state, reason, first_hand))
    _within(_TELL_S, _flush)
    os._exit(code)


def _flush() -> None:
    """Waits for whoever reads them, and for a thread that does."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def _tidy_up(state: str, reason: str, first_hand: bool) -> None:
    if _journal is not None:
        with contextlib.suppress(Exception):
            _journal.sync()
    if _directory is not None:
        status.note_end(_directory, state, reason, first_hand)
    if _exit_hook is not None:
        with contextlib.suppress(Exception):
            _exit_hook()


def _within(limit_s: float, action: Callable[[], None]) -> bool:
    """Whether it was done in time."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


def note_failure(rank: int, error: Exception) -> str:
    """Mark the run directory: a defect ends this process, by its own traceback. Returns what to say of it, in one sentence."""
    sentence = (
        f"rank {rank} on {socket.gethostname()} has failed while {_describe_step(_place)} "
        f"({type(error).__name__}: {one_line(error, 200)}): its traceback says where"
    )
    if _directory is not None:
        sentence += "; finished packs are kept, but the same command may well fail there again"
        status.note_end(_directory, status.FAILED, sentence, first_hand=True)
    return sentence


class Watch:
    """The watching thread of this process. `start` it in the main thread, before all else; `join_ranks` when they are known."""

    def __init__(self) -> None:
        self.timeout_s = float("inf")
        self.rank = known_rank() or 0
        # A variable left over in a shell makes no launcher of that: torchrun always says which rank this is, too.
        self._launcher = os.getppid() if {"TORCHELASTIC_RUN_ID", "RANK"} <= os.environ.keys() else None
        self._siblings: dict[int, int] = {}
        self._report: Any = None
        self._stopped = threading.Event()
        self._beats: _Beats | None = None
        self._wakeup, self._signalled = os.pipe()
        self._looked = time.monotonic()
        self._joined = threading.Event()

    def start(self) -> None:
        """One rank: watch from now on. Several: until they have met, signals and the launcher's death just end this process.

        torch connects to its store without letting other threads run, for as long as it takes.
        """
        if self.rank == 0:
            threading.Thread(target=_speak, args=(self._stopped, self._whom), daemon=True, name="ddp_eval notices").start()
        if self._launcher is not None:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            _die_with_parent(signal.SIGKILL)
            if _is_orphan():  # it was killed before we asked
                os._exit(1)
            threading.Thread(target=self._await_joining, daemon=True, name="ddp_eval start").start()
        else:
            self._begin()

    def _await_joining(self) -> None:
        """Before the ranks have met, all of them may hang in the same step, as in front of a file server that is dead."""
        looked, later_s = time.monotonic(), 0.0 if self.rank == 0 else _AFTER_RANK_0_S
        while not self._joined.wait(_TICK_S):
            looked = self._check_step(looked, self.timeout_s + later_s)

    def _begin(self) -> None:
        _die_with_parent(0)
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _let_watch_run)
        self._stand_by_to_give_way()
        threading.Thread(target=self._watch, daemon=True, name="ddp_eval watch").start()

    def _stand_by_to_give_way(self) -> None:
        global _may_give_way
        _may_give_way = True
        signal.signal(signal.SIGVTALRM, lambda *_: None if time.monotonic() - self._looked < 2 * _TICK_S else _let_watch_run())
        signal.siginterrupt(signal.SIGVTALRM, False)

    def _whom(self) -> str:
        """For whom this rank waits, once it has met them: those that are at something, each with what it is at."""
        if self._beats is None:
            return ""
        busy = [f"rank {rank} on {host} ({place})" for rank, host, place in self._beats.places() if place != WAITING]
        more = f" and {len(busy) - 3} more" if len(busy) > 3 else ""
        return ", ".join(busy[:3]) + more or "the other ranks"

    def join_ranks(
        self, rank: int, store: Any, pids: Sequence[int], local_ranks: Sequence[int], timeout_s: float, report: Any
    ) -> None:
        """Watch the other ranks too.

        store: they all reach it. pids: of all ranks. local_ranks: those of this node. report: says a sentence from one rank.
        """
        self.timeout_s, self._siblings = timeout_s, {other: pids[other] for other in local_ranks if other != rank}
        self._report = report
        self._joined.set()
        if self._launcher is not None:
            self._begin()
        if store is not None:
            self._beats = _Beats(rank, len(pids), store, timeout_s, report, self._stopped)
            self._beats.thread.start()

    def stop(self) -> None:
        """The run has come to its end: what happens to other ranks from now on is no matter."""
        self._stopped.set()
        if self._beats is not None:  # it must not be inside of torch when the interpreter ends
            self._beats.thread.join(10)

    def await_death(self, limit_s: float) -> str | None:
        """A sentence about a rank of this node that has died, as soon as one has; None if all live on for so long."""
        deadline = time.monotonic() + limit_s
        while True:
            for rank, pid in self._siblings.items():
                if not _is_there(pid):
                    again = "the same command resumes from the finished packs" if _directory is not None else "start it again"
                    return (
                        f"rank {rank} (process {pid} on {socket.gethostname()}) has died (its output above, or torchrun's "
                        f"summary below, may say why): the run ends; {again}"
                    )
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)

    def _tell(self, sentence: str) -> None:
        """From one rank only, the first that has something to say."""
        if self._report is None:
            _say(sentence, self.rank)
        else:
            _within(_TELL_S, lambda: self._report(sentence))

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            ready, _, _ = select.select([self._wakeup], [], [], _TICK_S)
            self._looked = time.monotonic()
            if ready and (number := os.read(self._wakeup, 1)[0]) in _SIGNALS:
                self._handle_signal(number)
            if self._launcher is not None and os.getppid() != self._launcher:
                _say("torchrun is gone: this rank leaves too", self.rank)
                leave(1, status.FAILED, "torchrun was killed; the same command resumes", first_hand=False)
            now = self._check_step(looked, self.timeout_s)
            if self._beats is not None:
                self._beats.check_store(min(now - looked, _LOOK_S))
            looked = now

    def _check_step(self, looked: float, limit_s: float) -> float:
        """End the run if the step under way takes longer than that. Time in which this process was stopped does not count.

        looked: when it was checked last. Returns the time of this check.
        """
        place, now = _place, time.monotonic()
        place.since += max(0.0, now - looked - _LOOK_S)
        late_s = now - place.since
        if place.step != WAITING and late_s > limit_s and not self._stopped.is_set():
            _leave_hanging(self.rank, socket.gethostname(), str(place), late_s, self._beats and self._beats.report)
        return now

    def _handle_signal(self, number: int) -> None:
        """Finish or abandon the pack in hand, and leave."""
        name = signal.Signals(number).name
        # At once: soon ranks that were told to stop, as this one was, will be gone too.
        death = self.await_death(0) if number == signal.SIGTERM else None
        if _journal is not None and _place.step == PACKS:
            _journal.wait_for_pack(_GRACE_S)
        if death is not None:
            self._tell(death)
            leave(1, status.FAILED, death, first_hand=False)
        kept = "finished packs are kept and " if _directory is not None else "finished models are kept and " if _resumes else ""
        again = f"{kept}the same command {'resumes' if kept else 'starts over'}"
        self._tell(f"stopped by {name} while {_describe_step(_place)}: {again}")
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
        leave(code, status.PREEMPTED, f"stopped by {name}; the same command resumes")


class _Beats:
    """Tells the others through a store where this rank is. Rank 0 looks after all others, and each of them after rank 0."""

    def __init__(self, rank: int, ranks: int, store: Any, timeout_s: float, report: Any, stopped: threading.Event) -> None:
        self.rank = rank
        self.report = report
        self._store = store
        self._timeout_s = timeout_s
        self._stopped = stopped
        self._others = list(range(1, ranks)) if rank == 0 else [0]
        self._heard: set[int] = set()
        self._seen: dict[int, tuple[str, float]] = {}  # the last word of each, and for how long it has been the last, in seconds
        self._patience: dict[int, Patience] = {}
        self._looked = time.monotonic()
        self._host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"  # of the store
        # Of the store's silence or loss: the first rank of each machine, and rank 1 where rank 0 has no words left.
        self._speaks = launch_local_rank() == 0 or (rank == 1 and self._host == "rank 0")
        self._questions = itertools.count(1)
        self._question = 0  # the number of the one that the store has not answered yet; 0: none
        self._mute_s, self._mute_question, self._mute_patience = 0.0, 0, Patience()
        self.thread = threading.Thread(target=self._run, daemon=True, name="ddp_eval beats")

    def places(self) -> list[tuple[int, str, str]]:
        """Where the others were last: (rank, host, step)."""
        words = [(rank, json.loads(text)) for rank, (text, _) in sorted(self._seen.copy().items())]
        return [(rank, host, place) for rank, (_, host, place) in words]

    def _run(self) -> None:
        host = socket.gethostname()
        for count in itertools.count():
            try:
                self._question = next(self._questions)
                self._store.set(_beat_key(self.rank), json.dumps([count, host, str(_place)]))
                self._check_peers()
            except RuntimeError:
                self._question = 0
                if not self._stopped.wait(3):  # a leader that has ended well has sent its message by now
                    if self._speaks:
                        _print(f"rank {self.rank} on {host} lost contact with rank 0 while {_describe_step(_place)}")
                    leave(1, status.FAILED, "contact with rank 0 was lost; the same command resumes", first_hand=False)
            self._question = 0
            if self._stopped.wait(_BEAT_S):
                return

    def check_store(self, passed_s: float) -> None:
        """End the run if the store does not answer: its host may be stopped, and torch waits for ever.

        passed_s: since the last check, which is made by another thread than the one that asks.
        """
        if not self._question or self._question != self._mute_question or self._stopped.is_set():
            self._mute_s, self._mute_question, self._mute_patience = 0.0, self._question, Patience()
            return
        self._mute_s += passed_s
        if self._speaks and self._mute_patience.is_due(self._mute_s):
            silent = f"{self._host} gives no sign of life: the store that it keeps for all ranks does not answer"
            _within(_TELL_S, functools.partial(notice, silent, self._mute_s))
        if self._mute_s > self._timeout_s:
            again = "the same command resumes" if _directory is not None else "start it again"
            sentence = f"{self._host} has shown no sign of life for {self._mute_s:.0f} s: the run ends; "
            sentence += f"look after its machine, then {again}"
            if self._speaks:
                _print(sentence)
            leave(1, status.FAILED, sentence, first_hand=False)

    def _check_peers(self) -> None:
        now = time.monotonic()
        passed_s, self._looked = min(now - self._looked, _LOOK_S), now
        for rank in self._others:
            self._question = next(self._questions)
            if rank not in self._heard and self._store.check([_beat_key(rank)]):
                self._heard.add(rank)
            if rank in self._heard:
                text = self._store.get(_beat_key(rank)).decode()
            else:
                text = json.dumps([-1, "an unknown host", "starting"])
            before, silent_s = self._seen.get(rank, ("", 0.0))
            silent_s = silent_s + passed_s if text == before else 0.0
            self._seen[rank] = text, silent_s
            _, host, place = json.loads(text)
            if silent_s == 0.0:
                self._patience[rank] = Patience()
            elif self.rank < 2 and self._patience[rank].is_due(silent_s):  # of those who look after rank 0, one speaks
                notice(f"rank {rank} on {host} gives no sign of life (last: {place or 'waiting for other ranks'})", silent_s)
            limit_s = min(_SILENCE_S, self._timeout_s) if place.startswith(PACKS) else self._timeout_s
            if silent_s > limit_s and not self._stopped.is_set():
                _leave_hanging(rank, host, place or "waiting for other ranks", silent_s, self.report)


def _leave_hanging(rank: int, host: str, place: str, late_s: float, report: Any) -> NoReturn:
    kept = "the same command resumes from the finished packs" if _directory is not None else "start it again"
    cause = "the task's templates and code" if ", document " in place else "that machine"
    sentence = (
        f"rank {rank} on {host} has shown no progress for {late_s:.0f} s while {place}: the run ends; look after {cause}, "
        f"then {kept}, or give a longer --timeout if a step may take so long"
    )
    global _ending
    _ending = threading.get_ident()
    _within(3, lambda: (report or _print)(sentence))
    leave(1, status.FAILED, sentence)


def _die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies; 0: none. Linux only, elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)


def _is_orphan() -> bool:
    """Whether this process has fallen to the system's first process, which in a container may be a launcher too, in Python."""
    if os.getppid() != 1:
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False


def _beat_key(rank: int) -> str:
    return f"ddp_eval/beat/{rank}"


def _describe_step(place: _Place) -> str:
    return str(place) if place.step != WAITING else "waiting for other ranks"


def _is_there(pid: int) -> bool:
    """One that has ended is not, though its parent may not have taken notice yet."""
    if os.path.exists("/proc/self/stat"):
        return birth(pid) is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _say(sentence: str, rank: int) -> None:
    if rank == 0:
        _print(sentence)


def _print(sentence: str) -> None:
    _within(_TELL_S, lambda: say(sentence))  # whoever reads it may have been stopped


def _let_watch_run(*_: Any) -> None:
    """The watching thread acts; the main one, which runs this, may be in code that lets no other run."""
    time.sleep(0.05)
    while _ending not in (None, threading.get_ident()):
        time.sleep(0.05)
