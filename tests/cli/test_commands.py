"""The table of subcommands."""

from __future__ import annotations

import importlib
import inspect

import pytest

from ddp_eval.cli import COMMANDS, DEFAULT, Command, split_command
from ddp_eval.cli.flags import build_parser, parse
from ddp_eval.errors import UserError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_module_has_its_entry(name: str) -> None:
    """Catches a line of the table that leads nowhere, which shows only when somebody calls the command."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    entry = module.parse if command.runs_on_all_ranks else module.main
    assert list(inspect.signature(entry).parameters) == ["argv"]
    assert command.help and command.help[0].islower() and not command.help.endswith(".")


def test_a_new_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of commands beside the table, which a new one would be missing from."""
    monkeypatch.setitem(COMMANDS, "audit", Command("ddp_eval.cli.audit", False, "count what was spent"))
    assert split_command(["audit", "--all"]) == ("audit", ["--all"])
    assert "  audit      count what was spent\n" in build_parser().format_help()
    for words in (["odit"], ["audit", "--limit", "1"]):
        with pytest.raises(UserError, match=rf"^unknown command {words[0]}: there are run \(may be left out\), .* and audit$"):
            parse(words)


def test_the_word_run_may_be_left_out() -> None:
    """Catches flags that are taken for a command, and a second `run` that goes by unseen."""
    assert split_command([]) == (DEFAULT, [])
    assert split_command(["--limit", "1"]) == split_command(["run", "--limit", "1"]) == (DEFAULT, ["--limit", "1"])
    assert parse(["run", "--limit", "1"]) == parse(["--limit", "1"])
    with pytest.raises(UserError, match=r"^run belongs to no flag"):
        parse(["run", "run"])
