"""Models that count positions by a token's index in the forward, whatever they are told: for a tree they must count its depth.

ALiBi adds slope * (position of the key) to the scores. A key's position counts alone, since a softmax takes no notice of what is
added to a whole row of scores: so the bias of a pack is the plain one, each key's taken at its depth. The layers of GPT-Neo and
of the first GPT hold masks of their own, by index: they are given the tree's. What is replaced is replaced for one forward
(transformers 5.23).

Letters: N heads, L pack length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import unittest.mock
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ddp_eval.engines.ops.masks import LayerRule, visible


@dataclasses.dataclass(frozen=True)
class Counting:
    """count: (depth, end), both (L,) -> a block in which the model's forward counts by them. takes_mask: it wants the tree's mask
    besides."""

    count: Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[Any]]
    takes_mask: bool = True


def counting_of(model: Any) -> Counting | None:
    """How a causal model is made to count by depth; None for models that take positions, and those that are not known."""
    body, kind = model.base_model, getattr(model.config, "model_type", None)
    if kind in ("bloom", "mpt") and hasattr(body, f"build_{'mpt_' if kind == 'mpt' else ''}alibi_tensor"):
        return Counting(functools.partial(_count_bloom if kind == "bloom" else _count_mpt, body))
    if kind == "falcon" and model.config.alibi:
        return Counting(functools.partial(_count_falcon, sys.modules[type(model).__module__]))
    if kind == "gpt_neo":
        window = {"local": LayerRule(window=body.config.window_size)}
        layers = [(layer, window.get(layer.attention_type, LayerRule())) for layer in (block.attn.attention for block in body.h)]
        return Counting(functools.partial(_mask_layers, layers), takes_mask=False)
    if kind == "openai-gpt":
        return Counting(functools.partial(_mask_layers, [(block.attn, LayerRule()) for block in body.h]), takes_mask=False)
    return None


def _at_depth(bias: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """(N, 1, L) of a plain row's (N, 1, longest) bias."""
    return bias[:, :, depth]


def _count_bloom(body: Any, depth: torch.Tensor, end: torch.Tensor) -> AbstractContextManager[Any]:
    build = body.build_alibi_tensor

    def by_depth(mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        plain = torch.ones((1, int(depth.max()) + 1), dtype=torch.int64, device=depth.device)
        return _at_depth(build(plain, heads, dtype=dtype), depth)

    return unittest.mock.patch.object(body, "build_alibi_tensor", by_depth)


def _count_mpt(body: Any, depth: torch.Tensor, end: torch.Tensor) -> AbstractContextManager[Any]:
    build = body.build_mpt_alibi_tensor

    def by_depth(heads: int, length: int, *args: Any, **options: Any) -> torch.Tensor:
        return _at_depth(build(heads, int(depth.max()) + 1, *args, **options), depth)

    return unittest.mock.patch.object(body, "build_mpt_alibi_tensor", by_depth)


def _count_falcon(code: Any, depth: torch.Tensor, end: torch.Tensor) -> AbstractContextManager[Any]:
    build = code.build_alibi_tensor

    def by_depth(mask: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        plain = torch.ones((1, int(depth.max()) + 1), dtype=torch.int64, device=depth.device)
        return _at_depth(build(plain, heads, dtype), depth)

    return unittest.mock.patch.object(code, "build_alibi_tensor", by_depth)


@contextlib.contextmanager
def _mask_layers(layers: list[tuple[Any, LayerRule]], depth: torch.Tensor, end: torch.Tensor) -> Any:
    """Give attention layers the tree in place of their (1, 1, positions, positions) buffers of who sees whom."""
    seen = {rule: visible(depth, end, rule)[None, None] for _, rule in layers}
    before = [layer.bias for layer, _ in layers]
    try:
        for layer, rule in layers:
            layer.bias = seen[rule].to(layer.bias.dtype)
        yield
    finally:
        for (layer, _), bias in zip(layers, before, strict=True):
            layer.bias = bias
