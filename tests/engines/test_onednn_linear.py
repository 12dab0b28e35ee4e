"""Linear layers by oneDNN."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerance
import torch
from engine_runs import assert_equal_answers, assert_equal_values, build_prefix_tree, load, run, to_requests

from ddp_eval.engines.hf import engine as hf
from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine
from ddp_eval.engines.ops import mkl, onednn_linear
from ddp_eval.packs.plan import build_pack
from ddp_eval.run.planning import make_plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN's products whatever this processor is; skipped where torch has none."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(onednn_linear, "is_wanted", lambda: True)
    yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [40, onednn_linear.WIDE])
def test_products_are_the_layers_own(bias: bool, features: int) -> None:
    """Catches a bias left out, rows mixed up where the tokens are not contiguous, and rows of padding that come out."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, features, bias=bias)
    many = torch.randn(256, 2, 24).transpose(0, 1)
    with torch.inference_mode():
        expected = layer(many)
        for part in ((), (0,), (slice(None), slice(None, None, 2)), (slice(None), slice(3)), (1, slice(250))):
            tokens, rows = many[part], expected[part]
            found = onednn_linear.linear(layer, tokens)
            assert found.shape == rows.shape and ((found - rows).abs() <= tolerance.product_error(tokens, layer)).all()


def test_numbers_of_tokens_are_few() -> None:
    """Catches a kernel compiled and kept for every length that a run comes across, and much padding to avoid it."""
    counts = np.arange(1, 8193)
    grid = onednn_linear.to_grid(counts)
    assert ((counts <= grid) & (grid <= counts * 17 / 16)).all()
    assert len(np.unique(grid[grid % onednn_linear.FINE == 0])) == 32 + 16 and (grid[2048:] % onednn_linear.FINE == 0).all()
    assert [onednn_linear.to_grid(count) for count in (1, 120, 121, 640, 2047, 2049, 8000)] == [
        1,
        120,
        128,
        640,
        2048,
        2176,
        8192,
    ]


def test_what_is_not_on_the_grid_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights reordered for a token of generation, narrow layers' input copied, gradients lost, and slow weights."""
    narrow, wide = torch.nn.Linear(24, 40), torch.nn.Linear(24, onednn_linear.WIDE)
    seen: list[int] = []
    multiply = onednn_linear.multiply
    monkeypatch.setattr(onednn_linear, "multiply", lambda tokens, *rest: seen.append(len(tokens)) or multiply(tokens, *rest))
    with torch.inference_mode():
        for count in (1, 60, 127, 128, 200, 256):
            onednn_linear.linear(narrow, torch.randn(count, 24))
        assert seen == [128, 256]
        for count in (1, 60, 127, 128, 200, 256):
            onednn_linear.linear(wide, torch.randn(count, 24))
        assert seen[2:] == [128, 128, 256]
        with pytest.raises(RuntimeError):
            onednn_linear.linear(wide, torch.randn(128, 24).to(torch.bfloat16))
        wide.weight = torch.nn.Parameter(torch.randn(24, onednn_linear.WIDE).T)
        onednn_linear.linear(wide, torch.randn(128, 24))
    onednn_linear.linear(narrow, torch.randn(128, 24)).sum().backward()
    assert seen[5:] == [] and narrow.weight.grad is not None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "qwen3_moe", "llama4"])
def test_packs_lengthened_to_the_grid_give_the_same_answers(
    kind: str, tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches padding that a real token sees, or that is read, or a mask cut for the pack as it was."""
    monkeypatch.setattr(onednn_linear, "FINE", 32)
    monkeypatch.setattr(onednn_linear, "MOST_ADDED", 1.0)
    engine = load(tiny_model_path(kind))
    requests, expected = build_prefix_tree(engine.model, seed=3)
    fed: list[tuple[int, int]] = []
    call = engine._call
    monkeypatch.setattr(engine, "_call", lambda tokens, *rest, **more: fed.append(tokens.shape) or call(tokens, *rest, **more))
    plan, item_of_request, *_ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    fed.clear()
    assert_equal_answers(run(engine, plan, item_of_request), expected)
    packs = [build_pack(plan, index) for index in range(plan.num_packs)]
    assert fed == [engine.input_shape(pack) for pack in packs] and all(length % 32 == 0 for _, length in fed)
    assert any(length > len(pack) for (_, length), pack in zip(fed, packs, strict=True))
    chain, item_of_request, *_ = make_plan(engine, to_requests(requests[:1]), packing=True, max_pack_tokens=None)
    assert build_pack(chain, 0).is_chain and len(build_pack(chain, 0)) % 32
    assert_equal_values(run(engine, chain, item_of_request), expected[:1])
    engine.close()


def test_a_model_with_them_gives_the_same_logits_and_is_given_back() -> None:
    """Catches layers left out, a layer put in another's place, and a model that keeps them."""
    model = tiny_models.make_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    linears: list[Any] = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rounding = tolerance.of(model)
    with torch.inference_mode():
        expected = model(tokens).logits
        engine = hf.HFEngine(model, CPU)
        assert all(module.forward.func is onednn_linear.linear for module in linears)
        assert float((model(tokens).logits - expected).abs().max()) <= rounding.nats(1)
        engine.close()
    assert not any("forward" in vars(module) for module in linears)


def test_only_plain_layers_in_float32_are_taken() -> None:
    """Catches layers that work otherwise or that somebody has hooked, and weights that the kernel is slow or wrong with."""
    hooked, turned, half = torch.nn.Linear(4, 4), torch.nn.Linear(4, 6), torch.nn.Linear(4, 4).to(torch.bfloat16)
    hooked.forward = own = lambda tokens: tokens  # type: ignore[method-assign]
    turned.weight = torch.nn.Parameter(torch.randn(4, 6).T)

    class Other(torch.nn.Linear):
        pass

    plain = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(hooked, turned, half, Other(4, 4), plain)
    remove = onednn_linear.install(model)
    assert [module for module in model if "forward" in vars(module)] == [hooked, plain]
    remove()
    assert hooked.forward is own and "forward" not in vars(plain)


def test_an_encoder_decoder_is_given_back() -> None:
    """Catches an encoder-decoder whose layers stay ours."""
    model = tiny_models.make_model("t5")
    linears: list[Any] = [module for module in model.modules() if type(module) is torch.nn.Linear]
    engine = Seq2SeqEngine(model, CPU)
    assert all(module.forward.func is onednn_linear.linear for module in linears)
    engine.close()
    engine.close()
    assert not any("forward" in vars(module) for module in linears)


@pytest.mark.parametrize(
    ("processor", "vectors", "expected"),
    [
        ("Intel(R) Architecture processors", "AVX512", True),
        ("Intel(R) Advanced Vector Extensions 2 (Intel(R) AVX2) enabled processors", "AVX512", True),
        ("Intel(R) Architecture processors", "AVX2", False),
        ("Intel(R) Advanced Vector Extensions 512 (Intel(R) AVX-512) enabled processors", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_only_where_mkl_leaves_out_vectors_of_the_processor(
    processor: str | None, vectors: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kernel chosen where MKL is as good, or that torch has taken away, or that its user has switched off."""
    monkeypatch.undo()
    monkeypatch.setattr(mkl, "processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    try:
        onednn_linear._is_faster_here.cache_clear()
        assert onednn_linear.is_wanted() is expected
        with torch.backends.mkldnn.flags(enabled=False):
            assert not onednn_linear.is_wanted()
        onednn_linear._is_faster_here.cache_clear()
        monkeypatch.setattr(onednn_linear, "multiply", lambda *tokens: torch.ops.mkldnn._no_such_product(*tokens))
        assert not onednn_linear.is_wanted()
    finally:
        onednn_linear._is_faster_here.cache_clear()


@pytest.mark.skipif(not torch.backends.mkl.is_available() or sys.platform != "linux", reason="there is no MKL to be asked")
def test_mkl_says_what_it_takes_the_processor_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer read from the wrong place of MKL's structure, and a library or function that is no longer there."""
    answer = mkl.processor()
    assert re.fullmatch(r"Intel\(R\) [\x20-\x7e]+", str(answer))
    monkeypatch.setattr(mkl, "_ASK", ("no_such_function",))
    assert mkl.processor.__wrapped__() is None
