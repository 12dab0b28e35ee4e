"""Linear layers by oneDNN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models
import torch

from ddp_eval import machine
from ddp_eval.engines import hf, products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN's products whatever this processor is; skipped where torch has none."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(products, "is_wanted", lambda: True)
    yield


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_layers_own(bias: bool) -> None:
    """Catches a bias left out, rows mixed up where the tokens are not contiguous, and shapes that come out otherwise."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    many = torch.randn(200, 2, 24).transpose(0, 1)
    with torch.inference_mode():
        expected = layer(many)
        for tokens, rows in (
            (many, expected),
            (many[0], expected[0]),
            (many[:, ::2], expected[:, ::2]),
            (many[:, :3], expected[:, :3]),
        ):
            found = products.linear(layer, tokens)
            assert found.shape == rows.shape and torch.allclose(found, rows, atol=1e-5)


def test_few_tokens_and_other_dtypes_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights reordered for a single token of generation, and tokens of a dtype that the kernel would misread."""
    layer = torch.nn.Linear(24, 40)
    seen: list[int] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda tokens, *rest: seen.append(len(tokens)) or multiply(tokens, *rest))
    with torch.inference_mode():
        for count in (1, products.FEWEST_TOKENS - 1, products.FEWEST_TOKENS):
            products.linear(layer, torch.randn(count, 24))
        with pytest.raises(RuntimeError):
            products.linear(layer, torch.randn(products.FEWEST_TOKENS, 24).to(torch.bfloat16))
    assert seen == [products.FEWEST_TOKENS]


def test_a_model_with_them_gives_the_same_logits_and_is_given_back() -> None:
    """Catches layers left out, a layer put in another's place, and a model that keeps them."""
    model = tiny_models.make_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (3, 60), generator=torch.Generator().manual_seed(1))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.inference_mode():
        expected = model(tokens).logits
        engine = hf.HFEngine(model, CPU)
        assert all(module.forward.func is products.linear for module in linears)
        assert torch.allclose(model(tokens).logits, expected, atol=1e-4)
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
    remove = products.install(model)
    assert [module for module in model if "forward" in vars(module)] == [hooked, plain]
    remove()
    assert hooked.forward is own and "forward" not in vars(plain)


@pytest.mark.parametrize(
    ("name", "expected"), [("AMD EPYC 9654", True), ("Intel(R) Xeon(R) Platinum 8480+", False), (None, False)]
)
def test_only_processors_on_which_it_was_seen_to_be_faster(
    name: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kernel chosen where nobody has timed it."""
    monkeypatch.undo()
    monkeypatch.setattr(machine, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products.is_wanted.cache_clear()
    assert products.is_wanted() is expected
    products.is_wanted.cache_clear()
