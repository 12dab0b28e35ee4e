"""Which models of a sweep can be evaluated now, and when to look again: the part that looks at files and at the clock."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ddp_eval.distributed import watchdog
from ddp_eval.run.sweep_models import SweptModel
from ddp_eval.run.sweep_options import SweepOptions
from ddp_eval.system.whole_files import look_at, why_incomplete

log = logging.getLogger("ddp_eval")

_REST_S = 5.0  # nobody has written to a checkpoint for so long: tokenizers are written after weights
_OLD_S = 60.0  # by the clocks of files, which may be those of another machine
_NAMED_AFTER = 10  # looks at a checkpoint that stays as incomplete as it is
_TOUCH_S = 600.0
_TICK_S = 0.2


class Watcher:
    """`look`, then read `ready`, in order, and `reasons`, by name, of those that are not.

    A model that was settled is not ready again, unless it failed and was written to since.
    """

    def __init__(self, options: SweepOptions) -> None:
        self._options = options
        self._began = time.monotonic()
        self._looks: dict[str, tuple[tuple[Any, ...], float]] = {}
        self._settled_looks: dict[str, tuple[Any, ...]] = {}
        self._busy: set[str] = set()
        self._has_retried = False
        self._named: set[str] = set()
        self._settling = False
        self._is_file_there = False  # that of --until
        self._touched = time.monotonic()
        self.ready: list[SweptModel] = []
        self.reasons: dict[str, str] = {}

    def look_for_end(self) -> None:
        """To be called before models are listed: whoever leaves the file of --until has written the last of them before."""
        self._is_file_there = self._sees_file()

    def look(self, models: Sequence[SweptModel], settled: Collection[str]) -> None:
        """settled: names of models that were evaluated, or failed, in this launch."""
        self.ready, self.reasons, self._settling = [], {}, False
        for model in models:
            if not (self._options.watch and model.is_local):
                if model.name not in settled and model.name not in self._busy:
                    self.ready.append(model)
                continue
            look = look_at(self._folder_of(model))
            if model.name in settled and self._settled_looks.setdefault(model.name, look) == look:
                continue
            if model.name in self._busy:
                continue
            if (why := self._why_not(model, look)) is not None:
                self.reasons[model.name] = why
            else:
                self._settled_looks[model.name] = look
                self.ready.append(model)

    def _why_not(self, model: SweptModel, look: tuple[Any, ...]) -> str | None:
        """Why a checkpoint is left alone for now."""
        now, folder = time.monotonic(), self._folder_of(model)
        before, since = self._looks.get(model.name, ((), now))
        if before != look:
            since = now
            self._named.discard(model.name)
        self._looks[model.name] = look, since
        if self._options.marker is not None:
            marked = os.path.lexists(os.path.join(folder, self._options.marker))
            return None if marked else f"{self._options.marker} is not there yet"
        if (why := why_incomplete(folder)) is not None:
            if now - since > _NAMED_AFTER * self._options.every_s and model.name not in self._named:
                self._named.add(model.name)
                log.warning("%s is not complete: %s", model.model, why)
            return f"it is not complete: {why}"
        is_old = time.time() - max((changed for _, _, changed in look), default=0) / 1e9 > _OLD_S
        if is_old or now - since >= self._rest_s:
            return None
        self._settling = True
        return "it is still being written"

    def _folder_of(self, model: SweptModel) -> str:
        return os.path.join(os.path.expanduser(model.model), self._options.subfolder)

    @property
    def _rest_s(self) -> float:
        return min(_REST_S, self._options.every_s)

    def leave_alone(self, model: SweptModel) -> None:
        """Another launch is at it."""
        self._busy.add(model.name)

    def tries_again(self) -> bool:
        """Once more those that other launches were at, when there is nothing else."""
        if not self._busy or self._has_retried:
            return False
        self._has_retried = True
        return True

    @property
    def wants_all(self) -> bool:
        """Whether the end is that of all models, and not of so many, or of a time."""
        return self._options.until.count is None and self._options.until.seconds is None

    def is_over(self, settled: int) -> bool:
        """Whether --until has come. settled: how many models are done, or have failed, in all launches."""
        until = self._options.until
        if until.count is not None:
            return settled >= until.count
        if until.seconds is not None:
            return self._is_late()
        return self._is_file_there and not (self.ready or self._settling)

    def wait(self, keep_in_touch: Callable[[], None]) -> None:
        """Until the next look. keep_in_touch: called every few minutes."""
        self._busy.clear()
        wait_s = self._rest_s if self._settling or not self._options.watch else self._options.every_s
        watchdog.step(f"waiting for {', '.join(self._options.models)}")
        deadline = time.monotonic() + wait_s
        while (left_s := deadline - time.monotonic()) > 0:
            if not self._settling and (self._is_late() or self._sees_file()):
                return
            if time.monotonic() - self._touched > _TOUCH_S:
                self._touched = time.monotonic()
                keep_in_touch()
            watchdog.touch()
            time.sleep(min(_TICK_S, left_s))

    def _is_late(self) -> bool:
        until = self._options.until
        return until.seconds is not None and time.monotonic() - self._began >= until.seconds

    def _sees_file(self) -> bool:
        until = self._options.until
        return until.file is not None and os.path.lexists(until.file)
