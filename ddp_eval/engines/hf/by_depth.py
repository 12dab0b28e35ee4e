"""Models that count positions by a token's index in the forward, whatever they are told: for a tree they must count its depth.

ALiBi adds slope * (position of the key) to the scores. A key's position counts alone, since a softmax takes no notice of what is
added to a whole row of scores: so the bias of a pack is the plain one, each key's taken at its depth. GPT-Neo's layers hold masks
of their own, by index: they are given the tree's. What is replaced is replaced for one forward (transformers 5.23).

Letters: N heads, L pack length.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import unittest.mock
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ddp_eval.engines.ops.masks import LayerRule, visible

# (depth, end), both (L,) -> a block in which the model's forward counts by them.
Counting = Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[Any]]


def counting_of(model: Any) -> Counting | None:
    """How a causal model is made to count by depth; None for models that take positions, and those that are not known."""
    body, kind = model.base_model, getattr(model.config, "model_type", None)
    if kind in ("bloom", "mpt") and hasattr(body, f"build_{'mpt_' if kind == 'mpt' else ''}alibi_tensor"):
        return functools.partial(_count_bloom if kind == "bloom" else _count_mpt, body)
    if kind == "falcon" and model.config.alibi:
        return functools.partial(_count_falcon, sys.modules[type(model).__module__])
    if kind == "gpt_neo":
        return functools.partial(_count_gpt_neo, body)
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
def _count_gpt_neo(body: Any, depth: torch.Tensor, end: torch.Tensor) -> Any:
    """Its layers keep (1, 1, positions, positions) buffers of who sees whom: causal, or within a window."""
    rules = {"global": LayerRule(), "local": LayerRule(window=body.config.window_size)}
    seen = {kind: visible(depth, end, rule)[None, None] for kind, rule in rules.items()}
    layers = [block.attn.attention for block in body.h]
    before = [layer.bias for layer in layers]
    try:
        for layer in layers:
            layer.bias = seen[layer.attention_type]
        yield
    finally:
        for layer, bias in zip(layers, before, strict=True):
            layer.bias = bias
