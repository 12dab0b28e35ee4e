"""PEFT adapters (LoRA and its kin) on a transformers model, by lm_eval's rules: its layers stay layers, nothing is merged.

The optional package peft puts an adapter's layers into the model itself, which stays the transformers model that the engine
knows.
Adapters that work by virtual tokens before the input are refused: a prefix tree has no room for them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from ddp_eval.errors import UserError, one_line


def check_adapter(model_args: Mapping[str, Any]) -> None:
    """Raise UserError when the adapter of `peft=` is not there, or peft is not installed. Loads no weight."""
    name = model_args.get("peft")
    if not name:
        return
    looks_local = str(name).startswith(("/", "./", "../", "~")) or os.path.isdir(name)
    if looks_local and not os.path.isfile(os.path.join(os.path.expanduser(name), "adapter_config.json")):
        raise UserError(f"model_args peft={name} holds no adapter: adapter_config.json is missing")
    _import_peft()


def apply_adapter(model: Any, tokenizer: Any, model_args: Mapping[str, Any]) -> Any:
    """The model with the layers of the adapter `peft=` in it. tokenizer: its length is that of the embeddings, as in lm_eval.

    Raises UserError when the adapter cannot be read, is of another model, or needs virtual tokens.
    """
    peft = _import_peft()
    name, revision = os.path.expanduser(str(model_args["peft"])), str(model_args.get("revision", "main"))
    try:
        config = peft.PeftConfig.from_pretrained(name, revision=revision)
    except Exception as error:
        raise UserError(f"cannot read the adapter {name}: {one_line(error)}") from error
    _check_kind(config, f"the adapter {name}")
    if model.config.get_text_config().vocab_size != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            adapted = peft.PeftModel.from_pretrained(model, name, revision=revision)
        except Exception as error:
            raise UserError(f"cannot put the adapter {name} on this model: {one_line(error)}") from error
    lacking = next((str(one.message) for one in said if "missing adapter keys" in str(one.message)), None)
    if lacking:
        raise UserError(f"the adapter {name} lacks weights for this model: {one_line(lacking)}")
    return adapted.get_base_model()


def unwrap(adapted: Any) -> Any:
    """The transformers model inside a PeftModel, its adapter's layers in it. Raises UserError where they need virtual tokens."""
    _check_kind(adapted.active_peft_config, "the model's adapter")
    return adapted.get_base_model()


def _check_kind(config: Any, what: str) -> None:
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(
            f"{what} is of the type {kind}, which puts virtual tokens before the input and is not supported: "
            "evaluate it with lm_eval's own hf model"
        )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"peft= in --model_args needs the package peft, which cannot be imported ({one_line(error)}): pip install '.[peft]'"
        ) from None
    return peft
