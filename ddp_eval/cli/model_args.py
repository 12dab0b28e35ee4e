"""model_args: which there are, which are ignored or refused, and why."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any

from ddp_eval import layout
from ddp_eval.cli.flag_values import to_switch
from ddp_eval.config import PROMPT_ARGS, check_not_loaded
from ddp_eval.errors import UserError, one_line
from ddp_eval.values import TEXT_MODEL_ARGS

BY_COST = "packs are sized by cost, not by a batch size"
_BY_MEMORY = "--layout goes by the memory that the GPUs have"
_IGNORED_MODEL_ARGS = {
    "batch_size": BY_COST,
    "max_batch_size": BY_COST,
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
KNOWN_MODEL_ARGS = (
    *TEXT_MODEL_ARGS,
    *PROMPT_ARGS,
    "dtype",
    "attn_implementation",
    "backend",
    "quantization_config",
    *_SWITCHED_MODEL_ARGS,
)


def settle_model_args(values: dict[str, Any], notes: list[str]) -> None:
    """Take out of model_args what is not for the model's loader: what we ignore, refuse, or have a flag for."""
    model_args = values.setdefault("model_args", {})
    check_not_loaded(model_args)
    for key in TEXT_MODEL_ARGS:
        if isinstance(model_args.get(key), os.PathLike):
            model_args[key] = os.fspath(model_args[key])
    _refuse(model_args)
    _drop_what_is_off(model_args)
    if "device" in model_args:
        raise UserError(f"model_args device is not supported: use --device {model_args['device']}")
    _settle_backend(model_args)
    _settle_texts(model_args)
    if "trust_remote_code" in model_args:
        trusted = to_switch("model_args trust_remote_code", model_args.pop("trust_remote_code") or False)
        values["trust_remote_code"] = trusted or values.get("trust_remote_code", False)
    for key, why in _IGNORED_MODEL_ARGS.items():
        if key in model_args:
            notes.append(f"model_args {key} is ignored: {why}")
            del model_args[key]


def _refuse(model_args: dict[str, Any]) -> None:
    for key, why in _REFUSED_MODEL_ARGS.items():
        value = model_args.pop(key, None)
        if value:
            raise UserError(f"model_args {key} is not supported yet: {why}")


def _drop_what_is_off(model_args: dict[str, Any]) -> None:
    for key in _OPTIONAL_MODEL_ARGS:
        if model_args.get(key, ...) is None:
            del model_args[key]
    for key in _SWITCHED_MODEL_ARGS:
        if not to_switch(f"model_args {key}", model_args.get(key) or False):
            model_args.pop(key, None)


def _settle_backend(model_args: dict[str, Any]) -> None:
    backend = model_args.pop("backend", "default")
    if backend not in ("default", "causal", "seq2seq"):
        raise UserError(f"model_args backend must be default, causal or seq2seq, got {backend}")
    if backend != "default":
        model_args["backend"] = backend


def _settle_texts(model_args: dict[str, Any]) -> None:
    for key in TEXT_MODEL_ARGS:
        if isinstance(model_args.get(key), int) and not isinstance(model_args[key], bool):  # of YAML, JSON or Python
            model_args[key] = str(model_args[key])
        if not isinstance(model_args.get(key), (str, type(None))):
            example = f"{key}='\"123\"' keeps a number as text"
            raise UserError(f"model_args {key} must be text, got {one_line(repr(model_args[key]), 80)} ({example})")


def settle_layout(values: dict[str, Any]) -> None:
    """lm_eval's parallelize=True and tp_plan=auto are layouts: layers over as few GPUs as will do, matrices over a node's."""
    model_args = values.get("model_args", {})
    wishes = {"--layout": values.get("layout")}
    if to_switch("model_args parallelize", model_args.pop("parallelize", None) or False):
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


def refuse_misspelt(model_args: Iterable[str]) -> None:
    """The loader knows many more names than we do, so only what is nearly one of ours is taken for a slip."""
    for key in model_args:
        close = difflib.get_close_matches(key, KNOWN_MODEL_ARGS, n=1, cutoff=0.8)
        if close and close[0] != key:
            raise UserError(f"model_args {key} is unknown: did you mean {close[0]}?")
