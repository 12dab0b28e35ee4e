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
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines.ops.masks import LayerRule, visible

NAME = "ddp_eval_blocks"  # the attention implementation's name towards transformers

# What one more block costs beside its pairs (a kernel's launch, slices, Python), in pairs of one head.
BLOCK_OVERHEAD = 4096
# A run without branches may be split at multiples of this, so that a long one does not pay for its upper triangle.
CHAIN_STEP = 64
# torch's causal attention skips the upper triangle in tiles of this many keys: at 512 tokens it computes the whole square (on a
# CPU 40 GFLOP/s of visible pairs at 512 tokens, 55 at 1,024, 66 at 2,048; 82 where all are visible).
CAUSAL_TILE = 512
MASKED = 1.2  # what a pair costs behind an additive mask


@dataclasses.dataclass(frozen=True)
class Block:
    """Queries start … stop-1, or of them only `queries` (Q,). bias: (Q, K) additive mask, or None for plain causal attention.

    keys: their K key positions without the first `held`, which are the first ones of the block before that has any, too;
    None where the keys are a slice, first … stop-1.
    """

    start: int
    stop: int
    first: int
    keys: torch.Tensor | None
    bias: torch.Tensor | None
    queries: torch.Tensor | None = None
    held: int = 0


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
        # A run that is a chain from a root is plain causal attention.
        chain = (heads[:index] == 0) & (branches_to[edges[index] - 1] == branches_to[starts])
        causal = queries * (queries + np.minimum(queries, CAUSAL_TILE)) / 2
        total = best[:index] + np.where(chain, causal, MASKED * pairs) + BLOCK_OVERHEAD
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
    reads: npt.NDArray[Any] | None = None,
) -> list[Block]:
    """The blocks of a pack under one kind of layer.

    runs: from `split`; dtype: of the additive masks, the queries' own; reads: (R,) the queries that are wanted, if not all.
    """
    index = np.arange(len(depth))
    blocks = []
    latest = index[:0]
    for start, stop in runs:
        wanted = None if reads is None else reads[np.searchsorted(reads, start) : np.searchsorted(reads, stop)]
        if wanted is not None and not len(wanted):
            continue
        ancestors = np.flatnonzero(end[:start] > start)
        if rule.window is not None:
            ancestors = ancestors[depth[ancestors] > depth[start:stop].min() - rule.window]
        chain = bool((np.diff(depth[start:stop]) == 1).all())
        short = rule.window is None or stop - start <= rule.window
        most = wanted is None or 2 * len(wanted) > stop - start
        if chain and not len(ancestors) and short and rule.chunk is None and most:
            blocks.append(Block(start, stop, start, None, None))
            continue
        keys = np.concatenate([ancestors, index[start:stop]])
        at_keys = torch.from_numpy(keys)
        queries = torch.from_numpy(index[start:stop] if wanted is None else wanted)
        seen = visible(torch.from_numpy(depth), torch.from_numpy(end), rule, queries, at_keys)
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).to(device)
        chosen = None if wanted is None else queries.to(device)
        first = int(keys[0])
        if len(keys) == stop - first:
            blocks.append(Block(start, stop, first, None, bias, chosen))
            continue
        both = min(len(keys), len(latest))
        held = int(np.argmin(np.append(keys[:both] == latest[:both], False)))
        blocks.append(Block(start, stop, first, at_keys[held:].to(device), bias, chosen, held))
        latest = keys
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

    `attention_mask` is what `as_attention_mask` made; anything else (no mask, a plain tensor) goes to sdpa.
    What queries that are not wanted get is zero, or right all the same.
    Raises ValueError for variants of attention (score capping, sinks) that this does not compute.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    blocks = getattr(attention_mask, "blocks", None)
    if blocks is not None:
        blocks = attention_mask.blocks_of_layer.get(getattr(module, "layer_idx", None), blocks)
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("blockwise attention computes plain softmax attention only")
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = torch.zeros((1, query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for block, keys, values in with_keys(blocks, key, value):
        asked = slice(block.start, block.stop) if block.queries is None else block.queries
        result = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, asked], keys, values, attn_mask=block.bias, scale=scaling, is_causal=block.bias is None
        )
        output[:, asked] = result.transpose(1, 2)
    return output, None


def with_keys(blocks: list[Block], key: torch.Tensor, value: torch.Tensor) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor]]:
    """Each block with the keys and values of its queries: (1, heads, K, head size), good until the next block is asked for."""
    # What a block has in common with the one before stays where it is.
    most = max((block.held + len(block.keys) for block in blocks if block.keys is not None), default=0)
    near_keys, near_values = (part.new_empty((*part.shape[:2], most, part.shape[3])) for part in (key, value))
    for block in blocks:
        if block.keys is None:
            yield block, key[:, :, block.first : block.stop], value[:, :, block.first : block.stop]
            continue
        count = block.held + len(block.keys)
        keys, values = near_keys[:, :, :count], near_values[:, :, :count]
        keys[:, :, block.held :] = key.index_select(2, block.keys)
        values[:, :, block.held :] = value.index_select(2, block.keys)
        yield block, keys, values


def as_attention_mask(blocks: list[Block], blocks_of_layer: dict[int | None, list[Block]], device: torch.device) -> torch.Tensor:
    """An empty 4-D tensor that brings `blocks` to `attend`: transformers passes 4-D masks through as they are.

    blocks_of_layer: other blocks for some layers, by number.
    """
    carrier = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)  # no floats: a mixed-precision policy would cast them
    carrier.blocks = blocks  # type: ignore[attr-defined]
    carrier.blocks_of_layer = blocks_of_layer  # type: ignore[attr-defined]
    return carrier
