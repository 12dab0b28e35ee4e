"""The bounds of tests/support/tolerance.py: wider than what any kernel brings, narrower than a fault."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kernels_main
import numpy as np
import pytest
import tiny_models
import tolerance
import torch
import transformers
from engine_runs import ONE_PACK, Answer, build_prefix_tree, load, run, to_requests

from ddp_eval import demo
from ddp_eval.engines.ops import masks
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.plan import Pack, build_pack
from ddp_eval.packs.rows import plan_rows

KINDS = (*tiny_models.CONFIGS, *tiny_models.SEQ2SEQ_CONFIGS)
MARGIN = 2  # between what is seen here and the bound, at the least
SMALLEST_FAULT = 3  # the typical fault in multiples of the bound, at the least
# Kernels that differ from this processor's fastest in width and in the order of sums.
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}


def share_of_bound(one: torch.Tensor, other: torch.Tensor, rounding: tolerance.Rounding) -> float:
    """The largest difference as a part of the bound: of single tokens, and of sums over the first n."""
    drift = (one - other).abs()
    counts = torch.arange(1, len(drift) + 1)
    sums = (one - other).cumsum(0).abs()
    return max(float(drift.max()) / rounding.nats(1), float((sums / rounding.nats(counts)).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_within(kind: str, tiny_model: Callable[..., Any]) -> None:
    """Catches a bound below the error of one run, by its distance from exact numbers."""
    model = tiny_model(kind)
    exact = kernels_main.logprobs_of(tolerance.as_float64(model))
    # Two runs differ by up to twice as much.
    assert share_of_bound(kernels_main.logprobs_of(model), exact, tolerance.of(model)) < 1 / (2 * MARGIN)


@contextmanager
def rounded(model: Any, seed: int) -> Iterator[None]:
    """A float64 model, each product of which is off as in float32: by u of its terms' sizes, the sign drawn."""
    generator = torch.Generator().manual_seed(seed)
    unit = tolerance.unit_roundoff(torch.float32)

    def disturb(layer: Any, args: Any, output: Any) -> Any:
        weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output + signs * unit * (args[0].abs() @ weight.abs().T)

    layers = [
        module for module in model.modules() if type(module) in (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    ]  # not subclasses: routers return several tensors
    assert layers
    hooks = [layer.register_forward_hook(disturb) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_any_rounding_is_within(kind: str, tiny_model: Callable[..., Any]) -> None:
    """Catches a bound that holds for this processor's order of sums alone: here every product is off, by random signs."""
    model = tolerance.as_float64(tiny_model(kind))
    columns = []
    for seed in range(4):
        with rounded(model, seed):
            columns.append(kernels_main.logprobs_of(model))
    rounding = tolerance.of_kind(kind)
    shares = [share_of_bound(one, other, rounding) for one, other in itertools.pairwise(columns)]
    assert 0 < max(shares) < 1 / MARGIN


def test_other_kernels_are_within(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a bound that holds for one set of instructions: the narrowest kernels in another process, and two threads here."""
    out = tmp_path / "out.json"
    path = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, kernels_main.__file__, str(out), *KINDS]
    subprocess.run(command, check=True, env={**os.environ, **OTHER_KERNELS, "PYTHONPATH": path}, timeout=240)
    others = json.loads(out.read_text())
    for kind in KINDS:
        model, rounding = tiny_model(kind), tolerance.of_kind(kind)
        here = kernels_main.logprobs_of(model)
        with torch.backends.mkldnn.flags(enabled=False):
            without = kernels_main.logprobs_of(model)
        torch.set_num_threads(2)
        try:
            parted = kernels_main.logprobs_of(model)
        finally:
            torch.set_num_threads(1)
        for other in (torch.tensor(others[kind], dtype=torch.float64), without, parted):
            assert share_of_bound(here, other, rounding) < 1 / MARGIN, kind


def largest_share(got: list[tuple[float, bool]], expected: list[Answer]) -> float:
    """The largest difference as a part of its bound."""
    return max(abs(value - answer.logprob) / answer.allowed_nats for (value, _), answer in zip(got, expected, strict=True))


def hidden_pairs(pack: Pack) -> list[tuple[int, int]]:
    """(query, key) of what a causal mask shows and the tree hides, for the queries that are read."""
    seen = masks.visible(torch.from_numpy(pack.depth), torch.from_numpy(pack.end), masks.LayerRule())
    pairs = (~seen).tril().nonzero().tolist()
    return [(query, key) for query, key in pairs if query in pack.reads]


@pytest.mark.parametrize("kind", [*tiny_models.BATCHED_KINDS, "deepseek_v32"])  # the others are not told positions
def test_faults_are_not(
    kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bound so wide that one leaked entry of a mask, or one position off by one, would pass for rounding."""
    engine = load(tiny_model_path(kind), attn_implementation="eager")
    requests, expected = build_prefix_tree(tiny_model(kind), seed=0)
    plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, 10**6)
    pack, random = build_pack(plan, 0), np.random.default_rng(0)
    assert largest_share(run(engine, plan, item_of_request), expected) < 1 / MARGIN
    visible, call, pairs = masks.visible, engine._call, hidden_pairs(pack)
    found: dict[str, list[float]] = {"leaks": [], "shifts": []}
    for index in random.choice(len(pairs), 9, replace=False):
        query, key = pairs[index]

        def leak(*args: Any, query: int = query, key: int = key, **more: Any) -> torch.Tensor:
            seen = visible(*args, **more)
            seen[query, key] = True
            return seen

        def shift(*args: Any, query: int = query, **more: Any) -> Any:
            positions = more["position_ids"].clone()
            positions[0, query] += 1
            return call(*args, **{**more, "position_ids": positions})

        faults: list[tuple[str, Any, str, Any]] = [("leaks", masks, "visible", leak), ("shifts", engine, "_call", shift)]
        for name, target, member, fault in faults:
            with monkeypatch.context() as patch:
                patch.setattr(target, member, fault)
                found[name].append(largest_share(run(engine, plan, item_of_request), expected))
    # Of single faults a few weigh little, such as a key of low score; those of a defect come in numbers.
    for name, sizes in found.items():
        assert np.median(sizes) > SMALLEST_FAULT and np.mean(np.array(sizes) > 1) > 0.8, (name, sizes)


def test_half_precision_against_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bound for 16-bit runs that a causal mask over a tree would pass, or that rounding alone exceeds."""
    random = np.random.default_rng(0)
    stems = [random.integers(1, 2000, 150).tolist() for _ in range(3)]
    requests = to_requests([(stem + random.integers(1, 2000, 7).tolist(), 5) for stem in stems for _ in range(8)])
    alone, packs = plan_rows(requests, 1), plan_packs(requests, CostModel(), 512)

    def score(engine: Any, plan: Any) -> list[float]:
        return [value for value, _ in run(engine, *plan)]

    half = load(Path(demo.MODEL_PATH), dtype="bfloat16", attn_implementation="sdpa")
    exact, plain = score(load(Path(demo.MODEL_PATH)), alone), score(half, alone)
    error, allowed = tolerance.error_of_half(score(half, packs), plain, exact)
    assert 0 < error < allowed
    monkeypatch.setattr(half, "_make_mask", lambda pack, depth: None)
    error, allowed = tolerance.error_of_half(score(half, packs), plain, exact)
    assert error > 2 * allowed


def test_bounds_by_hand() -> None:
    """Catches a unit, a factor or a term that is lost: of float32, hidden size 16, 3 layers, logits up to 8, 10 tokens."""
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=3)
    assert tolerance.unit_roundoff(torch.float32) == 2**-24 and tolerance.unit_roundoff(torch.float64) == 2**-53
    assert tolerance.growth(config) == 12.0
    assert tolerance.nats(torch.float32, 10, 8.0, 12.0) == 2**-24 * 8 * 12 * (64 + 2 * 10)
    assert tolerance.growth(transformers.T5Config(d_model=16, num_layers=2, num_decoder_layers=1)) == 12.0
    assert (
        tolerance.growth(
            transformers.BartConfig(
                d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, encoder_layers=2, decoder_layers=1
            )
        )
        == 12.0
    )
    assert tolerance.float32_sum_nats(4, -100.0) == 2**-24 * 400 and tolerance.float32_sum_nats(100, -100.0) == 2**-24 * 4000


def test_products_in_another_order() -> None:
    """Catches a bound of a product or of attention that is below the error of the plainest loop."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(300, 20)
    tokens = torch.randn((7, 300), generator=generator)
    with torch.inference_mode():
        loop = layer.bias.expand(7, 20).clone()
        for column in range(300):
            loop += tokens[:, column, None] * layer.weight[:, column]
        shares = (layer(tokens) - loop).abs() / tolerance.product_error(tokens, layer)
        assert 0 < float(shares.max()) < 1 / MARGIN
    query, key, value = torch.randn((3, 1, 2, 500, 8), generator=generator).unbind()
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    bound = tolerance.attention_error(query, key, value)
    assert float((found - exact).abs().max()) < bound / (2 * MARGIN)
    lost = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, 1:], value[:, :, 1:])
    assert float((found - lost).abs().max()) > SMALLEST_FAULT * bound, "a key that is lost"
