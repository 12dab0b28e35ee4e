"""What a sweep was asked to do. Every rank reads it before torch is loaded: nothing here imports it."""

from __future__ import annotations

import dataclasses
import re

from ddp_eval.errors import UserError
from ddp_eval.system.text import read_count

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclasses.dataclass(frozen=True)
class Until:
    """When a watch ends: when a file is there, when so many models are evaluated, after so many seconds. All None: never."""

    file: str | None = None
    count: int | None = None
    seconds: float | None = None

    def describe(self) -> str:
        if self.file is not None:
            return f"until the file {self.file} is there"
        if self.count is not None:
            return f"until {self.count} models are evaluated"
        return "until it is stopped" if self.seconds is None else f"for {self.seconds:g} s"


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """models: paths, names and patterns. revisions: of each of them; () for the default one. output_path: of the whole sweep.

    watch: go on looking for new ones, every `every_s` seconds. marker: a file in a checkpoint's directory that says it is whole;
    None: its own files do. subfolder: of each model, where its files lie.
    """

    models: tuple[str, ...]
    revisions: tuple[str, ...]
    output_path: str
    watch: bool = False
    every_s: float = 30.0
    until: Until = dataclasses.field(default_factory=Until)
    marker: str | None = None
    subfolder: str = ""


def read_until(text: str) -> Until:
    """A number of models, a time such as 90m or 12h, or else the path of a file. Raises UserError."""
    if (count := read_count(text)) is not None:
        if count < 1:
            raise UserError(f"--until must be 1 or more models, got {count}")
        return Until(count=count)
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return Until(seconds=float(found[1]) * _UNITS_S[found[2]])
    if not text.strip():
        raise UserError("--until must be a number of models, a time such as 90m or 12h, or the path of a file")
    return Until(file=text)
