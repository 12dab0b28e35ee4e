"""Command line in, exit code out: flags, values, and one module per subcommand.

COMMANDS is the one list of subcommands: `__main__` runs what it names, and --help and errors are made of it. A new subcommand is
a module and one line here. Every rank reads it before torch is loaded, so it imports none of the modules that it names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ddp_eval.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand.

    module:             imported when the subcommand is called.
    runs_on_all_ranks:  False: rank 0 calls the module's `main(argv)`, which returns the exit code; other ranks do nothing.
                        True: every rank calls its `parse(argv)`, which returns a `subcommand.Evaluation`, and evaluates.
    help:               one line for --help.
    """

    module: str
    runs_on_all_ranks: bool
    help: str


DEFAULT = "run"
COMMANDS = {
    "run": Command("ddp_eval.cli.run", True, "evaluate a model on tasks"),
    "sweep": Command("ddp_eval.cli.sweep", True, "evaluate many checkpoints in one launch, or watch for new ones"),
    "ls": Command("ddp_eval.cli.ls", False, "list the tasks, groups and tags that --tasks can name"),
    "validate": Command("ddp_eval.cli.validate", False, "check task names and task files without fetching documents"),
    "plan": Command("ddp_eval.cli.plan", False, "show which layouts of a model fit in memory, and which is the fastest"),
    "compare": Command("ddp_eval.cli.compare", False, "compare finished runs: metrics, answers, log-probabilities"),
    "report": Command("ddp_eval.cli.report", False, "write an HTML page about finished runs"),
    "reproduce": Command("ddp_eval.cli.reproduce", True, "repeat a finished run from its manifest, and compare the two"),
}


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The subcommand that a command line names, `run` where it names none, and the words behind it.

    Raises UserError for an unknown one.
    """
    if not words or words[0].startswith("-"):
        return DEFAULT, list(words)
    if words[0] not in COMMANDS:
        raise unknown_command(words[0])
    return words[0], list(words[1:])


def unknown_command(name: str) -> UserError:
    *others, last = (other for other in COMMANDS if other != DEFAULT)
    return UserError(f"unknown command {name}: there are {DEFAULT} (may be left out), {', '.join(others)} and {last}")


def list_others() -> str:
    """A line for each subcommand but `run`, for --help."""
    others = {name: command for name, command in COMMANDS.items() if name != DEFAULT}
    width = max(map(len, others))
    return "\n".join(f"  {name:<{width}}  {command.help}" for name, command in others.items())
