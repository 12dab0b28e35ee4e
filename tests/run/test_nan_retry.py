"""A request whose forward overflows to NaN, and what shares a pack or a batch of answers with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerance
import torch
from lm_eval_answers import answers_of
from task_files import write_generation_task, write_pairs_task
from tiny_models import evaluate_with_lm_eval

import ddp_eval
from ddp_eval.engines.hf import decode
from ddp_eval.engines.hf.engine import HFEngine
from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine
from ddp_eval.packs import batches
from ddp_eval.packs.batches import NO_TOKEN, Batch, Settings, build_batch
from ddp_eval.packs.cut import plan_one_tree
from ddp_eval.packs.plan import build_pack
from ddp_eval.packs.requests import IntArray, requests_from_lists
from ddp_eval.packs.results import RESULT, Results
from ddp_eval.run import nan_retry
from ddp_eval.run.planning import Decision, make_plan

CPU = torch.device("cpu")
BAD = 33  # "@", whose embedding is NaN


@pytest.fixture(scope="module")
def poisoned() -> Any:
    """A model that one token, and nothing else, brings to NaN."""
    model = tiny_models.make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    return model


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs and batches without their self-check, whose tokens may be the bad one."""
    monkeypatch.setattr("ddp_eval.run.self_check.check_packs", lambda *arguments: None)
    monkeypatch.setattr(decode, "check_decoding", lambda engine: None)


@pytest.mark.usefixtures("trusted")
def test_a_request_keeps_its_nan_to_itself(poisoned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches log-probabilities that are NaN here and numbers in lm_eval, since a neighbour in the pack is NaN."""
    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    bad = tokenizer.decode([BAD])
    texts = [f"One of the words {'and' if number != 3 else bad} number {number}" for number in range(9)]
    path = write_pairs_task(tmp_path / "tasks", [{"context": text, "continuation": " of the end"} for text in texts])
    assert BAD in tokenizer.encode(texts[3]) and not any(BAD in tokenizer.encode(text) for text in texts[:3] + texts[4:])
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=path, include_defaults=False)
    theirs = answers_of(evaluate_with_lm_eval(poisoned, tokenizer, ["pairs"], task_manager=manager)["samples"]["pairs"])
    run = ddp_eval.evaluate(poisoned, tokenizer, ["pairs"], include_path=path, log_samples=True, bootstrap_iters=0)
    assert run is not None and run["ddp_eval"]["batching"] == "packs"
    ours = answers_of(run["samples"]["pairs"])
    assert [np.isnan(ours[key][0]) for key in theirs] == [np.isnan(theirs[key][0]) for key in theirs]
    assert sum(np.isnan(ours[key][0]) for key in theirs) == 1
    rounding = tolerance.of_kind("llama")
    assert all(ours[key][0] == rounding.close_for(value, " of the end") for key, (value, _) in theirs.items() if value == value)
    assert run["ddp_eval"]["nan_recovered"] >= 1
    assert run["ddp_eval"]["not_finite"] == {"pairs": {"requests": 1, "first": [[3, 0]]}}
    said = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert said[0].endswith("distinct requests came out NaN in packs with others: trying them by themselves") and len(said) == 2


def test_a_broken_model_is_not_run_again_for_every_request(
    poisoned: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches hours of single forwards over a model that gives nothing but NaN, and a sample that finds no cure and is all."""
    monkeypatch.setattr(nan_retry, "SAMPLE", 4)
    requests = requests_from_lists([[BAD, 9, number, 5] for number in range(10, 30)], [2] * 20)
    engine = HFEngine(poisoned, CPU)
    decision = Decision(*plan_one_tree(requests), None)
    runs: list[int] = []

    def results(count: int, value: float, greedy: bool) -> Results:
        return np.array([(item, value, greedy) for item in range(count)], dtype=RESULT)

    def run(value: float) -> Callable[[Any], Results]:
        return lambda plan: runs.append(plan.num_items) or results(plan.num_items, value, True)

    nothing = results(20, np.nan, False)
    assert nan_retry.rescore_nan(nothing, requests, decision, engine, run(np.nan))[1] == 0 and runs == [4]
    assert "none of 4 came out otherwise: the model is at fault, and 16 others are left as they are" in caplog.text
    found, saved = nan_retry.rescore_nan(nothing, requests, decision, engine, run(-1.0))
    assert saved == 20 and runs == [4, 4, 16] and np.array_equal(found, results(20, -1.0, True))
    assert np.isnan(nothing["logprob"]).all(), "what was gathered is left as it is"
    runs.clear()
    rows = decision._replace(plan=make_plan(engine, requests, packing=False, max_pack_tokens=None).plan)
    apart = Seq2SeqEngine(tiny_models.make_model("bart"), CPU)
    for cut, by in (decision, apart), (rows, engine):
        assert nan_retry.rescore_nan(nothing, requests, cut, by, run(-1.0))[1] == 0
    assert not runs, "there each has its own row"


def test_each_answer_goes_to_its_own_item(tiny_model: Callable[[str], Any]) -> None:
    """Catches scores of the second run that are given to other requests."""
    engine = HFEngine(tiny_model("llama"), CPU)
    random = np.random.default_rng(0)
    lists = [random.integers(2, 60, length).tolist() for length in (9, 7, 12, 7, 5, 11)]
    requests = requests_from_lists([*lists, lists[2]], [3, 2, 4, 2, 1, 5, 4])
    decision = make_plan(engine, requests, packing=True, max_pack_tokens=None)

    def run(plan: Any) -> Results:
        return np.concatenate([engine.collect(engine.launch(build_pack(plan, index))) for index in range(plan.num_packs)])

    right = run(decision.plan)
    for chosen in ([0], [2, 4], [5, 1, 3, 0]):
        broken = right.copy()
        broken["logprob"][chosen], broken["greedy"][chosen] = np.nan, ~broken["greedy"][chosen]
        found, saved = nan_retry.rescore_nan(broken, requests, decision, engine, run)
        assert saved == len(chosen)
        tolerance.of_kind("llama").assert_close(found["logprob"], right["logprob"], decision.plan.num_targets)
        np.testing.assert_array_equal(found[["item", "greedy"]], right[["item", "greedy"]])
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.0},
        {"do_sample": True, "eta_cutoff": 1e-3},
        {"do_sample": True, "top_h": 0.9},
    ],
    ids=["greedy", "sampled", "eta_cutoff", "top_h"],
)
@pytest.mark.parametrize("alone", [False, True])
def test_an_answer_ends_where_there_is_nothing_to_choose(
    options: dict[str, Any], alone: bool, poisoned: Any, tiny_model: Callable[[str], Any], tiny_tokenizer: Any
) -> None:
    """Catches token 0 chosen of NaN to the limit, torch's own error over a NaN, and neighbours that fall with it."""
    random = np.random.default_rng(0)
    prompts: list[IntArray] = [random.integers(100, 200, 12).astype(np.int32) for _ in range(8)]
    healthy = Batch(prompts, [6] * 8, list(range(21, 29)), Settings((), options), 0 if alone else 3, 0, range(8))
    expected = _generate(tiny_model("llama"), healthy, tiny_tokenizer)
    ill = [prompt.copy() for prompt in prompts]
    ill[2][5] = BAD
    found = _generate(poisoned, Batch(ill, [6] * 8, healthy.seeds, healthy.settings, healthy.slots, 0, range(8)), tiny_tokenizer)
    assert found[2] == [NO_TOKEN]
    assert not any(NO_TOKEN in answer for answer in expected) and not any(BAD in answer for answer in expected)
    assert [answer for place, answer in enumerate(found) if place != 2] == expected[:2] + expected[3:]


def test_one_nan_does_not_stay_in_a_slot(poisoned: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys of a broken row left behind the next one's, which is shorter: all that come to the slot would be run again."""
    random = np.random.default_rng(0)
    prompts: list[IntArray] = [random.integers(100, 200, length).astype(np.int32) for length in range(60, 20, -2)]
    prompts[0][3] = BAD
    singles, single = [], decode._single
    monkeypatch.setattr(decode, "_single", lambda batch, index: singles.append(index) or single(batch, index))
    monkeypatch.setattr(decode, "ADMIT_TOKENS", 16)
    batch = Batch(prompts, [6] * 20, [0] * 20, Settings((), {}), 4, 0, range(20))
    answers = _generate(poisoned, batch, tiny_tokenizer)
    assert answers[0] == [NO_TOKEN] and sum(NO_TOKEN in answer for answer in answers) == 1
    assert set(singles) <= {0, 1, 2, 3}, "those that were let in together"


def test_where_all_fall_the_first_few_tell(poisoned: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch behind a bad common prefix that is run again row by row, to the same end."""
    singles, single = [], decode._single
    monkeypatch.setattr(decode, "_single", lambda batch, index: singles.append(index) or single(batch, index))
    stem = np.array([*range(100, 140), BAD], dtype=np.int32)
    prompts: list[IntArray] = [np.append(stem, np.arange(150, 155 + number)).astype(np.int32) for number in range(12)]
    batch = Batch(prompts, [6] * 12, [0] * 12, Settings((), {}), 4, len(stem), range(12))
    assert _generate(poisoned, batch, tiny_tokenizer) == [[NO_TOKEN]] * 12
    assert singles == list(range(decode.NAN_PROBE))


def test_greedily_an_infinite_score_is_the_choice(tiny_tokenizer: Any) -> None:
    """Catches answers cut where transformers, and lm_eval with it, take the token whose score overflows."""
    model = tiny_models.make_model("llama")
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.index_fill(-1, torch.tensor([9]), torch.inf))
    prompt = np.arange(5, 20, dtype=np.int32)
    expected = model.generate(torch.from_numpy(prompt.astype(np.int64))[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for slots in (1, 0):
        batch = Batch([prompt], [4], [0], Settings((), {}), slots, 0, range(1))
        assert _generate(model, batch, tiny_tokenizer) == [expected[0, len(prompt) :].tolist()]


def test_a_beam_that_breaks_loses(poisoned: Any, tiny_model: Callable[[str], Any], tiny_tokenizer: Any) -> None:
    """Catches a healthy answer that is marked since another beam came to NaN, and one that is junk and not marked."""
    model, prompt = tiny_model("llama"), np.arange(5, 20, dtype=np.int32)
    context = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.inference_mode():
        second = int(model(context).logits[0, -1].topk(2).indices[1])
    settings = Settings((), {"num_beams": 2, "do_sample": False})
    whole = _generate(model, Batch([prompt], [1], [0], settings, 0, 0, range(1)), tiny_tokenizer)
    broken = tiny_models.make_model("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight[second] = torch.nan
    answers = _generate(broken, Batch([prompt], [3], [0], settings, 0, 0, range(1)), tiny_tokenizer)
    assert answers[0][0] == whole[0][0] and NO_TOKEN not in answers[0] and second not in answers[0]
    ill = prompt.copy()
    ill[4] = BAD
    assert _generate(poisoned, Batch([ill], [3], [0], settings, 0, 0, range(1)), tiny_tokenizer) == [[NO_TOKEN]]


def test_an_answer_keeps_what_came_before(poisoned: Any, tiny_tokenizer: Any) -> None:
    """Catches an answer thrown away whole, and one that goes on behind the NaN: the bad token is the second chosen."""
    prompt = np.arange(5, 20, dtype=np.int32)
    processor = {"forced_bos_token_id": None, "sequence_bias": [[[BAD], 1e6]]}
    for slots in (1, 0):
        batch = Batch([prompt], [6], [0], Settings((), processor), slots, 0, range(1))
        assert _generate(poisoned, batch, tiny_tokenizer) == [[BAD, NO_TOKEN]]


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("numerics", ["fast", "alone"])
def test_such_answers_are_counted(numerics: str, poisoned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an answer cut short by a NaN that is scored like any other, without a word."""
    import pyarrow.parquet

    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    texts = [f"Say the words {'and' if number != 1 else tokenizer.decode([BAD])} number {number}" for number in range(3)]
    path = write_generation_task(tmp_path / "tasks", texts, {"until": ["zzzz"], "max_gen_toks": 5})
    run = ddp_eval.evaluate(
        poisoned, tokenizer, ["pairs"], include_path=path, bootstrap_iters=0, numerics=numerics, output_path=tmp_path / "run"
    )
    assert run is not None
    assert run["ddp_eval"]["not_finite"] == {"pairs": {"requests": 1, "first": [[1, 0]]}}
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "texts.parquet").to_pylist()
    assert [(row["not_finite"], row["num_tokens"], row["at_limit"]) for row in rows] == [
        (False, 5, True),
        (True, 0, False),
        (False, 5, True),
    ]
    said = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert said == [
        "1 requests of the task pairs came to numbers that are NaN or infinite (document 1 choice 0): do not trust its metrics"
    ]


def test_an_encoder_decoder_ends_there_too(tiny_tokenizer: Any) -> None:
    """Catches the third way of generating that goes on with NaN."""
    model = tiny_models.make_model("bart")
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
        model.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(model.lm_head.weight.clone()))  # tied to them
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        batch = Batch([np.array([5, BAD, 7]), np.array([5, 6, 7])], [4, 4], [1, 2], Settings((), options), 0, 0, range(2))
        answers = Seq2SeqEngine(model, CPU).generate(batch, tiny_tokenizer, lambda requests, tokens: None)
        assert answers[0] == [NO_TOKEN] and NO_TOKEN not in answers[1]


def test_batches_keep_the_mark_in_a_journal(tmp_path: Path) -> None:
    """Catches a mark that a resume reads back as a token."""
    from ddp_eval.output.journal import Journal, read_journals

    prompts = batches.Prompts([np.array([1, 2])] * 2, [0] * 2, [4] * 2, [3, 4], [Settings((), {"do_sample": True})], ["t"] * 2)
    plan, _ = batches.plan_batches(prompts, batches.BatchLimits(100, 2, 2), [False])
    own = Journal(tmp_path / "a.journal", b"k" * 32, "here")
    own.append_texts(0, [[5, NO_TOKEN], [6]])
    own.close()
    found = read_journals(tmp_path, b"k" * 32, np.zeros(1, dtype=np.int64), plan.item_starts)
    assert len(build_batch(plan, 0)) == 2 and found.answers[:, 0].tolist() == [5, NO_TOKEN, 6]


def _generate(model: Any, batch: Batch, tokenizer: Any) -> list[list[int]]:
    engine = HFEngine(model, CPU)
    try:
        return decode.generate(engine, batch, tokenizer, lambda requests, tokens: None)
    finally:
        engine.close()


def test_a_finished_run_still_says_so(poisoned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches metrics over NaN that the same command shows again, on its finished directory, as if nothing were wrong."""
    from ddp_eval.config import Config
    from ddp_eval.distributed.world import join_group
    from ddp_eval.run import runner

    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    for part in (poisoned, tokenizer):
        part.save_pretrained(tmp_path / "model")
    path = write_pairs_task(tmp_path / "tasks", [{"context": f"A word {tokenizer.decode([BAD])}", "continuation": " of it"}])
    flags: dict[str, Any] = {"model_args": {"pretrained": str(tmp_path / "model")}, "tasks": ["pairs"], "include_path": path}
    for _ in range(2):
        caplog.clear()
        runner.run(Config(**flags, bootstrap_iters=0, output_path=str(tmp_path / "run")), join_group("cpu"))
        assert "1 requests of the task pairs came to numbers that are NaN or infinite" in caplog.text
    assert "nothing is left to do" in caplog.text
