"""`python -m ddp_eval compare`: flags, tables, and an exit code for CI."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ddp_eval.analysis.difference import NEAR_TIE_NATS, compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.analysis.sweep import is_sweep, read_sweep, refuse_among_runs
from ddp_eval.analysis.sweep_compare import AGAINST, FIRST, compare_sweep
from ddp_eval.analysis.sweep_text import format_sweep
from ddp_eval.analysis.verdict import NOT_AS_EXPECTED, format_comparison, jsonable, print_verdict, read_expectation, why_not
from ddp_eval.cli.subcommand import SubcommandParser
from ddp_eval.errors import UserError

AGAINST_IS_OF_A_SWEEP = "--against is for the directory of a sweep: runs are compared with the first"
_ABOUT = """\
Compares runs with the first one: metrics with paired errors and p-values, answers that flipped, differences of
log-probability, and what differs in what was run. A run is a directory that --output_path named, or a directory
or file of lm_eval's own samples_*.jsonl. The directory of a sweep, alone, is a table of its models."""


def main(argv: Sequence[str]) -> int:
    """Print the comparison; returns the exit code: 0, or 3 when --expect is not met. Raises UserError."""
    options = _build_parser().parse_args(argv)
    expectation = read_expectation(options.expect)
    if len(options.runs) == 1 and is_sweep(options.runs[0]):
        return _show_sweep(options)
    refuse_among_runs(options.runs, "compare")
    if options.against:
        raise UserError(AGAINST_IS_OF_A_SWEEP)
    runs = [read_run(path) for path in options.runs]
    if len(runs) < 2:
        raise UserError("compare needs two runs or more")
    comparisons = [compare_runs(runs[0], run, options.near_tie) for run in runs[1:]]
    failures = [failure for one in comparisons if (failure := why_not(one, expectation))]
    if options.json:
        print(json.dumps({"comparisons": [jsonable(one) for one in comparisons], "unmet": failures}, indent=2))
    else:
        print("\n\n".join(format_comparison(one) for one in comparisons))
        print_verdict(expectation, failures, comparisons)
    return NOT_AS_EXPECTED if failures else 0


def _show_sweep(options: argparse.Namespace) -> int:
    if options.expect:
        raise UserError("--expect is for runs, not for a sweep: name the runs in it")
    compared = compare_sweep(read_sweep(options.runs[0]), options.against or FIRST, options.near_tie)
    print(json.dumps(jsonable(compared), indent=2) if options.json else format_sweep(compared))
    return 0


def add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        choices=AGAINST,
        help="of a sweep: what its models are compared with, the first of them or the best in each metric (default: first)",
    )


def add_expect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expect",
        nargs="+",
        metavar="WHAT",
        help="identical (every bit, text and metric), or within NATS (largest difference of a log-probability, and the same "
        "texts); exit code 3 if it is not so",
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = SubcommandParser("compare", _ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the first is A, each other one is compared with it as B")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--near_tie", type=float, default=NEAR_TIE_NATS, metavar="NATS", help="what counts as a near tie (default: %(default)s)"
    )
    add_against(parser)
    add_expect(parser)
    return parser
