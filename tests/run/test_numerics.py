"""The numeric ladder: what each level of --numerics asks for and keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddp_eval.config import Config
from ddp_eval.engines.hf.engine import HFEngine
from ddp_eval.errors import UserError
from ddp_eval.packs.plan import build_pack
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run.planning import make_plan


def test_fp32_reaches_the_loader():
    """Catches a precision that is accepted and then not loaded."""
    config = Config(model_args={"pretrained": "demo"}, tasks=["demo"], numerics="fp32")
    assert config.loader_args["dtype"] == "float32"
    assert "dtype" not in Config(model_args={"pretrained": "demo"}, tasks=["demo"]).loader_args


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"numerics": "exact"}, "--numerics must be fast, fp32 or alone, got exact"),
        ({"numerics": "fp32", "model_args": {"dtype": "bfloat16"}}, "--numerics fp32 and dtype=bfloat16 exclude each other"),
        ({"numerics": "alone", "max_pack_tokens": 9}, "--numerics alone and --max_pack_tokens exclude each other"),
    ],
)
def test_contradictions_are_refused(options, sentence):
    """Catches one of two wishes dropped in silence."""
    with pytest.raises(UserError, match=sentence):
        Config(tasks=["demo"], **options)


def test_alone_means_that_no_neighbour_matters(tiny_model):
    """Catches rows that share a forward: each request's bits must be those it has when nothing else is asked."""
    engine = HFEngine(tiny_model("llama"), torch.device("cpu"))
    random = np.random.default_rng(0)
    stem = random.integers(2, 400, 20).tolist()
    sequences = [stem[:length] for length in (6, 9, 9, 20)] + [random.integers(2, 400, 13).tolist()]
    targets = [1, 2, 3, 4, 5]

    def bits(chosen):
        requests = requests_from_lists([sequences[index] for index in chosen], [targets[index] for index in chosen])
        decision = make_plan(engine, requests, True, None, alone=True)
        assert decision.plan.rows and decision.why_rows == "--numerics alone was given"
        sums = [
            engine.collect(engine.launch(build_pack(decision.plan, index)))["logprob"] for index in range(decision.plan.num_packs)
        ]
        return np.concatenate(sums)[decision.item_of_request].view(np.int64).tolist()

    together = bits(range(5))
    assert together == [bits([index])[0] for index in range(5)]
