"""Encoder-decoders: the numbers of lm_eval's HF backend (backend=seq2seq), each context encoded once, any cut of the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerance
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from lm_eval_answers import answers_of, assert_same_outcome, texts_of
from task_files import write_generation_task, write_pairs_task
from tiny_models import evaluate_with_lm_eval

from ddp_eval.api import evaluate
from ddp_eval.engines.hf import checkpoint
from ddp_eval.engines.hf.seq2seq import Seq2SeqEngine
from ddp_eval.errors import UserError
from ddp_eval.packs.batches import Batch, Settings
from ddp_eval.packs.pairs import contexts_of, plan_pairs
from ddp_eval.packs.plan import build_pack, halve
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run.planning import make_plan

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")

TASKS = ["demo_hellaswag", "demo_boolean_expressions", "demo_lambada"]


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], Any]:
    made: dict[str, Any] = {}
    return lambda kind: made.setdefault(kind, made.get(kind) or tiny_models.make_model(kind))


def run(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    results = evaluate(model, tokenizer, tasks, **{"log_samples": True, "bootstrap_iters": 0, **options})
    assert results is not None
    return results


EXACT = {"softmax_dtype": "float64"}  # has lm_eval add up in float64, as we do


def assert_same_as_exact(ours: dict[str, Any], theirs: dict[str, Any], model: Any) -> None:
    assert_same_outcome(ours, theirs, tolerance.of(model), float32_sums=False)


@pytest.mark.parametrize(("kind", "tasks"), [("t5", TASKS), ("bart", TASKS[1:]), ("m2m_100", TASKS[1:])])
def test_numbers_are_those_of_lm_eval(kind: str, tasks: list[str], model_of: Callable[[str], Any]) -> None:
    """Catches a decoder fed unshifted, a continuation encoded with its context, special tokens, padding that shows."""
    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    theirs = evaluate_with_lm_eval(model_of(kind), tokenizer, tasks, lm_args=EXACT, limit=2)
    ours = run(model_of(kind), tokenizer, tasks, limit=2)
    assert_same_as_exact(ours, theirs, model_of(kind))
    section = ours["ddp_eval"]
    assert section["why_rows"] is None and section["engine"]["name"] == "seq2seq"
    # HellaSwag's four endings and the expressions' two answers share a context that is counted once.
    assert section["computed_tokens"] < section["request_tokens"] * 0.95


def test_a_tokenizer_that_ends_texts(model_of: Callable[[str], Any]) -> None:
    """Catches `</s>` missing behind a context, or set behind a continuation: T5's tokenizers add it."""
    from tokenizers import processors

    tokenizer = tiny_models.make_tokenizer(model_max_length=512, bos_token=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    assert tokenizer("a").input_ids[-1] == 1
    theirs = evaluate_with_lm_eval(model_of("t5"), tokenizer, TASKS[1:], lm_args=EXACT, limit=1)
    assert_same_as_exact(run(model_of("t5"), tokenizer, TASKS[1:], limit=1), theirs, model_of("t5"))


def test_rolling_windows(model_of: Callable[[str], Any]) -> None:
    """Catches windows refused, or fed otherwise than by lm_eval: what is predicted goes to the decoder alone."""
    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    short = {"max_length": 400}
    theirs = evaluate_with_lm_eval(model_of("t5"), tokenizer, ["demo_wikitext"], lm_args=EXACT | short, limit=1)
    ours = run(model_of("t5"), tokenizer, ["demo_wikitext"], model_args=short, limit=1)
    assert_same_as_exact(ours, theirs, model_of("t5"))
    assert ours["ddp_eval"]["requests"] > 2


def test_windows_of_their_own(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    """Catches a context cut to make room for the continuation: each has a window of its own. Empty contexts, leading spaces."""
    from lm_eval.tasks import TaskManager

    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    long = " many words in a row" * 5
    rows = [
        {"context": long, "continuation": " the end of it all"},
        {"context": "", "continuation": "alone"},
        {"context": "spaces   ", "continuation": "behind"},
        {"context": "spaces   ", "continuation": "here"},
    ]
    path = write_pairs_task(tmp_path / "tasks", rows)
    manager = TaskManager(include_path=path, include_defaults=False)
    short = {"max_length": 16}
    theirs = evaluate_with_lm_eval(model_of("bart"), tokenizer, ["pairs"], lm_args=EXACT | short, task_manager=manager)
    ours = run(model_of("bart"), tokenizer, ["pairs"], model_args=short, include_path=path)
    assert_same_as_exact(ours, theirs, model_of("bart"))


@pytest.mark.parametrize("options", [{"max_pack_tokens": 1}, {"max_pack_tokens": 300}, {"numerics": "alone"}, {"packing": False}])
def test_any_cut_gives_the_same_numbers(options: dict[str, Any], model_of: Callable[[str], Any]) -> None:
    """Catches an answer that depends on its neighbours, or on a context that is shared or not."""
    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    whole, cut = (run(model_of("t5"), tokenizer, TASKS[:2], limit=1, **each) for each in ({}, options))
    for task in TASKS[:2]:
        answers, texts = answers_of(cut["samples"][task]), texts_of(cut["samples"][task])
        for key, (value, flag) in answers_of(whole["samples"][task]).items():
            assert answers[key] == (tolerance.of_kind("t5").close_for(value, texts[key], float32_sum=False), flag)
    assert cut["ddp_eval"]["packs"] > whole["ddp_eval"]["packs"] or "packing" in options


def test_neighbours_that_change_numbers_are_parted(model_of: Callable[[str], Any]) -> None:
    """Catches wrong numbers of a model whose mask has a hole: it must prove itself on a few tokens."""

    requests = requests_from_lists([[5, 6, 7, 8], [5, 6, 7, 9], [4, 3, 2, 1, 9, 8, 7]], [1, 2, 3])
    cpu = torch.device("cpu")
    assert make_plan(Seq2SeqEngine(model_of("bart"), cpu), requests, True, None).why_rows is None

    class Misled(Seq2SeqEngine):
        """Its logits depend on how many contexts are in the batch."""

        def _read_off(self, logits: Any, pack: Any) -> Any:
            return super()._read_off(logits * (1 + 0.1 * len(contexts_of(pack)[0])), pack)

    decision = make_plan(Misled(model_of("bart"), cpu), requests, True, None)
    assert decision.why_rows is not None and "batches and single pairs differ by" in decision.why_rows
    assert decision.plan.num_packs == 3


@given(
    pairs=st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
        min_size=1, max_size=20,
    ),
    max_tokens=st.integers(1, 60),
    share=st.booleans(),
)  # fmt: skip
def test_every_pair_comes_back_from_its_plan(pairs: Any, max_tokens: int, share: bool) -> None:
    """Catches a pair lost, mixed with its neighbour, or torn at the wrong place, in whole packs and in halves of them."""
    requests = requests_from_lists([context + more for context, more in pairs], [len(more) for _, more in pairs])
    plan, item_of_request = plan_pairs(requests, max_tokens, share=share)
    found: dict[int, Any] = {}
    for index in range(plan.num_packs):
        pack = build_pack(plan, index)
        for part in halve(pack) if len(pack.items) > 1 else (pack,):
            contexts, context_of_item, continuations = contexts_of(part)
            for place, item in enumerate(part.items):
                found[item] = contexts[context_of_item[place]].tolist(), continuations[place].tolist()
            if share and part is pack:
                assert len({tuple(context.tolist()) for context in contexts}) == len(contexts)
    assert [found[item] for item in item_of_request.tolist()] == [(list(context), list(more)) for context, more in pairs]
    assert len(found) == plan.num_items == len({(tuple(context), tuple(more)) for context, more in pairs})
    assert int(plan.num_requests.sum()) == len(pairs)


def test_contexts_are_encoded_once(model_of: Callable[[str], Any]) -> None:
    """Catches an encoder that runs for every choice."""
    seen = []
    engine = Seq2SeqEngine(model_of("t5"), torch.device("cpu"))
    requests = requests_from_lists([[5, 6, 7, end] for end in (8, 9, 10, 11)], [1] * 4)
    plan, _ = plan_pairs(requests, 10_000)
    engine.collect(engine.launch(build_pack(plan, 0)))  # the first also looks whether the model draws
    handle = engine.model.get_encoder().register_forward_hook(lambda module, args, output: seen.append(output[0].shape[0]))
    sums = engine.collect(engine.launch(build_pack(plan, 0)))["logprob"]
    handle.remove()
    assert seen == [1] and len(sums) == 4 and len(np.unique(sums)) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["e", " th"], "max_gen_toks": 12},
        {"until": ["\n"], "max_gen_toks": 3},
        {"until": ["\n"], "max_gen_toks": 4, "num_beams": 2},
        {"until": ["\n"], "max_gen_toks": 8, "max_length": 6},
    ],
    ids=["stops", "limit", "beams", "length"],
)
def test_texts_are_those_of_lm_eval(settings: dict[str, Any], model_of: Callable[[str], Any], tmp_path: Path) -> None:
    """Catches an answer with its prompt cut off it, cut at other places, or as long as of a decoder-only model."""
    from lm_eval.tasks import TaskManager

    tokenizer = tiny_models.make_tokenizer(model_max_length=512)
    texts = ("What is it?", "many words in a row " * 3, "the end of")
    path = write_generation_task(tmp_path / "tasks", texts, settings)
    manager, short = TaskManager(include_path=path, include_defaults=False), {"max_length": 20}
    theirs = evaluate_with_lm_eval(model_of("bart"), tokenizer, ["pairs"], lm_args=short, task_manager=manager)
    ours = run(model_of("bart"), tokenizer, ["pairs"], model_args=short, include_path=path)
    found, expected = ([one["resps"] for one in results["samples"]["pairs"]] for results in (ours, theirs))
    assert found == expected
    assert any(text for one in expected for (text,) in one)


def test_forwards_that_draw(caplog: pytest.LogCaptureFixture) -> None:
    """Catches numbers that differ from run to run, unsaid, since an encoder or decoder draws from the global generator."""
    model = tiny_models.make_model("t5")
    model.decoder.block[0].register_forward_hook(lambda module, args, output: (output[0] + torch.rand(()), *output[1:]))
    engine = Seq2SeqEngine(model, torch.device("cpu"))
    plan, _ = plan_pairs(requests_from_lists([[5, 6, 7, end] for end in (8, 9)], [1] * 2), 10_000)
    first, again = (engine.collect(engine.launch(build_pack(plan, 0)))["logprob"] for _ in range(2))
    assert np.array_equal(first, again)
    assert "the model draws at random whenever it runs: from --seed, here 1234, and its input" in caplog.messages


def test_models_that_cannot_run() -> None:
    """Catches a traceback of ours where lm_eval meets the same error: a decoder without a first token, a cache that fails."""
    model, tokenizer = tiny_models.make_model("t5"), tiny_models.make_tokenizer()
    model.config.decoder_start_token_id = None
    engine: Any = Seq2SeqEngine(model, torch.device("cpu"))
    requests = requests_from_lists([[5, 6, 7, 8]], [1])
    with pytest.raises(UserError, match=r"^the model cannot score pairs of a context and a continuation: ValueError: .*start"):
        make_plan(engine, requests, packing=True, max_pack_tokens=None)
    model.config.decoder_start_token_id = 0
    model.decoder.block[0].layer[0].SelfAttention.q.weight.data = torch.zeros(3, 3)
    settings = Settings(("\n",), {"do_sample": False})
    batch = Batch([np.array([5, 6])], [4], [0], settings, 1, 0, range(1))
    with pytest.raises(UserError, match=r"^the model cannot generate, one prompt at a time: RuntimeError: mat1 and mat2 shapes"):
        engine.generate(batch, tokenizer, lambda requests, tokens: None)


def test_which_models_are_encoder_decoders() -> None:
    """Catches lm_eval's `backend=` lost, and a decoder taken out of an encoder-decoder treated as one."""
    t5, llama = transformers.T5Config(), transformers.LlamaConfig()
    assert checkpoint.is_seq2seq({}, t5) and not checkpoint.is_seq2seq({}, llama)
    assert checkpoint.is_seq2seq({"backend": "seq2seq"}, llama) and not checkpoint.is_seq2seq({"backend": "causal"}, t5)
    assert not checkpoint.is_seq2seq({}, transformers.BartConfig(is_encoder_decoder=False))


def test_what_serves_no_encoder_decoder() -> None:
    """Catches an encoder-decoder handed to code that knows decoders alone."""
    from ddp_eval.config import Config
    from ddp_eval.distributed.world import World
    from ddp_eval.placement.choose import choose_layout

    world, args = World(0, 0, 2, torch.device("cpu"), ranks_per_node=2), {"pretrained": "m"}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"layout": "layers:2"}, "--layout layers:2 cannot split an encoder-decoder: give --layout replicas"),
        ({"layout": "shard:2"}, "--layout shard:2 cannot split an encoder-decoder: give --layout replicas"),
        ({"load": "broadcast"}, "--load broadcast cannot send an encoder-decoder: give --load disk"),
        ({"model": "vllm"}, "encoder-decoders are not for --model vllm: give --model hf"),
    ]
    for options, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            choose_layout(Config(model_args=args, **options), transformers.T5Config(), world)


def test_positions_that_no_checkpoint_holds(tmp_path):
    """Catches Marian refused for random weights: its sines are computed over what was drawn, and are saved nowhere."""
    config = tiny_models.SEQ2SEQ_CONFIGS["bart"]()
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    model = transformers.MarianMTModel(transformers.MarianConfig(**fields)).eval()
    model.save_pretrained(tmp_path)
    args = {"pretrained": str(tmp_path), "dtype": "float32"}
    loaded = checkpoint.load_weights(args, checkpoint.load_config(args), torch.device("cpu"), transformers.AutoModelForSeq2SeqLM)
    assert torch.equal(loaded.model.encoder.embed_positions.weight, model.model.encoder.embed_positions.weight)
