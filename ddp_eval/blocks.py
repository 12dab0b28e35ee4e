"""Attention over a pack without paying for what is masked: each block of queries against its ancestors and itself.

A dense (L, L) mask makes a pack of L tokens cost L * L pairs, nearly all of them masked when the tree is wide. But in depth-first
order the tokens of a run [start, stop) see nothing before `start` but the ancestors of `start`: depth[start] tokens. So the
queries of a run need depth[start] + (stop - start) keys, and the pack splits into runs whose pairs add up to little more than
the visible ones:

    ├─ prefix ────────────┤├─ question 1 ─┤├─ question 2 ─┤
    keys of `prefix`:       itself, causal
    keys of `question 1`:   prefix, question 1
    keys of `question 2`:   prefix, question 2

Pure tensors but for `attend`, the function that transformers calls in place of its own (`engines/hf.py` registers it).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.attention import LayerRule, visible

NAME = "ddp_eval_blocks"  # the attention implementation's name towards transformers

# What one more block costs beside its pairs (a kernel's launch, slices, Python), in pairs of one head.
BLOCK_OVERHEAD = 4096
# A run without branches may be split at multiples of this, so that a long one does not pay for its upper triangle.
CHAIN_STEP = 128


@dataclasses.dataclass(frozen=True)
class Block:
    """Queries start … stop-1. keys: (K,) their key positions, or None for a slice of the queries' own; bias: (Q, K) additive
    mask, or None for plain causal attention."""

    start: int
    stop: int
    keys: torch.Tensor | None
    bias: torch.Tensor | None


def split(depth: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Cut a pack into runs so that queries times keys, and what each run costs by itself, add up to the least.

    depth: (L,) as in packing.Pack. Runs end where a branch begins, and within long chains.
    """
    length = len(depth)
    steps = np.diff(depth) != 1
    candidates = np.concatenate([[0], np.flatnonzero(steps) + 1, np.arange(0, length, CHAIN_STEP), [length]])
    edges = np.unique(candidates)
    branches_to = np.concatenate([[0], np.cumsum(steps), [steps.sum()]])  # branch points at or before each position
    heads = depth[edges[:-1]]
    best = np.zeros(len(edges))
    choice = np.zeros(len(edges), dtype=np.int64)
    for index in range(1, len(edges)):
        starts = edges[:index]
        queries = edges[index] - starts
        pairs = queries * (heads[:index] + queries).astype(np.float64)
        # A run that is a chain from a root is plain causal attention, at half the price.
        chain = (heads[:index] == 0) & (branches_to[edges[index] - 1] == branches_to[starts])
        total = best[:index] + np.where(chain, pairs / 2, pairs) + BLOCK_OVERHEAD
        choice[index] = int(total.argmin())
        best[index] = total[choice[index]]
    runs = []
    index = len(edges) - 1
    while index:
        runs.append((int(edges[choice[index]]), int(edges[index])))
        index = int(choice[index])
    return runs[::-1]


def make_blocks(
    runs: list[tuple[int, int]],
    depth: npt.NDArray[Any],
    end: npt.NDArray[Any],
    rule: LayerRule,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Block]:
    """The blocks of a pack under one kind of layer. runs: from `split`; dtype: of the additive masks, the queries' own."""
    index = np.arange(len(depth))
    blocks = []
    for start, stop in runs:
        ancestors = np.flatnonzero(end[:start] > start)
        if rule.window is not None:
            ancestors = ancestors[depth[ancestors] > depth[start:stop].min() - rule.window]
        chain = bool((np.diff(depth[start:stop]) == 1).all())
        short = rule.window is None or stop - start <= rule.window
        if chain and not len(ancestors) and short and rule.chunk is None:
            blocks.append(Block(start, stop, None, None))
            continue
        keys = np.concatenate([ancestors, index[start:stop]])
        at_keys = torch.from_numpy(keys)
        seen = visible(torch.from_numpy(depth), torch.from_numpy(end), rule, torch.arange(start, stop), at_keys)
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).to(device)
        blocks.append(Block(start, stop, at_keys.to(device) if len(ancestors) else None, bias))
    return blocks


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query, key, value: (1, heads, L, head size). Returns (1, L, heads, head size).

    `attention_mask` is the carrier that `carry` made; anything else (no mask, a plain tensor) goes to transformers' sdpa.
    Raises ValueError for variants of attention (score capping, sinks) that this does not compute.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    blocks = getattr(attention_mask, "blocks", None)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("blockwise attention computes plain softmax attention only")
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = torch.empty((1, query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for block in blocks:
        span = slice(block.start, block.stop)
        keys = key[:, :, span] if block.keys is None else key.index_select(2, block.keys)
        values = value[:, :, span] if block.keys is None else value.index_select(2, block.keys)
        result = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, span], keys, values, attn_mask=block.bias, scale=scaling, is_causal=block.bias is None
        )
        output[:, span] = result.transpose(1, 2)
    return output, None


def carry(blocks: list[Block], device: torch.device) -> torch.Tensor:
    """An empty 4-D tensor that brings `blocks` to `attend`: transformers passes 4-D masks through as they are."""
    carrier = torch.empty((1, 1, 0, 0), device=device)
    carrier.blocks = blocks  # type: ignore[attr-defined]
    return carrier
