"""`python -m ddp_eval ls`: the tasks that can be named, as `lm-eval ls` lists them."""

from __future__ import annotations

from ddp_eval.cli.subcommand import SubcommandParser
from ddp_eval.errors import printable

_ABOUT = """\
Lists what --tasks can name: lm_eval's tasks, the demo's, and those of a directory of yours. A group's tasks have a
common score, a tag's have not."""


def main(argv: list[str]) -> int:
    """Print the table. Returns the exit code. Raises UserError for what cannot be meant."""
    parser = SubcommandParser("ls", _ABOUT)
    kinds = ("tasks", "groups", "subtasks", "tags")
    parser.add_argument("what", choices=kinds, nargs="?", help="tasks (which is all of them), groups, subtasks or tags")
    parser.add_argument("--include_path", "--include-path", metavar="DIR", help="one more directory of task files")
    options = parser.parse_args(argv)
    if options.what is None:
        parser.print_help()
        return 0
    from ddp_eval.tasks.select import list_tasks

    print(printable(list_tasks(options.what, options.include_path), keep="\n"))
    return 0
