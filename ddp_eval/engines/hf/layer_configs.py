"""A transformers config layer by layer: what differs between layers has no one value, and reading it raises an error.

Two forms are in use (transformers 5.23): a list with a value for each layer (Gemma 3n's `intermediate_size`), and
`per_layer_config` (Gemma 4's `head_dim`), of which `config.per_layer_config[number]` gives the config of one layer.
"""

from __future__ import annotations

from typing import Any

import torch


def num_layers(config: Any) -> int:
    return int(read(config, "num_hidden_layers", 0))


def modules_of_layers(model: Any) -> list[Any]:
    """The language model's layers, in order; none where they are in no list.

    Qwen2-Audio's encoder, which comes first, has as many layers as its language model.
    """
    count = num_layers(model.config.get_text_config())
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    modules = (module for holder in (decoder, model) if holder is not None for module in holder.modules())
    return list(next((module for module in modules if isinstance(module, torch.nn.ModuleList) and len(module) == count), []))


def read(config: Any, name: str, default: Any = None) -> Any:
    """What all layers have in common. The largest value where they differ; `default` where there is none."""
    try:
        value = getattr(config, name, None)
    except (RuntimeError, ValueError):  # transformers: it differs by layer
        value = [getattr(layer, name, None) for layer in layer_configs(config)]
    if isinstance(value, (list, tuple)):
        value = max((one for one in value if one is not None), default=None)
    return default if value is None else value


def read_each(config: Any, name: str, default: Any = None) -> list[Any]:
    """The value of every layer; `default` where one has none."""
    found: list[Any] = [getattr(layer, name, None) for layer in layer_configs(config)]
    found = [value[number] if _is_list_of(value, found) else value for number, value in enumerate(found)]
    return [default if value is None else value for value in found]


def layer_configs(config: Any) -> list[Any]:
    """The config of every layer: the same one, where they do not differ."""
    layers = num_layers(config)
    if not getattr(config, "is_heterogeneous", False):
        return [config] * layers
    return [config.per_layer_config[number] for number in range(layers)]


def _is_list_of(value: Any, layers: list[Any]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == len(layers)
