"""`ddp_eval.lm` and `ddp_eval.evaluate` called as programs call lm_eval's own HFLM and `simple_evaluate`. Source: attempts to
break this program: requests without a task, one object twice, settings as text and a loaded model each ended in a traceback."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import tiny_models
import tolerance
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from places import GENERATION_TASKS

import ddp_eval
from ddp_eval import demo
from ddp_eval.errors import UserError
from ddp_eval.lm import DDPEvalLM, launch

WINDOW = 24  # tokens, of the sides that are to cut
LONG = "One two three four five six seven eight nine ten. " * 8


@pytest.fixture(scope="module")
def make_sides(tiny_model_path: Callable[[str], Path]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """make_sides(kind, **arguments) -> (ours, lm_eval's HFLM at batch size 1), of the same weights and tokenizer."""
    opened: dict[str, tuple[Any, Any]] = {}

    def make(kind: str = "llama", **arguments: Any) -> tuple[Any, Any]:
        key = json.dumps([kind, arguments])
        if key not in opened:
            path = tiny_model_path(kind)
            ours = launch(pretrained=str(path), device="cpu", **arguments)
            opened[key] = ours, HFLM(pretrained=str(path), device="cpu", batch_size=1, **arguments)
        return opened[key]

    yield make
    for ours, _ in opened.values():
        ours.close()


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one, 0) for one in arguments]


Answers = Sequence[tuple[float, bool]]


def scores_agree(ours: Answers, theirs: Answers, pairs: Sequence[tuple[str, str]], kind: str = "llama") -> None:
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    sums_agree([value for value, _ in ours], [value for value, _ in theirs], [text for _, text in pairs], kind)
    assert all(type(value) is float and type(flag) is bool for value, flag in ours)


def sums_agree(ours: Sequence[float], theirs: Sequence[float], texts: Sequence[str], kind: str = "llama") -> None:
    rounding = tolerance.of_kind(kind)
    assert list(ours) == [rounding.close_for(value, text) for value, text in zip(theirs, texts, strict=True)]


PAIRS = [
    ("The cat", " sat"), ("The cat ", "sat on the mat"), ("", " sat"), ("", "<s>sat on"), ("<s>The cat", " sat"),
    ("Zoë läuft 走", " 走る 🙂"), ("The cat", " sat"), ("The", " cat"), ("The", " cat sat"), ("a\t", "\tb"), (LONG, " ten"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_pairs(kind: str, make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches requests without a task, an empty context, trailing spaces and repeats answered otherwise than by HFLM."""
    ours, theirs = make_sides(kind)
    expected = [theirs.loglikelihood([one])[0] for one in ask("loglikelihood", *PAIRS)]
    scores_agree(ours.loglikelihood(ask("loglikelihood", *PAIRS)), expected, PAIRS, kind)


def test_one_text_cut_in_two_places(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches a continuation that is read at another's places. HFLM does so within one call, 0.6 nats here, unless
    logits_cache=False is given. A plain forward says what is right."""
    ours, theirs = make_sides()
    pairs = [("The", " cat sat"), ("The cat", " sat")]
    asked = ask("loglikelihood", *pairs)
    context, continuation = theirs._encode_pair("The cat", " sat")
    expected = tiny_models.score_plainly(theirs.model, context + continuation, len(continuation))
    assert ours.loglikelihood(asked)[1][0] == tolerance.of_kind("llama").close(expected[0], len(continuation))
    theirs.logits_cache = False
    try:
        scores_agree(ours.loglikelihood(asked), theirs.loglikelihood(asked), pairs)
    finally:
        theirs.logits_cache = True


def test_what_does_not_fit(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches a TypeError over the tasks that have lost tokens, and other tokens lost than by HFLM."""
    ours, theirs = make_sides(max_length=WINDOW)
    pairs = [(LONG, " ten"), ("One two three four", " five six"), (LONG, ""), ("a", "b")]
    kept = [pair for pair in pairs if pair[1]]  # HFLM fails on an empty continuation
    mine = ours.loglikelihood(ask("loglikelihood", *pairs))
    scores_agree(
        [one for one, pair in zip(mine, pairs, strict=True) if pair[1]], theirs.loglikelihood(ask("loglikelihood", *kept)), kept
    )
    asked = ask("generate_until", (LONG, {"until": ["\n"], "max_gen_toks": 6}), ("One", {"until": ["\n"], "max_gen_toks": 6}))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    with pytest.raises(UserError, match=rf"answers of up to {WINDOW} tokens, which leaves no room for its prompts"):
        ours.generate_until(ask("generate_until", ("One", {"max_gen_toks": WINDOW})))
    texts = [LONG, "", "One", LONG[:60]]
    asked = ask("loglikelihood_rolling", *((text,) for text in texts))
    mine = ours.loglikelihood_rolling(asked)
    sums_agree(mine, theirs.loglikelihood_rolling(asked), texts)
    assert mine[1] == 0 and all(type(one) is float for one in mine)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"until": "."},
    {"until": [".", "\n"], "max_gen_toks": 5},
    {"until": [], "max_new_tokens": 4},
    {"max_tokens": "7"},
    {"do_sample": False, "temperature": 0.7, "max_gen_toks": 5},
    {"temperature": 0, "max_gen_toks": 5},
    {"max_gen_toks": 6, "repetition_penalty": 1.3},
]


def test_texts(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches stop strings read otherwise than by HFLM (one text, a list, none), and settings mixed up in one call."""
    ours, theirs = make_sides(max_length=300)
    prompts = ["The cat", "One two three", "Q: what?\nA:"]
    arguments = [
        (prompt, {"max_gen_toks": 12, **given} if not given or "until" in given else given)
        for given in SETTINGS
        for prompt in prompts
    ]
    mine = ours.generate_until(ask("generate_until", *arguments))
    assert mine == theirs.generate_until(ask("generate_until", *arguments)) and len(set(mine)) > 10


def test_one_object_twice(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches an IndexError for an object that stands in the list twice, whatever its repeats say, and draws all alike."""
    ours, theirs = make_sides(max_length=300)
    greedy = ask("generate_until", ("The cat", {"max_gen_toks": 5}))[0]
    (pair,), (text,) = ask("loglikelihood", ("The", " cat")), ask("loglikelihood_rolling", ("The cat",))
    greedy.repeats = 5
    assert ours.generate_until([greedy, greedy]) == theirs.generate_until([greedy, greedy])
    scores_agree(ours.loglikelihood([pair, pair]), theirs.loglikelihood([pair, pair]), [pair.args] * 2)
    sums_agree(ours.loglikelihood_rolling([text] * 3), theirs.loglikelihood_rolling([text] * 3), [text.args[0]] * 3)
    drawn = ask("generate_until", ("The cat", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}))[0]
    answers = ours.generate_until([drawn, drawn, drawn])
    assert len(set(answers)) > 1 and answers == ours.generate_until([drawn, drawn, drawn])


def test_settings_as_text(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches do_sample="false" taken for true, which draws at random, and a temperature that no sampler can use."""
    ours, _ = make_sides(max_length=300)

    def texts(**settings: Any) -> list[str]:
        return list(
            ours.generate_until(ask("generate_until", *((prompt, {"max_gen_toks": 9, **settings}) for prompt in ("The", "A b"))))
        )

    greedy, sampled = texts(), texts(do_sample=True, temperature=0.7, top_k=20)
    assert greedy != sampled
    given: dict[str, Any]
    for given in (
        {"do_sample": "false"},
        {"temperature": "0.0"},
        {"do_sample": "False", "temperature": "0.7"},
        {"max_gen_toks": "9"},
    ):
        assert texts(**given) == greedy, given
    for given in (
        {"do_sample": "true", "temperature": "0.7", "top_k": "20"},
        {"do_sample": 1, "temperature": "7e-1", "top_k": 20},
    ):
        assert texts(**given) == sampled, given
    assert texts(until=None, top_p="none") == greedy


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("until=.", "gives generation settings that are no mapping"),
        ({"until": [3]}, "until of the task without a name must be a text or a list of texts, got"),
        ({"until": ("a", "b")}, "until of the task without a name must be a text or a list of texts"),
        ({"do_sample": "perhaps"}, "do_sample of the task without a name must be true or false, got perhaps"),
        ({"temperature": "warm"}, "cannot be meant"),
        ({"max_gen_toks": "many"}, "cannot be meant"),
        ({"max_gen_toks": 0}, "max_gen_toks of the task without a name must be 1 or more, got 0"),
        ({"do_sample": True, "temperature": 0.0}, "cannot generate with"),
        ({"beams": 3}, "cannot generate with"),
    ],
)
def test_settings_that_cannot_be_meant(settings: Any, sentence: str, make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches a traceback, or a setting that is dropped in silence; the model answers the next call."""
    ours, theirs = make_sides(max_length=300)
    with pytest.raises(UserError, match=sentence):
        ours.generate_until(ask("generate_until", ("The cat", settings)))
    asked = ask("generate_until", ("The cat", {"max_gen_toks": 3}))
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_calls_in_any_order(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches an object that answers its first call alone, or answers a later one out of an earlier, and empty lists that run."""
    ours, theirs = make_sides(max_length=300)
    kinds = {
        "loglikelihood": ask("loglikelihood", *PAIRS[:4]),
        "loglikelihood_rolling": ask("loglikelihood_rolling", ("The cat sat.",), ("",)),
        "generate_until": ask("generate_until", ("The cat", {"max_gen_toks": 4}), ("", {"max_gen_toks": 4}))[:1],
    }
    expected = {kind: getattr(theirs, kind)(asked) for kind, asked in kinds.items()}
    chosen = random.Random(0)
    for kind in chosen.choices([*kinds, *kinds], k=9):
        assert getattr(ours, kind)([]) == getattr(theirs, kind)([]) == []
        answers = getattr(ours, kind)(kinds[kind])
        if kind == "loglikelihood":
            scores_agree(answers, expected[kind], PAIRS[:4])
        elif kind == "generate_until":
            assert answers == expected[kind]
        else:
            sums_agree(answers, expected[kind], [one.args[0] for one in kinds[kind]])
    bare = [SimpleNamespace(args=one.args) for one in kinds["loglikelihood"]]  # of a request, HFLM reads no more
    scores_agree(ours.loglikelihood(bare), expected["loglikelihood"], PAIRS[:4])


def test_token_ids(make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches `_loglikelihood_tokens`, which programs of their own call with ids, missing or scored otherwise."""
    for kind, sides in (("llama", make_sides()), ("llama", make_sides(max_length=WINDOW)), ("t5", make_sides("t5"))):
        asked: list[tuple[Any, list[int], list[int]]] = [
            (("a", "b"), [5, 6, 7], [8, 9]), (None, [0], [20]), (None, list(range(20, 60)), [61, 62]), (None, [5, 6, 7], [8, 10]),
        ]  # fmt: skip
        first, second = (one._loglikelihood_tokens(asked, disable_tqdm=True) for one in sides)
        scores_agree(first, second, [("", "ab")] * len(asked), kind)  # for two tokens or fewer
        assert sides[0]._loglikelihood_tokens([]) == []


TEXTS = ["", "The cat", " The cat ", "<s>The cat", "<s>", "Zoë 走る 🙂\n", LONG]


@pytest.mark.parametrize("arguments", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}])
def test_tokens(arguments: dict[str, Any], make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches text and ids that go other ways than HFLM's."""
    ours, theirs = make_sides(**arguments)
    for text in TEXTS:
        for special in (None, True, False):
            ids = theirs.tok_encode(text, add_special_tokens=special)
            assert ours.tok_encode(text, add_special_tokens=special) == ids and type(ours.tok_encode(text)) is list
            assert ours.tok_decode(ids) == theirs.tok_decode(ids)
            assert ours.tok_decode(ids, skip_special_tokens=False) == theirs.tok_decode(ids, skip_special_tokens=False)
        assert ours.tok_encode(text, left_truncate_len=3) == theirs.tok_encode(text, left_truncate_len=3)
    assert ours.tok_decode(ours.eot_token_id, skip_special_tokens=False) == "</s>"
    for batch in (TEXTS[1:], TEXTS[3:], TEXTS[6:]):
        for options in ({}, {"padding_side": "right"}, {"left_truncate_len": 5}):
            for one, other in zip(
                ours.tok_batch_encode(batch, **options), theirs.tok_batch_encode(batch, **options), strict=True
            ):
                assert torch.equal(one, other)
    for context, continuation in [pair for pair in PAIRS if pair[0]]:
        assert tuple(map(list, ours._encode_pair(context, continuation))) == theirs._encode_pair(context, continuation)


SAME = [
    "add_bos_token", "backend", "batch_schedule", "batch_size", "batch_size_per_gpu", "batch_sizes", "chat_template_args",
    "custom_prefix_token_id", "delta", "device", "enable_thinking", "eot_token_id", "logits_cache", "max_batch_size",
    "max_gen_toks", "max_length", "mixed_precision_dtype", "peft", "prefix_token_id", "rank", "think_end_token",
    "tokenizer_name", "truncation", "vocab_size", "world_size", "AUTO_MODEL_CLASS", "_DEFAULT_MAX_LENGTH", "_max_length",
    "revision", "pretrained",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_members(kind: str, make_sides: Callable[..., tuple[Any, Any]]) -> None:
    """Catches an AttributeError in a program that was written for HFLM, and one that does not say why or what to do."""
    ours, theirs = make_sides(kind)
    absent = {}
    for name in (name for name in dir(theirs) if not name.startswith("__")):
        try:
            assert callable(getattr(ours, name)) == callable(getattr(theirs, name)), name
        except AttributeError as error:
            absent[name] = str(error)
    assert set(absent) == {
        "_get_config", "_get_backend", "_create_model", "_create_tokenizer", "_get_accelerate_args", "_detect_batch_size",
        "_batch_scheduler", "_model_generate", "_select_cont_toks",
    }  # fmt: skip
    assert all(f"DDPEvalLM has no {name}: " in text and len(text) > len(name) + 40 for name, text in absent.items())
    assert {name: getattr(ours, name) for name in SAME} == {name: getattr(theirs, name) for name in SAME}
    assert set(SAME) >= {name for name in vars(HFLM) if isinstance(vars(HFLM)[name], property)} - {"config", "model"}
    assert type(ours.model) is type(theirs.model) and ours.config.model_type == theirs.config.model_type == kind
    mine, expected = ours.get_model_info(), theirs.get_model_info()
    assert {name: str(value) for name, value in mine.items()} == {name: str(value) for name, value in expected.items()}
    assert ours.chat_template(False) is None and ours.chat_template(True) == theirs.chat_template(True)
    with pytest.raises(AttributeError, match="'DDPEvalLM' object has no attribute 'no_such_member'"):
        _ = ours.no_such_member
    assert not hasattr(ours, "accelerator") and getattr(ours, "accelerator", None) is None
    if kind == "llama":
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(ours._model_call(ids), theirs._model_call(ids))


def test_members_as_given(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches settings of a program that it does not find again."""
    given = {"batch_size": "auto:2", "max_batch_size": 8, "max_length": 64, "revision": "main"}
    made = launch(pretrained=tiny_model_path("llama"), device="cpu", think_end_token="7", **given)  # a path, not its text
    assert made is not None
    with made:
        assert (made.batch_size, made.batch_schedule, made.max_batch_size) == ("auto", 2.0, 8)
        assert (made.max_length, made.max_gen_toks, made.think_end_token) == (64, 256, 7)
    described = DDPEvalLM.create_from_arg_string(
        f"pretrained={tiny_model_path('llama')},dtype=float32", {"device": "cpu", "batch_size": 4, "max_batch_size": None}
    )
    with described:
        assert described.batch_size == 4 and described.device == torch.device("cpu")


def test_no_model_in_one_piece(make_sides: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part of a model handed out as the whole: its forward, on one rank alone, would wait for the others for ever."""
    from ddp_eval.layout import Layout

    ours, _ = make_sides()
    monkeypatch.setattr(ours, "_replica", SimpleNamespace(layout=Layout("tensor", 2), engine=ours._replica.engine))
    for name in ("model", "_model"):
        with pytest.raises(AttributeError, match=r"no rank holds the whole model under --layout tensor:2: .*layout='replicas'"):
            getattr(ours, name)
    assert getattr(ours, "model", None) is None


def test_a_tokenizer_without_an_end(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches int(None), which also takes the tokenizer's other facts out of the results."""
    tiny_models.make_tokenizer(eos_token=None, model_max_length=2048).save_pretrained(tmp_path)
    made = launch(pretrained=str(tiny_model_path("llama")), tokenizer=str(tmp_path), device="cpu")
    assert made is not None
    with made:
        assert made.eot_token_id is None
        manager = TaskManager(include_path=demo.TASKS_PATH, include_defaults=False)
        found: Any = lm_eval.simple_evaluate(model=made, tasks=["demo_lambada"], task_manager=manager, limit=1, bootstrap_iters=0)
    assert found["tokenizer_bos_token"] == ["<s>", "0"] and found["eot_token_id"] is None


def test_nan_is_said(tiny_model_path: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """Catches numbers that are none and that nobody is told of, as the command tells."""
    made = launch(pretrained=str(tiny_model_path("llama")), device="cpu")
    assert made is not None
    with made, torch.no_grad():
        made.model.lm_head.weight[9] = float("nan")
        (answer,) = made.loglikelihood(ask("loglikelihood", ("The", " cat")))
    assert answer[0] != answer[0] and "1 requests of the task without a name came to numbers that are NaN" in caplog.text


def test_a_loaded_model_is_no_name(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Catches a repr of a whole model, hundreds of lines, instead of where a loaded one is evaluated."""
    model = tiny_model("llama")
    for call in (
        lambda: launch(pretrained=model),
        lambda: launch(pretrained="demo", tokenizer=tiny_tokenizer),
        lambda: lm_eval.simple_evaluate(model="ddp_eval", model_args={"pretrained": model}, tasks=["none"]),
        lambda: ddp_eval.evaluate(model, tiny_tokenizer, ["demo_lambada"], model_args={"pretrained": model}),
        lambda: ddp_eval.evaluate(model, tiny_tokenizer, ["demo_lambada"], model_args={"tokenizer": tiny_tokenizer}),
    ):
        with pytest.raises(UserError) as refused:
            call()
        text = str(refused.value)
        assert "\n" not in text and len(text) < 250
        assert "must be a path or a name, got a " in text and "ddp_eval.evaluate(model, tokenizer, tasks=[...])" in text


@pytest.mark.usefixtures("no_lm_eval_index")
def test_options_as_text(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Catches an AttributeError over gen_kwargs="…", which simple_evaluate takes, None where it takes that, and other numbers."""
    model = tiny_model("llama")
    path = str(GENERATION_TASKS)

    def run(**options: Any) -> dict[str, Any]:
        given = {"include_path": path, "bootstrap_iters": 0, "limit": 2, "log_samples": True, **options}
        found = ddp_eval.evaluate(model, tiny_tokenizer, "gen_story", **given)
        assert found is not None
        return found

    def shown(found: dict[str, Any]) -> Any:
        return [(one["arguments"], one["resps"]) for one in found["samples"]["gen_story"]]

    plain = run(gen_kwargs={"max_gen_toks": 3, "do_sample": False, "until": ["z"]}, num_fewshot=0)
    assert plain["config"]["gen_kwargs"] == {"max_gen_toks": 3, "do_sample": False, "until": ["z"]}
    texts = {
        "gen_kwargs": 'max_gen_toks=3,do_sample=false,until=["z"]',
        "num_fewshot": "0",
        "limit": "2",
        "model_args": "max_length=2048",
    }
    assert shown(run(**texts)) == shown(plain)
    assert shown(run(gen_kwargs='{"max_gen_toks": 3, "do_sample": false, "until": ["z"]}', num_fewshot=0)) == shown(plain)
    none: dict[str, Any] = dict.fromkeys(
        ("gen_kwargs", "model_args", "metadata", "samples", "apply_chat_template", "bootstrap_iters")
    )
    assert shown(run(**none)) == shown(run())
    assert run(batch_size="8")["config"]["batch_size"] == "8" and "batch_size is ignored" in caplog.text
    for options, sentence in (
        ({"gen_kwargs": "max_gen_toks"}, "--gen_kwargs must be key=value pairs, got 'max_gen_toks'"),
        ({"gen_kwargs": 5}, "--gen_kwargs must be key=value pairs, got 5"),
        ({"limit": "few"}, "--limit must be a number, got few"),
        ({"seed": [1, 2]}, "--seed must be 1 or 4 values"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(**options)


def test_lm_evals_cache_of_answers(make_sides: Callable[..., tuple[Any, Any]], tmp_path: Path) -> None:
    """Catches a model that lm_eval's `use_cache` cannot wrap, and answers that change on their way through its file."""
    pytest.importorskip("sqlitedict")
    ours, _ = make_sides()
    manager = TaskManager(include_path=demo.TASKS_PATH, include_defaults=False)
    options = {"tasks": ["demo_lambada", "demo_wikitext"], "task_manager": manager, "limit": 1, "bootstrap_iters": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[Any] = [lm_eval.simple_evaluate(model=ours, use_cache=str(tmp_path / "cache"), **options) for _ in range(2)]
        plain: Any = lm_eval.simple_evaluate(model=ours, **options)
    ours.set_cache_hook(type(ours.cache_hook)(None))
    for results in found:
        assert results["results"] == plain["results"]
