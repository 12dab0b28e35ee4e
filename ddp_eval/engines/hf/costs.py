"""What a model costs on a device: operations, and memory of attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from ddp_eval.engines.hf import layer_configs
from ddp_eval.engines.ops import onednn_linear
from ddp_eval.engines.ops import tree_attention as blocks

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call the number of experts


# flex_attention works on tiles of this many tokens; equal lengths also spare its compiler.
FLEX_STEP = 128


# Of eager attention, for each head and each pair of tokens of a pack: scores, and their softmax in float32 on its way back.
SCORE_BYTES = 8


_MOST_SCORE_BYTES = {"cuda": 2**32, "cpu": 2**30}  # in one layer


def pad_lengths(implementation: str | None, lengths: onednn_linear.Count) -> onednn_linear.Count:
    """The lengths that packs of so many tokens are fed with, by their attention implementation."""
    if implementation == "flex_attention":
        return -(-lengths // FLEX_STEP) * FLEX_STEP
    return onednn_linear.to_grid(lengths) if implementation == blocks.NAME else lengths


def largest_pack(config: Any, tree_attention: str, device: torch.device) -> int:
    """Tokens of the largest pack worth planning; a longer request still gets a pack of its own.

    By the model's shape and the kind of device alone, so that every machine cuts alike. Dense masks on the CPU pay L², the
    scores of eager attention take heads x L².
    """
    most = 8192 if device.type == "cuda" or tree_attention == blocks.NAME else 4096
    if tree_attention != "eager":
        return most
    heads = int(layer_configs.read(config, "num_attention_heads", 1))
    pairs = _MOST_SCORE_BYTES["cuda" if device.type == "cuda" else "cpu"] // (SCORE_BYTES * heads)
    return min(most, math.isqrt(pairs))


def flops_of_pair_and_read(config: Any) -> tuple[float, float]:
    """Floating-point operations of a token that sees another, in all layers, and of the head at one read."""
    hidden = int(layer_configs.read(config, "hidden_size", 1))
    widths = [heads * head_dim for heads, _, head_dim in head_shapes(config)]
    return 4.0 * sum(widths), 2.0 * hidden * int(config.vocab_size)


def head_shapes(config: Any) -> list[tuple[int, int, int]]:
    """(heads, key-value heads, head size) of every layer; of one layer where the config does not say how many there are."""
    hidden = int(layer_configs.read(config, "hidden_size", 1))
    if not layer_configs.num_layers(config):
        heads = int(layer_configs.read(config, "num_attention_heads", 1))
        return [(heads, heads, hidden // heads)]
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    each = zip(*(layer_configs.read_each(config, name) for name in names), strict=True)
    shapes = [(heads or 1, kv_heads or heads or 1, head_dim or hidden // (heads or 1)) for heads, kv_heads, head_dim in each]
    return [(int(heads), int(kv_heads), int(head_dim)) for heads, kv_heads, head_dim in shapes]


def active_parameters(model: Any, config: Any) -> float:
    """Weights that one token's forward multiplies with: all but embeddings and head, experts by the share that is routed to.

    Routed experts lie below `experts` (Mixtral, Qwen 2, 3, DeepSeek, Llama 4, gpt-oss; transformers 5.23); `shared_expert`,
    `shared_experts` and the router run for every token. model: the whole of it, or a module of one of its layers.
    """
    experts = next((count for key in _EXPERT_COUNTS if (count := layer_configs.read(config, key))), None)
    routed = layer_configs.read(config, "num_experts_per_tok")
    share = routed / experts if experts and routed else 1.0
    has_ends = hasattr(model, "get_input_embeddings")
    ends = (model.get_input_embeddings(), model.get_output_embeddings()) if has_ends else ()
    skipped = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    counted = [(name, weight.numel()) for name, weight in model.named_parameters() if id(weight) not in skipped]
    return float(sum(size * (share if "experts" in name.split(".") else 1.0) for name, size in counted))
