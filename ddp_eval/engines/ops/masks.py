"""What a pack's attention may see, in the form that each attention implementation takes.

Pure tensors: one (L,) array `end` says all (packs/plan.py): token i sees token j when j <= i < end[j]. Sliding layers also ask
depth[i] - depth[j] < window, chunked layers that both depths fall into one chunk.

transformers passes a 4-D mask through as it is, but what it must hold differs, and a wrong kind gives wrong numbers with no
error: sdpa takes True where a token is seen, eager adds the mask to the scores, flex_attention takes a BlockMask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
INDEXED = "indexed_attention"  # an indexer chooses some of the tokens that the mask lets a token see
WITHOUT_ATTENTION = ("mlp", "moe", "dense", "sparse")
_WHY_NOT = {
    "linear_attention": "keep a state instead of attending",
    "conv": "mix neighbouring tokens (a short convolution)",
    "hybrid": "keep a state beside attending",
    "hybrid_sliding": "keep a state beside attending",
    "compressed_sparse_attention": "compress runs of tokens by their index",
    "heavily_compressed_attention": "compress runs of tokens by their index",
    "minimax_m3_sparse": "choose blocks of tokens by their index",
}


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What one kind of layer sees beside the tree. window, chunk: tokens, or None."""

    window: int | None = None
    chunk: int | None = None


def layer_rules(config: Any) -> dict[str, LayerRule]:
    """The kinds of attention layer in a transformers config; the key "" stands for a model that takes one mask for all layers.

    Raises ValueError, naming it, for a kind of layer that packs cannot serve.
    """
    if hasattr(config, "attention_layers"):  # GPT-Neo
        raise ValueError("its local layers mask by index, in a buffer of their own")
    kinds = [kind for kind in layer_kinds(config) if kind not in WITHOUT_ATTENTION]
    of_kind = {kind: _config_of(config, kind) for kind in kinds}
    window = getattr(config, "sliding_window", None) if not kinds else None
    if kinds in ([], ["full_attention"]):
        return {"": LayerRule(window=window)}
    rules = {}
    for kind in kinds:
        if kind in ("full_attention", INDEXED):
            rules[kind] = LayerRule()
        elif kind == "sliding_attention":
            rules[kind] = LayerRule(window=of_kind[kind].sliding_window)
        elif kind == "chunked_attention":
            rules[kind] = LayerRule(chunk=of_kind[kind].attention_chunk_size)
        else:
            raise ValueError(f"its layers of the kind {kind} {_WHY_NOT.get(kind, 'are not known to take a tree mask')}")
    return rules


def layer_kinds(config: Any) -> list[str]:
    """The distinct kinds of layer that a transformers config names, in the order of their first layers."""
    return list(dict.fromkeys(getattr(config, "layer_types", None) or []))


def needs_dense_masks(config: Any) -> bool:
    """Whether the model's own code reads its masks, beside its attention function."""
    return INDEXED in layer_kinds(config)


def _config_of(config: Any, kind: str) -> Any:
    """The config of all layers of a kind. Raises ValueError where they differ."""
    return config.per_layer_config[kind] if getattr(config, "is_heterogeneous", False) else config


def visible(
    depth: torch.Tensor,
    end: torch.Tensor,
    rule: LayerRule,
    queries: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """(Q, K) bool: whether each query token sees each key token.

    depth, end: (L,) integers on one device. queries, keys: positions; all L of them if not given.
    """
    index = torch.arange(len(end), device=end.device)
    rows = index if queries is None else queries
    columns = index if keys is None else keys
    return _sees(depth, end, rule)(None, None, rows[:, None], columns[None, :])


def _sees(depth: torch.Tensor, end: torch.Tensor, rule: LayerRule) -> Callable[..., torch.Tensor]:
    """The rule as a function of (batch, head, i, j), the form that flex_attention takes."""

    def sees(batch: Any, head: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen = (j <= i) & (i < end[j])
        if rule.window is not None:
            seen = seen & (depth[i] - depth[j] < rule.window)
        if rule.chunk is not None:
            seen = seen & (depth[i] // rule.chunk == depth[j] // rule.chunk)
        return seen

    return sees


def make_mask(
    implementation: str, depth: torch.Tensor, end: torch.Tensor, rules: dict[str, LayerRule], dtype: torch.dtype
) -> Any:
    """What to pass to a transformers model as `attention_mask`: one mask, or {layer type: mask}.

    implementation: the model's attention implementation, one of IMPLEMENTATIONS.
    dtype: the model's, for the additive mask of eager attention.
    """
    masks = {kind: _one_mask(implementation, depth, end, rule, dtype) for kind, rule in rules.items()}
    return masks.get("", masks)


def _one_mask(implementation: str, depth: torch.Tensor, end: torch.Tensor, rule: LayerRule, dtype: torch.dtype) -> Any:
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        length = len(end)
        return create_block_mask(_sees(depth, end, rule), None, None, length, length, device=end.device)
    seen = visible(depth, end, rule)[None, None]
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
    raise ValueError(f"attention implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation}")
