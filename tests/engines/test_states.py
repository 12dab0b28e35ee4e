"""Trees that share caches, on tiny models of each kind of layer that keeps a state, against plain forwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_configs  # in scripts/
import tiny_models
import tolerance
import torch
import transformers
from engine_runs import CPU, answer_plainly, assert_equal_answers, assert_equal_values, build_prefix_tree, load, run, to_requests
from tiny_models import STATE_KINDS, VOCAB_SIZE

from ddp_eval.engines.hf import capabilities, mamba_scan, model_cache
from ddp_eval.engines.hf import engine as hf
from ddp_eval.engines.hf.cache_slots import CacheSlots
from ddp_eval.packs.plan import STATES
from ddp_eval.packs.rows import plan_rows
from ddp_eval.packs.states import count_branches, plan_one_forest
from ddp_eval.run import planning
from ddp_eval.run.planning import make_plan
from ddp_eval.run.self_check import check_states, trial_requests

# Of transformers 5.23, each with its own code for states. Zamba2's and xLSTM's tiny models do not run.
TYPES = [
    "bailing_hybrid", "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling2_text", "inkling_text",
    "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid",
    "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "zamba", "zaya",
]  # fmt: skip


def few_shot(seed: int, questions: int, prefix: int = 150) -> list[tuple[list[int], int]]:
    """Questions of several lengths behind one prefix, with two choices each: the second a token longer."""
    random = np.random.default_rng(seed)

    def draw(count: int) -> list[int]:
        return random.integers(2, VOCAB_SIZE, count).tolist()

    stem = draw(prefix)
    asked = [stem + draw(int(random.integers(20, 60))) for _ in range(questions)]
    return [(question + draw(1 + choice), 1 + choice) for question in asked for choice in (0, 1)]


@pytest.mark.parametrize("kind", STATE_KINDS)
def test_equals_plain_forwards(kind: str, tiny_model_path: Callable[[str], Path]) -> None:
    """Catches states that are not copied, belong to another row, are ignored or padded over, and positions counted anew."""
    engine = load(tiny_model_path(kind))
    requests, expected = build_prefix_tree(engine.model, seed=5, count=12, longest_prefix=70, longest_tail=40)
    plan, item_of_request = plan_one_forest(to_requests(requests))
    assert count_branches(plan) > 3
    assert_equal_answers(run(engine, plan, item_of_request), expected)
    assert check_states(engine, trial_requests(to_requests(requests), VOCAB_SIZE)) is None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_equals_plain_forwards(model_type: str) -> None:
    """Catches a type whose cache is another or whose layers ignore it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_configs.tiny_config(model_type), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4  # as drawn, hardly anything shows in the log-probabilities
    engine = hf.HFEngine(model, CPU)
    trial = trial_requests(to_requests([(list(range(2, 200)), 3)]), engine.vocab_size, engine.capabilities.reaches)
    assert check_states(engine, trial) is None
    assert engine.why_not_batches is None


def test_plan_shares_caches_where_it_pays(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches models with states that run in rows, rows that no longer do, and a plan that does not say which it is."""
    engine = load(tiny_model_path("qwen3_5"))
    requests = few_shot(seed=1, questions=8)
    decision = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert decision.plan.kind == STATES and decision.instead == planning.SHARED
    assert decision.why_rows == "its layers of the kind linear_attention keep a state instead of attending"
    asked = sum(len(tokens) - 1 for tokens, _ in requests)
    assert len(decision.plan.tokens) < asked / 3
    assert_equal_values(run(engine, decision.plan, decision.item_of_request), answer_plainly(engine.model, requests))
    assert make_plan(engine, to_requests(requests), packing=False, max_pack_tokens=None).plan.rows
    strangers = [(tokens[index : index + 9], 1) for index, (tokens, _) in enumerate(requests)]
    alone = make_plan(engine, to_requests(strangers), packing=True, max_pack_tokens=None)
    assert alone.plan.rows and alone.instead == planning.PADDED and "copies" not in str(alone.why_rows)


def test_check_catches_layers_that_ignore_their_state(
    tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that is blind: Mamba-1 layers begin at zero whatever their cache holds, without an error."""
    engine = load(tiny_model_path("mamba"))
    requests = few_shot(seed=2, questions=40)
    monkeypatch.setattr(mamba_scan, "beginning_at_states", lambda model: contextlib.nullcontext())
    decision = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert decision.plan.rows and "runs with copies of its cache and plain ones differ by" in str(decision.why_rows)


def test_check_copies_single_rows_too(tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trial that always has rows of two trees together: where all copy one row, they share its keys and values."""
    copy_layer = model_cache._copy_layer

    def without_keys(layer, rows, only, *rest):
        made = copy_layer(layer, rows, only, *rest)
        if only is not None and len(rows) > 1 and getattr(made, "keys", None) is not None:
            made.keys = torch.zeros_like(made.keys)
        return made

    engine = load(tiny_model_path("lfm2"))
    trial = trial_requests(to_requests(few_shot(seed=6, questions=4)), VOCAB_SIZE)
    monkeypatch.setattr(model_cache, "_copy_layer", without_keys)
    assert "copies of its cache and plain ones differ" in (check_states(engine, trial) or "")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_one_token_at_the_last_position(rope_type: str) -> None:
    """Catches padding beyond the length from which on the frequencies of all rows change."""
    model = tiny_models.make_model("lfm2")
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    config.max_position_embeddings = 64 if rope_type == "dynamic" else 256
    if rope_type == "longrope":
        config.rope_parameters |= {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    torch.manual_seed(0)
    engine = hf.HFEngine(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), CPU)
    stem = np.random.default_rng(7).integers(2, VOCAB_SIZE, 63).tolist()
    requests = [(stem + tail, 2) for tail in ([5, 6], [7, 8], [9, 10])]
    assert engine.most_positions == 64 == len(requests[0][0]) - 1
    plans = plan_one_forest(to_requests(requests)), plan_rows(to_requests(requests), 1, isolate=True)
    shared, alone = ([value for value, _ in run(engine, *plan)] for plan in plans)
    assert np.abs(np.array(shared) - alone).max() < 1e-4


def test_layers_that_fully_shard_has_derived_a_class_from() -> None:
    """Catches Mamba layers that are not known as such where a caller has sharded them one by one: they would begin at zero."""
    from torch.distributed.fsdp import FSDPModule

    model = tiny_models.make_model("mamba")
    requests = few_shot(seed=8, questions=3, prefix=40)
    expected = answer_plainly(model, requests)
    for block in model.backbone.layers:
        kind = type(block.mixer)
        block.mixer.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})
    assert_equal_values(run(hf.HFEngine(model, CPU), *plan_one_forest(to_requests(requests))), expected)


def test_long_branches_of_mamba() -> None:
    """Catches what a state adds to a branch that is computed a slice of tokens at a time."""
    engine = hf.HFEngine(tiny_models.make_model("mamba"), CPU)
    tokens = np.random.default_rng(9).integers(2, VOCAB_SIZE, (2, 300))
    tokens[1, :20] = tokens[0, :20]
    requests = [(row.tolist(), 290) for row in tokens]
    assert_equal_values(run(engine, *plan_one_forest(to_requests(requests))), answer_plainly(engine.model, requests))


def test_slots_hold_states(tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows without a common prefix, of which only keys and values were counted, that take any memory for their states."""
    engine = load(tiny_model_path("falcon_h1"))
    with engine.inference(None):
        assert CacheSlots(engine, np.zeros(0, dtype=np.int64), 8, 20).slots == 8
        states = 2 * 4 * 4 * 16 * 8  # bytes: layers, float32, heads, their size, state size
        monkeypatch.setitem(model_cache.COPIES_BYTES, "cpu", 5 * states)
        assert 1 <= CacheSlots(engine, np.zeros(0, dtype=np.int64), 8, 20).slots < 5


@pytest.mark.parametrize(("model_type", "values", "reach"), [
    ("deepseek_v4", {"index_topk": 512, "compress_rates": {"compressed_sparse_attention": 4}}, 2048),
    ("minimax_m3_vl_text", {"index_topk_blocks": 16, "index_block_size": 128}, 2048),
])  # fmt: skip
def test_reaches_count_tokens(model_type: str, values: dict[str, object], reach: int) -> None:
    """Catches a trial in which an indexer never has to choose: its top-k counts runs of tokens, of so many tokens each."""
    config = tiny_configs.tiny_config(model_type)
    for name, value in values.items():
        setattr(config, name, value)
    assert reach in capabilities.reaches(config)


def test_states_keep_their_dtype(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches states rounded to the model's dtype on their way into a copy, and rows mixed up in it."""
    engine = load(tiny_model_path("qwen3_5"), dtype="bfloat16")
    with torch.inference_mode():
        cache = engine.model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]), use_cache=True).past_key_values
        before = [tensor.clone() for tensor in model_cache._tensors(cache)]
        copied = model_cache.copy_rows(cache, [1, 1, 1], CPU)
        joined = model_cache.join_rows([cache, copied], [3, 3])
        engine.model(input_ids=torch.tensor([[5]] * 3), past_key_values=copied, use_cache=True)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].conv_states[0].dtype == torch.bfloat16
    for made in (copied, joined):
        assert [tensor.dtype for tensor in model_cache._tensors(made)] == [tensor.dtype for tensor in before]
    assert all(torch.equal(*pair) for pair in zip(model_cache._tensors(cache), before, strict=True)), "the source has changed"
    requests = few_shot(seed=3, questions=12, prefix=60)
    exact = [answer.logprob for answer in answer_plainly(load(tiny_model_path("qwen3_5")).model, requests)]
    plain = [value for value, _ in run(engine, *plan_rows(to_requests(requests), 1, isolate=True))]
    shared = [value for value, _ in run(engine, *plan_one_forest(to_requests(requests)))]
    error, allowed = tolerance.error_of_half(shared, plain, exact)
    assert error <= allowed


def test_rows_in_slots_of_their_own_cache(tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that see padding, another row's states or what has left, and more copies of a prefix than have room."""
    engine = load(tiny_model_path("qwen3_5"))
    random = np.random.default_rng(6)
    prefix, *tails = (random.integers(2, VOCAB_SIZE, count).astype(np.int32) for count in (30, 5, 1, 17, 8))
    fed = random.integers(2, VOCAB_SIZE, (4, 3)).tolist()
    with torch.inference_mode():
        slots = CacheSlots(engine, prefix, slots=3, width=25)
        found = [[row] for row in slots.admit(tails[:2])[1]]
        for rows, row in zip(found, slots.step([fed[0][0], fed[1][0]]), strict=True):
            rows.append(row)
        slots.drop(0, is_broken=True)  # the second row moves into its slot
        found[2:] = [[row] for row in slots.admit(tails[2:])[1]]
        for step in (1, 2):
            logits = slots.step([fed[1][step], fed[2][step - 1], fed[3][step - 1]])
            for place, row in enumerate(logits, start=1):
                found[place].append(row)
        ends = [fed[0][:1], fed[1], fed[2][:2], fed[3][:2]]
        for rows, tail, end in zip(found, tails, ends, strict=True):
            whole = torch.from_numpy(np.concatenate([prefix, tail, end]).astype(np.int64))[None]
            plain = engine.model(input_ids=whole, use_cache=False).logits[0]
            for place, row in enumerate(reversed(rows)):
                assert torch.allclose(row, plain[-1 - place], atol=1e-3), place
        monkeypatch.setitem(model_cache.COPIES_BYTES, "cpu", 25_000)
        assert CacheSlots(engine, prefix, slots=3, width=25).slots == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5", "falcon_h1", "jamba"])
def test_twenty_to_three_thousand_tokens(kind: str) -> None:
    """Catches numbers that go off with length, and packs that hold long and short requests badly."""
    engine = hf.HFEngine(tiny_models.make_model(kind), CPU)
    requests = [*few_shot(seed=4, questions=3, prefix=2900), *few_shot(seed=5, questions=6, prefix=400)]
    requests += [(tokens[-length:], 2) for (tokens, _), length in zip(requests, (20, 45, 90, 200, 700, 1500), strict=False)]
    decision = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert decision.plan.kind == STATES
    assert_equal_values(run(engine, decision.plan, decision.item_of_request), answer_plainly(engine.model, requests))
