#!/usr/bin/env python3
"""Write docs/reference/flags.md from the command line's own parsers.

    python scripts/make_reference.py            # writes the page
    python scripts/make_reference.py --check    # exit code 1 where the page is not what the parsers say

Every command's parser is caught where it would read its arguments, so that the page has no second list of flags.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

from ddp_eval.cli import COMMANDS, DEFAULT, flags

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "flags.md"
_HEAD = """\
# Flags

<!-- Made by scripts/make_reference.py from the command line's own parsers: do not edit. -->

Flags may be spelled with `-` or `_`. `--config FILE` takes the same names, without dashes, from a YAML file; flags on the
command line win over it. Every command has `--help`. Where flags differ from lm_eval's is in
[lm_eval compatibility](lm-eval.md#flags).
"""
_TABLE = ("| flag | meaning |", "|---|---|")
_SHAPES: dict[str | int | None, str] = {None: "{}", "?": "[{}]", "+": "{} …"}


class _Caught(BaseException):
    """Carries a parser out of a command that was about to read its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def make_page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([_HEAD, *(line for name in COMMANDS for line in _describe_command(name))]) + "\n"


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command, by its name in `cli.COMMANDS`."""
    if name == DEFAULT:
        return flags.build_parser()
    command = COMMANDS[name]
    module = importlib.import_module(command.module)

    def catch(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", catch):
        try:
            (module.parse if command.runs_on_all_ranks else module.main)([])
        except _Caught as caught:
            return caught.parser
    raise RuntimeError(f"the command {name} reads no arguments")


def _describe_command(name: str) -> Iterator[str]:
    parser = parser_of(name)
    yield f"## {name}"
    yield ""
    yield f"{COMMANDS[name].help[0].upper()}{COMMANDS[name].help[1:]}."
    yield ""
    yield from _code(_usage(name, parser))
    yield ""
    yield " ".join((parser.description or "").split())
    yield ""
    if name == DEFAULT:
        for group in parser._action_groups:
            if rows := list(_rows(parser, group._group_actions)):
                yield from (f"### {(group.title or '').capitalize()}", "", *_TABLE, *rows, "")
    else:
        yield from (*_TABLE, *_rows(parser, parser._actions), "")
    if name == DEFAULT:
        yield from _describe_others()


def _rows(parser: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> Iterator[str]:
    """A row for each flag. Every command has --help: the head of the page says so."""
    for action in actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            yield f"| {_spell(action)} | {_cell(_expand(parser, action))} |"


def _describe_others() -> Iterator[str]:
    yield "### Ignored and refused"
    yield ""
    yield from ("| flag of lm_eval | here |", "|---|---|")
    for name, (short, why) in flags.IGNORED_FLAGS.items():
        yield f"| {_names(name, short)} | ignored, with a note: {_cell(why)} |"
    for name, (short, why) in flags._REFUSED_FLAGS.items():
        yield f"| {_names(name, short)} | refused: {_cell(why)} |"
    yield ""


def _names(name: str, short: str) -> str:
    return ", ".join(f"`{one}`" for one in (short, f"--{name}") if one)


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    if name == DEFAULT:
        return str(parser.usage)
    positional = [action.metavar or action.dest for action in parser._actions if not action.option_strings]
    return f"{parser.prog} {' '.join(str(one) for one in positional)} [flags]".replace("  ", " ")


def _code(text: str) -> tuple[str, ...]:
    return ("```text", text, "```")


def _spell(action: argparse.Action) -> str:
    """`-o`, `--output_path` `DIR`"""
    if not action.option_strings:
        return f"`{_SHAPES[None if action.nargs == '?' else action.nargs].format(action.metavar or action.dest)}`"
    names = ", ".join(f"`{one}`" for one in action.option_strings)
    if action.nargs == 0:
        return names
    choices = "|".join(map(str, action.choices)) if action.choices is not None else ""
    value = _SHAPES[action.nargs].format(choices or action.metavar or action.dest.upper())
    return f"{names} `{_cell(value)}`"


def _expand(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is not up to date")
    check: bool = parser.parse_args().check
    page = make_page()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE} is not up to date: run python scripts/make_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
