"""Bytes of rows of a model's own cache: as reckoned without weights, in real caches, and as a limit on rows that run together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_configs  # in scripts/
import tiny_models
import torch
import transformers
from engine_runs import CPU, run, to_requests

from ddp_eval.engines.hf import cache_sizes, model_cache
from ddp_eval.engines.hf import engine as hf
from ddp_eval.packs.states import plan_one_forest

SLOW = [
    "bamba",
    "deepseek_v4",
    "kimi_linear",
    "mamba",
    "minimax",
    "minimax_m3_vl_text",
    "nemotron_h",
    "olmo_hybrid",
    "zamba2",
    "zaya",
]


@pytest.mark.parametrize(
    "model_type",
    [
        *["qwen3_next", "qwen3_5_text", "mamba2", "falcon_h1", "jamba", "lfm2", "deepseek_v32"],
        *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW],
    ],
)
def test_reckoned_bytes_are_those_of_real_caches(model_type: str) -> None:
    """Catches states counted by token, in another dtype or not at all, and windows and compressed runs taken for all tokens."""
    torch.manual_seed(0)
    config = tiny_configs.tiny_config(model_type)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sizes = cache_sizes.measure_cache(model, torch.bfloat16)
    assert sizes is not None
    for tokens in (8, 80):
        with torch.inference_mode():
            output = model.base_model(input_ids=torch.arange(2, 2 + tokens)[None], use_cache=True)
        cache: Any = getattr(output, str(model_cache.cache_argument(model)))
        assert sizes.row_bytes(tokens) == model_cache.row_bytes(cache, 1)
        copies = model_cache.copy_rows(cache, [0, 0, 0], CPU)
        assert sizes.row_bytes(tokens) == pytest.approx(model_cache.row_bytes(copies, 3), abs=8 * len(cache.layers))


def test_rows_that_run_together_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches roots whose states are in no limit, and branches that are counted as long as what they go on from."""
    engine, found = hf.HFEngine(tiny_models.make_model("qwen3_5"), CPU), []
    random = np.random.default_rng(0)
    stems = random.integers(2, tiny_models.VOCAB_SIZE, (8, 20)).tolist()
    tails = random.integers(2, tiny_models.VOCAB_SIZE, (8, 3, 60)).tolist()
    requests = [(stem + tail, 1) for stem, each in zip(stems, tails, strict=True) for tail in each]
    call = engine.call_with_cache

    def watch(tokens: Any, columns: Any, depth: int, cache: Any, keep: bool) -> Any:
        values, made = call(tokens, columns, depth, cache, keep)
        if made is not None or cache is not None:
            found.append((len(tokens), model_cache.row_bytes(cache if made is None else made, len(tokens))))
        return values, made

    monkeypatch.setattr(engine, "call_with_cache", watch)
    wide = run(engine, *plan_one_forest(to_requests(requests)))
    assert max(rows for rows, _ in found) >= 8
    assert engine.cache_sizes is not None
    room = 2 * 4 * engine.cache_sizes.row_bytes(20)
    monkeypatch.setitem(model_cache.COPIES_BYTES, "cpu", room)
    found.clear()
    narrow = run(engine, *plan_one_forest(to_requests(requests)))
    assert max(rows for rows, _ in found) == 4
    assert all(rows == 1 or 2 * rows * of_row <= room for rows, of_row in found)
    assert [value for value, _ in narrow] == pytest.approx([value for value, _ in wide], abs=1e-4)
