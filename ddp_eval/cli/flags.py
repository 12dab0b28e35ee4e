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

from ddp_eval import layout
from ddp_eval.config import DEFAULT_SEED, PROMPT_ARGS, Config, check_not_loaded
from ddp_eval.errors import UserError, one_line
from ddp_eval.system import read_back
from ddp_eval.values import TEXT_MODEL_ARGS, read_args, read_json_object

_USAGE = "torchrun --nproc_per_node=N -m ddp_eval [run] [flags]"
_ABOUT = """\
Evaluates a language model on lm-evaluation-harness tasks, on all ranks that torchrun starts, or on
one without torchrun. Flags are lm_eval's, spelled with - or _. Without pretrained= it runs the
small demo model, without --tasks the demo tasks: both ship with it and need no network."""
_COMMANDS = ("run",)
_HELP_WIDTH = 100

# lm_eval knows one engine by three names.
_MODEL_ALIASES = {"huggingface": "hf", "hf-auto": "hf"}

_BY_COST = "packs are sized by cost, not by a batch size"
_IGNORED_FLAGS = {
    "batch_size": ("-b", _BY_COST),
    "max_batch_size": ("", _BY_COST),
    "verbosity": ("-v", "set the environment variable LMEVAL_LOG_LEVEL for lm_eval's messages"),
}
_REFUSED_FLAGS = {
    "use_cache": ("-c", "use --output_path DIR: the same command there resumes"),
    "check_integrity": ("", "check tasks with python -m ddp_eval validate --tasks"),
}

_BY_MEMORY = "--layout goes by the memory that the GPUs have"
_IGNORED_MODEL_ARGS = {
    "batch_size": _BY_COST,
    "max_batch_size": _BY_COST,
    "logits_cache": "requests with the same prefix always share it",
    "truncation": "a request that is too long always keeps its last tokens",
    "softmax_dtype": "log-probabilities are always computed in float32",
    "max_memory_per_gpu": _BY_MEMORY,
    "max_cpu_memory": _BY_MEMORY,
    "offload_folder": _BY_MEMORY,
}
_REFUSED_MODEL_ARGS = {
    "device_map": "--layout says how the model lies over the ranks",
    "token": "log in with hf auth login or set HF_TOKEN, so that it is written nowhere",
    "delta": "add the delta to the base model, save it, and evaluate what you saved",
    "autogptq": "leave it out, transformers loads a checkpoint whose config.json says that it is GPTQ",
    "gptqmodel": "leave it out, transformers loads a checkpoint whose config.json says that it is GPTQ",
    "gguf_file": "convert the model to safetensors and evaluate that",
    "mixed_precision_dtype": "choose one precision for the whole model with dtype",
}
_SWITCHED_MODEL_ARGS = ("load_in_8bit", "load_in_4bit")
_OPTIONAL_MODEL_ARGS = ("enable_thinking", "think_end_token", "chat_template_args", "peft", "quantization_config")
_KNOWN_MODEL_ARGS = (
    *TEXT_MODEL_ARGS,
    *PROMPT_ARGS,
    "dtype",
    "attn_implementation",
    "backend",
    "quantization_config",
    *_SWITCHED_MODEL_ARGS,
)


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Read a command line, without the program's name.

    Returns the Config and one sentence for each flag that is accepted and ignored, for the caller to log from one rank.
    Raises UserError with one sentence for anything that cannot be meant. --help and --version print, then raise SystemExit(0).
    """
    raw = _read_command_line(_drop_command(argv))
    if "config" in raw:
        raw = _read_config_file(_to_text("--config", raw.pop("config"))) | raw
    batch_size = raw.get("batch_size")
    notes = [f"--{name} is ignored: {why}" for name, (_, why) in _IGNORED_FLAGS.items() if raw.pop(name, None) is not None]
    values = {name: _FLAGS[name].convert(f"--{name}", value) for name, value in raw.items()}
    _settle_layout(values)
    _settle_model_args(values, notes)
    _settle_what_to_evaluate(values, notes)
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
    _settle_layout(values)
    _settle_model_args(values, notes)
    _refuse_misspelt(values["model_args"])
    if not values["model_args"].get("pretrained"):
        raise UserError("model_args pretrained must be a path or a name, got nothing")
    return Config(**values), notes


def read_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of a Python call without those that are flags which no longer matter, and a sentence on each of these."""
    notes = [f"{name} is ignored: {why}" for name, (_, why) in _IGNORED_FLAGS.items() if options.get(name) is not None]
    return {name: value for name, value in options.items() if name == "batch_size" or name not in _IGNORED_FLAGS}, notes


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
        epilog=f"Accepted and ignored: {', '.join('--' + name for name in _IGNORED_FLAGS)}.\n"
        "Other commands, each with a --help of its own: ls, validate, plan, compare, report, reproduce.",
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
    for name, (short, _) in _IGNORED_FLAGS.items():
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


def _drop_command(argv: Sequence[str]) -> list[str]:
    if not argv or argv[0].startswith("-"):
        return list(argv)
    if argv[0] not in _COMMANDS:
        raise UserError(
            f"unknown command {argv[0]}: there are run (may be left out), ls, validate, plan, compare, report and reproduce"
        )
    return list(argv[1:])


def _read_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """Raw values by flag name: str, list of str, or True. Raises UserError for what no flag takes."""
    namespace, rest = build_parser().parse_known_args([_with_underscores(token) for token in argv])
    for token in rest:
        if token.startswith("-"):
            name = token.lstrip("-").partition("=")[0]
            raise UserError(f"unknown flag {token.partition('=')[0]}: {_did_you_mean(name, '--')}")
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
        if name not in {*_FLAGS, *_IGNORED_FLAGS, *_REFUSED_FLAGS}:
            raise UserError(f"--config {path} has the unknown key {key}: {_did_you_mean(name, '')}")
        if name == "seed" or value is not None:
            raw[name] = value
    raw = {name: value for name, value in raw.items() if value or name not in _REFUSED_FLAGS}
    _refuse_flags(raw)
    return raw


def _refuse_flags(names: Iterable[str]) -> None:
    for name in names:
        if name in _REFUSED_FLAGS:
            raise UserError(f"--{name} is not supported: {_REFUSED_FLAGS[name][1]}")


def _did_you_mean(name: str, prefix: str) -> str:
    matches = difflib.get_close_matches(name.replace("-", "_"), [*_FLAGS, *_IGNORED_FLAGS], n=3)
    return f"did you mean {' or '.join(prefix + match for match in matches)}?" if matches else "see --help for those there are"


def _settle_model_args(values: dict[str, Any], notes: list[str]) -> None:
    """Take out of model_args what is not for the model's loader: what we ignore, refuse, or have a flag for."""
    model_args = values.setdefault("model_args", {})
    check_not_loaded(model_args)
    for key in TEXT_MODEL_ARGS:
        if isinstance(model_args.get(key), os.PathLike):
            model_args[key] = os.fspath(model_args[key])
    for key, why in _REFUSED_MODEL_ARGS.items():
        value = model_args.pop(key, None)
        if value:
            raise UserError(f"model_args {key} is not supported yet: {why}")
    for key in _OPTIONAL_MODEL_ARGS:
        if model_args.get(key, ...) is None:
            del model_args[key]
    for key in _SWITCHED_MODEL_ARGS:
        if not _to_switch(f"model_args {key}", model_args.get(key) or False):
            model_args.pop(key, None)
    if "device" in model_args:
        raise UserError(f"model_args device is not supported: use --device {model_args['device']}")
    backend = model_args.pop("backend", "default")
    if backend not in ("default", "causal", "seq2seq"):
        raise UserError(f"model_args backend must be default, causal or seq2seq, got {backend}")
    if backend != "default":
        model_args["backend"] = backend
    for key in TEXT_MODEL_ARGS:
        if isinstance(model_args.get(key), int) and not isinstance(model_args[key], bool):  # of YAML, JSON or Python
            model_args[key] = str(model_args[key])
        if not isinstance(model_args.get(key), (str, type(None))):
            example = f"{key}='\"123\"' keeps a number as text"
            raise UserError(f"model_args {key} must be text, got {one_line(repr(model_args[key]), 80)} ({example})")
    if "trust_remote_code" in model_args:
        trusted = _to_switch("model_args trust_remote_code", model_args.pop("trust_remote_code") or False)
        values["trust_remote_code"] = trusted or values.get("trust_remote_code", False)
    for key, why in _IGNORED_MODEL_ARGS.items():
        if key in model_args:
            notes.append(f"model_args {key} is ignored: {why}")
            del model_args[key]


def _settle_layout(values: dict[str, Any]) -> None:
    """lm_eval's parallelize=True and tp_plan=auto are layouts: layers over as few GPUs as will do, matrices over a node's."""
    model_args = values.get("model_args", {})
    wishes = {"--layout": values.get("layout")}
    if _to_switch("model_args parallelize", model_args.pop("parallelize", None) or False):
        wishes["parallelize=True"] = layout.LAYERS
    if plan := model_args.pop("tp_plan", None):
        if plan != "auto":
            raise UserError(f"model_args tp_plan must be auto, got {plan}: the model brings its own plan")
        wishes["tp_plan=auto"] = layout.TENSOR
    given = {name: wish for name, wish in wishes.items() if wish is not None}
    if len(set(given.values())) > 1:
        raise UserError(f"{' and '.join(given)} ask for different layouts: give one of them")
    if given:
        values["layout"] = next(iter(given.values()))


def _settle_what_to_evaluate(values: dict[str, Any], notes: list[str]) -> None:
    """What is not given is the embedded default, and said to be: nobody should take the demo's scores for their model's."""
    model_args = values["model_args"]
    _refuse_misspelt(model_args)
    if "pretrained" not in model_args:
        model_args["pretrained"] = "demo"
        notes.append("no pretrained= is in --model_args: this evaluates the small demo model that ships with ddp_eval")
    if not model_args["pretrained"]:
        raise UserError("model_args pretrained must be a path or a name, got nothing")
    if "tasks" not in values:
        values["tasks"] = ["demo"]
        notes.append("no --tasks are given: this evaluates the small demo tasks that ship with ddp_eval")


def _refuse_misspelt(model_args: Iterable[str]) -> None:
    """The loader knows many more names than we do, so only what is nearly one of ours is taken for a slip."""
    for key in model_args:
        close = difflib.get_close_matches(key, _KNOWN_MODEL_ARGS, n=1, cutoff=0.8)
        if close and close[0] != key:
            raise UserError(f"model_args {key} is unknown: did you mean {close[0]}?")


def _to_text(flag: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{flag} must be text, got {value!r}")
    if not value.strip():
        raise UserError(f"{flag} must not be empty: leave it out instead")
    return value


def _to_directory(flag: str, value: Any) -> str:
    path = _to_text(flag, value)
    if path.endswith(".json"):
        raise UserError(f"{flag} must be a directory, got {path}: results.json is written into it")
    return path


def _to_instruction(flag: str, value: Any) -> str | None:
    return _to_text(flag, value) if value != "" else None


def _to_model(flag: str, value: Any) -> str:
    name = _to_text(flag, value)
    return _MODEL_ALIASES.get(name, name)


def _to_count(flag: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{flag} must be a whole number, got {value}") from None


def _to_number(flag: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{flag} must be a number, got {value}") from None


def _to_switch(flag: str, value: Any) -> bool:
    text = str(value).lower()
    if text in ("true", "yes", "1"):
        return True
    if text in ("false", "no", "0"):
        return False
    raise UserError(f"{flag} must be true or false, got {value}")


def _to_template(flag: str, value: Any) -> bool | str:
    """True: the tokenizer's own template; text: the template of that name. lm_eval takes the words true and false for names."""
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    return _to_text(flag, value)


def _to_cache(flag: str, value: Any) -> str | None:
    """lm_eval's three words, YAML's true and false, and the mapping that lm_eval makes of a word: off unless one says true.

    Config checks the word.
    """
    if isinstance(value, dict):
        words = {"delete_requests_cache": "delete", "rewrite_requests_cache": "refresh", "cache_requests": "true"}
        if unknown := [name for name in value if name not in words]:
            raise UserError(f"{flag} has the unknown key {unknown[0]}: there are {', '.join(words)}")
        given = (word for name, word in words.items() if _to_switch(f"{flag} {name}", value.get(name) or False))
        return next(given, None)
    return None if value is False else "true" if value is True else _to_text(flag, value)


def _to_tasks(flag: str, value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{flag} must be task names, got {value!r}")
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    if not names:
        raise UserError(f"{flag} must name at least one task")
    return names


def _to_samples(flag: str, value: Any) -> Any:
    """A mapping, JSON, or the path of a JSON file. What the mapping holds is checked by Config."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return read_json_object(flag, value)
    try:
        return read_back.read_json(_to_text(flag, value))
    except UserError as error:
        raise UserError(f"{flag} must be a JSON object or the path of a file with one: {error}") from None


def _to_seed(flag: str, value: Any) -> tuple[int | None, ...]:
    """One value for all four generators (random, numpy, torch, few-shot), or four, or three and the default of the fourth."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    seeds = [_to_one_seed(flag, item) for item in items]
    if len(seeds) == 1:
        seeds *= len(DEFAULT_SEED)
    if len(seeds) == len(DEFAULT_SEED) - 1:
        seeds.append(DEFAULT_SEED[-1])
    if len(seeds) != len(DEFAULT_SEED):
        raise UserError(f"{flag} must be 1 or 4 values (random, numpy, torch, few-shot), got {len(seeds)}")
    return tuple(seeds)


def _to_one_seed(flag: str, item: Any) -> int | None:
    if item is None or str(item).strip().lower() == "none":
        return None
    try:
        if isinstance(item, (bool, float)):
            raise ValueError
        return int(item)
    except (TypeError, ValueError):
        raise UserError(f"{flag} must be whole numbers or None, got {item}") from None


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: how it is spelled, how its raw value becomes a Config value, and what --help says of it.

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
    "model": _Flag("model", _to_model, "what runs the model (default: hf, which is transformers)", "NAME", "-M"),
    "model_args": _Flag(
        "model",
        read_args,
        "pretrained=PATH_OR_NAME, and revision, dtype, tokenizer, max_length, attn_implementation, add_bos_token, "
        "prefix_token_id, ... as key=value pairs or a JSON object (default: pretrained=demo)",
        "KEY=VALUE",
        "-a",
        "+",
    ),
    "device": _Flag("model", _to_text, "cuda or cpu (default: a GPU for each local rank, else cpu)", "DEVICE"),
    "trust_remote_code": _Flag("model", _to_switch, "run Python code of the model or data set (default: off)"),
    "tasks": _Flag("tasks", _to_tasks, "task or group names, YAML files, globs of them (default: demo)", "TASK", "-t", "+"),
    "include_path": _Flag("tasks", _to_text, "one more directory of task files", "DIR"),
    "limit": _Flag("tasks", _to_number, "documents per task, or a fraction of them below 1 (default: all)", "N", "-L"),
    "samples": _Flag("tasks", _to_samples, 'documents to take: {"TASK": [0, 5]} or a file (default: all)', "JSON", "-E"),
    "metadata": _Flag(
        "tasks", read_args, "settings that some tasks ask for, such as max_seq_lengths=[4096]", "KEY=VALUE", "", "+"
    ),
    "confirm_run_unsafe_code": _Flag("tasks", _to_switch, "allow tasks that run the code a model writes (default: off)"),
    "cache_requests": _Flag(
        "prompts",
        _to_cache,
        "true and refresh change nothing, prompts are built in every run; delete empties lm_eval's cache of them (default: off)",
        "true|refresh|delete",
        "",
        "?",
    ),
    "num_fewshot": _Flag("prompts", _to_count, "examples before each question (default: the task's own)", "N", "-f"),
    "apply_chat_template": _Flag(
        "prompts", _to_template, "use the tokenizer's chat template, or that NAME (default: off)", "NAME", "", "?"
    ),
    "system_instruction": _Flag("prompts", _to_instruction, "system message before every prompt (default: none)", "TEXT"),
    "fewshot_as_multiturn": _Flag(
        "prompts", _to_switch, "examples as turns of the chat (default: true with a chat template)", "BOOL", "", "?"
    ),
    "gen_kwargs": _Flag("prompts", read_args, "generation settings over the task's own, such as top_p=0.9", "KEY=VALUE", "", "+"),
    "output_path": _Flag("output", _to_directory, "run directory for results and scores (default: only the table)", "DIR", "-o"),
    "overwrite": _Flag("output", _to_switch, "replace the run that --output_path already holds (default: refuse)"),
    "fresh": _Flag("output", _to_switch, "start over, whatever --output_path holds of this package (default: resume)"),
    "log_samples": _Flag("output", _to_switch, "also write every document with prompt and answer (default: off)", "", "-s"),
    "predict_only": _Flag("output", _to_switch, "write the answers and skip the metrics; implies --log_samples", "", "-x"),
    "write_out": _Flag("output", _to_switch, "print the prompts of the first documents (default: off)", "", "-w"),
    "show_config": _Flag("output", _to_switch, "print all results with the settings of every task (default: off)"),
    **{
        name: _Flag("output", read_args, help, "KEY=VALUE", "", "+")
        for name, help in {
            "wandb_args": "log to Weights & Biases, with these arguments of wandb.init (default: no)",
            "wandb_config_args": "more of what wandb records as the run's config",
            "trackio_args": "log to Trackio, with these arguments of trackio.init (default: no)",
            "hf_hub_log_args": "upload to the Hugging Face hub: push_results_to_hub=True,hub_results_org=NAME, ... (default: no)",
        }.items()
    },
    "config": _Flag("execution", _to_text, "YAML file of flags by name; flags given here win over it", "FILE", "-C"),
    "seed": _Flag(
        "execution",
        _to_seed,
        "of random, numpy, torch, few-shot; one for all; None: unseeded (default: 0,1234,1234,1234)",
        "INT[,INT...]",
    ),
    "bootstrap_iters": _Flag("execution", _to_count, "resamplings for a bootstrapped standard error (default: 100000)", "N"),
    "layout": _Flag(
        "execution",
        _to_text,
        "how the model lies over the ranks: replicas (a copy on each), tensor:K or layers:K (a copy on each K ranks), "
        "auto (by what fits) or measure (try what fits on some of the work) (default: auto)",
        "LAYOUT",
    ),
    "max_pack_tokens": _Flag(
        "execution", _to_count, "most tokens in one pack; a longer request gets one alone (default: chosen by the planner)", "N"
    ),
    "numerics": _Flag(
        "execution",
        _to_text,
        "fast (packs, the checkpoint's precision), fp32 (packs in float32), alone (one forward for each input: no neighbour "
        "changes a bit of it); each gives the same bits on any number of ranks (default: fast)",
        "LEVEL",
    ),
    "load": _Flag(
        "execution",
        _to_text,
        "each rank reads the weights from disk, or rank 0 reads and sends them (default: disk)",
        "{disk,broadcast}",
    ),
    "preflight": _Flag("execution", _to_switch, "only check the nodes, and say which is bad (several nodes: always checked)"),
    "timeout": _Flag(
        "execution", _to_number, "most seconds that a rank may take for a pack or another step (default: 1800)", "S"
    ),
    "no_packing": _Flag("execution", _to_switch, "run padded rows, sharing no prefixes (default: off)"),
}
