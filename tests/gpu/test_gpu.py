"""The CUDA paths: flex_attention, masked sdpa and chains against plain rows, launches that wait for nothing, short memory."""

from typing import Any

import numpy as np
import pytest
import tolerance
import torch
from places import GENERATION_TASKS

from ddp_eval import demo
from ddp_eval.config import Config
from ddp_eval.distributed.messages import Work
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint
from ddp_eval.engines.hf import engine as hf
from ddp_eval.packs import cut, rows
from ddp_eval.packs import plan as packing
from ddp_eval.packs.requests import Requests, requests_from_lists
from ddp_eval.packs.results import fill_slots
from ddp_eval.run import execute, preflight
from ddp_eval.run.self_check import check_packs

TEXTS = str(GENERATION_TASKS)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]


@pytest.fixture
def requests() -> Requests:
    """Questions behind a shared prefix, with short choices, longer than one tile of flex_attention."""
    generator = np.random.default_rng(0)
    sequences, num_targets = [], []
    for _ in range(3):
        prefix = generator.integers(1, 2000, 150).tolist()
        for _ in range(4):
            choice = generator.integers(1, 2000, 7).tolist()
            sequences += [prefix + choice, prefix + choice[:3]]
            num_targets += [5, 2]
    return requests_from_lists(sequences, num_targets)


def load(dtype: str, **model_args: object) -> hf.HFEngine:
    args = {"pretrained": "demo", "dtype": dtype, **model_args}
    return hf.load_engine(args, checkpoint.load_config(args), torch.device("cuda", 0))


def score(engine: hf.HFEngine, plan: packing.Plan, item_of_request: np.ndarray) -> np.ndarray:
    sums = [engine.collect(engine.launch(packing.build_pack(plan, index)))["logprob"] for index in range(plan.num_packs)]
    return np.concatenate(sums)[item_of_request]


def assert_close(found, plain, requests, dtype):
    """By the bounds of float32, or against a run in float32: bfloat16 has none that a fault would exceed."""
    if dtype == "float32":
        tolerance.of_demo().assert_close(found, plain, requests.num_targets)
        return
    exact = score(load("float32"), *rows.plan_rows(requests, max_tokens=1))
    error, allowed = tolerance.error_of_half(found, plain, exact)
    assert error <= allowed


@pytest.mark.parametrize(
    ("dtype", "model_args", "implementation"),
    [("float32", {}, "sdpa"), ("float32", {"attn_implementation": "eager"}, "eager"), ("bfloat16", {}, "flex_attention")],
)
def test_packs_equal_plain_rows(requests, dtype, model_args, implementation):
    """A mask that CUDA's kernels read otherwise than the CPU's do, or a tail padding that shifts reads."""
    engine = load(dtype, **model_args)
    assert engine.tree_attention == implementation
    assert check_packs(engine, requests) is None
    packed = score(engine, *cut.plan_packs(requests, engine.cost_model(), max_tokens=512))
    plain = score(engine, *rows.plan_rows(requests, max_tokens=1))
    assert_close(packed, plain, requests, dtype)


@pytest.mark.parametrize(
    ("dtype", "model_args"),
    [
        ("float32", {}),
        ("float32", {"attn_implementation": "eager"}),
        ("bfloat16", {}),
        ("bfloat16", {"attn_implementation": "flex_attention"}),
    ],
)
def test_chains_equal_plain_rows(requests, dtype, model_args):
    """A pack without branches, which has no mask: positions or padding that the kernels read otherwise."""
    engine = load(dtype, **model_args)
    chains = cut.plan_packs(requests, engine.cost_model(), max_tokens=1)
    assert all(packing.build_pack(chains[0], index).is_chain for index in range(chains[0].num_packs))
    plain = score(engine, *rows.plan_rows(requests, max_tokens=1))
    assert_close(score(engine, *chains), plain, requests, dtype)


def cut_packs(requests, max_tokens):
    return cut.plan_packs(requests, cut.CostModel(dense=False), max_tokens)


@pytest.mark.parametrize(("planner", "max_tokens"), [(rows.plan_rows, 1), (cut_packs, 1), (cut_packs, 400)])
def test_a_launch_waits_for_nothing(requests, planner, max_tokens):
    """A value asked of the device within a launch: the next pack is then prepared only when this one is done."""
    engine = load("bfloat16")
    plan, _ = planner(requests, max_tokens)
    packs = [packing.build_pack(plan, index) for index in range(2)]
    assert max_tokens == 1 or not packs[0].is_chain, "trees, with their masks"
    for pack in packs:
        engine.collect(engine.launch(pack))  # asks the model what it can do, once, and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [engine.launch(pack) for pack in packs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(np.concatenate([engine.collect(one)["logprob"] for one in launched])).all()


def test_results_do_not_wait_for_the_next_pack(requests):
    """Results fetched behind the pack that was launched meanwhile: the device then idles until another is launched."""
    engine = load("bfloat16")
    plan, _ = cut.plan_packs(requests, engine.cost_model(), max_tokens=200)
    alone = [engine.collect(engine.launch(packing.build_pack(plan, index))) for index in range(2)]
    first, second = (engine.launch(packing.build_pack(plan, index)) for index in range(2))
    torch.cuda._sleep(2 * 10**9)  # cycles, about a second: the rest of the second pack
    np.testing.assert_array_equal(engine.collect(first), alone[0])
    assert not torch.cuda.current_stream().query(), "the second pack is still under way"
    np.testing.assert_array_equal(engine.collect(second), alone[1])


def test_packs_launched_ahead_keep_their_results(requests):
    """Results of two packs under way at once that are swapped, or overwritten by the later one."""
    engine = load("float32")
    plan, _ = cut.plan_packs(requests, engine.cost_model(), max_tokens=200)
    assert engine.capabilities.launches_ahead and plan.num_packs > 2
    world = World(0, 0, 1, engine.device)
    gathered = execute.run_plan(world, engine, Work(plan, np.arange(plan.num_packs), "ahead", phase="measure"))
    filled, _ = fill_slots(gathered.results, plan.num_items)
    expected = score(engine, plan, np.arange(plan.num_items))
    tolerance.of_demo().assert_close(filled["logprob"], expected, plan.num_targets)


def test_packs_are_halved_when_memory_is_short():
    """A pack that does not fit the card: its pieces must fit and come to the same numbers."""
    engine = load("float32")  # with a dense mask, whose size goes by the square of the pack
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1, 2000, 200).tolist() for _ in range(40)]
    plan, _ = cut.plan_one_tree(requests_from_lists(sequences, [5] * 40))
    pack = packing.build_pack(plan, 0)
    assert engine.tree_attention == "sdpa" and not pack.is_chain
    world = World(0, 0, 1, engine.device)
    engine.collect(engine.launch(packing.halve(pack)[0]))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    (whole,) = execute._launch(world, engine, pack)
    expected = engine.collect(whole)["logprob"]
    needed = torch.cuda.max_memory_allocated()
    del whole
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(engine.device).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.7 * (needed - before)) / total)
    try:
        pieces = execute._launch(world, engine, pack)
        sums = np.concatenate([engine.collect(piece)["logprob"] for piece in pieces])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(pieces) > 1
    tolerance.of_demo().assert_close(sums, expected, plan.num_targets)


def test_check_packs_sees_a_wrong_mask_in_bfloat16(requests, monkeypatch):
    """A tolerance for rounding that is so wide that it lets a plain causal mask over the tree pass."""
    engine = load("bfloat16", attn_implementation="sdpa")
    monkeypatch.setattr(engine, "_make_mask", lambda pack, depth: None)
    assert check_packs(engine, requests) is not None


def test_same_scores_as_on_the_cpu(requests):
    """A device-dependent index or dtype slip."""
    on_gpu = load("float32")
    args = {"pretrained": "demo", "dtype": "float32"}
    on_cpu = hf.load_engine(args, checkpoint.load_config(args), torch.device("cpu"))
    plan = cut.plan_packs(requests, on_cpu.cost_model(), max_tokens=2048)
    tolerance.of_demo().assert_close(score(on_gpu, *plan), score(on_cpu, *plan), requests.num_targets)


def test_evaluate_on_the_gpu():
    """The whole run on CUDA: the model stays where it is and the demo task is above chance."""
    import transformers

    import ddp_eval

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.bfloat16)
    model.to("cuda")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    results = ddp_eval.evaluate(model, tokenizer, ["demo_boolean_expressions"], bootstrap_iters=0)
    assert results["results"]["demo_boolean_expressions"]["acc,none"] > 0.8
    assert results["ddp_eval"]["engine"]["attention"] == "flex_attention"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("numerics", ["default", "alone"])
def test_texts_on_the_gpu_are_lm_evals(numerics):
    """Catches slots, masks or stop strings that CUDA's kernels take otherwise, and answers that come back wrong."""
    import tiny_models
    import transformers
    from lm_eval.tasks import TaskManager

    import ddp_eval

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH, dtype=torch.float32)
    model.to("cuda")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    manager = TaskManager(include_path=TEXTS, include_defaults=False)
    tasks = ["gen_boolean", "gen_story"]
    theirs = tiny_models.evaluate_with_lm_eval(model, tokenizer, tasks, task_manager=manager, limit=24)
    options = {"include_path": TEXTS, "limit": 24, "bootstrap_iters": 0, "log_samples": True}
    options |= {} if numerics == "default" else {"numerics": numerics}
    ours = ddp_eval.evaluate(model, tokenizer, tasks, **options)
    texts = [{(task, row["doc_id"]): row["resps"] for task in tasks for row in one["samples"][task]} for one in (theirs, ours)]
    assert len(texts[0]) == 48 and texts[0] == texts[1]
    assert (ours["ddp_eval"]["generation"]["slots"] > 1) == (numerics == "default")


def test_node_checks_try_the_gpu():
    """Catches a GPU that the node checks do not find, or cannot tell from another."""
    config = Config(model_args={"pretrained": "demo"}, tasks=["demo"], device="cuda")
    (line,) = preflight.check_nodes(config).lines
    assert f"rank 0, 1 x {torch.cuda.get_device_name(0)}" in line
    facts = preflight._look_at_gpu(config)
    assert facts is not None and facts["memory_bytes"] > 2**30
    assert facts["uuid"]
