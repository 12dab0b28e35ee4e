"""How each model of a sweep stands, as far as this launch knows, and what it makes of sweep.json and the tables beside it.

Other launches may work on the same sweep: the file is read before it is written, under its lock (output/sweep_file.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_eval.analysis import sweep_files
from ddp_eval.distributed import watchdog
from ddp_eval.errors import UserError, one_line
from ddp_eval.output import directory as run_directory
from ddp_eval.output import sweep_file, write
from ddp_eval.output.lock import LockHeldError
from ddp_eval.output.sweep_file import DONE, FAILED, GONE, WAITING
from ddp_eval.run.sweep_models import SweptModel, is_removed
from ddp_eval.run.sweep_options import SweepOptions

log = logging.getLogger("ddp_eval")

REMOVED = "its files were removed before it was evaluated"


class SweepStates:
    """`own`: entries of sweep.json that this launch has made, by name: of what it evaluated, of what failed or is gone, and, as
    waiting, of what other launches are at."""

    def __init__(self, directory: Path, options: SweepOptions) -> None:
        """Raises UserError where there is a sweep.json that cannot be read: what it says of others' models is not thrown away."""
        self._directory, self._options = directory, options
        self._news: set[str] = set()
        self._in_tables: list[dict[str, Any]] | None = None
        self.own: dict[str, dict[str, Any]] = {}
        try:
            self._entries = sweep_file.read_earlier(directory)
        except UserError as error:
            raise UserError(f"{error}: remove it, and the same command finds again which models are done") from None

    def read(self) -> dict[str, dict[str, Any]]:
        """The entries of sweep.json by name; as they last were where it cannot be read any more."""
        with contextlib.suppress(OSError):
            return self._read()
        return self._entries

    def _read(self) -> dict[str, dict[str, Any]]:
        """Raises OSError where the disk does not answer: what others have written may still be there."""
        try:
            self._entries = sweep_file.read_earlier(self._directory)
        except UserError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            log.warning("%s: it is written anew", error)
        return self._entries

    @property
    def has_news(self) -> bool:
        """Whether sweep.json lacks something that this launch knows: the last `write` could not change it."""
        return bool(self._news)

    def note(self, entry: dict[str, Any]) -> None:
        """What came of a model."""
        self.own[entry["name"]] = entry
        self._news.add(entry["name"])

    @property
    def settled(self) -> dict[str, str]:
        """{name: state} of what this launch has come to an end with."""
        return {name: one["state"] for name, one in self.own.items() if one["state"] != WAITING}

    def count_settled(self, is_to_stay: Callable[[str], bool]) -> int:
        """Models that are done, in any launch, that are gone, or that have failed in this launch. is_to_stay: whether a finished
        run is not one that is to be replaced."""
        others = {name for name, one in self.read().items()
                  if one["state"] == GONE or (one["state"] == DONE and is_to_stay(name))}  # fmt: skip
        return len(self.settled.keys() | others)

    def held_by_others(self, is_to_stay: Callable[[str], bool]) -> list[str]:
        """Names of models that another launch was at when this one came to them, and that are not done yet. is_to_stay: as in
        `count_settled`."""
        entries = self.read()
        done = {name for name, one in entries.items() if one["state"] == DONE and is_to_stay(name)}
        own = [name for name, one in self.own.items() if one["state"] == WAITING]
        return [name for name in own if name not in done and entries.get(name, self.own[name])["state"] in (WAITING, DONE)]

    def write(self, models: Sequence[SweptModel], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
        """Bring the files up to date, and return the entries. models: all that there are now. reasons: why some of them wait."""
        waiting = [entry_of(one, WAITING, reasons.get(one.name)) for one in models]
        self._look_for_gone(models)
        try:
            with sweep_file.changing(self._directory, watchdog.touch):
                entries = sweep_file.merge(self._directory, self._read(), waiting, self.own, self._news)
                sweep_file.write_sweep(self._directory, entries)
                if entries != self._in_tables:  # which are made of every model's results
                    sweep_files.write_tables(self._directory)
            self._in_tables = entries
            self._news.clear()
        except (LockHeldError, OSError) as error:
            why = f"{error} keeps its lock" if isinstance(error, LockHeldError) else one_line(error)
            log.warning("%s is not written for now: %s", self._directory / sweep_file.SWEEP, why)
            entries = sweep_file.merge(self._directory, self.read(), waiting, self.own, self._news)
        self._entries = {one["name"]: one for one in entries}
        return entries

    def _look_for_gone(self, models: Sequence[SweptModel]) -> None:
        """Of the models that wait, those that no pattern finds any more: nobody can evaluate them. Each is named once."""
        listed, there = {one.name for one in models}, {one.name for one in models if one.is_local}  # a path is listed in any case
        for name in [name for name, one in self.own.items() if one["state"] == GONE and name in there]:
            del self.own[name]  # it has come back
            self._news.discard(name)
        for name, entry in {**self.own, **self.read()}.items():
            if entry["state"] != WAITING or name in listed or not is_removed(self._options, entry["model"] or ""):
                continue
            run = self._directory / name
            if not (run / write.MANIFEST).is_file() and not run_directory.is_at_work(run, watchdog.touch):
                self.note({**entry, "state": GONE, "reason": REMOVED})
                log.warning("%s is gone: %s", name, REMOVED)


def entry_of(
    model: SweptModel, state: str, reason: str | None = None, seconds: float | None = None, logged: Sequence[str] = ()
) -> dict[str, Any]:
    """An entry of sweep.json."""
    return {
        "name": model.name, "model": model.model, "revision": model.revision, "step": model.step, "state": state,
        "reason": reason, "seconds": seconds, "logged": list(logged),
    }  # fmt: skip


def summarize(states: Sequence[str], held: int) -> str:
    """'3 done, 1 failed, 2 at work in another launch': how many models of a sweep stand how. held: of those that wait."""
    counts = {state: states.count(state) for state in (DONE, FAILED, GONE, WAITING)}
    counts[WAITING] -= held
    counts["at work in another launch"] = held
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no model"
