"""Slots of a key-value cache: rows that decode together and share the keys of their prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines.ops import tree_attention
from ddp_eval.engines.ops.masks import LayerRule, layer_rules
from ddp_eval.packs.batches import as_bytes, common
from ddp_eval.packs.requests import IntArray

if TYPE_CHECKING:
    from ddp_eval.engines.hf.causal_model import CausalModel


NAME = "ddp_eval_decode"  # the attention implementation's name towards transformers


class KVSlots:
    """Keys and values of the rows that decode together, and the two forwards over them."""

    def __init__(self, engine: CausalModel, prefix: IntArray, slots: int, width: int) -> None:
        self._engine, self.slots, self._width = engine, slots, width
        self._rules = layer_rules(engine.config)
        self._prefix_length = len(prefix)
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer, (K, P, D) each
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer, (S, K, width, D) each
        self._lengths: list[int] = []  # tokens kept of each row, the prefix not counted
        self._layer = 0
        if len(prefix):
            tree = _Tree(prefix, np.arange(len(prefix)), np.full(len(prefix), len(prefix)), [])
            fresh = self._run_tree(tree, None, 0)[0]
            self._prefix = [(key[0].contiguous(), value[0].contiguous()) for key, value in fresh]

    def __len__(self) -> int:
        return len(self._lengths)

    def admit(self, prompts: Sequence[IntArray]) -> tuple[int, torch.Tensor]:
        """Put `prompts`, without the common prefix, into the next slots.

        Returns the tokens computed and (len(prompts), V) logits of what comes next.
        """
        logits, computed = [], 0
        most = self._engine.max_tokens()
        for group in _groups(prompts, most):
            tree = build_prefix_tree(prompts[group.start : group.stop])
            ends = np.array([path[-1] for path in tree.paths])
            fresh, last = self._run_tree(tree, ends, self._prefix_length)
            self._keep(tree, fresh)
            logits.append(last)
            computed += len(tree.tokens)
        return computed, torch.cat(logits)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to every row. Returns (B, V) logits of what comes next."""
        device = self._engine.device
        at = torch.tensor(self._lengths, device=device)
        self._lengths = [length + 1 for length in self._lengths]
        width = max(self._lengths)
        index = torch.arange(len(at), device=device)
        depth = at + self._prefix_length
        masks = {
            kind: _carry(functools.partial(self._attend_step, index, at, width, self._biases(rule, at, width)), device)
            for kind, rule in self._rules.items()
        }
        fed = torch.tensor(tokens, device=device)[:, None]
        self._layer = 0
        return self._engine.next_logits(fed, attention_mask=masks.get("", masks), position_ids=depth[:, None])

    def _attend_step(
        self,
        index: torch.Tensor,
        at: torch.Tensor,
        width: int,
        bias: tuple[torch.Tensor | None, torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """The attention of the next layer in a step: every row's new token is kept, and sees what its row has kept.

        index: (B,) the rows. at, bias: as in `_biases`. width: tokens of the longest row.
        """
        layer, rows = self._count(), len(at)
        keys, values = self._kept[layer]
        keys[index, :, at] = key[:, :, 0]
        values[index, :, at] = value[:, :, 0]
        prefix = self._prefix[layer] if self._prefix_length else None
        return _attend_slots(query, keys[:rows, :, :width], values[:rows, :, :width], prefix, bias, scaling, softcap)

    def drop(self, slot: int, is_broken: bool) -> None:
        """Free a slot: the last row moves into it. is_broken: with NaN among its keys, which would reach the next row there."""
        last = len(self._lengths) - 1
        if is_broken:
            for kept in self._kept:
                for part in kept:
                    part[slot].zero_()
        if slot != last:
            length = self._lengths[last]
            for keys, values in self._kept:
                keys[slot, :, :length] = keys[last, :, :length]
                values[slot, :, :length] = values[last, :, :length]
            self._lengths[slot] = self._lengths[last]
        self._lengths.pop()

    def _count(self) -> int:
        self._layer += 1
        return self._layer - 1

    def _biases(self, rule: LayerRule, at: torch.Tensor, width: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Additive masks of one step: (B, P) for the prefix, None where all of it is seen, and (B, W) for the rows' own tokens.

        at: (B,) where each row's new token stands among its own.
        """
        own = torch.arange(width, device=at.device)[None]
        before = torch.arange(self._prefix_length, device=at.device)[None] - self._prefix_length
        row = at[:, None]
        sees_own, sees_prefix = own <= row, None
        if rule.window is not None:
            sees_own, sees_prefix = sees_own & (row - own < rule.window), row - before < rule.window
        if rule.chunk is not None:
            depth = self._prefix_length
            same = (own + depth) // rule.chunk == (row + depth) // rule.chunk
            sees_own, sees_prefix = sees_own & same, (before + depth) // rule.chunk == (row + depth) // rule.chunk
        return (None if sees_prefix is None else self._additive(sees_prefix)), self._additive(sees_own)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(seen.shape, dtype=torch.float32, device=seen.device)
        return bias.masked_fill_(~seen, -torch.inf)

    def _run_tree(self, tree: _Tree, reads: IntArray | None, behind: int) -> tuple[list[Any], Any]:
        """Keys and values of a tree by layer, and (len(reads), V) logits; behind: tokens of the prefix that it stands behind."""
        engine, device = self._engine, self._engine.device
        depth = np.concatenate([np.arange(behind), tree.depth + behind])
        end = np.concatenate([np.full(behind, behind + len(tree.end)), tree.end + behind])
        runs = [(start + behind, stop + behind) for start, stop in tree_attention.split(tree.depth + behind)]
        fresh: list[tuple[torch.Tensor, torch.Tensor]] = []
        made = {}
        for kind, rule in self._rules.items():
            cut = tree_attention.make_blocks(runs, depth, end, rule, engine.dtype, device)
            made[kind] = _carry(functools.partial(self._attend_tree, cut, behind, fresh), device)
        tokens, positions = (torch.from_numpy(array.astype(np.int64)).to(device) for array in (tree.tokens, tree.depth + behind))
        masks = made.get("", made)
        logits = engine.logits_at(tokens[None], reads, attention_mask=masks, position_ids=positions[None])
        return fresh, logits

    def _attend_tree(
        self,
        cut: list[tree_attention.Block],
        behind: int,
        fresh: list[tuple[torch.Tensor, torch.Tensor]],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """The attention of the next layer in a tree, whose keys and values are added to `fresh`."""
        layer = len(fresh)
        fresh.append((key, value))
        if behind:
            keys, values = self._prefix[layer]
            key, value = torch.cat([keys[None], key], dim=2), torch.cat([values[None], value], dim=2)
        return _attend_blocks(query, key, value, cut, behind, scaling, softcap)

    def _keep(self, tree: _Tree, fresh: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy what a tree's rows need of its keys and values into their slots."""
        if not self._kept:
            self._kept = [
                tuple(part.new_zeros((self.slots, part.shape[1], self._width, part.shape[3])) for part in pair)  # type: ignore[misc]
                for pair in fresh
            ]
        for path in tree.paths:
            slot = len(self._lengths)
            at = torch.from_numpy(path).to(self._engine.device)
            for kept, new in zip(self._kept, fresh, strict=True):
                for target, source in zip(kept, new, strict=True):
                    target[slot, :, : len(path)] = source[0].index_select(1, at)
            self._lengths.append(len(path))


class _Tree(NamedTuple):
    """Prompts as one line, in depth-first order: (L,) tokens, depth, end as in packs/plan.py; paths: each prompt's positions."""

    tokens: IntArray
    depth: IntArray
    end: IntArray
    paths: list[npt.NDArray[np.int64]]


def build_prefix_tree(prompts: Sequence[IntArray]) -> _Tree:
    """Lay prompts down as a prefix tree; each shared token once."""
    order = sorted(range(len(prompts)), key=lambda index: as_bytes(prompts[index]))
    parts: list[IntArray] = []
    paths: dict[int, npt.NDArray[np.int64]] = {}
    path = np.zeros(0, dtype=np.int64)
    ends: list[tuple[npt.NDArray[np.int64], int]] = []
    laid, before = 0, None
    for index in order:
        prompt = prompts[index]
        skip = common(prompts[before], prompt) if before is not None else 0
        ends.append((path[skip:], laid))
        own = np.arange(laid, laid + len(prompt) - skip)
        path = np.concatenate([path[:skip], own])
        paths[index] = path
        parts.append(prompt[skip:])
        laid, before = laid + len(own), index
    end, depth = np.full(laid, laid, dtype=np.int64), np.zeros(laid, dtype=np.int64)
    for closed, stop in ends:
        end[closed] = stop
    for one in paths.values():
        depth[one] = np.arange(len(one))
    return _Tree(np.concatenate(parts), depth, end, [paths[index] for index in range(len(prompts))])


def _groups(prompts: Sequence[IntArray], most_tokens: int) -> Iterator[range]:
    """Runs of prompts that have at most so many tokens, or are one."""
    start, total = 0, 0
    for index, prompt in enumerate(prompts):
        if index > start and total + len(prompt) > most_tokens:
            yield range(start, index)
            start, total = index, 0
        total += len(prompt)
    yield range(start, len(prompts))


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, (B, heads, tokens, D) -> (B, tokens, heads, D); the mask brings what to do.

    Raises ValueError for variants of attention that this does not compute.
    """
    run = getattr(attention_mask, "run", None)
    if run is None or any(kwargs.get(name) is not None for name in ("s_aux", "position_bias")):
        raise ValueError("decoding computes plain or capped softmax attention only")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return run(query, key, value, scale, softcap), None


def _carry(run: Callable[..., torch.Tensor], device: torch.device) -> torch.Tensor:
    """An empty 4-D tensor that brings `run` to `attend`: transformers passes 4-D masks through as they are."""
    carrier = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)  # no floats: a mixed-precision policy would cast them
    carrier.run = run  # type: ignore[attr-defined]
    return carrier


def _attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cut: list[tree_attention.Block],
    behind: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """(1, L, heads, D): a tree's queries, block by block. behind: keys that stand before the first query."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    for block, keys, values in tree_attention.with_keys(cut, key, value):
        span = slice(block.start - behind, block.stop - behind)
        queries = query[:, :, span]
        if softcap is None:
            result = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=block.bias, scale=scaling, is_causal=block.bias is None
            )
        else:
            scores = softcap * torch.tanh(queries @ keys.transpose(2, 3) * scaling / softcap)
            bias = block.bias
            if bias is None:
                bias = torch.full(scores.shape[2:], -torch.inf, device=scores.device, dtype=scores.dtype).triu(1)
            result = (scores + bias).softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        output[:, span] = result.transpose(1, 2)
    return output


def _attend_slots(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    bias: tuple[torch.Tensor | None, torch.Tensor],
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """(B, 1, heads, D): one query of each row to the common prefix, read once for all of them, and to its own tokens.

    query: (B, K * Q, 1, D). keys, values: (B, K, W, D). prefix: its keys and values, (K, P, D) each.
    """
    rows, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    query = query.reshape(rows, kv_heads, groups, size) * scaling
    own = query @ keys.transpose(2, 3)  # (B, K, Q, W)
    scores = own.float() if softcap is None else softcap * torch.tanh(own.float() / softcap)
    scores = scores + bias[1][:, None, None]
    if prefix is None:
        mixed = scores.softmax(-1).to(values.dtype) @ values
        return mixed.reshape(rows, 1, heads, values.shape[3])
    prefix_keys, prefix_values = prefix
    length = prefix_keys.shape[1]
    by_head = query.transpose(0, 1).reshape(kv_heads, rows * groups, size)
    ahead = (by_head @ prefix_keys.transpose(1, 2)).float()  # (K, B * Q, P)
    ahead = ahead if softcap is None else softcap * torch.tanh(ahead / softcap)
    ahead = ahead.view(kv_heads, rows, groups, length).transpose(0, 1)
    if bias[0] is not None:
        ahead = ahead + bias[0][:, None, None]
    shares = torch.cat([ahead, scores], dim=-1).softmax(-1).to(values.dtype)
    mixed = shares[..., length:] @ values
    to_prefix = shares[..., :length].transpose(0, 1).reshape(kv_heads, rows * groups, length) @ prefix_values
    mixed = mixed + to_prefix.view(kv_heads, rows, groups, -1).transpose(0, 1)
    return mixed.reshape(rows, 1, heads, values.shape[3])


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
