"""`python -m ddp_eval report DIR [DIR2 …]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.report import render
from ddp_eval.cli.subcommand import SubcommandParser
from ddp_eval.errors import UserError, printable
from ddp_eval.system.files import replace_file

_ABOUT = """\
Writes report.html into the directory of the first run: results, margins, where time and bytes went, samples
(of runs with --log_samples), and with more runs their differences from the first."""


def main(argv: Sequence[str]) -> int:
    """Write the report and print its path. Raises UserError."""
    options = _build_parser().parse_args(argv)
    runs = [read_run(path) for path in options.runs]
    if runs[0].kind != "ddp_eval" and not options.output:
        raise UserError("the first run must be a directory of ddp_eval, or give --output FILE")
    target = Path(options.output) if options.output else runs[0].path / "report.html"
    page = render(runs, options.samples)
    try:
        replace_file(target, [page.encode("utf-8", errors="backslashreplace")])
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}") from None
    print(printable(f"ddp_eval: the report is in {target}"))
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = SubcommandParser("report", _ABOUT)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="run directories; others than the first may be lm_eval's samples")
    parser.add_argument("--output", "-o", metavar="FILE", help="where to write (default: report.html in the first directory)")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="documents of each task to browse (default: 100)")
    return parser
