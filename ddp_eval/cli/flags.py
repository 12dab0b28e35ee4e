"""Flags, or a YAML file of them, to one checked Config.

Every rank reads the flags before torch is loaded, so this module imports neither torch nor lm_eval: lm_eval's small rules for
flag values are written out again here and in values.py, and tests compare them with the originals. A flag of lm_eval keeps its
name, short form and meaning; where lm_eval guesses in silence, UserError is raised instead. Only --help and --version exit.

Flags and YAML meet as raw values by name (command line over file), then pass through the same converters:

    argv ── argparse (syntax only) ──┐
                                     ├── raw values ── _FLAGS[name].convert ── model_args, defaults ── Config, notes
    --config FILE ── YAML ───────────┘
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ddp_eval.cli import DEFAULT, list_others, split_command, unknown_command
from ddp_eval.cli.flag_values import (
    to_cache,
    to_count,
    to_directory,
    to_instruction,
    to_model,
    to_number,
    to_samples,
    to_seed,
    to_switch,
    to_tasks,
    to_template,
    to_text,
)
from ddp_eval.cli.model_args import BY_COST, KNOWN_MODEL_ARGS, refuse_misspelt, settle_layout, settle_model_args
from ddp_eval.config import Config
from ddp_eval.errors import UserError, one_line
from ddp_eval.system import read_back
from ddp_eval.values import read_args

_USAGE = "torchrun --nproc_per_node=N -m ddp_eval [run] [flags]"
_ABOUT = """\
Evaluates a language model on lm-evaluation-harness tasks, on all ranks that torchrun starts, or on
one without torchrun. Flags are lm_eval's, spelled with - or _. Without pretrained= it runs the
small demo model, without --tasks the demo tasks: both ship with it and need no network."""
_HELP_WIDTH = 100


IGNORED_FLAGS = {
    "batch_size": ("-b", BY_COST),
    "max_batch_size": ("", BY_COST),
    "verbosity": ("-v", "set the environment variable LMEVAL_LOG_LEVEL for lm_eval's messages"),
}
_REFUSED_FLAGS = {
    "use_cache": ("-c", "use --output_path DIR: the same command there resumes"),
    "check_integrity": ("", "check tasks with python -m ddp_eval validate --tasks"),
}


def parse(argv: Sequence[str], more: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """Read a command line, without the program's name: `parse_flags`, and the word `run` may come before the flags."""
    command, flags = split_command(argv)
    if command != DEFAULT:
        raise unknown_command(command)
    return parse_flags(flags, more=more)


def parse_flags(argv: Sequence[str], names_model: bool = True, more: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """The flags of `run` -> a Config, and one sentence for each flag that is accepted and ignored, for one rank to log.

    names_model: whether the model is among them, by default the demo's; for a sweep it is not.
    more: names of the flags that a subcommand has beside these, and has taken out: what is misspelt may be one of them.
    Raises UserError with one sentence for anything that cannot be meant. --help and --version print, then raise SystemExit(0).
    """
    raw = _read_command_line(argv, more)
    if "config" in raw:
        raw = _read_config_file(to_text("--config", raw.pop("config"))) | raw
    batch_size = raw.get("batch_size")
    notes = [f"--{name} is ignored: {why}" for name, (_, why) in IGNORED_FLAGS.items() if raw.pop(name, None) is not None]
    values = {name: _FLAGS[name].convert(f"--{name}", value) for name, value in raw.items()}
    settle_layout(values)
    settle_model_args(values, notes)
    _settle_what_to_evaluate(values, notes, names_model)
    if values.get("predict_only"):
        values["log_samples"] = True
    if values.get("log_samples") and "output_path" not in values:
        flag = "--predict_only" if values.get("predict_only") else "--log_samples"
        raise UserError(f"{flag} needs --output_path DIR, where the samples are to be written")
    values["packing"] = not values.pop("no_packing", False)
    values["batch_size"] = 1 if batch_size is None else batch_size
    return Config(**values), notes


def config_of_model(model_args: Mapping[str, Any], **options: Any) -> tuple[Config, list[str]]:
    """A Config for programs that bring tasks of their own: model_args as of the command, options as fields of `Config`.

    Returns and raises as `parse`.
    """
    given = {name: one for name, one in options.items() if one is not None}
    values: dict[str, Any] = {"model_args": dict(model_args), **convert_options(given)}
    notes: list[str] = []
    settle_layout(values)
    settle_model_args(values, notes)
    refuse_misspelt(values["model_args"])
    if not values["model_args"].get("pretrained"):
        raise UserError("model_args pretrained must be a path or a name, got nothing")
    return Config(**values), notes


def read_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of a Python call without those that are flags which no longer matter, and a sentence on each of these."""
    notes = [f"{name} is ignored: {why}" for name, (_, why) in IGNORED_FLAGS.items() if options.get(name) is not None]
    return {name: value for name, value in options.items() if name == "batch_size" or name not in IGNORED_FLAGS}, notes


def convert_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a Python call, by the names of `Config`'s fields: each that is a flag is read as the flag's value is.

    None is an option not given, except for the seed, where it means no seed. Raises UserError, naming the flag.
    """
    converted = {}
    for name, value in options.items():
        if value is None and name != "seed":
            continue
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        as_it_is = name not in _FLAGS or (name == "limit" and type(value) is int)
        converted[name] = value if as_it_is else _FLAGS[name].convert(f"--{name}", plain)
    return converted


def build_parser() -> argparse.ArgumentParser:
    """The grammar and the help text of `run`. It only splits: values stay strings, and absent flags stay absent."""
    parser = _Parser(
        usage=_USAGE,
        description=_ABOUT,
        epilog=f"Accepted and ignored: {', '.join('--' + name for name in IGNORED_FLAGS)}.\n"
        f"Other commands, each with its own --help:\n{list_others()}",
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    for title in dict.fromkeys(flag.group for flag in _FLAGS.values()):
        group = parser.add_argument_group(title)
        for name, flag in _FLAGS.items():
            if flag.group == title:
                group.add_argument(*_spellings(name, flag.short), **flag.argparse_settings())
    about = parser.add_argument_group("about")
    about.add_argument("-h", "--help", action="help", help="print this text and exit")
    about.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    for name, (short, _) in IGNORED_FLAGS.items():
        parser.add_argument(*_spellings(name, short), help=argparse.SUPPRESS)
    for name, (short, _) in _REFUSED_FLAGS.items():
        parser.add_argument(*_spellings(name, short), nargs="*", help=argparse.SUPPRESS)
    return parser


def _spellings(name: str, short: str) -> list[str]:
    return [short, f"--{name}"] if short else [f"--{name}"]


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        flag = next((name for name in flag.split("/") if name.startswith("--")), flag)
        if problem.startswith("expected"):
            raise UserError(f"{flag} needs a value (see --help)")
        if problem.startswith("ignored explicit argument"):
            raise UserError(f"{flag} takes no value, got {problem.removeprefix('ignored explicit argument ')}")
        raise UserError(f"the flags cannot be read: {message}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of a fixed width, that names the value of a flag once, not once per spelling."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_HELP_WIDTH, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shapes: dict[str | int | None, str] = {None: " {}", "?": " [{}]", "+": " {} ..."}
        return ", ".join(action.option_strings) + shapes.get(action.nargs, "").format(action.metavar)


class _PrintVersion(argparse.Action):
    """Looks the version up only when asked: a checkout that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = importlib.metadata.version("ddp_eval")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print("ddp_eval", version)
        parser.exit()


def _read_command_line(argv: Sequence[str], more: Iterable[str]) -> dict[str, Any]:
    """Raw values by flag name: str, list of str, or True. Raises UserError for what no flag takes."""
    namespace, rest = build_parser().parse_known_args([_with_underscores(token) for token in argv])
    for token in rest:
        if token.startswith("-"):
            name = token.lstrip("-").partition("=")[0]
            raise UserError(f"unknown flag {token.partition('=')[0]}: {did_you_mean(name, '--', more)}")
    if rest:
        raise UserError(f"{rest[0]} belongs to no flag (see --help)")
    raw = vars(namespace)
    _refuse_flags(raw)
    return raw


def _with_underscores(token: str) -> str:
    """`--model-args=a-b` -> `--model_args=a-b`. A token with a space before its = is a value that happens to start with --."""
    name, equals, value = token.partition("=")
    if not name.startswith("--") or " " in name:
        return token
    return "--" + name[2:].replace("-", "_") + equals + value


def _read_config_file(path: str) -> dict[str, Any]:
    """Raw values by flag name out of a YAML mapping; a null is a flag not given, except for the seed, where it means no seed."""
    try:
        mapping = read_back.read_yaml(path)
    except UserError as error:
        raise UserError(f"--config must be a YAML file that can be read: {error}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"--config must hold flag names with their values, {path} holds {one_line(repr(mapping))}")
    raw = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name == "config" and value is None:
            continue
        if name == "config":
            raise UserError(f"--config {path} must not name another config file")
        if name not in {*_FLAGS, *IGNORED_FLAGS, *_REFUSED_FLAGS}:
            raise UserError(f"--config {path} has the unknown key {key}: {did_you_mean(name, '')}")
        if name == "seed" or value is not None:
            raw[name] = value
    raw = {name: value for name, value in raw.items() if value or name not in _REFUSED_FLAGS}
    _refuse_flags(raw)
    return raw


def _refuse_flags(names: Iterable[str]) -> None:
    for name in names:
        if name in _REFUSED_FLAGS:
            raise UserError(f"--{name} is not supported: {_REFUSED_FLAGS[name][1]}")


def _settle_what_to_evaluate(values: dict[str, Any], notes: list[str], names_model: bool) -> None:
    """Fill in the demo where no model or tasks are given, with a note: its scores must not be taken for another model's."""
    model_args = values["model_args"]
    refuse_misspelt(model_args)
    if "pretrained" not in model_args and names_model:
        model_args["pretrained"] = "demo"
        notes.append("no pretrained= is in --model_args: this evaluates the small demo model that ships with ddp_eval")
    if not model_args.get("pretrained", not names_model):
        raise UserError("model_args pretrained must be a path or a name, got nothing")
    if "tasks" not in values:
        values["tasks"] = ["demo"]
        notes.append("no --tasks are given: this evaluates the small demo tasks that ship with ddp_eval")


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: how it is spelled, how its raw value becomes a Config value, and its help text.

    convert:  (flag as the user knows it, raw value) -> value; raises UserError. Raw values come from argv and from YAML.
    nargs:    argparse's; "?" stands for True when the flag comes bare. A flag without a metavar is a switch.
    """

    group: str
    convert: Callable[[str, Any], Any]
    help: str
    metavar: str = ""
    short: str = ""
    nargs: str | None = None

    def argparse_settings(self) -> Mapping[str, Any]:
        if not self.metavar:
            return {"help": self.help, "action": "store_true"}
        settings: dict[str, Any] = {"help": self.help, "metavar": self.metavar}
        if self.nargs:
            settings["nargs"] = self.nargs
        if self.nargs == "+":
            settings["action"] = "extend"
        if self.nargs == "?":
            settings["const"] = True
        return settings


_FLAGS = {
    "model": _Flag("model", to_model, "what runs the model (default: hf, which is transformers)", "NAME", "-M"),
    "model_args": _Flag(
        "model",
        read_args,
        "pretrained=PATH_OR_NAME, and revision, dtype, tokenizer, max_length, attn_implementation, add_bos_token, "
        "prefix_token_id, ... as key=value pairs or a JSON object (default: pretrained=demo)",
        "KEY=VALUE",
        "-a",
        "+",
    ),
    "device": _Flag("model", to_text, "cuda or cpu (default: a GPU for each local rank, else cpu)", "DEVICE"),
    "trust_remote_code": _Flag("model", to_switch, "run Python code of the model or data set (default: off)"),
    "tasks": _Flag("tasks", to_tasks, "task or group names, YAML files, globs of them (default: demo)", "TASK", "-t", "+"),
    "include_path": _Flag("tasks", to_text, "one more directory of task files", "DIR"),
    "limit": _Flag("tasks", to_number, "documents per task, or a fraction of them below 1 (default: all)", "N", "-L"),
    "samples": _Flag("tasks", to_samples, 'documents to take: {"TASK": [0, 5]} or a file (default: all)', "JSON", "-E"),
    "metadata": _Flag(
        "tasks", read_args, "settings that some tasks ask for, such as max_seq_lengths=[4096]", "KEY=VALUE", "", "+"
    ),
    "confirm_run_unsafe_code": _Flag("tasks", to_switch, "allow tasks that run the code a model writes (default: off)"),
    "cache_requests": _Flag(
        "prompts",
        to_cache,
        "true and refresh change nothing, prompts are built in every run; delete empties lm_eval's cache of them (default: off)",
        "true|refresh|delete",
        "",
        "?",
    ),
    "num_fewshot": _Flag("prompts", to_count, "examples before each question (default: the task's own)", "N", "-f"),
    "apply_chat_template": _Flag(
        "prompts", to_template, "use the tokenizer's chat template, or that NAME (default: off)", "NAME", "", "?"
    ),
    "system_instruction": _Flag("prompts", to_instruction, "system message before every prompt (default: none)", "TEXT"),
    "fewshot_as_multiturn": _Flag(
        "prompts", to_switch, "examples as turns of the chat (default: true with a chat template)", "BOOL", "", "?"
    ),
    "gen_kwargs": _Flag("prompts", read_args, "generation settings over the task's own, such as top_p=0.9", "KEY=VALUE", "", "+"),
    "output_path": _Flag("output", to_directory, "run directory for results and scores (default: only the table)", "DIR", "-o"),
    "overwrite": _Flag("output", to_switch, "replace the run that --output_path already holds (default: refuse)"),
    "fresh": _Flag("output", to_switch, "start over, whatever --output_path holds of this package (default: resume)"),
    "log_samples": _Flag("output", to_switch, "also write every document with prompt and answer (default: off)", "", "-s"),
    "predict_only": _Flag("output", to_switch, "write the answers and skip the metrics; implies --log_samples", "", "-x"),
    "write_out": _Flag("output", to_switch, "print the prompts of the first documents (default: off)", "", "-w"),
    "show_config": _Flag("output", to_switch, "print all results with the settings of every task (default: off)"),
    **{
        name: _Flag("output", read_args, help, "KEY=VALUE", "", "+")
        for name, help in {
            "wandb_args": "log to Weights & Biases, with these arguments of wandb.init (default: no)",
            "wandb_config_args": "more of what wandb records as the run's config",
            "trackio_args": "log to Trackio, with these arguments of trackio.init (default: no)",
            "hf_hub_log_args": "upload to the Hugging Face hub: push_results_to_hub=True,hub_results_org=NAME, ... (default: no)",
        }.items()
    },
    "config": _Flag("execution", to_text, "YAML file of flags by name; flags given here win over it", "FILE", "-C"),
    "seed": _Flag(
        "execution",
        to_seed,
        "of random, numpy, torch, few-shot; one for all; None: unseeded (default: 0,1234,1234,1234)",
        "INT[,INT...]",
    ),
    "bootstrap_iters": _Flag("execution", to_count, "resamplings for a bootstrapped standard error (default: 100000)", "N"),
    "layout": _Flag(
        "execution",
        to_text,
        "how the model is split over the ranks: replicas (data parallel), layers:K (pipeline parallel over K ranks), tensor:K "
        "(tensor parallel over K ranks), shard:K (fully sharded over K ranks, each of which runs packs of its own), auto (the "
        "fastest that fits) or measure (try what fits on some of the work) "
        "(default: auto)",
        "LAYOUT",
    ),
    "max_pack_tokens": _Flag(
        "execution",
        to_count,
        "maximum tokens of a pack; a longer request is a pack by itself (default: chosen by the planner)",
        "N",
    ),
    "numerics": _Flag(
        "execution",
        to_text,
        "fast (packs, the checkpoint's precision), fp32 (packs in float32), alone (one forward for each input: no neighbour "
        "changes a bit of it); each gives the same bits on any number of ranks (default: fast)",
        "LEVEL",
    ),
    "load": _Flag(
        "execution",
        to_text,
        "each rank reads the weights from disk, or rank 0 reads and sends them (default: disk)",
        "{disk,broadcast}",
    ),
    "preflight": _Flag("execution", to_switch, "only check the nodes, and report which is bad (several nodes: always checked)"),
    "timeout": _Flag("execution", to_number, "maximum seconds of a rank for a pack or another step (default: 1800)", "S"),
    "no_packing": _Flag("execution", to_switch, "run padded rows, sharing no prefixes (default: off)"),
}


def did_you_mean(name: str, prefix: str, more: Iterable[str] = ()) -> str:
    matches = difflib.get_close_matches(name.replace("-", "_"), [*more, *_FLAGS, *IGNORED_FLAGS], n=3)
    if matches:
        return f"did you mean {' or '.join(prefix + match for match in matches)}?"
    if name.replace("-", "_") in KNOWN_MODEL_ARGS:
        return f"give it as --model_args {name.replace('-', '_')}=VALUE"
    return "see --help for those there are"
