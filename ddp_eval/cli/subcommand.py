"""What subcommands share: the command-line parser, and what those that run on all ranks return."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ddp_eval.config import Config
from ddp_eval.errors import UserError
from ddp_eval.run.sweep_options import SweepOptions


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What all ranks are to evaluate.

    notes:     sentences for rank 0 to log.
    inspect:   as `run.runner.run` takes it.
    sweep:     of several models, each with `config`; None: of the one that `config` names.
    conclude:  called on rank 0 after the run, and returns the exit code. None: 0.
    """

    config: Config
    notes: Sequence[str] = ()
    inspect: Callable[[dict[str, Any]], None] | None = None
    sweep: SweepOptions | None = None
    conclude: Callable[[], int] | None = None


class SubcommandParser(argparse.ArgumentParser):
    """argparse that raises UserError, naming the subcommand, where it would print its usage and exit.

    launcher: what the usage line starts with.
    """

    def __init__(self, command: str, about: str, launcher: str = "python") -> None:
        super().__init__(
            prog=f"{launcher} -m ddp_eval {command}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._command = command

    @property
    def flags(self) -> list[str]:
        """The names of its own flags, without dashes."""
        return [action.dest for action in self._actions if action.option_strings and action.dest != "help"]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._command}: {message} (see {self._command} --help)")
