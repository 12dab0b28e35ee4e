"""Values of a model's config that no model can have: refused in a sentence, before a layer is built or a byte is allocated."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ddp_eval.engines.hf import layer_configs
from ddp_eval.errors import UserError, one_line
from ddp_eval.system import read_back

# What configs call a model's sizes, and what these can be. The largest are far beyond any model that is known.
_RANGES: tuple[tuple[tuple[str, ...], int, int], ...] = (
    (("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1, 4096),
    (("encoder_layers", "decoder_layers", "num_decoder_layers"), 0, 4096),
    (("vocab_size",), 1, 2**28),
    (("hidden_size", "n_embd", "d_model"), 1, 2**20),
    (("num_attention_heads", "n_head", "n_heads"), 1, 2**16),
    (("num_key_value_heads", "head_dim"), 1, 2**16),
    (("intermediate_size", "n_inner", "d_ff", "ffn_dim"), 0, 2**26),
)
# What lm_eval reads a model's window from, in its order.
WINDOWS = ("n_positions", "max_position_embeddings", "n_ctx")
_UNTURNED = "qk_nope_head_dim"  # what of a head has no rotary positions
_WEIGHTS = (".safetensors", ".bin")
_MAX_FILE_BYTES = 16 * 2**20
_PER_BYTE = 8  # weights of a quantised checkpoint, at most; of any other, one


def check_file(path: str, name: str, overrides: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json whose sizes cannot be meant: transformers divides by some of them as it reads it.

    overrides: fields that --model_args give in place of the file's. A file that is cut or holds no object is refused, too:
    transformers' own words for one do not name it.
    """
    fields = read_back.read_json(path, read_back.an_object, max_bytes=_MAX_FILE_BYTES, unique_keys=False)
    _check_sizes({**fields, **overrides}, name)


def check_config(config: Any, name: str, max_length: int | None) -> None:
    """Raise UserError for sizes, or a window, that no model can have. max_length: the window that was given, if one was."""
    for part in _parts(config):
        _check_sizes(_Fields(part), name)
    if max_length:
        return
    text = getattr(config, "text_config", None) or config
    field = next((field for field in WINDOWS if getattr(text, field, None) is not None), None)
    if field is not None:
        _check_window(getattr(text, field), f"the config of {name} has {field}=")


def _check_window(value: Any, has: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{has}{one_line(value, 60)}, and a window is 1 token or more: give max_length=N in --model_args")


def check_size(count_weights: Callable[[], int], config: Any, directory: str, name: str) -> None:
    """Raise UserError where a config describes far more weights than the checkpoint's files hold: they would take memory first.

    count_weights: of the model that the config describes, which it builds, though on no device; asked only where an estimate by
        the config's sizes is beyond what the files can hold.
    """
    stored = _stored_bytes(directory)
    most = stored * (_PER_BYTE if getattr(config, "quantization_config", None) else 1)
    if not stored or _estimate(config) <= most:
        return
    try:
        described = count_weights()
    except UserError:  # the loader will say more
        return
    if described > most:
        raise UserError(
            f"cannot load the model {name}: its config.json describes {described:,} weights, and its files of weights have "
            f"{stored:,} bytes: are they whole, and of this model?"
        )


def _parts(config: Any) -> Iterator[Any]:
    """The config itself and those of its language models."""
    yield config
    for name in ("text_config", "encoder", "decoder"):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            yield part


class _Fields(dict[str, Any]):
    """What a config object calls its sizes, by any of their names."""

    def __init__(self, config: Any) -> None:
        names = [_UNTURNED, *(name for names, _, _ in _RANGES for name in names)]
        super().__init__({name: value for name in names if (value := layer_configs.read(config, name)) is not None})


def _check_sizes(fields: Mapping[str, Any], name: str) -> None:
    for names, least, most in _RANGES:
        for field in names:
            value = fields.get(field)
            if value is None or isinstance(value, (list, tuple)):  # the model's default, or one for each layer
                continue
            if field == "head_dim" and value == 0 and fields.get(_UNTURNED):  # what is turned of a head (GLM-5 Next: nothing)
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UserError(
                    f"the config of {name} has {field}={one_line(value, 60)}, and a model has {least} to {most:,}: "
                    "is its config.json damaged?"
                )


def _estimate(config: Any) -> int:
    """About as many weights as the sizes make, rather too many than too few."""
    text = config.get_text_config()
    sizes = {field: value for field, value in text.to_dict().items() if type(value) is int}

    def size(name: str, pattern: str) -> int:
        mapped = layer_configs.read(text, name)  # by transformers' name, whatever the file calls it
        return max([mapped if type(mapped) is int else 0, *(sizes[field] for field in sizes if re.fullmatch(pattern, field))])

    layers = size("num_hidden_layers", r"\w+_layers") * (2 if getattr(config, "is_encoder_decoder", False) else 1)
    hidden = size("hidden_size", "d_model")
    experts = size("num_experts", r"(num|n)_(local_|routed_)?experts")
    inner = max(size("intermediate_size", r"n_inner|d_ff|\w*ffn_dim"), 4 * hidden)
    inner = max(inner, experts * (size("moe_intermediate_size", "expert_ffn_hidden_size") or inner))
    ends = 2 * size("vocab_size", "vocab_size") + size("max_position_embeddings", "|".join(WINDOWS))
    return layers * (4 * hidden * hidden + 3 * hidden * inner) + ends * hidden


def _stored_bytes(directory: str) -> int:
    """Of the weights in a local directory and those below it; 0 where there are none."""
    try:
        files = [os.path.join(place, name) for place, _, names in os.walk(directory) for name in names if name.endswith(_WEIGHTS)]
        return sum(map(os.path.getsize, files))
    except OSError:
        return 0
