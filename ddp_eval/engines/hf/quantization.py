"""Quantised weights: the model_args about them, by transformers' names. transformers itself loads and runs them.

A checkpoint that is quantised says so in its config.json (GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8, …) and needs nothing
here but the package that its kind needs. `load_in_8bit`, `load_in_4bit` and `quantization_config` quantise while loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddp_eval.errors import UserError, one_line

_BITSANDBYTES = ("load_in_8bit", "load_in_4bit")


def is_own(name: str) -> bool:
    """Whether a model_arg is read here, and not handed to `from_pretrained` as it is."""
    return name in (*_BITSANDBYTES, "quantization_config") or name.startswith(("bnb_4bit_", "llm_int8_"))


def is_quantised(model_args: Mapping[str, Any], config: Any) -> bool:
    """Whether the weights are, or are to be, quantised. config: the model's."""
    return bool(getattr(config, "quantization_config", None)) or any(
        model_args.get(name) for name in (*_BITSANDBYTES, "quantization_config")
    )


def check_data_free(model_args: Mapping[str, Any], config: Any) -> None:
    """Raise UserError for a quantisation that looks at examples while it loads: which ones is drawn, and changes the weights."""
    whole = model_args.get("quantization_config")
    data = whole.get("dataset") if isinstance(whole, Mapping) else getattr(whole, "dataset", None)
    if data and not getattr(config, "quantization_config", None):
        raise UserError(
            f"model_args quantization_config with dataset={one_line(data, 50)} would quantise by examples drawn while loading: "
            "quantise the model, save it, and evaluate what you saved"
        )


def loading_options(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is given to quantise while loading; {} where the checkpoint alone decides. Raises UserError."""
    import transformers
    from transformers.quantizers import AutoQuantizationConfig

    settings = {name: value for name, value in model_args.items() if is_own(name) and name != "quantization_config"}
    whole = model_args.get("quantization_config")
    wanted = any(settings.get(name) for name in _BITSANDBYTES)
    if settings and not wanted and any(settings.values()):
        name = next(name for name, value in settings.items() if value)
        raise UserError(f"model_args {name} needs load_in_8bit=True or load_in_4bit=True")
    if whole and wanted:
        raise UserError("model_args quantization_config and load_in_8bit or load_in_4bit exclude each other: give one of them")
    try:
        if whole:
            return {"quantization_config": AutoQuantizationConfig.from_dict(dict(whole)) if isinstance(whole, dict) else whole}
        return {"quantization_config": transformers.BitsAndBytesConfig(**settings)} if wanted else {}
    except Exception as error:
        raise UserError(f"model_args for quantised weights cannot be used: {one_line(error)}") from error
