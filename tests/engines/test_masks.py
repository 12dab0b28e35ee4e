"""Masks: against the ancestor relation by brute force, in every form that transformers takes; and which layers want which."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tolerance
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, WINDOW
from torch.nn.functional import scaled_dot_product_attention

from ddp_eval.engines.ops import tree_attention
from ddp_eval.engines.ops.masks import IMPLEMENTATIONS, LayerRule, layer_rules, make_mask, visible

Tree = tuple[list[int], list[int], list[int | None]]  # depth, end, parent


@st.composite
def forests(draw: st.DrawFn) -> Tree:
    """Depth-first forests of 1 to 24 tokens."""
    parent: list[int | None] = [None]
    for _ in range(draw(st.integers(0, 23))):
        # In depth-first order the next token hangs below the last one, or below one of its ancestors, or starts a tree.
        last: int | None = len(parent) - 1
        options: list[int | None] = []
        while last is not None:
            options.append(last)
            last = parent[last]
        parent.append(draw(st.sampled_from([*options, None])))
    depth: list[int] = []
    end = [0] * len(parent)
    for above in parent:
        depth.append(0 if above is None else depth[above] + 1)
    for i in reversed(range(len(parent))):
        end[i] = max([i + 1, *(end[j] for j in range(len(parent)) if parent[j] == i)])
    return depth, end, parent


rules = st.builds(LayerRule, window=st.none() | st.integers(1, 6), chunk=st.none() | st.integers(1, 6))


def visible_by_hand(tree: Tree, rule: LayerRule) -> torch.Tensor:
    """Walk from each token to its root."""
    depth, _, parent = tree
    seen = torch.zeros(len(depth), len(depth), dtype=torch.bool)
    for i in range(len(depth)):
        j: int | None = i
        while j is not None:
            within_window = rule.window is None or depth[j] > depth[i] - rule.window
            within_chunk = rule.chunk is None or depth[j] >= depth[i] - depth[i] % rule.chunk
            seen[i, j] = within_window and within_chunk
            j = parent[j]
    return seen


@settings(deadline=None, max_examples=100)
@given(forests(), rules)
def test_a_token_sees_its_ancestors(tree: Tree, rule: LayerRule) -> None:
    """Catches `<=` for `<` at the end of a subtree or window, distances by index instead of depth, chunks from elsewhere."""
    depth, end, _ = tree
    assert torch.equal(visible(torch.tensor(depth), torch.tensor(end), rule), visible_by_hand(tree, rule))


def as_seen(implementation: str, mask: Any, length: int) -> torch.Tensor:
    """(L, L) bool, whatever form the mask has."""
    if implementation == "flex_attention":
        index = torch.arange(length)
        zero = torch.tensor(0)
        seen = mask.mask_mod(zero, zero, index[:, None], index[None, :])
        # What the mask's blocks leave out is never looked at by the kernel, whatever the function says.
        blocks = mask.to_dense()[0, 0].repeat_interleave(mask.BLOCK_SIZE[0], 0).repeat_interleave(mask.BLOCK_SIZE[1], 1)
        return seen & blocks[:length, :length].bool()
    assert mask.shape == (1, 1, length, length)
    if implementation == "sdpa":
        assert mask.dtype == torch.bool
        return mask[0, 0]
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(mask.dtype).min}
    return mask[0, 0] == 0


@settings(deadline=None, max_examples=25)
@given(forests(), rules, st.sampled_from([torch.float32, torch.bfloat16]))
def test_all_forms_say_the_same(tree: Tree, rule: LayerRule, dtype: torch.dtype) -> None:
    """Catches a form of the opposite sense, or of another type: a bool mask under eager is wrong without an error."""
    depth, end = torch.tensor(tree[0]), torch.tensor(tree[1])
    expected = visible_by_hand(tree, rule)
    for implementation in IMPLEMENTATIONS:
        mask = make_mask(implementation, depth, end, {"": rule}, dtype)
        assert torch.equal(as_seen(implementation, mask, len(end)), expected), implementation
        if implementation == "eager":
            assert mask.dtype == dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_masks_agree(implementation: str) -> None:
    """Catches a BlockMask that is right within its first block only."""
    depth = torch.cat([torch.arange(150), torch.arange(100, 180), torch.arange(60)])
    end = torch.cat([torch.full((100,), 230), torch.full((50,), 150), torch.full((80,), 230), torch.full((60,), 290)])
    rule = LayerRule(window=120)
    mask = make_mask(implementation, depth, end, {"": rule}, torch.float32)
    assert torch.equal(as_seen(implementation, mask, 290), visible(depth, end, rule))


def test_one_mask_for_each_kind_of_layer() -> None:
    """Catches one kind's window that is put on another, and a single mask where the model looks for a dict."""
    depth, end = torch.arange(12), torch.full((12,), 12)
    kinds = {"full_attention": LayerRule(), "sliding_attention": LayerRule(window=3)}
    masks = make_mask("sdpa", depth, end, kinds, torch.float32)
    assert list(masks) == list(kinds)
    for kind, rule in kinds.items():
        assert torch.equal(masks[kind][0, 0], visible(depth, end, rule))


def test_unknown_implementation_is_refused_by_name() -> None:
    """Catches a new implementation that is given some other one's mask."""
    with pytest.raises(ValueError, match="sdpa, eager, flex_attention, got flash_attention_2"):
        make_mask("flash_attention_2", torch.arange(2), torch.full((2,), 2), {"": LayerRule()}, torch.float32)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"": LayerRule()}),
        ("gpt2", {"": LayerRule()}),
        ("mistral", {"": LayerRule(window=WINDOW)}),
        ("gemma2", {"full_attention": LayerRule(), "sliding_attention": LayerRule(window=WINDOW)}),
        ("gemma3", {"full_attention": LayerRule(), "sliding_attention": LayerRule(window=WINDOW)}),
        ("qwen3_moe", {"": LayerRule()}),
        ("deepseek_v32", {"indexed_attention": LayerRule()}),
        ("llama4", {"full_attention": LayerRule(), "chunked_attention": LayerRule(chunk=WINDOW)}),
    ],
)
def test_rules_of_real_configs(kind: str, expected: dict[str, LayerRule]) -> None:
    """Catches a config whose window is not seen, or is seen in layers that have none."""
    assert layer_rules(CONFIGS[kind]()) == expected


def test_a_window_that_is_switched_off_does_not_count() -> None:
    """Catches Qwen's `sliding_window` in the config of a model that does not slide."""
    off = transformers.Qwen2Config(num_hidden_layers=2, sliding_window=8, use_sliding_window=False)
    on = transformers.Qwen2Config(num_hidden_layers=2, sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert layer_rules(off) == {"": LayerRule()}
    assert layer_rules(on) == {"full_attention": LayerRule(), "sliding_attention": LayerRule(window=8)}


def test_every_layer_slides() -> None:
    """Catches a model with nothing but sliding layers that is served without its window."""
    config = transformers.Qwen2Config(num_hidden_layers=2, sliding_window=8, use_sliding_window=True, max_window_layers=0)
    assert list(layer_rules(config).values()) == [LayerRule(window=8)]


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "something_new"])
def test_other_kinds_of_layer_are_named(kind: str) -> None:
    """Catches a state-space or convolution layer that is taken for attention, and one that is not known yet."""
    config = transformers.Qwen2Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", kind]
    with pytest.raises(ValueError, match=kind):
        layer_rules(config)


def test_gpt_neo_is_named() -> None:
    """Catches its local layers, which mask by index whatever mask they are given: no short check would show it."""
    with pytest.raises(ValueError, match="by index"):
        layer_rules(transformers.GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]))


def test_chunks_of_a_forest_start_at_each_root() -> None:
    """Catches chunks counted along the pack: worked by hand, two trees of five tokens in chunks of two."""
    depth = torch.tensor([0, 1, 2, 3, 4] * 2)
    end = torch.tensor([5] * 5 + [10] * 5)
    seen = visible(depth, end, LayerRule(chunk=2))
    chunks = [{0, 1}, {2, 3}, {4}, {5, 6}, {7, 8}, {9}]
    pairs = {(i, j) for chunk in chunks for i, j in itertools.product(chunk, chunk) if j <= i}
    assert {tuple(pair) for pair in seen.nonzero().tolist()} == pairs


def long_forest() -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) depth and end: a chain of 700, a root of 300 with branches of 150, 10 and 90, and a chain of 40."""
    depth = [*range(700), *range(300), *range(300, 450), *range(300, 310), *range(300, 390), *range(40)]
    end = [700] * 700 + [1250] * 300 + [1150] * 150 + [1160] * 10 + [1250] * 90 + [1290] * 40
    return torch.tensor(depth), torch.tensor(end)


@pytest.mark.parametrize("rule", [LayerRule(), LayerRule(window=200), LayerRule(chunk=256)], ids=str)
@pytest.mark.parametrize("reads", [None, range(1290), range(0, 1290, 97), range(1289, 1290), [*range(600, 700), 1149]])
def test_blocks_see_what_the_dense_mask_shows(rule: LayerRule, reads: range | list[int] | None) -> None:
    """Catches slices of keys that start elsewhere than their block, queries left out, and causal blocks where a window cuts."""
    depth, end = long_forest()
    query, key, value = torch.randn(3, 1, 2, len(depth), 8, generator=torch.Generator().manual_seed(1)).unbind()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=visible(depth, end, rule))
    at = None if reads is None else np.array(reads)
    runs = tree_attention.split(depth.numpy())
    made = tree_attention.make_blocks(runs, depth.numpy(), end.numpy(), rule, torch.float32, torch.device("cpu"), at)
    assert len(runs) > 4 and max(stop - start for start, stop in runs) < 700
    output, _ = tree_attention.attend(None, query, key, value, tree_attention.as_attention_mask(made, {}, torch.device("cpu")))
    chosen = slice(None) if at is None else at
    allowed = tolerance.attention_error(query, key, value)
    torch.testing.assert_close(output.transpose(1, 2)[:, :, chosen], expected[:, :, chosen], atol=allowed, rtol=0.0)
    if at is not None and len(at) == 1:
        assert (output.abs().sum(dim=(0, 2, 3)) > 0).sum() == 1
