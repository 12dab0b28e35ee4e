"""The transformers engine: packs against one plain forward for each request, by hand; what loading refuses, in which words."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import tiny_models
import tolerance
import torch
import transformers
from engine_runs import (
    CPU,
    ONE_PACK,
    Request,
    answer_plainly,
    assert_equal_answers,
    assert_equal_values,
    build_prefix_tree,
    continue_greedily,
    load,
    run,
    to_requests,
)
from tiny_models import ROW_KINDS, SINGLE_KINDS, TREE_KINDS, VOCAB_SIZE
from torch.utils import _pytree

from ddp_eval.engines import Capabilities
from ddp_eval.engines.hf import checkpoint
from ddp_eval.engines.hf import engine as hf
from ddp_eval.engines.ops import logprobs, masks, tree_attention
from ddp_eval.errors import UserError
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.plan import PACKS, build_pack, fed_tokens
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.packs.rows import plan_rows
from ddp_eval.run import planning
from ddp_eval.run.planning import cut_packs, make_plan
from ddp_eval.run.self_check import check_packs, trial_requests


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"], ids=str)
@pytest.mark.parametrize("kind", TREE_KINDS)
def test_packs_equal_plain_forwards(
    kind: str, implementation: str | None, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]
) -> None:
    """Catches a mask, position, window, chunk or read that is off by anything, in whole trees and cut ones."""
    if kind in ("gemma2", "mpt", "bloom", "gpt_neo", "openai_gpt") and implementation == "sdpa":
        pytest.skip(f"transformers refuses sdpa for {kind}")
    if kind == "falcon_alibi" and implementation == "eager":
        pytest.skip("transformers (5.23) adds Falcon's ALiBi twice under eager: other numbers than the model's own")
    engine = load(tiny_model_path(kind), **({"attn_implementation": implementation} if implementation else {}))
    assert engine.why_not_packs is None
    for seed in range(3):
        requests, expected = build_prefix_tree(tiny_model(kind), seed)
        whole = plan_packs(to_requests(requests), ONE_PACK, 10**6)
        cut = plan_packs(to_requests(requests), CostModel(), 40)
        assert whole[0].num_packs == 1 and not build_pack(whole[0], 0).is_chain
        assert cut[0].num_packs > 1
        assert_equal_answers(run(engine, *whole), expected)
        assert_equal_answers(run(engine, *cut), expected)


@pytest.mark.parametrize("kind", TREE_KINDS)
def test_large_packs_equal_plain_forwards(
    kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]
) -> None:
    """Catches what only a large pack meets: attention that goes block by block, branches far behind what they hang from."""
    engine = load(tiny_model_path(kind))
    requests, expected = build_prefix_tree(tiny_model(kind), seed=7, count=16, longest_prefix=240, longest_tail=90)
    plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, 10**6)
    assert len(build_pack(plan, 0)) > 700
    assert_equal_answers(run(engine, plan, item_of_request), expected)


@pytest.mark.parametrize("kind", TREE_KINDS)
def test_chains_equal_plain_forwards(kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]) -> None:
    """Catches keys or reads that a pack without branches loses when only its end is read, or all of it."""
    engine, model = load(tiny_model_path(kind)), tiny_model(kind)
    random = np.random.default_rng(0)
    for length, scored in ((200, 199), (200, 7), (70, 40), (1, 1)):
        tokens = random.integers(0, tiny_models.VOCAB_SIZE, length).tolist()
        likely = continue_greedily(model, tokens, 1)
        requests = [(tokens, scored), (likely, 1)] if length > 1 else [(likely, 1)]
        plan, item_of_request = plan_packs(to_requests(requests), ONE_PACK, 10**6)
        assert plan.num_packs == 1 and build_pack(plan, 0).is_chain
        assert_equal_values(run(engine, plan, item_of_request), answer_plainly(model, requests))


@pytest.mark.parametrize("rows", [False, True])
def test_transformers_looks_for_no_second_sequence(
    rows: bool, tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a search among the positions of a pack without a mask, whose answer a GPU's launch has to wait for."""
    engine = load(tiny_model_path("llama"), attn_implementation="sdpa")
    found: list[Any] = []
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", found.append)
    requests = to_requests([([1, 2, 3, 4, 5], 2)])
    plan, item_of_request = plan_rows(requests, 60) if rows else plan_packs(requests, ONE_PACK, 60)
    assert build_pack(plan, 0).is_chain
    run(engine, plan, item_of_request)
    assert not found
    engine.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    assert found, "the name has changed"


def test_what_goes_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a copy from pageable memory, which waits for the pack under way whatever `non_blocking` says."""
    pinned, sent = torch.zeros(3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: sent.append((tensor, args, kwargs)))
    hf.HFEngine.to_device(types.SimpleNamespace(device=torch.device("cuda", 0)), np.arange(3))  # type: ignore[arg-type]
    ((tensor, args, kwargs),) = sent
    assert tensor is pinned and args == (torch.device("cuda", 0),) and kwargs == {"non_blocking": True}


def test_results_set_out_behind_their_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches results fetched from a GPU when they are asked for: they come once the next pack, launched meanwhile, is done."""
    happened: list[Any] = []

    class OnGpu:
        device = torch.device("cuda", 0)

        def __init__(self, values: list[Any]) -> None:
            self.values = torch.tensor(values)

        def to(self, device: str, non_blocking: bool) -> torch.Tensor:
            happened.append(("copy", device, non_blocking))
            return self.values

    class Event:
        def record(self, stream: Any) -> None:
            happened.append(("record", stream))

        def synchronize(self) -> None:
            happened.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    pack = build_pack(plan_packs(to_requests([([1, 2, 3], 2)]), ONE_PACK, 60)[0], 0)
    launched = logprobs.copy_to_host(pack, logprobs.TokenScores(OnGpu([-1.0, -2.0]), OnGpu([True, True])))  # type: ignore[arg-type]
    assert happened == [("copy", "cpu", True), ("copy", "cpu", True), ("record", "stream of cuda:0")]
    results = logprobs.sum_logprobs(launched)
    assert happened[3:] == ["synchronize"] and results.tolist() == [(0, -3.0, True)]


def test_hits_are_argmax() -> None:
    """Catches a tie taken wrongly, an item with one miss that passes for greedy, one whose later reads lie in another order."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.integers(0, 3, (40, 6)).astype(np.float32))  # ties abound
    rows = np.sort(random.integers(0, 40, 300))
    columns = np.where(random.random(300) < 0.7, logits.argmax(-1).numpy()[rows], random.integers(0, 6, 300))
    items = random.permutation(np.resize(np.arange(60), 300))
    hits = logprobs.find_greedy(logits, torch.from_numpy(rows), torch.from_numpy(columns), items).numpy()
    expected = logits.argmax(-1).numpy()[rows] == columns
    misses, expected_misses = (np.bincount(items, weights=~each) for each in (hits, expected))
    assert ((misses == 0) == (expected_misses == 0)).all() and 5 < (misses == 0).sum() < 55


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "llama4"])
def test_packs_under_flex_attention(kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a BlockMask that says other than the dense masks, run without a compiler: only the kernel differs on a GPU."""
    engine = load(tiny_model_path(kind), attn_implementation="flex_attention")
    assert engine.model.config._attn_implementation == "flex_attention" and engine.why_not_packs is None
    requests, expected = build_prefix_tree(tiny_model(kind), seed=0)
    with torch.compiler.set_stance("force_eager"):
        answers = run(engine, *plan_packs(to_requests(requests), ONE_PACK, 10**6))
    assert_equal_answers(answers, expected)


@pytest.mark.parametrize("kind", [*TREE_KINDS, *ROW_KINDS])
def test_rows_equal_plain_forwards(kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]) -> None:
    """Catches padding that is seen, a row read at another row's column, and two lengths confused in one batch."""
    engine = load(tiny_model_path(kind))
    requests, expected = build_prefix_tree(tiny_model(kind), seed=1)
    for max_tokens in (1, 60, 10**6):
        assert_equal_answers(run(engine, *plan_rows(to_requests(requests), max_tokens)), expected)


@pytest.mark.parametrize("kind", TREE_KINDS)
def test_check_passes_models_that_packs_serve(kind: str, tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a check so strict that rounding turns packs off."""
    engine = load(tiny_model_path(kind))
    requests, _ = build_prefix_tree(engine.model, seed=2)
    assert check_packs(engine, to_requests(requests)) is None


def test_llama4_packs_stop_where_its_queries_go_by_index(tmp_path: Path) -> None:
    """Catches packs beyond `floor_scale` tokens: Llama 4 scales its queries by the index in the pack there, silently wrong."""
    config = tiny_models.CONFIGS["llama4"]()
    config.floor_scale, config.attn_scale = 200, 2.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    engine = load(tmp_path)
    # Chains beyond the limit are right by themselves; what would be wrong is to lay several behind one another.
    requests, expected = build_prefix_tree(model, seed=3, count=16, longest_prefix=60, longest_tail=40)
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=20_000)
    assert why_rows is None and not plan.rows
    assert max(len(build_pack(plan, index)) for index in range(plan.num_packs)) <= 199
    assert_equal_answers(run(engine, plan, item_of_request), expected)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_models_that_packs_cannot_serve_run_as_rows(
    kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]
) -> None:
    """Catches state-space models put into trees. Their caches are shared where that saves more than among these."""
    engine = load(tiny_model_path(kind))
    requests, expected = build_prefix_tree(tiny_model(kind), seed=3)
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert why_rows and plan.rows
    assert_equal_answers(run(engine, plan, item_of_request), expected)


@pytest.mark.parametrize("kind", SINGLE_KINDS)
def test_models_that_see_padding_run_request_by_request(
    kind: str, tiny_model: Callable[..., Any], tiny_model_path: Callable[[str], Path]
) -> None:
    """Catches packs 12 nats off: padded rows differ as much, and were taken for the measure of rounding."""
    engine = load(tiny_model_path(kind))
    requests, expected = build_prefix_tree(tiny_model(kind), seed=3)
    decision = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert decision.instead == planning.SINGLE and "padded rows and single ones differ" in (decision.why_rows or "")
    assert_equal_answers(run(engine, decision.plan, decision.item_of_request), expected)
    assert make_plan(engine, to_requests(requests), packing=False, max_pack_tokens=None).instead == planning.SINGLE


def test_trial_reaches_what_the_run_reaches() -> None:
    """Catches a window, chunk or top-k that the run passes and the trial does not; and a trial far longer than the run."""
    requests = to_requests([(list(range(1, 200)), 1), (list(range(1, 300)), 2)])
    for reaches, prefix in (((), 24), ((100,), 108), ((64, 250, 4096), 258), ((290,), 282), ((4096,), 24)):
        trial = trial_requests(requests, VOCAB_SIZE, reaches)
        lengths = np.diff(trial.starts) - 1
        assert lengths[0] == prefix + 9 + 4 - 1 and lengths.max() <= 298
        passed = [reach for reach in reaches if reach < 298]
        assert all(lengths.max() > reach for reach in passed)


def test_check_catches_a_mask_of_the_wrong_type(tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that is blind: a bool mask under eager is added to the scores and hides nothing, without an error."""
    engine = load(tiny_model_path("llama"), attn_implementation="eager")
    requests, expected = build_prefix_tree(engine.model, seed=4)
    make_mask = masks.make_mask
    monkeypatch.setattr(masks, "make_mask", lambda implementation, *rest: make_mask("sdpa", *rest))
    assert "differ by" in (check_packs(engine, to_requests(requests)) or "")
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert plan.kind != PACKS and "differ by" in (why_rows or "")
    assert_equal_answers(run(engine, plan, item_of_request), expected)


@pytest.mark.parametrize("name", ["position_ids", "attention_mask"])
def test_check_catches_a_model_that_ignores_an_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that never branches: a model that counts positions by index is right in every chain."""
    model = tiny_models.make_model("llama")
    forward = model.model.forward

    def deaf(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        heard = {"attention_mask": attention_mask, "position_ids": position_ids, name: None}
        return forward(input_ids=input_ids, **heard, **kwargs)

    requests, _ = build_prefix_tree(model, seed=5)
    monkeypatch.setattr(model.model, "forward", deaf)
    engine = hf.HFEngine(model, CPU)
    assert engine.why_not_packs is None
    assert "differ by" in (check_packs(engine, to_requests(requests)) or "")


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}])
def test_numbers_that_depend_on_the_longest_request(rope: dict[str, Any]) -> None:
    """Catches a short request whose rotary frequencies come from a longer one that shares its forward pass."""
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    if rope["rope_type"] == "longrope":
        rope = {**rope, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
        config: Any = transformers.Phi3Config(
            vocab_size=VOCAB_SIZE, rope_parameters={**rope, "rope_theta": 1e4}, max_position_embeddings=64,
            original_max_position_embeddings=32, pad_token_id=0, num_key_value_heads=2, **shape,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB_SIZE, rope_parameters={**rope, "rope_theta": 1e4}, max_position_embeddings=32, **shape
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    random = np.random.default_rng(0)
    requests: list[Request] = [(random.integers(0, VOCAB_SIZE, length).tolist(), 3) for length in (20, 20, 40, 40, 28, 45)]
    requests += [(requests[3][0][:30], 2), (continue_greedily(model, requests[0][0], 2), 2)]
    engine = hf.HFEngine(model, CPU)
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert plan.rows and "rotary" in (why_rows or "")
    assert_equal_answers(run(engine, plan, item_of_request), answer_plainly(model, requests))
    short = [(tokens[:33], count) for tokens, count in requests[:3]] + [
        (requests[3][0][:20] + requests[4][0][:8], 2),
        requests[-1],
    ]
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(short), packing=True, max_pack_tokens=None)
    assert why_rows is None and not plan.rows, "up to 32 fed tokens, the frequencies are the same for all"
    assert_equal_answers(run(engine, plan, item_of_request), answer_plainly(model, short))


@pytest.mark.parametrize("shared", [0, 30, 300])
def test_positions_by_index_are_seen_on_questions_with_choices(
    shared: int, tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a trial of packs made of one question's choices, which have no branch to be wrong on."""
    engine = load(tiny_model_path("llama"))
    call = engine._call
    monkeypatch.setattr(engine, "_call", lambda *args, **kwargs: call(*args, **{**kwargs, "position_ids": None}))
    random = np.random.default_rng(shared)
    prefix = random.integers(0, VOCAB_SIZE, shared).tolist()
    questions = [prefix + random.integers(0, VOCAB_SIZE, 20).tolist() for _ in range(6)]
    requests: list[Request] = [([*question, choice], 1) for question in questions for choice in range(4)]
    plan, _, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert plan.kind != PACKS and "differ by" in (why_rows or "")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_dynamic_rope_does_not_remember(kind: str) -> None:
    """Catches scores that depend on what ran before: transformers keeps the longest length seen and its frequencies.

    Gemma 3 keeps one for each kind of layer.
    """
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    by_layer = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    more = (
        {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 16, "num_key_value_heads": 2}
        if kind != "llama"
        else {}
    )
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        rope_parameters=by_layer if more else rope, max_position_embeddings=32, initializer_range=0.2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    engine = hf.HFEngine(transformers.AutoModelForCausalLM.from_config(config).eval(), CPU)
    random = np.random.default_rng(0)
    requests = to_requests([(random.integers(0, VOCAB_SIZE, length).tolist(), 3) for length in (60, 100, 120)])
    plan, _ = plan_rows(requests, max_tokens=1)
    forwards = [lambda index=index: engine.collect(engine.launch(build_pack(plan, index)))["logprob"][0] for index in range(3)]
    upwards = [forward() for forward in forwards]
    downwards = [forward() for forward in forwards[::-1]]
    assert upwards == downwards[::-1]


def test_model_that_fails_on_packs_runs_as_rows(tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends in the trial of packs, where rows would have served."""
    engine = load(tiny_model_path("llama"))

    def fail(pack: Any) -> Any:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(engine, "_forward_tree", fail)
    requests: list[Request] = [([1, 2, 3, 4], 1), ([1, 2, 5, 6], 2)]
    plan, _, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert plan.rows and "too many values" in (why_rows or "")


def test_no_packing_gives_rows(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a flag that is read nowhere."""
    engine = load(tiny_model_path("llama"))
    requests, _ = build_prefix_tree(engine.model, seed=6)
    plan, _, why_rows, _ = make_plan(engine, to_requests(requests), packing=False, max_pack_tokens=None)
    assert plan.rows and why_rows == "--no_packing was given"


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_a_callers_default_dtype_changes_nothing(default: torch.dtype) -> None:
    """Catches memory asked for in the dtype that a training script has set."""
    logits, rows, columns = torch.randn(5, 7), torch.arange(5), torch.tensor([1, 0, 6, 2, 3])
    expected = logprobs.log_softmax_at(logits, rows, columns)
    torch.set_default_dtype(default)
    try:
        found = logprobs.log_softmax_at(logits, rows, columns)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_low_precision_is_summed_in_float32(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a softmax or a sum in bfloat16: the logits are rounded, what is computed from them may not be."""
    engine = load(tiny_model_path("llama"), dtype="bfloat16")
    assert engine.model.dtype == torch.bfloat16
    tokens, count = np.random.default_rng(0).integers(0, VOCAB_SIZE, 30).tolist(), 20
    seen: list[torch.Tensor] = []
    engine.model.get_output_embeddings().register_forward_hook(lambda module, args, logits: seen.append(logits))
    ((value, _),) = run(engine, *plan_packs(requests_from_lists([tokens], [count]), CostModel(), 100))
    # In float64, from the same logits: another forward may round them to other values of bfloat16.
    logits = seen[-1].reshape(-1, VOCAB_SIZE)[-count:].double()
    expected = float(logits.log_softmax(-1)[torch.arange(count), torch.tensor(tokens[-count:])].sum())
    assert seen[-1].dtype == torch.bfloat16
    assert value == pytest.approx(expected, abs=tolerance.log_softmax_nats(count, logits))


def test_cost_model_counts_the_weights_that_work(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches embeddings counted as work, and idle experts: by hand, from the tiny models' shapes."""
    attention_weights, norms = 32 * 32 * 2 + 32 * 16 * 2, 2 * 32
    llama = load(tiny_model_path("llama")).cost_model()
    assert llama.token == 2 * (2 * (attention_weights + 3 * 32 * 64 + norms) + 32)
    assert llama.read == 2 * 32 * VOCAB_SIZE
    mixture = load(tiny_model_path("qwen3_moe")).cost_model()
    in_use = attention_weights + norms + 2 * 8 + 4 * 32 + 2 * 3 * 32 * 32  # two norms of a head, a router, two experts of four
    assert mixture.token == 2 * (2 * in_use + 32)


@contextlib.contextmanager
def refused(*words: str):
    """The block raises UserError, one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def model_copy(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> Path:
    """A saved model that the test may spoil."""
    return Path(shutil.copytree(tiny_model_path("llama"), tmp_path / "model"))


def test_missing_directory_is_named(tmp_path: Path) -> None:
    """Catches a missing path that is looked up as a name on the hub."""
    path = str(tmp_path / "nothing")
    with refused(path, "does not exist"):
        checkpoint.load_config({"pretrained": path})
    with refused(path, "does not exist"):
        checkpoint.load_tokenizer({"pretrained": path})


def test_unknown_hub_name_is_named() -> None:
    """Catches transformers' page of advice, or its traceback, for a mistyped name."""
    with refused("cannot load the model no-such-owner/no-such-model"):
        checkpoint.load_config({"pretrained": "no-such-owner/no-such-model"})


def test_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a minute of the hub's client trying again before the user hears that there is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with refused(
        "cannot load the model no-such-owner/no-such-model: couldn't reach http://127.0.0.1:9", "where there is a network"
    ):
        checkpoint.load_config({"pretrained": "no-such-owner/no-such-model"})
    assert time.monotonic() - started < 15


def test_directory_without_config(tmp_path: Path) -> None:
    """Catches a traceback for a directory of something else."""
    with refused(str(tmp_path), "holds no model"):
        checkpoint.load_config({"pretrained": str(tmp_path)})


def test_model_without_tokenizer(model_copy: Path) -> None:
    """Catches an empty tokenizer that transformers makes up where its files are missing, or an error that names no way out."""
    for file in model_copy.glob("tokenizer*"):
        file.unlink()
    with refused(str(model_copy), "tokenizer", "tokenizer=NAME"):
        checkpoint.load_tokenizer({"pretrained": str(model_copy)})


def test_tokenizer_from_elsewhere(model_copy: Path, tiny_model_path: Callable[[str], Path]) -> None:
    """Catches `tokenizer=` that is read nowhere."""
    for file in model_copy.glob("tokenizer*"):
        file.unlink()
    tokenizer = checkpoint.load_tokenizer({"pretrained": str(model_copy), "tokenizer": str(tiny_model_path("llama"))})
    assert tokenizer("the").input_ids == tiny_models.make_tokenizer()("the").input_ids


@pytest.mark.parametrize("dtype", ["nonsense", "int8", "float23", 16])
def test_unknown_dtype(model_copy: Path, dtype: Any) -> None:
    """Catches a type that is taken for the default, or for a type that weights cannot have."""
    with refused(f"dtype in --model_args must be auto, float32, bfloat16 or float16, got {dtype}"):
        load(model_copy, dtype=dtype)


def test_unknown_model_argument(model_copy: Path) -> None:
    """Catches a mistyped argument that is dropped without a word."""
    with refused("cannot load the model", "atn_implementation"):
        load(model_copy, atn_implementation="eager")


def test_unknown_attention_implementation(model_copy: Path) -> None:
    """Catches a traceback for a mistyped value."""
    with refused("cannot load the model", "quick"):
        load(model_copy, attn_implementation="quick")


def test_missing_weight_is_named(model_copy: Path) -> None:
    """Catches a score of random weights: transformers only warns where a checkpoint lacks some."""
    file = model_copy / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with refused(str(model_copy), "lacks 1 of the model's weights", "model.layers.1.mlp.up_proj.weight"):
        load(model_copy)


def test_heads_leave_nothing_behind(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a class that is made for each call of the head: torch keeps those of a model's outputs for good."""
    engine = load(tiny_model_path("llama"))
    plan, _ = plan_rows(to_requests([([5, 6, 7, 8], 2)]), max_tokens=100)
    assert engine.splits_head
    before = len(_pytree.SUPPORTED_NODES)
    for _ in range(3):
        engine.collect(engine.launch(build_pack(plan, 0)))
    assert len(_pytree.SUPPORTED_NODES) == before


def test_tied_head_is_not_missing(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches a checkpoint refused for the head that it shares with its embeddings and so does not store."""
    for kind in ("gpt2", "gemma2"):
        file = tiny_model_path(kind) / "model.safetensors"
        assert "lm_head.weight" not in safetensors.torch.load_file(file)
        load(tiny_model_path(kind))


def test_weights_of_another_shape(model_copy: Path) -> None:
    """Catches a traceback, or random weights, for a config that does not belong to the weights."""
    config = transformers.AutoConfig.from_pretrained(model_copy)
    config.intermediate_size = 48
    config.save_pretrained(model_copy)
    with refused(str(model_copy)):
        load(model_copy)


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1\n"], ids=["cut off", "pointer"])
def test_broken_weights(content: bytes | None, model_copy: Path) -> None:
    """Catches a traceback for a download that broke off, or for a clone without its large files."""
    file = model_copy / "model.safetensors"
    file.write_bytes(content or file.read_bytes()[:20_000])
    with refused(f"cannot load the model {model_copy}"):
        load(model_copy)


def test_no_weights(model_copy: Path) -> None:
    """Catches a traceback for a directory that holds a config alone."""
    (model_copy / "model.safetensors").unlink()
    with refused(f"cannot load the model {model_copy}"):
        load(model_copy)


def test_rows_are_cut_by_their_padding(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that pads short rows to far longer ones, and one that cuts where rows are not padded at all."""
    engine = hf.HFEngine(tiny_model("llama"), CPU)
    requests = requests_from_lists([[number, length, *range(2, length)] for number in range(30) for length in (5, 50)], [2] * 60)
    plan = make_plan(engine, requests, packing=False, max_pack_tokens=None).plan
    padding = fed_tokens(plan) - len(plan.tokens)
    assert plan.rows and plan.num_packs > 1 and padding <= plan.num_packs * engine.cost_model().most_padding
    monkeypatch.setattr(engine, "capabilities", Capabilities(rows_are_independent=True))
    assert make_plan(engine, requests, packing=False, max_pack_tokens=None).plan.num_packs == 1
    engine.close()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_rotary_slices_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches slices put together wrongly, or cut along the heads, and a modeling file that is not given back."""
    model = tiny_models.make_model(kind)
    tokens = torch.randint(0, 50, (2, 23), generator=torch.Generator().manual_seed(1))
    code = sys.modules[type(model).__module__]
    now = code.apply_rotary_pos_emb
    rotate = getattr(now, "args", (now,))[0]  # another test's engine may still be open
    monkeypatch.setattr(code, "apply_rotary_pos_emb", rotate)
    with torch.inference_mode():
        expected = model(tokens).logits
        monkeypatch.setattr(hf.rotary, "TOKENS", 5)
        engine = hf.HFEngine(model, CPU)
        assert code.apply_rotary_pos_emb is not rotate
        assert torch.equal(model(tokens).logits, expected)
    engine.close()
    assert code.apply_rotary_pos_emb is rotate


@pytest.mark.parametrize("attention_args", [{}, {"attn_implementation": "eager"}], ids=["default", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_last_layer_works_only_where_it_is_read(
    kind: str, attention_args: dict[str, str], tiny_model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a last layer that computes what nobody reads, and one that leaves out what somebody does."""
    engine = load(tiny_model_path(kind), **attention_args)
    requests, expected = build_prefix_tree(engine.model, seed=11)
    plan, item_of_request, *_ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    seen: list[int] = []
    assert engine.last_layer.feed_forward is not None
    forward = engine.last_layer.feed_forward.forward

    def watched(inner: Callable[..., torch.Tensor], hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        return forward.func(lambda some: seen.append(some.shape[1]) or inner(some), hidden, *rest)

    monkeypatch.setattr(engine.last_layer.feed_forward, "forward", functools.partial(watched, *forward.args))
    assert_equal_answers(run(engine, plan, item_of_request), expected)
    assert seen == [len(build_pack(plan, index).reads) for index in range(plan.num_packs)]
    assert sum(seen) < len(plan.tokens)


def test_last_layer_works_whole_where_positions_are_mixed_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches output left out that something after the last layer looks at."""
    model = tiny_models.make_model("llama")
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda hidden: norm(hidden.cumsum(dim=1)))
    engine = hf.HFEngine(model, CPU)
    assert engine.splits_head and not engine.skips_unread
    engine.close()
    assert "forward" not in vars(engine.last_layer.feed_forward)


def test_ways_that_round_otherwise_agree_and_others_do_not() -> None:
    """Catches shortcuts given up in half precision for one step of rounding, and shortcuts taken that come to something else."""
    logits = torch.randn((2, 5000), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = logits.to(dtype)
        neighbours = (whole.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
        assert (neighbours != whole).float().mean() > 0.9 and hf._agree(neighbours, whole, dtype), dtype
        wrong = whole.clone()
        wrong[0, 7] += 0.5
        assert not hf._agree(wrong, whole, dtype), dtype
        shifted = whole + 0.02 * whole.abs().max()
        assert not hf._agree(shifted, whole, dtype), "each a little, all of them"
    assert not hf._agree(logits[:1], logits, torch.float32)


def test_short_memory_is_no_word_on_what_a_model_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another plan, and so other packs than on other machines, because memory was short while the model was asked."""
    engine = hf.HFEngine(tiny_models.make_model("llama"), CPU)

    def run_out(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.model, "forward", run_out)
    with pytest.raises(UserError, match="cpu has no memory left beside the model for a forward of four tokens"):
        _ = engine.splits_head
    monkeypatch.undo()
    assert engine.splits_head and engine.skips_unread


def refuse(*args: Any) -> Any:
    raise RuntimeError("Failed to find C compiler")


def test_trees_by_the_models_own_attention_where_the_fastest_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches rows, several times slower, where packs need no more than another attention; and costs of the wrong one."""
    model = tiny_models.make_model("llama")
    requests, expected = build_prefix_tree(model, seed=3)
    monkeypatch.setattr(tree_attention, "with_keys", refuse)
    engine = hf.HFEngine(model, CPU)
    assert engine.tree_attention == tree_attention.NAME
    most = []
    monkeypatch.setattr(planning, "cut_packs", lambda *args: most.append(args[2]) or cut_packs(*args))
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert why_rows is None and not plan.rows and engine.tree_attention == "sdpa" and engine.cost_model().dense
    assert most == [4096] == [engine.max_tokens()], "dense masks pay for the square"
    assert_equal_answers(run(engine, plan, item_of_request), expected)
    assert "packs run with sdpa attention, not with ddp_eval_blocks" in caplog.text


def test_attention_stays_where_no_other_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that cannot run packs at all, and is left with an attention that was only tried."""
    engine = hf.HFEngine(tiny_models.make_model("llama"), CPU)
    launch = engine.launch
    monkeypatch.setattr(engine, "launch", lambda pack: launch(pack) if pack.rows else refuse())
    decision = make_plan(engine, to_requests([([1, 2, 3], 1)]), packing=True, max_pack_tokens=None)
    assert decision.plan.rows and "Failed to find C compiler" in str(decision.why_rows)
    assert engine.tree_attention == tree_attention.NAME


def test_short_memory_is_no_word_on_packs_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows, or another attention, because memory was short while packs were tried, and a traceback in its rows."""
    for kind in (True, False):
        engine = hf.HFEngine(tiny_models.make_model("llama"), CPU)
        launch = engine.launch

        def run_out(pack: Any, launch: Any = launch, kind: bool = kind) -> Any:
            if pack.rows == kind:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return launch(pack)

        monkeypatch.setattr(engine, "launch", run_out)
        with pytest.raises(UserError, match=r"rank 0 ran out of memory when it tried the model on [0-9]+ tokens: give"):
            make_plan(engine, to_requests([([1, 2, 3], 1)]), packing=True, max_pack_tokens=None)


def test_scores_that_are_not_finite_are_said_to_be() -> None:
    """Catches broken weights told as packs that differ by nan from plain runs."""
    model = tiny_models.make_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    decision = make_plan(hf.HFEngine(model, CPU), to_requests([([1, 2, 3], 1)]), packing=True, max_pack_tokens=None)
    assert decision.why_rows == "its scores are not finite"
