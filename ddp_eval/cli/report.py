"""`python -m ddp_eval report DIR [DIR2 …]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.report import REPORT, render
from ddp_eval.analysis.sweep import is_sweep, read_sweep, refuse_among_runs
from ddp_eval.analysis.sweep_compare import FIRST
from ddp_eval.analysis.sweep_report import render_sweep
from ddp_eval.cli.compare import AGAINST_IS_OF_A_SWEEP, add_against
from ddp_eval.cli.subcommand import SubcommandParser
from ddp_eval.errors import UserError, printable
from ddp_eval.system.files import replace_file

_ABOUT = """\
Writes report.html into the directory of the first run: results, margins, where time and bytes went, samples
(of runs with --log_samples), and with more runs their differences from the first. Of the directory of a sweep, alone:
metrics against step or model, and their differences from the first model or the best."""


def main(argv: Sequence[str]) -> int:
    """Write the report and print its path. Raises UserError."""
    options = _build_parser().parse_args(argv)
    if len(options.runs) == 1 and is_sweep(options.runs[0]):
        sweep = read_sweep(options.runs[0])
        return _write(render_sweep(sweep, options.against or FIRST), options.output or sweep.path / REPORT)
    refuse_among_runs(options.runs, "report")
    if options.against:
        raise UserError(AGAINST_IS_OF_A_SWEEP)
    runs = [read_run(path) for path in options.runs]
    if runs[0].kind != "ddp_eval" and not options.output:
        raise UserError("the first run must be a directory of ddp_eval, or give --output FILE")
    return _write(render(runs, options.samples), options.output or runs[0].path / REPORT)


def _write(page: str, place: str | Path) -> int:
    target = Path(place)
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
    add_against(parser)
    return parser
