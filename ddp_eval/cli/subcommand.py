"""The command-line parser that compare, report and reproduce share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ddp_eval.errors import UserError


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

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._command}: {message} (see {self._command} --help)")
