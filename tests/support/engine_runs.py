"""The transformers engine on tiny models: load it, run a plan by it, and random requests with their answers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny_models
import tolerance
import torch
from tiny_models import VOCAB_SIZE

from ddp_eval.engines.hf import checkpoint
from ddp_eval.engines.hf import engine as hf
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import Plan, build_pack
from ddp_eval.packs.requests import Requests, requests_from_lists

CPU = torch.device("cpu")
ONE_PACK = CostModel(forward=1e12)

Request = tuple[list[int], int]  # tokens, how many of the last are scored


class Answer(NamedTuple):
    """The answer to a request by hand. allowed_nats: how far rounding may move its log-probability."""

    logprob: float
    greedy: bool
    allowed_nats: float


def load(path: Path, **model_args: Any) -> hf.HFEngine:
    args = {"pretrained": str(path), "dtype": "float32", **model_args}
    return hf.load_engine(args, checkpoint.load_config(args), CPU)


def build_prefix_tree(
    model: Any, seed: int, count: int = 14, longest_prefix: int = 20, longest_tail: int = 9
) -> tuple[list[Request], list[Answer]]:
    """`count` random requests that branch off from earlier ones, or repeat or end within them; and their answers by hand.

    Some continue as the model itself would, so that greedy ones are among them.
    """
    random = np.random.default_rng(seed)

    def draw(least: int, most: int) -> list[int]:
        return random.integers(0, VOCAB_SIZE, random.integers(least, most + 1)).tolist()

    requests: list[Request] = []
    for index in range(count):
        tokens = draw(2, longest_prefix)
        if requests and index % 5:
            earlier = requests[random.integers(len(requests))][0]
            tokens = earlier[: random.integers(1, len(earlier) + 1)] + draw(0, longest_tail)
        if index % 3 == 0:
            num_targets = int(random.integers(1, 4))
            tokens = continue_greedily(model, tokens, num_targets)
        else:
            tokens = tokens if len(tokens) > 1 else tokens + draw(1, 1)
            num_targets = int(random.integers(1, min(len(tokens), 6)))
        requests.append((tokens, num_targets))
    return requests, answer_plainly(model, requests)


def answer_plainly(model: Any, requests: list[Request]) -> list[Answer]:
    """The answers by one plain forward for each request."""
    rounding = tolerance.of(model)
    return [Answer(*tiny_models.score_plainly(model, *request), rounding.nats(request[1])) for request in requests]


def continue_greedily(model: Any, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens = [*tokens, int(logits[0, -1].argmax())]
    return tokens


def to_requests(requests: list[Request]) -> Requests:
    return requests_from_lists([tokens for tokens, _ in requests], [count for _, count in requests])


def run(engine: hf.HFEngine, plan: Plan, item_of_request: np.ndarray) -> list[tuple[float, bool]]:
    done = [engine.collect(engine.launch(build_pack(plan, index))) for index in range(plan.num_packs)]
    results = np.concatenate(done)[item_of_request]
    return list(zip(results["logprob"].tolist(), results["greedy"].tolist(), strict=True))


def assert_equal_answers(got: list[tuple[float, bool]], expected: list[Answer]) -> None:
    assert_equal_values(got, expected)
    assert {True, False} == {answer.greedy for answer in expected}, "the requests test no flag"


def assert_equal_values(got: list[tuple[float, bool]], expected: list[Answer]) -> None:
    """As `assert_equal_answers`, for requests that are all greedy or none of them."""
    apart = [abs(value - answer.logprob) for (value, _), answer in zip(got, expected, strict=True)]
    allowed = [answer.allowed_nats for answer in expected]
    assert all(nats <= limit for nats, limit in zip(apart, allowed, strict=True)), (apart, allowed)
    assert [flag for _, flag in got] == [answer.greedy for answer in expected]
