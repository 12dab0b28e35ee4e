"""Which attention implementation a model runs with, and the change to another."""

from __future__ import annotations

from typing import Any

import torch

from ddp_eval.engines.ops import masks
from ddp_eval.engines.ops import tree_attention as blocks


def choose_attention(model: Any, plain: str, device: torch.device) -> str:
    """The attention implementation that is fastest for trees, where the model came with sdpa; else what it came with.

    On the CPU: tree_attention.py. On CUDA in half precision: flex_attention, which skips what the tree masks (H100, Llama 8 B in
    bfloat16, packs of 8192 tokens: 58% of the card's matrix rate, as much as plain causal rows; sdpa with a mask 41%).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if plain != "sdpa" or masks.needs_dense_masks(model.config.get_text_config()):
        return plain
    if device.type == "cpu":
        AttentionInterface.register(blocks.NAME, blocks.attend)
        AttentionMaskInterface.register(blocks.NAME, sdpa_mask)
        faster = blocks.NAME
    elif model.dtype != torch.float32 and getattr(model, "_supports_flex_attn", False):
        faster = "flex_attention"
    else:
        return plain
    # A model with attention code of its own keeps what it has, with a warning in transformers' log and no error.
    attend_with(model, faster)
    taken: str = model.config.get_text_config()._attn_implementation
    attend_with(model, plain)
    return taken


def attend_with(model: Any, implementation: str) -> None:
    """Have the language model run with this implementation. Towers beside it keep their own, which may be all that they can."""
    wanted: Any = implementation
    for key in reversed(_path_to(model.config.get_text_config(), model.config) or []):
        wanted = {"": implementation, key: wanted}
    model.set_attn_implementation(wanted)


def _path_to(config: Any, within: Any) -> list[str] | None:
    """The names that lead from one config to a config within it; none for itself, None where it is not there."""
    if config is within:
        return []
    for key in getattr(within, "sub_configs", ()):
        inner = getattr(within, key, None)
        path = _path_to(config, inner) if hasattr(inner, "sub_configs") else None
        if path is not None:
            return [key, *path]
    return None
