"""How far two correct computations of the same log-probability may lie apart, in nats.

A product of matrices adds up terms in an order that its library chooses: by processor (AVX2, AVX-512, AMX), by number of threads,
by shape. Each order rounds differently. So no fixed number of nats holds everywhere; the bounds here follow from

    u     half the distance from 1 to the next number of the dtype
    S     the largest absolute logit of the model
    G     growth of the error on the way through the model: sqrt(hidden size) * layers

A dot product of k terms is off by about sqrt(k) * u of its terms' sizes, in any order (Higham and Mary, 2019), and each layer
adds its own error. So the logits of a typical token are off by less than u * S * G. A few tokens are much worse: where attention
weighs large scores against each other, a small error of a score is a large one of the result. Therefore

    nats = u * S * G * (WORST + TYPICAL * tokens)

TYPICAL is for each token of a request, once for either side: these errors may all have the same sign, so they add up in
proportion to the number of tokens. WORST is for the few tokens that are worse. tests/test_tolerance.py compares the bounds with
what other kernels and simulated rounding bring, and with a wrong mask or position, which are larger.

The bounds are for float32 and float64. In 16-bit dtypes they would exceed a fault: compare such runs with a float32 run of the
same weights (`error_of_half`).

What is meant to have the same bits is compared with ==, not by these bounds.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
import torch
import transformers

from ddp_eval import demo

# Measured: 190 u*S between two runs for the worst of 800 tokens of each tiny model, and 6 u*S for the mean, where G is 11.
WORST, TYPICAL = 64, 2
SAMPLE_TOKENS = 128  # whose logits are looked at for S


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def nats(dtype: torch.dtype, num_tokens: Any, logits_scale: float, reductions: float) -> Any:
    """Bound on the difference of two sums of log-probabilities.

    num_tokens: how many are summed, a number or an array. logits_scale: S. reductions: G.
    """
    return unit_roundoff(dtype) * logits_scale * reductions * (WORST + TYPICAL * num_tokens)


def float32_sum_nats(num_tokens: Any, total: Any) -> Any:
    """Bound on the error of adding up `num_tokens` log-probabilities in float32, as lm_eval does by default.

    total: their sum. Both are numbers or arrays. n terms round n times, in proportion to the sum; of many the signs differ.
    """
    return unit_roundoff(torch.float32) * np.minimum(num_tokens, 4 * np.sqrt(num_tokens)) * np.abs(total)


def count_at_most(text: str) -> int:
    """No fewer than the tokens of `text`: each stands for a byte or more, and a tokenizer may add one at either end."""
    return len(text.encode()) + 2


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What bounds the rounding error of one model."""

    dtype: torch.dtype
    logits_scale: float
    reductions: float

    def nats(self, num_tokens: Any) -> Any:
        """Bound for sums of `num_tokens` log-probabilities, a number or an array."""
        return nats(self.dtype, num_tokens, self.logits_scale, self.reductions)

    def nats_for(self, value: float, text: str, float32_sum: bool = True) -> float:
        """Bound for `value`, lm_eval's log-probability of `text`, where its tokens are not known. float32_sum: see `close`."""
        num_tokens = count_at_most(text)
        return self.nats(num_tokens) + (float32_sum_nats(num_tokens, value) if float32_sum and math.isfinite(value) else 0.0)

    def close(self, value: float, num_tokens: int) -> Any:
        """Equals what is within the bound of `value`."""
        return pytest.approx(value, abs=self.nats(num_tokens))

    def close_for(self, value: float, text: str, float32_sum: bool = True) -> Any:
        """Equals what is within the bound of lm_eval's log-probability of `text`. float32_sum: it was added up in float32."""
        return pytest.approx(value, abs=self.nats_for(value, text, float32_sum))

    def assert_close(self, ours: Iterable[float], theirs: Iterable[float], num_tokens: Iterable[int]) -> None:
        """Compare two columns of sums, request by request."""
        first, second, counts = (np.array(list(column)) for column in (ours, theirs, num_tokens))
        assert len(first) == len(second) == len(counts)
        drift, allowed = np.abs(first - second), self.nats(counts)
        worst = int(np.argmax(drift / allowed)) if len(drift) else 0
        assert (drift <= allowed).all(), (
            f"request {worst} of {counts[worst]} tokens: {drift[worst]:.3g} nats apart, {allowed[worst]:.3g} allowed"
        )


def of(model: Any) -> Rounding:
    """The bounds of a loaded model. Looks at its logits for some random tokens."""
    config = model.config.get_text_config() if not model.config.is_encoder_decoder else model.config
    return Rounding(model.dtype, logits_scale(model), growth(config))


def growth(config: Any) -> float:
    """sqrt(hidden size) * layers, those of encoder and decoder together."""
    layers = config.num_hidden_layers
    if config.is_encoder_decoder:
        pairs = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))
        layers = next(sum(getattr(config, name) for name in pair) for pair in pairs if hasattr(config, pair[1]))
    return math.sqrt(config.hidden_size) * layers


def logits_scale(model: Any) -> float:
    """The largest absolute logit for SAMPLE_TOKENS random tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(2, vocabulary, (1, SAMPLE_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    was_training = model.training
    with torch.inference_mode():
        scale = float(model.eval()(input_ids=tokens, use_cache=False, **more).logits.abs().max())
    model.train(was_training)
    assert math.isfinite(scale), "a model that gives NaN has no bounds: take those of the model before it was broken"
    return scale


@functools.cache
def of_kind(kind: str) -> Rounding:
    """The bounds of a tiny model, for runs in other processes."""
    return of(tiny_models.make_model(kind))


@functools.cache
def of_demo() -> Rounding:
    """The bounds of the bundled demo model."""
    return of(transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.float32).eval())


def log_softmax_nats(num_tokens: int, logits: torch.Tensor) -> float:
    """Bound on a sum of log-softmax values in float32, against exact ones of the same logits. (..., vocabulary).

    The sum of exponentials has as many terms as the vocabulary; subtracting it and the largest logit rounds at their size.
    """
    return unit_roundoff(torch.float32) * num_tokens * (logits.shape[-1] + 4 * float(logits.abs().max()))


def product_error(tokens: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    """Bound on the difference of two products of a linear layer, for each of its results: holds for any order of its terms.

    A sum of k terms is off by no more than k * u * (sum of the terms' sizes), to first order; there are two, and the bias.
    """
    sizes = tokens.abs() @ layer.weight.abs().T
    if layer.bias is not None:
        sizes = sizes + layer.bias.abs()
    return 2 * (tokens.shape[-1] + 2) * unit_roundoff(tokens.dtype) * sizes


def attention_error(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    """Bound on the difference of two results of scaled dot-product attention. (batch, heads, tokens, dims) each.

    A score of d terms is off by d * u * |q||k| / sqrt(d), and its exponential by that part of itself. The weights' sum over n
    keys and the weighted sum of values are off by n * u each. A result is a mean of values.
    """
    dims, keys = query.shape[-1], key.shape[-2]
    score = dims * float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) / math.sqrt(dims)
    return 2 * (2 * score + 2 * keys) * unit_roundoff(query.dtype) * float(value.abs().max())


def error_of_half(found: npt.ArrayLike, plain: npt.ArrayLike, exact: npt.ArrayLike) -> tuple[float, float]:
    """(mean error of `found`, what is allowed) for a 16-bit run of some dozen requests, in nats.

    exact: the same weights in float32. plain: the same dtype, one request in each forward. Either way rounding has the same size,
    and the mean of dozens stays below twice the other.
    """
    errors = [float(np.abs(np.asarray(side) - np.asarray(exact)).mean()) for side in (found, plain)]
    return errors[0], 2 * errors[1]


def as_float64(model: Any) -> Any:
    """A copy of a float32 model that computes in float64."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # the fused product has no float64
    return exact
