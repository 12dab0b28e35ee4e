"""`torchrun … -m ddp_eval sweep --models …`: many checkpoints in one launch, or all that a training run will write."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddp_eval.cli.flags import parse_flags
from ddp_eval.cli.subcommand import Evaluation, SubcommandParser
from ddp_eval.errors import UserError
from ddp_eval.run.sweep_models import sort_revisions
from ddp_eval.run.sweep_options import SweepOptions, Until, read_until

_ABOUT = """\
Evaluates each model in a run directory of its own, --output_path/NAME, as a run of the same flags would. Prompts,
token ids and plans are made once. Takes the flags of a run, but for pretrained= in --model_args: with it, --models
are adapters of that model. A model that fails is a line of the summary and exit code 1; the same command again goes
on with what is missing."""


def parse(argv: Sequence[str]) -> Evaluation:
    """Raises UserError for anything that cannot be meant, SystemExit(0) for --help."""
    parser = _build_parser()
    options, rest = parser.parse_known_args(argv)
    config, notes = parse_flags(rest, names_model=False, more=parser.flags)
    if not config.output_path:
        raise UserError("sweep needs --output_path DIR, under which each model has its run directory")
    if config.model != "hf":
        raise UserError(
            f"sweep is not for --model {config.model}, whose engine cannot give way to another in one process: run each model "
            "by itself, as slurm/sweep.sh does"
        )
    for name in ("revision", "peft"):
        if name in config.model_args:
            raise UserError(f"{name}= in --model_args is not for sweep: give --{'revisions' if name == 'revision' else 'models'}")
    for name in ("until", "every", "marker"):
        if getattr(options, name) is not None and not options.watch:
            raise UserError(f"--{name} needs --watch")
    models = _split("--models", options.models)
    if not models:
        raise UserError("sweep needs --models, such as A,B or 'runs/train/checkpoint-*'")
    every_s = 30.0 if options.every is None else options.every
    if not (math.isfinite(every_s) and every_s > 0):
        raise UserError(f"--every must be more than 0 seconds, got {every_s:g}")
    if options.marker is not None and ("/" in options.marker or not options.marker.strip()):
        raise UserError(f"--marker must be the name of a file in a checkpoint's directory, got {options.marker}")
    until = read_until(options.until) if options.until is not None else Until()
    revisions = sort_revisions(_split("--revisions", options.revisions or []))
    subfolder = "" if "pretrained" in config.model_args else str(config.model_args.get("subfolder") or "")
    sweep = SweepOptions(models, revisions, config.output_path, options.watch, every_s, until, options.marker, subfolder)
    return Evaluation(config, notes, sweep=sweep)


def _split(flag: str, words: Sequence[str]) -> tuple[str, ...]:
    found = [part.strip() for word in words for part in word.split(",")]
    if not all(found):
        raise UserError(f"{flag} must name something between its commas, got {' '.join(words)}")
    return tuple(dict.fromkeys(found))


def _build_parser() -> SubcommandParser:
    parser = SubcommandParser("sweep", _ABOUT, launcher="torchrun")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="paths, names and quoted patterns, with commas")
    parser.add_argument("--revisions", nargs="+", metavar="REVISION", help="of each model, with commas (default: its main one)")
    parser.add_argument("--watch", action="store_true", help="go on looking for new checkpoints, and take each that is whole")
    parser.add_argument("--every", type=float, metavar="S", help="seconds between two looks of --watch (default: 30)")
    parser.add_argument(
        "--until", metavar="FILE|N|TIME",
        help="end of --watch: this file is there, N models are evaluated, or a time such as 12h is over (default: never)",
    )  # fmt: skip
    parser.add_argument(
        "--marker", metavar="NAME", help="a checkpoint is whole once it holds this file (default: its own files say so)"
    )
    return parser
