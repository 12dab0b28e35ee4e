"""`torchrun … -m ddp_eval [run] [flags]`: the evaluation that the flags ask for."""

from __future__ import annotations

from collections.abc import Sequence

from ddp_eval.cli.flags import parse_flags
from ddp_eval.cli.subcommand import Evaluation


def parse(argv: Sequence[str]) -> Evaluation:
    """Raises UserError for anything that cannot be meant, SystemExit(0) for --help and --version."""
    config, notes = parse_flags(argv)
    return Evaluation(config, notes)
