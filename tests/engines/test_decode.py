"""Texts against lm_eval's own HF backend at batch size 1, of tiny random models; chance that is of the request alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_configs  # in scripts/
import tiny_models
import torch
import transformers
from places import GENERATION_TASKS
from task_files import write_generation_task

import ddp_eval
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import decode, sampling
from ddp_eval.engines.hf.engine import HFEngine
from ddp_eval.errors import UserError
from ddp_eval.packs import batches
from ddp_eval.packs.batches import Prompts, Settings, build_batch, plan_batches
from ddp_eval.run import execute

TASKS = str(GENERATION_TASKS)
CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots for three rows, so that they are taken again and again, and families of a few."""
    monkeypatch.setattr(decode, "choose_sizes", lambda engine: batches.BatchLimits(10**6, 3, 8))
    monkeypatch.setattr(decode, "ADMIT_TOKENS", 16)


@pytest.fixture
def evaluate(no_lm_eval_index: None) -> Callable[..., Any]:
    def run(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
        options = {"include_path": TASKS, "bootstrap_iters": 0, "log_samples": True, **options}
        return ddp_eval.evaluate(model, tokenizer, tasks, **options)

    return run


def lm_eval_texts(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    return tiny_models.evaluate_with_lm_eval(model, tokenizer, tasks, task_manager=manager, **options)


def answers(results: dict[str, Any]) -> dict[Any, Any]:
    return {
        (task, row["doc_id"], row["filter"]): (row["resps"], row["filtered_resps"])
        for task, rows in results["samples"].items()
        for row in rows
    }


@pytest.mark.parametrize(
    "kind",
    [
        *tiny_models.BATCHED_KINDS,
        *["mamba", "qwen3_5", "bloom", "deepseek_v32"],  # in slots of their own cache
        *[
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("falcon_h1", "lfm2", "jamba", "mpt", "gpt_neo", "falcon_alibi")
        ],
    ],
)
@pytest.mark.usefixtures("few")
def test_greedy_texts_are_lm_evals(kind: str, evaluate: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    """Catches a wrong mask, position, window or slot, an answer that ends too early or too late, and a cut in another place."""
    model, tasks = tiny_model(kind), ["gen_boolean", "gen_story"]
    theirs = lm_eval_texts(model, tasks, limit=5)
    ours = evaluate(model, tasks, limit=5)
    assert answers(ours) == answers(theirs)
    assert ours["ddp_eval"]["generation"]["why_one_by_one"] is None
    for task in tasks:
        for name, value in theirs["results"][task].items():
            if "," in name and "stderr" not in name:
                assert ours["results"][task][name] == value


def test_llama4_decodes_alone_where_its_queries_go_by_index(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    """Catches slots in which every token beyond `floor_scale` counts as the first of its forward, silently wrong."""
    from lm_eval.tasks import TaskManager

    config = tiny_models.CONFIGS["llama4"]()
    config.floor_scale, config.attn_scale = 600, 2.0  # the self-check does not reach so far
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    text = " ".join(tiny_models.training_text())
    texts = [text[:4000] + more for more in ("one", "two words")]
    path = write_generation_task(tmp_path / "task", texts, {"max_gen_toks": 8, "until": ["@"]})
    manager = TaskManager(include_path=path, include_defaults=False)
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    theirs = tiny_models.evaluate_with_lm_eval(model, tokenizer, ["pairs"], task_manager=manager)
    ours = evaluate(model, ["pairs"], include_path=path)
    assert answers(ours) == answers(theirs)
    assert "index in the forward from 599 tokens on" in ours["ddp_eval"]["generation"]["why_one_by_one"]


# What layers keep beside keys: an indexer's (Qwen 4 with n-grams of tokens, too), compressed runs of tokens, blocks of them.
BESIDE_KEYS = {
    "deepseek_v4": {},
    "qwen4_exp_text": {},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "index_n_heads": tiny_configs.KV_HEADS,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", BESIDE_KEYS)
@pytest.mark.usefixtures("few")
def test_greedy_texts_of_what_keeps_more_than_keys(model_type: str, evaluate: Callable[..., Any]) -> None:
    """Catches an indexer that chooses among padding, and runs of tokens that begin elsewhere because of it."""
    torch.manual_seed(0)
    config = tiny_configs.tiny_config(model_type)
    for name, value in {**BESIDE_KEYS[model_type], "vocab_size": tiny_models.VOCAB_SIZE}.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 4
    theirs = lm_eval_texts(model, ["gen_boolean", "gen_story"], limit=5)
    ours = evaluate(model, ["gen_boolean", "gen_story"], limit=5)
    assert answers(ours) == answers(theirs)
    assert ours["ddp_eval"]["generation"]["why_one_by_one"] is None
    assert len({str(row["resps"]) for row in ours["samples"]["gen_story"]}) > 1


@pytest.mark.usefixtures("few")
def test_settings_that_look_at_the_text(evaluate: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    """Catches logits processors that see another row's tokens, or none of the prompt; others fall back to the model's own."""
    served: list[dict[str, Any]] = [{"repetition_penalty": 1.3, "min_new_tokens": 6}, {"no_repeat_ngram_size": 2}]
    alone = [{"num_beams": 2}, {"encoder_repetition_penalty": 1.4}, {"encoder_no_repeat_ngram_size": 1}]
    for settings in served + alone:
        theirs = lm_eval_texts(tiny_model("llama"), ["gen_story"], limit=3, gen_kwargs=settings)
        ours = evaluate(tiny_model("llama"), ["gen_story"], limit=3, gen_kwargs=settings)
        assert answers(ours) == answers(theirs)
        assert bool(ours["ddp_eval"]["generation"]["why_one_by_one"]) == (settings in alone)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "checkpoint",
    [
        {"max_new_tokens": 40},
        {"max_new_tokens": 5, "min_new_tokens": 3, "forced_eos_token_id": 7, "eos_token_id": [1, 40, 50, 60, 70, 80, 90]},
        {"max_length": 9, "num_return_sequences": 1, "repetition_penalty": 1.2, "do_sample": True, "top_k": 3},
    ],
)
def test_settings_of_the_checkpoint(checkpoint: dict[str, Any], evaluate: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a checkpoint's generation_config that is not obeyed, or is where lm_eval's call goes before it."""
    import pyarrow.parquet

    model, asked = tiny_models.make_model("llama"), {"until": ["zqzq"], "max_gen_toks": 8}
    model.generation_config.update(**checkpoint)
    theirs = lm_eval_texts(model, ["gen_story"], limit=2, gen_kwargs=dict(asked))
    for numerics in ("default", "alone"):
        path = tmp_path / numerics
        options = {} if numerics == "default" else {"numerics": numerics}
        ours = evaluate(model, ["gen_story"], limit=2, gen_kwargs=dict(asked), output_path=str(path), **options)
        assert answers(ours) == answers(theirs)
        rows = pyarrow.parquet.read_table(path / "texts.parquet").to_pylist()
        limit = checkpoint.get("max_new_tokens", 8)
        assert [row["at_limit"] for row in rows] == [row["num_tokens"] == limit for row in rows]
        assert any(row["num_tokens"] != 8 for row in rows) == (limit != 8)


def test_stop_strings_of_the_checkpoint_are_refused(evaluate: Callable[..., Any]) -> None:
    """Catches a traceback in the middle of a run where transformers would want a tokenizer that lm_eval does not give it."""
    model = tiny_models.make_model("llama")
    model.generation_config.stop_strings = ["e"]
    with pytest.raises(UserError, match=r"the task gen_story cannot generate with .*: stop_strings, .* give them as until"):
        evaluate(model, ["gen_story"], limit=2)


def test_no_slots_no_packs(evaluate: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    """Catches flags that ask for the model's own code and do not get it."""
    ours = evaluate(tiny_model("llama"), ["gen_boolean"], limit=3)
    alone = evaluate(tiny_model("llama"), ["gen_boolean"], limit=3, numerics="alone")
    assert answers(ours) == answers(alone)
    assert ours["ddp_eval"]["generation"]["slots"] == 3
    assert alone["ddp_eval"]["generation"]["slots"] == 0


@pytest.mark.usefixtures("few")
def test_mixed_kinds_and_repeats(evaluate: Callable[..., Any], tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches an answer given to another kind of request, repeats that are one and the same, and texts that are not kept."""
    import pyarrow.parquet

    path = tmp_path / "run"
    ours = evaluate(tiny_model("llama"), ["gen_drawn", "demo_lambada", "gen_boolean"], limit=4, output_path=str(path))
    drawn = [row["resps"][0] for row in ours["samples"]["gen_drawn"]]
    assert [len(texts) for texts in drawn] == [3] * 4
    assert all(len(set(texts)) > 1 for texts in drawn)
    rows = pyarrow.parquet.read_table(path / "texts.parquet").to_pylist()
    assert [row["text"] for row in rows if row["task"] == "gen_drawn"] == [text for texts in drawn for text in texts]
    assert [row["repeat"] for row in rows if row["task"] == "gen_drawn"] == [0, 1, 2] * 4
    assert pyarrow.parquet.read_table(path / "scores.parquet").num_rows == 4
    again = evaluate(tiny_model("llama"), ["gen_drawn"], limit=2)
    assert answers(again) == {key: value for key, value in answers(ours).items() if key[0] == "gen_drawn" and key[1] < 2}


def test_draws_follow_the_distribution(tiny_model: Callable[..., Any]) -> None:
    """Catches a token that can never be drawn, or one that is cut off by top_k and is."""
    model = tiny_model("llama")
    settings = Settings((), {"do_sample": True, "temperature": 1.0, "top_k": 3, "top_p": 1.0})
    chooser = sampling.TokenSampler(model, settings, 1)
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.25, 0.1]])).repeat(4000, 1)
    logits[:, 4] = -20.0
    draws = (np.arange(4000) + 0.5) / 4000
    prompts = [np.array([1])] * 4000
    chosen = chooser.choose(logits, prompts, [[]] * 4000, [1] * 4000, draws.tolist())
    shares = np.bincount(chosen, minlength=5) / 4000
    assert shares == pytest.approx([0.1 / 0.85, 0.5 / 0.85, 0.0, 0.25 / 0.85, 0.0], abs=0.01)


@pytest.fixture
def load(tiny_model: Callable[..., Any]) -> Iterator[Callable[[str], HFEngine]]:
    """An engine over a model that others use after it."""
    with contextlib.ExitStack() as loaded:

        def load(kind: str) -> HFEngine:
            engine = HFEngine(tiny_model(kind), CPU)
            loaded.callback(engine.close)
            return engine

        yield load


@pytest.mark.usefixtures("few")
def test_a_row_alone_and_in_company(load: Callable[[str], HFEngine], tiny_tokenizer: Any) -> None:
    """Catches a row that reads a neighbour's keys: its text would change with who is there."""
    engine, random = load("gemma3"), np.random.default_rng(0)
    settings = Settings(("zq",), {"do_sample": True, "temperature": 1.5})
    head = random.integers(2, 400, 40)
    tokens = [np.concatenate([head, random.integers(2, 400, size)]) for size in random.integers(1, 30, 9)]
    seeds = list(range(1, 10))

    def texts(chosen: list[int]) -> list[list[int]]:
        prompts = Prompts(
            [tokens[index] for index in chosen], [0] * len(chosen), [int(5 + index) for index in chosen],
            [seeds[index] for index in chosen], [settings], ["task"] * len(chosen),
        )  # fmt: skip
        plan, items = plan_batches(prompts, engine.generation_sizes(), [False])
        done: dict[int, list[int]] = {}
        for index in range(plan.num_batches):
            batch = build_batch(plan, index)
            done.update(zip(batch.items, engine.generate(batch, tiny_tokenizer, lambda *told: None), strict=True))
        return [done[item] for item in items.tolist()]

    together = texts(list(range(9)))
    assert together == [texts([index])[0] for index in range(9)]
    assert [len(text) for text in together] == [5 + index for index in range(9)]


def test_a_model_that_decodes_wrongly_is_found_out() -> None:
    """Catches a self-check that passes whatever comes: here the positions are ignored."""
    model = tiny_models.make_model("gpt2")
    engine = HFEngine(model, CPU)
    assert engine.why_not_batches is None
    whole = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids=None, **kwargs: whole(*args, **kwargs)
    assert "batched and plain runs differ" in str(HFEngine(model, CPU).why_not_batches)


@pytest.mark.parametrize("run_out", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: ...")])
def test_slots_are_halved_when_memory_is_short(
    run_out: Exception, load: Callable[[str], HFEngine], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that ends where fewer rows at once would do, and one that goes on for ever."""
    engine = load("llama")
    prompts = Prompts([np.arange(2, 9 + n) for n in range(8)], [0] * 8, [6] * 8, [0] * 8, [Settings((), {})], ["task"] * 8)
    plan, _ = plan_batches(prompts, batches.BatchLimits(10**6, 8, 8), [False])
    batch, generate, room = build_batch(plan, 0), engine.generate, 2

    def refuse(batch: Any, *rest: Any) -> Any:
        if batch.slots > room:
            raise run_out
        return generate(batch, *rest)

    world = World(0, 0, 1, CPU)
    wanted = generate(batch, tiny_tokenizer, lambda *told: None)
    monkeypatch.setattr(engine, "generate", refuse)
    assert execute._generate(world, engine, batch, tiny_tokenizer, lambda *told: None) == (wanted, 4)
    room = 0
    with pytest.raises(UserError, match="ran out of memory on cpu with 1 prompts and answers of up to"):
        execute._generate(world, engine, batch, tiny_tokenizer, lambda *told: None)
