"""What cannot be scored must not get the best score: texts that a tokenizer joins or drops, empty choices, NaN metrics."""

from __future__ import annotations

import itertools
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerance
from lm_eval.api.instance import Instance
from lm_eval_answers import answer_with_lm_eval, assert_same_outcome, by_lm_eval, odd_answers
from task_files import write_task
from tiny_models import make_joining_tokenizer

import ddp_eval
from ddp_eval.analysis.difference import compare_runs
from ddp_eval.analysis.read import read_run
from ddp_eval.errors import UserError
from ddp_eval.lm import launch
from ddp_eval.output import irregular
from ddp_eval.tasks import tokenization
from ddp_eval.tasks.tokenization import Encoder


def evaluate(model: Any, tokenizer: Any, path: str, **options: Any) -> dict[str, Any]:
    options = {"log_samples": True, "bootstrap_iters": 0, **options}
    found = ddp_eval.evaluate(model, tokenizer, ["odd"], include_path=path, **options)
    assert found is not None
    return found


def score_behind(model: Any, context: list[int], continuation: list[int]) -> Any:
    """By hand: (log-probability within rounding, flag)."""
    value, greedy = tiny_models.score_plainly(model, [*context, *continuation], len(continuation))
    return tolerance.of(model).close(value, len(continuation)), greedy


def test_a_token_across_the_joint(tiny_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the choice whose token spans the joint scored 0 nats and greedy, so that it always wins (a public report).

    lm_eval stops on it, or gives it 0 nats where another choice is one token long. Where it scores a token, also of choices that
    are joined in part, the number is lm_eval's.
    """
    model, tokenizer = tiny_model("llama"), make_joining_tokenizer()
    choices = ["wer", "zzz", "wer!", "werzz", "w"]
    rows = [{"context": "Ans", "choices": choices, "gold": 1}]
    path = write_task(tmp_path / "tasks", "multiple_choice", rows, ["acc"])
    assert odd_answers(by_lm_eval(model, tokenizer, path))[0, 0] == (0.0, True), "lm_eval's, by its cache of logits"
    with pytest.raises(AssertionError):
        answer_with_lm_eval(model, tokenizer, "Ans", "wer")
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        ours = evaluate(model, tokenizer, path)
    answers, ids = odd_answers(ours), tokenizer.encode("Ans")
    for idx, choice in enumerate(choices):
        whole = tokenizer.encode("Ans" + choice)
        if len(whole) > len(ids):
            value, greedy = answer_with_lm_eval(model, tokenizer, "Ans", choice)
            assert answers[0, idx] == (tolerance.of_kind("llama").close_for(value, choice), greedy)
        else:
            assert answers[0, idx] == score_behind(model, ids, tokenizer.encode(choice))
    assert all(value < -0.1 for value, _ in answers.values())
    assert ours["ddp_eval"]["irregular"] == {
        "continuation_encoded_alone": {"odd": {"requests": 3, "first": [[0, 0], [0, 2], [0, 4]]}}
    }
    said = [message for message in caplog.messages if "joins it to the context" in message]
    assert len(said) == 1 and said[0].endswith(": 3 (odd: document 0 choice 0, document 0 choice 2, document 0 choice 4)")


def test_with_and_without_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches joined continuations that are split otherwise where shared text is encoded once."""
    monkeypatch.setattr(tokenization, "MANY_CHARACTERS", 0)
    tokenizer = make_joining_tokenizer()
    pairs = [
        (f"Example {number}: no\n\nQuestion\n{context}", continuation)
        for number in range(60)
        for context, continuation in itertools.product(["Ans", "Ans ", ""], ["wer", "", " wer", "wer!"])
    ]
    pairs += [("", ""), ("", "<s>"), ("Ans", "")]
    cutting, whole = Encoder(tokenizer, 64), Encoder(tokenizer, 64)
    assert cutting._cuts is not None
    whole._may_cut = False
    found, expected = cutting.encode_pairs(pairs), whole.encode_pairs(pairs)
    assert cutting._may_cut, "else nothing is compared"
    for name in ("tokens", "starts", "num_targets"):
        assert np.array_equal(getattr(found.requests, name), getattr(expected.requests, name))
    assert np.array_equal(found.owner, expected.owner)
    for name in ("truncated", "cut", "empty", "alone", "bare"):
        assert getattr(found, name) == getattr(expected, name)
    assert len(found.alone) == 60 * 2 + 1 and len(found.empty) == 60 + 2


# lm_eval itself stops on an empty choice in a task's first document.
ORDINARY = {"context": "The answer", "choices": [" yes", " no", " well", " now"], "gold": 0}
METRICS = ["acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "brier_score"]


@pytest.mark.parametrize("context", ["The answer", "The answer ", ""])
def test_empty_choices_never_win(context: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches an empty choice that wins by 0 nats, by 0/0 (argmax picks a NaN), by -inf - -inf, or by its share of a softmax."""
    choices = ["", " yes", " no", " well"]
    rows = [{"context": context, "choices": choices, "gold": gold} for gold in range(4)]
    path = write_task(tmp_path / "tasks", "multiple_choice", [ORDINARY, *rows], METRICS)
    ours = evaluate(tiny_model("llama"), tiny_tokenizer, path, samples={"odd": [1, 2, 3, 4]})
    answers = odd_answers(ours)
    is_empty = not context.endswith(" ")  # a space at its end is the continuation's, and lm_eval scores it
    values = np.array([answers[1, idx][0] for idx in range(8)])
    if is_empty:
        assert answers[1, 0] == (-math.inf, False)
    assert answers[1, 4] == (0.0, False), "the empty choice without its context"
    assert np.isfinite(values[1:]).all()
    with np.errstate(all="ignore"):
        lengths = np.array([len(choice) for choice in choices], dtype=float)
        expected = {
            "acc": int(values[:4].argmax()),
            "acc_norm": int((values[:4] / lengths).argmax()),
            "acc_bytes": int((values[:4] / lengths).argmax()),
            "acc_mutual_info": int((values[:4] - values[4:]).argmax()),
        }
    if is_empty:
        assert 0 not in expected.values()
    assert expected["acc_norm"] != 0
    for sample in ours["samples"]["odd"]:
        for metric, winner in expected.items():
            assert sample[metric] == float(sample["doc"]["gold"] == winner), metric
        assert sample["exact_match"] == int(answers[1, sample["doc"]["gold"]][1])
    assert math.isfinite(ours["results"]["odd"]["brier_score,none"])
    counted = ours["ddp_eval"]["irregular"].get("nothing_to_score")
    assert counted == ({"odd": {"requests": 4, "first": [[doc, 0] for doc in range(1, 5)]}} if is_empty else None)
    assert ours["ddp_eval"]["not_finite"] == {}


def test_a_document_that_nothing_can_decide(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a metric that is NaN for one document, and so for the task, without a word of which document it is."""
    rows = [{"context": "The answer", "choices": [" yes", " no"], "gold": 0} for _ in range(3)]
    rows.insert(1, {"context": "The answer", "choices": ["", ""], "gold": 0})
    path = write_task(tmp_path / "tasks", "multiple_choice", rows, ["acc", "brier_score"])
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        ours = evaluate(tiny_model("llama"), tiny_tokenizer, path, output_path=str(tmp_path / "out"))
    with np.errstate(all="raise"):
        assert compare_runs(read_run(tmp_path / "out"), read_run(tmp_path / "out"))["identical"]
    assert math.isnan(ours["results"]["odd"]["brier_score,none"])
    found = ours["ddp_eval"]["irregular"]
    assert found["nan_metrics"] == {"odd": {"documents": 1, "first": [1]}}
    assert found["identical_choices"] == {"odd": {"documents": 1, "first": [1]}}
    assert found["nothing_to_score"] == {"odd": {"requests": 2, "first": [[1, 0], [1, 1]]}}
    assert [message for message in caplog.messages if "NaN" in message] == [
        "documents with a metric that is NaN, which makes its mean over all documents NaN: 1 (odd: document 1)"
    ]


def test_chosen_documents_keep_their_numbers(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches documents named by their place among those of --samples."""
    rows = [{"context": "The answer", "choices": ["", ""] if number == 3 else [" yes", " no"], "gold": 0} for number in range(5)]
    path = write_task(tmp_path / "tasks", "multiple_choice", rows, ["brier_score"])
    found = evaluate(tiny_model("llama"), tiny_tokenizer, path, samples={"odd": [4, 3]})["ddp_eval"]["irregular"]
    assert [found[kind]["odd"]["first"] for kind in ("nothing_to_score", "identical_choices", "nan_metrics")] == [
        [[3, 0], [3, 1]], [3], [3]
    ]  # fmt: skip


def test_a_perplexity_over_nothing(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a perplexity that an empty target lowers, an overflow, and a bootstrap or comparison that stops on infinity."""
    rows = [{"context": "The end", "target": target} for target in (" of it", "", " is near")]
    path = write_task(tmp_path / "tasks", "loglikelihood", rows, ["perplexity", "acc"])
    with np.errstate(all="raise"):
        ours = evaluate(tiny_model("llama"), tiny_tokenizer, path, bootstrap_iters=100, output_path=str(tmp_path / "out"))
        compared = compare_runs(read_run(tmp_path / "out"), read_run(tmp_path / "out"))
    assert compared["identical"] and compared["tasks"]["odd"]["metrics"]["perplexity,none"]["difference"] == 0
    assert ours["results"]["odd"]["perplexity,none"] == math.inf
    assert [sample["acc"] for sample in ours["samples"]["odd"]][1] == 0
    assert odd_answers(ours)[1, 0] == (-math.inf, False)


def test_texts_without_tokens(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches another number than lm_eval's for an empty rolling text, and one that is not counted."""
    rows = [{"context": "", "target": target} for target in ("A text.", "", "Another text")]
    path = write_task(tmp_path / "tasks", "loglikelihood_rolling", rows, ["word_perplexity", "byte_perplexity"])
    theirs, ours = by_lm_eval(tiny_model("llama"), tiny_tokenizer, path), evaluate(tiny_model("llama"), tiny_tokenizer, path)
    assert_same_outcome(ours, theirs, tolerance.of_kind("llama"))
    assert ours["ddp_eval"]["irregular"] == {"text_without_tokens": {"odd": {"requests": 1, "first": [[1, 0]]}}}


def test_prompts_and_contexts_without_tokens(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches an empty prompt that stops the run, as in lm_eval, or goes on from the prefix token without a word."""
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    rows = [{"context": context, "target": "x"} for context in ("", "<s>", "a")]
    asking = {"generation_kwargs": settings, "repeats": 2}
    path = write_task(tmp_path / "asking", "generate_until", rows, ["exact_match"], **asking)
    ours = evaluate(tiny_model("llama"), tiny_tokenizer, path)
    texts = {sample["doc_id"]: sample["resps"][0] for sample in ours["samples"]["odd"]}
    assert texts[0] == texts[1]
    assert ours["ddp_eval"]["irregular"] == {"context_without_tokens": {"odd": {"requests": 1, "first": [[0, 0]]}}}
    path = write_task(tmp_path / "blank", "loglikelihood", [{"context": " ", "target": "yes"}], ["acc"])
    ours = evaluate(tiny_model("llama"), tiny_tokenizer, path)
    assert odd_answers(ours)[0, 0] == score_behind(tiny_model("llama"), [0], tiny_tokenizer.encode(" yes"))
    assert ours["ddp_eval"]["irregular"] == {"context_without_tokens": {"odd": {"requests": 1, "first": [[0, 0]]}}}


def test_encoder_decoders(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches an empty choice that wins, and a long one of which a decoder counts the last tokens alone."""
    choices = ["", " yes", " and so on" * 12]
    rows: list[dict[str, Any]] = [{"context": "The answer is", "choices": choices, "gold": 1}]
    path = write_task(tmp_path / "tasks", "multiple_choice", [ORDINARY, *rows], ["acc", "acc_norm"])
    ours = evaluate(tiny_model("t5"), tiny_tokenizer, path, model_args={"max_length": 16})
    answers = odd_answers(ours)
    assert answers[1, 0] == (-math.inf, False)
    ids = tiny_tokenizer.encode(choices[2])
    assert len(ids) > 16
    pieces = [tiny_tokenizer.decode(ids[start : start + 16]) for start in range(0, len(ids), 16)]
    assert "".join(pieces) == choices[2]
    for idx, parts in ((1, [choices[1]]), (2, pieces)):
        theirs = [answer_with_lm_eval(tiny_model("t5"), tiny_tokenizer, rows[0]["context"], part) for part in parts]
        assert answers[1, idx][0] == tolerance.of_kind("t5").close_for(sum(value for value, _ in theirs), choices[idx])
    assert set(ours["ddp_eval"]["irregular"]) == {"nothing_to_score", "continuation_in_windows"}


def test_long_continuations_count_whole(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a choice that wins since only its last tokens are scored: lm_eval stops on one longer than the window."""
    choices = [" word" * 3, " word" * 40]
    rows = [{"context": "Once", "choices": choices, "gold": 0}]
    path = write_task(tmp_path / "tasks", "multiple_choice", rows, ["acc"])
    whole = odd_answers(evaluate(tiny_model("llama"), tiny_tokenizer, path))
    ours = evaluate(tiny_model("llama"), tiny_tokenizer, path, model_args={"max_length": 8}, output_path=str(tmp_path / "out"))
    windows = odd_answers(ours)
    assert whole[0, 1][0] < whole[0, 0][0] and windows[0, 1][0] < windows[0, 0][0]
    assert ours["samples"]["odd"][0]["acc"] == 1.0
    from ddp_eval.output.tables import read_scores

    scored = list(read_scores(tmp_path / "out" / "scores.parquet").num_tokens)
    context = len(tiny_tokenizer.encode("Once"))
    assert scored == [len(tiny_tokenizer.encode("Once" + choice)) - context for choice in choices]


def test_as_a_model_of_lm_eval(tiny_model: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches other rules where lm_eval leads, which does not say which tasks it asks for, and requests made by hand."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = make_joining_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    lm = launch(pretrained=str(tmp_path / "model"), device="cpu", batch_size=1)
    assert lm is not None
    pairs = [("Ans", "wer"), ("Ans", "zzz"), ("Ans", ""), ("", "wer"), ("", "")]
    of_document = [Instance("loglikelihood", {}, pair, idx, ("odd", 7, 1)) for idx, pair in enumerate(pairs)]
    by_hand = [Instance("loglikelihood", {}, pair, 0) for pair in pairs[1:3]]
    with lm, caplog.at_level(logging.WARNING, "ddp_eval"):
        joined, plain, empty, unconditional, nothing = lm.loglikelihood(of_document)
        again = lm.loglikelihood(by_hand)
    assert again == [(tolerance.of(tiny_model("llama")).close(plain[0], len(tokenizer.encode("zzz"))), plain[1]), empty]
    assert joined == score_behind(tiny_model("llama"), tokenizer.encode("Ans"), tokenizer.encode("wer"))
    assert empty == (-math.inf, False) and nothing == (0.0, False) and math.isfinite(unconditional[0])
    assert any("document 7 choice 2" in message for message in caplog.messages)


def test_which_requests_are_without_their_context() -> None:
    """Catches an empty choice behind an empty context taken for the second half of acc_mutual_info, where it may win."""

    def ask(*pairs: tuple[str, str]) -> list[Any]:
        return [Instance("loglikelihood", {}, pair, idx, ("odd", 0, 1)) for idx, pair in enumerate(pairs)]

    assert irregular.find_unconditional(ask(("", ""), ("", "a"), ("", "b")), [0], set()) == []
    assert irregular.find_unconditional(ask(("c", ""), ("c", "a"), ("", ""), ("", "a")), [0, 2], set()) == [2]
    assert irregular.find_unconditional(ask(("", ""), ("", "a"), ("", ""), ("", "a")), [0, 2], {"odd"}) == [2]


def test_runs_with_infinity_compare_and_say_it_again(tmp_path: Path) -> None:
    """Catches a finished directory that says nothing of what could not be scored, and a comparison that stops on infinity."""
    rows = [{"context": "The answer", "choices": ["", " yes", " no"], "gold": 1} for _ in range(3)]
    tasks = write_task(tmp_path / "tasks", "multiple_choice", [ORDINARY, *rows], ["acc", "acc_norm"])
    flags = ["--model_args", "pretrained=demo", "--tasks", "odd", "--include_path", tasks, "--output_path", str(tmp_path / "out")]
    command = [sys.executable, "-m", "ddp_eval", *flags]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=120) for _ in range(2))
    line = "ddp_eval: requests whose continuation has no token: their log-probability is -inf, so that they never win: 3 (odd: "
    for finished in (first, again):
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.count(line) == 1, finished.stderr
    assert "complete: nothing is left to do" in again.stderr and "complete" not in first.stderr
    written = json.loads((tmp_path / "out" / "results.json").read_text())["ddp_eval"]
    assert written["irregular"]["nothing_to_score"]["odd"]["first"] == [[1, 0], [2, 0], [3, 0]]
    with np.errstate(all="raise"):
        compared = compare_runs(read_run(tmp_path / "out"), read_run(tmp_path / "out"))
    assert compared["identical"] and compared["overall"]["delta_nats"]["max"] == 0


def test_an_empty_choice_in_the_first_document(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches lm_eval's IndexError over it passed on as it is, and one of the task's own code called an empty choice."""
    path = write_task(tmp_path / "tasks", "multiple_choice", [{"context": "a", "choices": ["", "b"], "gold": 1}], ["acc"])
    with pytest.raises(UserError, match=r"^the first document of odd has an empty choice or target, with which lm_eval loads"):
        evaluate(tiny_model("llama"), tiny_tokenizer, path)
    (tmp_path / "tasks" / "utils.py").write_text("def load(**options):\n    return ''[0]\n")
    with pytest.raises(UserError, match="IndexError: string index out of range"):
        evaluate(tiny_model("llama"), tiny_tokenizer, path)
