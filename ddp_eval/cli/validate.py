"""`python -m ddp_eval validate`: whether task names lead to tasks that run here, before any document is fetched."""

from __future__ import annotations

from ddp_eval.cli.subcommand import SubcommandParser
from ddp_eval.errors import UserError

_ABOUT = """\
Looks the names up as a run does, reads the task files with the Python code that they name, and refuses with the
sentence of a run what is unknown or could not run. Documents are not fetched."""


def main(argv: list[str]) -> int:
    """Print how many tasks the names lead to. Returns the exit code. Raises UserError for what would not run."""
    parser = SubcommandParser("validate", _ABOUT)
    parser.add_argument("--tasks", "-t", nargs="+", required=True, metavar="TASK", help="task or group names, YAML files, globs")
    parser.add_argument("--include_path", "--include-path", metavar="DIR", help="one more directory of task files")
    options = parser.parse_args(argv)
    tasks = [name.strip() for word in options.tasks for name in word.split(",") if name.strip()]
    if not tasks:
        raise UserError("--tasks must name at least one task")
    from ddp_eval.tasks.select import validate_tasks

    print(f"Validating tasks: {tasks}")
    count, unsafe = validate_tasks(tasks, options.include_path)
    for name in unsafe:
        print(f"The task {name} runs code that a model writes: a run of it needs --confirm_run_unsafe_code")
    print(f"All tasks found and valid ({count} {'task' if count == 1 else 'tasks'})")
    return 0
