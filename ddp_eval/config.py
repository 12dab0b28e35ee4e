"""The settings of one evaluation.

A `Config` is plain data: it is built by `cli/flags.py` (or by a caller of the Python API), checked here, and goes into the
manifest as it is. It knows nothing of ranks, models or tasks. Flags that lm_eval has too keep lm_eval's names and meanings.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ddp_eval import layout
from ddp_eval.errors import UserError, one_line
from ddp_eval.system.text import read_count
from ddp_eval.values import read_args

# Seeds of random, numpy, torch and few-shot sampling: lm_eval's defaults.
DEFAULT_SEED = (0, 1234, 1234, 1234)

# Where else results go; of no matter to what they are.
TRACKER_FLAGS = ("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args")
CACHE_REQUESTS = ("true", "refresh", "delete")

# model_args about prompts and their tokens: what loads weights knows none of them.
PROMPT_ARGS = (
    "max_length", "add_bos_token", "prefix_token_id", "use_fast_tokenizer", "chat_template_args", "enable_thinking",
    "think_end_token",
)  # fmt: skip

# Settings by name that are passed on to other libraries, and written down.
_WRITTEN_ARGS = ("model_args", "metadata", "gen_kwargs")


@dataclasses.dataclass(frozen=True)
class EngineName:
    """What --model may name.

    module: holds the engine's `SPEC` (engines/registry.py), and is imported when a run asks for it.
    packages: that it needs beside this package's own; a run directory records their versions.
    batches_itself: it forms its own batches of what it is given, so that no request can have a forward to itself.
    stops_behind_thinking: with think_end_token, a task's stop strings are looked for behind the thinking alone, as in lm_eval's
        backend of that name.
    """

    module: str
    packages: tuple[str, ...] = ()
    batches_itself: bool = False
    stops_behind_thinking: bool = False


# A new engine: its module, a line here, and its packages as an extra in setup.cfg.
ENGINES = {
    "hf": EngineName("ddp_eval.engines.hf.load"),
    "vllm": EngineName("ddp_eval.engines.vllm", packages=("vllm",), batches_itself=True, stops_behind_thinking=True),
}

# fast: packs, in the checkpoint's precision. fp32: packs, weights and arithmetic in float32. alone: one forward for each input.
NUMERICS = ("fast", "fp32", "alone")

# Names of secrets, but for tokens of a vocabulary: eos_token, prefix_token_id, ...
_SECRET = re.compile(r"(^|_)token(_|$)|secret|passw|credential|api_?key")
_NO_SECRET = re.compile(r".*token_(id|ids|index)|(.*_)?(bos|eos|pad|unk|sep|cls|mask|start|end|prefix|image|audio|video)_token")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what is evaluated and where the outcome goes.

    Raises UserError, naming the flag, when a value cannot be meant.
    """

    model: str = "hf"
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks: list[Any] = dataclasses.field(default_factory=list)
    num_fewshot: int | None = None
    limit: float | None = None
    samples: dict[str, list[int]] | None = None
    device: str | None = None
    include_path: str | None = None
    output_path: str | None = None
    overwrite: bool = False
    fresh: bool = False
    log_samples: bool = False
    predict_only: bool = False
    write_out: bool = False
    show_config: bool = False
    cache_requests: str | None = None
    apply_chat_template: bool | str = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: tuple[int | None, int | None, int | None, int | None] = DEFAULT_SEED
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    bootstrap_iters: int = 100_000
    packing: bool = True
    max_pack_tokens: int | None = None
    numerics: str = "fast"
    layout: str = "auto"
    load: str = "disk"
    preflight: bool = False
    timeout: float = 1800.0  # seconds
    wandb_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    wandb_config_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    trackio_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    hf_hub_log_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int | str | None = dataclasses.field(default=1, compare=False)  # of no effect: lm_eval's results repeat it

    @property
    def loader_args(self) -> dict[str, Any]:
        """model_args as the model's loader takes them: with the flag that allows a checkpoint's own code, and the precision."""
        trusted = {"trust_remote_code": True} if self.trust_remote_code else {}
        precise = {"dtype": "float32"} if self.numerics == "fp32" else {}
        return {**self.model_args, **trusted, **precise}

    @property
    def model_name(self) -> str | None:
        """What results are filed under, by lm_eval's rule: the adapter, else the model. None for one that was passed in."""
        name = self.model_args.get("peft") or self.model_args.get("pretrained")
        return str(name) if name else None

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as a run directory keeps them: without those of trackers, which may hold what is private."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in (*TRACKER_FLAGS, "batch_size")}

    def __post_init__(self) -> None:
        _convert(self)
        for check in _CHECKS:
            check(self)


def _convert(config: Config) -> None:
    """Fill in what other fields decide, and read what a caller of the API may give as text or as one number."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str) and field.default_factory is dict:  # as lm_eval takes them
            object.__setattr__(config, field.name, read_args(f"--{field.name}", value))
    if isinstance(config.seed, int):
        object.__setattr__(config, "seed", (config.seed,) * len(DEFAULT_SEED))
    if config.fewshot_as_multiturn is None and config.apply_chat_template:
        object.__setattr__(config, "fewshot_as_multiturn", True)


def _check_model(config: Config) -> None:
    if config.model not in ENGINES:
        *others, last = ENGINES
        raise UserError(f"--model must be {', '.join(others)} or {last}, got {config.model}")
    if ENGINES[config.model].batches_itself and config.numerics == "alone":
        raise UserError(
            f"--numerics alone is not for --model {config.model}, which batches requests as they come: give --model hf"
        )


def _check_mappings(config: Config) -> None:
    for flag in _WRITTEN_ARGS:
        value = getattr(config, flag)
        if not isinstance(value, Mapping):
            raise UserError(f"--{flag} must be a mapping, or key=value pairs, got {one_line(repr(value), 80)}")


def _check_names(config: Config) -> None:
    check_not_loaded(config.model_args)


def check_not_loaded(model_args: Mapping[str, Any]) -> None:
    """Raise UserError where a model or tokenizer object stands for its name. lm_eval's HFLM takes them; here ranks load."""
    for name in ("pretrained", "tokenizer"):
        value = model_args.get(name)
        if not isinstance(value, (str, int, float, os.PathLike, type(None))):
            raise UserError(
                f"model_args {name} must be a path or a name, got a {type(value).__name__} object: "
                "ddp_eval.evaluate(model, tokenizer, tasks=[...]) evaluates what is loaded already"
            )


def _check_secrets(config: Config) -> None:
    for flag in _WRITTEN_ARGS:
        for name in _secrets_in(getattr(config, flag)):
            raise UserError(
                f"--{flag} {name} looks like a secret, and the flags of a run are written down: "
                "log in with hf auth login or set HF_TOKEN, so that it is written nowhere"
            )


def _secrets_in(values: Mapping[str, Any]) -> Iterator[str]:
    """Names in `values`, and in mappings within, that have a value and by their name hold a secret."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _secrets_in(value)
        plain = str(name).lower().replace("-", "_")
        if value is not None and not isinstance(value, bool) and _SECRET.search(plain) and not _NO_SECRET.fullmatch(plain):
            yield str(name)


def _check_numerics(config: Config) -> None:
    level, dtype = config.numerics, config.model_args.get("dtype", "auto")
    if level not in NUMERICS:
        raise UserError(f"--numerics must be {', '.join(NUMERICS[:-1])} or {NUMERICS[-1]}, got {level}")
    if level == "fp32" and str(dtype).removeprefix("torch.") not in ("auto", "float32"):
        raise UserError(f"--numerics fp32 and dtype={dtype} exclude each other: give one of them")
    if level == "alone" and config.max_pack_tokens is not None:
        raise UserError("--numerics alone and --max_pack_tokens exclude each other: every input has a forward of its own")


def _check_load(config: Config) -> None:
    if config.load not in ("disk", "broadcast"):
        raise UserError(f"--load must be disk or broadcast, got {config.load}")


def _check_counts(config: Config) -> None:
    for flag, minimum in {"num_fewshot": 0, "max_pack_tokens": 1, "bootstrap_iters": 0}.items():
        value = getattr(config, flag)
        if value is not None and value < minimum:
            raise UserError(f"--{flag} must be {minimum} or more, got {value}")
    for name, minimum in {"max_length": 1, "max_model_len": 2, "max_gen_toks": 1, "prefix_token_id": 0}.items():
        value = config.model_args.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise UserError(f"{name} in --model_args must be a whole number of {minimum} or more, got {value}")


def _check_thinking(config: Config) -> None:
    """lm_eval's rules: a model that is to think must have its thoughts cut off, or no answer would be found."""
    end = read_think_end(config.model_args)
    wanted, more = config.model_args.get("enable_thinking"), config.model_args.get("chat_template_args")
    if not isinstance(wanted, (bool, type(None))):
        raise UserError(f"model_args enable_thinking must be true or false, got {wanted}")
    if wanted and end is None:
        raise UserError("model_args enable_thinking=True needs think_end_token=TEXT_OR_ID, such as think_end_token=</think>")
    if not isinstance(more, (dict, type(None))):
        raise UserError(f"model_args chat_template_args must be a mapping, got {more}")


def _check_trackers(config: Config) -> None:
    if config.wandb_config_args and not config.wandb_args:
        raise UserError("--wandb_config_args needs --wandb_args, such as --wandb_args project=NAME")
    if "token" in config.hf_hub_log_args:
        raise UserError("--hf_hub_log_args must not hold a token: set HF_TOKEN, or log in with hf auth login")
    if "output_path" in config.hf_hub_log_args:
        raise UserError("--hf_hub_log_args must not hold an output_path: give --output_path")


def _check_cache_requests(config: Config) -> None:
    if config.cache_requests not in (None, *CACHE_REQUESTS):
        raise UserError(
            f"--cache_requests must be {', '.join(CACHE_REQUESTS[:-1])} or {CACHE_REQUESTS[-1]}, got {config.cache_requests}"
        )


def _check_seed(config: Config) -> None:
    """numpy and torch take no seed outside of these bounds; random and few-shot sampling take any."""
    seed = config.seed
    if len(seed) != len(DEFAULT_SEED):
        raise UserError(f"--seed must be {len(DEFAULT_SEED)} values (random, numpy, torch, few-shot), got {len(seed)}")
    bounds = {1: ("numpy", 0, 2**32 - 1), 2: ("torch", -(2**63), 2**64 - 1)}
    for slot, (name, minimum, maximum) in bounds.items():
        value = seed[slot]
        if value is not None and not minimum <= value <= maximum:
            raise UserError(f"--seed must be {minimum} to {maximum} for {name}, got {value}")


def _check_layout(config: Config) -> None:
    layout.check_layout(config.layout)


def _check_timeout(config: Config) -> None:
    if not (math.isfinite(config.timeout) and config.timeout >= 1):
        raise UserError(f"--timeout must be 1 or more seconds, got {config.timeout:g}")


def _check_fresh(config: Config) -> None:
    if config.fresh and not config.output_path:
        raise UserError("--fresh needs --output_path DIR, where the work to be forgotten is")


def _check_limit(config: Config) -> None:
    limit = config.limit
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise UserError(f"--limit must be more than 0 (documents per task, or a fraction below 1), got {limit:g}")
    if limit is not None and limit >= 1 and limit != int(limit):
        raise UserError(f"--limit must be a whole number or a fraction below 1, got {limit:g}")


def _check_samples(config: Config) -> None:
    samples = config.samples
    if samples is None:
        return
    if not isinstance(samples, dict) or not samples:
        raise UserError('--samples must be a JSON object such as {"task": [0, 5]}, or the path of a file with one')
    for task, indices in samples.items():
        if not isinstance(indices, list) or not indices:
            raise UserError(f"--samples must name at least one document for task {task}")
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices):
            raise UserError(f"--samples must list whole document numbers from 0 for task {task}, got {indices}")
    if config.limit is not None:
        raise UserError("--samples and --limit exclude each other: give one of them")


def _check_multiturn(config: Config) -> None:
    if config.fewshot_as_multiturn and not config.apply_chat_template:
        raise UserError("--fewshot_as_multiturn needs --apply_chat_template: turns exist only in a chat template")


def _check_paths(config: Config) -> None:
    for name in ("output_path", "include_path"):
        if "\0" in str(getattr(config, name) or ""):
            raise UserError(f"--{name} must not hold a NUL character, which no path can")


# In the order in which they run: where several settings are wrong, the first is named.
_CHECKS = (
    _check_model, _check_paths, _check_mappings, _check_names, _check_secrets, _check_numerics, _check_load, _check_counts,
    _check_thinking, _check_trackers, _check_cache_requests, _check_seed, _check_layout, _check_timeout, _check_fresh,
    _check_limit, _check_samples, _check_multiturn,
)  # fmt: skip


ThinkEnd = str | int | None


def read_think_end(model_args: Mapping[str, Any]) -> ThinkEnd:
    """The end of thinking: a token id (digits count as one), a string, or None. Raises UserError for anything else."""
    end = model_args.get("think_end_token")
    if isinstance(end, str):
        count = read_count(end)
        return count if count is not None else end or None
    if end is not None and (isinstance(end, bool) or not isinstance(end, int)):
        raise UserError(f"model_args think_end_token must be a string or a token id, got {end}")
    return end
