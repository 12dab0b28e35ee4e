"""Text to ids: to the last id as lm_eval's own HF backend makes them, for several families of tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import transformers
from encoded_rows import encode_with_lm_eval, rows_of
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ddp_eval.engines.hf import checkpoint
from ddp_eval.tasks import tokenization
from ddp_eval.tasks.tokenization import Encoder, rolling_windows

PAIRS = [
    ("Question: what is it?\nAnswer:", " yes"),
    ("Question: what is it?\nAnswer: ", "yes"),
    ("two spaces  ", "behind"),
    ("a newline\n", "behind"),
    ("a tab\t \n ", " and more"),
    ("no-break space\u00a0", "behind"),
    ("ideographic space\u3000", " behind"),
    ("", "an empty context"),
    ("", " and a space"),
    ("", "  "),
    (" ", "a blank context"),
    ("  \n\t", " blanks"),
    ("wor", "ld within a word"),
    ("Zoë met naïve 東京 friends", " 北京😀 Ω"),
    ("a letter and its accent: e", "\u0301"),
    ("an emoji and its colour: 👍", "🏽"),
    ("a zero-width space\u200b", "behind"),
    ("\nstarts with newlines\n\n", "\n\nends with them\n\n"),
    ("<s>begins with BOS", " text"),
    ("<s>", "only BOS before"),
    (" <s>a space before BOS", " text"),
    ("BOS <s> inside", " and </s> behind"),
    ("[CLS]begins with CLS", " text"),
    ("", "<s>a continuation that begins with BOS"),
    ("", "[CLS] a continuation that begins with CLS"),
    ("", "<s>"),
    ("an empty continuation", ""),
    ("an empty continuation behind a space ", ""),
    ("UPPER lower", " MiXeD"),
    ("tabs\tand\r\nreturns", "\r\n"),
    ("a long context " * 400, " and its end"),
    ("x", " a long continuation" * 300),
    ("repeated", " pair"),
    ("repeated", " pair"),
]
TEXTS = [
    "",
    " ",
    "one",
    "Some words, a newline\n\nand Zoë in 東京 😀.",
    "<s>begins with BOS",
    " <s> BOS behind a space",
    "\n",
    "a long text that needs many windows " * 40,
]


class Lowering(transformers.PreTrainedTokenizerFast):
    """One that does something of its own with texts."""

    def _encode_plus(self, text: Any, *rest: Any, **options: Any) -> Any:
        lowered = text.lower() if isinstance(text, str) else [each.lower() for each in text]
        return super()._encode_plus(lowered, *rest, **options)


def fast(
    parts: Any, bos: str | None, eos: str | None, kind: Any = transformers.PreTrainedTokenizerFast, cut: int = 0, **options: Any
) -> Any:
    """cut: tokens that the backend is set to cut texts to."""
    backend = tiny_models.train(parts, tiny_models.training_text())
    if cut:
        backend.enable_truncation(cut)
        backend.enable_padding(length=2 * cut)
    return kind(tokenizer_object=backend, bos_token=bos, eos_token=eos, **options)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": lambda: fast(tiny_models.byte_level_bpe(), "<s>", "</s>"),
    "byte_level_without_bos": lambda: fast(tiny_models.byte_level_bpe(), None, "</s>"),
    "byte_level_adding_bos": lambda: fast(tiny_models.byte_level_bpe(add_bos=True), "<s>", "</s>"),
    "byte_level_blind_to_bos": lambda: fast(tiny_models.byte_level_bpe(), "<s>", "</s>", split_special_tokens=True),
    "byte_level_set_to_cut": lambda: fast(tiny_models.byte_level_bpe(), "<s>", "</s>", cut=5),
    "byte_level_lowering": lambda: fast(tiny_models.byte_level_bpe(), "<s>", "</s>", Lowering),
    "unigram": lambda: fast(tiny_models.unigram(), "<s>", "</s>"),
    "word_piece": lambda: fast(tiny_models.word_piece(), "[CLS]", "[SEP]"),
    # no fast tokenizer: Python, byte by byte, EOS behind every text
    "slow": lambda: transformers.ByT5Tokenizer(extra_ids=0),
}


@functools.cache
def make_tokenizer(kind: str) -> Any:
    return TOKENIZERS[kind]()


@pytest.mark.parametrize("prefix_token_id", [None, 0, 5])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("many", [0, tokenization.MANY_CHARACTERS], ids=["in parts", "whole"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pairs(
    kind: str,
    many: int,
    add_bos_token: bool | None,
    prefix_token_id: int | None,
    tiny_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches any rule of lm_eval's that we read wrongly: spaces, BOS, special tokens, prefix, where the continuation starts."""
    monkeypatch.setattr(tokenization, "MANY_CHARACTERS", many)
    tokenizer = make_tokenizer(kind)
    options: dict[str, Any] = {"add_bos_token": add_bos_token, "prefix_token_id": prefix_token_id}
    encoder = Encoder(tokenizer, 10**6, **options)
    # lm_eval stops on an empty context before a continuation without tokens: blanks are nothing to WordPiece.
    pairs = [pair for pair in PAIRS if pair != ("", "  ") or kind != "word_piece"]
    expected = encode_with_lm_eval("loglikelihood", pairs, tokenizer, tiny_model("llama"), **options)

    encoded = encoder.encode_pairs(pairs)
    # lm_eval stops on a context without tokens; here it is an empty one.
    expected = [(context or [encoder.prefix_token_id], continuation) for context, continuation in expected]
    lost = [owner for owner, (_, continuation) in enumerate(expected) if not continuation]
    alone = {owner: list(tokenizer.encode(pairs[owner][1], add_special_tokens=False)) for owner in lost if pairs[owner][1]}
    # lm_eval stops on a continuation without tokens; here it is encoded by itself.
    expected = [(context, alone.get(owner, continuation)) for owner, (context, continuation) in enumerate(expected)]
    scored = [(owner, pair) for owner, pair in enumerate(expected) if pair[1]]
    assert rows_of(encoded) == [(owner, context + scored, len(scored)) for owner, (context, scored) in scored]
    assert encoded.empty == [owner for owner, (_, continuation) in enumerate(expected) if not continuation]
    assert encoded.alone == [owner for owner in lost if alone.get(owner)]
    assert encoded.truncated == encoded.cut == []
    assert encoded.empty


@pytest.mark.parametrize("max_length", [1, 2, 7, 64])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_rolling(kind: str, add_bos_token: bool | None, max_length: int, tiny_model: Callable[..., Any]) -> None:
    """Catches a window that starts or ends elsewhere than lm_eval's, or has another context."""
    tokenizer = make_tokenizer(kind)
    encoded = Encoder(tokenizer, max_length, add_bos_token).encode_rolling(TEXTS)
    assert encoded.cut == encoded.truncated == []
    rows = rows_of(encoded)
    for owner, text in enumerate(TEXTS):
        windows = encode_with_lm_eval(
            "loglikelihood_rolling", [text], tokenizer, tiny_model("llama"), max_length=max_length, add_bos_token=add_bos_token
        )
        mine = [(tokens, count) for whose, tokens, count in rows if whose == owner]
        assert mine == [(context + scored, len(scored)) for context, scored in windows]
        assert (owner in encoded.empty) == (not windows)
    # Plans are named by their arrays' types, too: other types, other names, and no old journal would be found.
    assert encoded.requests.tokens.dtype == np.int32 and encoded.requests.num_targets.dtype == np.int32


@given(st.lists(st.integers(1, 99), max_size=40), st.integers(1, 12))
def test_windows_predict_each_token_once(tokens: list[int], max_length: int) -> None:
    """Catches a token scored twice or never, and a window longer than the model's."""
    windows = list(rolling_windows(tokens, 0, max_length))
    assert [token for _, predicted in windows for token in predicted] == tokens
    assert all(context and len(context) + len(predicted) <= max_length + 1 for context, predicted in windows)
    assert windows == [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, 0, max_length, 1)]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("kind", ["byte_level", "byte_level_adding_bos", "unigram"])
def test_loaded_tokenizer(kind: str, add_bos_token: bool | None, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """Catches options of lm_eval's that do not reach the tokenizer as it is loaded."""
    make_tokenizer(kind).save_pretrained(tmp_path)
    args = {"pretrained": "unused", "tokenizer": str(tmp_path), "add_bos_token": add_bos_token}
    encoder = Encoder(checkpoint.load_tokenizer(args), 10**6, add_bos_token)
    expected = encode_with_lm_eval("loglikelihood", PAIRS, str(tmp_path), tiny_model("llama"), add_bos_token=add_bos_token)
    tokens = [(context or [encoder.prefix_token_id]) + continuation for context, continuation in expected if continuation]
    encoded = encoder.encode_pairs(PAIRS)
    assert [row[1] for row in rows_of(encoded) if row[0] not in encoded.alone] == tokens


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches owners that count from 0 in each batch, and pairs mixed up where some contexts are empty."""
    encoder = Encoder(make_tokenizer("byte_level"), 100)
    at_once = encoder.encode_pairs(PAIRS), encoder.encode_rolling(TEXTS)
    monkeypatch.setattr(tokenization, "BATCH", 3)
    in_batches = encoder.encode_pairs(PAIRS), encoder.encode_rolling(TEXTS)
    for one, other in zip(at_once, in_batches, strict=True):
        assert rows_of(one) == rows_of(other)
        assert (one.truncated, one.cut, one.empty) == (other.truncated, other.cut, other.empty)


def letters(text: str) -> list[int]:
    """The ids of a text where each letter is a token."""
    return [ord(letter) for letter in text]


class OneIdPerLetter:
    """The least that Encoder asks of a tokenizer."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def decode(self, token: int) -> str:
        return chr(token)

    def encode(self, text: str, **options: Any) -> list[int]:
        return letters(text)

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [letters(text) for text in texts]}


def test_what_does_not_fit_is_cut_from_the_left() -> None:
    """Catches a window of one more or less, warnings mixed up, and tokens that nobody counts: by hand, in a window of four."""
    pairs = [
        ("abc", "de"),  # fits: four are fed, the last is only predicted
        ("abcd", "ef"),  # one too many
        ("abcdefg", "hijk"),  # four to predict need four before them, of which one is context
        ("abcdefg", "hijkl"),  # one more than can be predicted: two windows, the last as long as the first
        ("", "abcdef"),
        ("abcdefgh", "i"),
    ]
    encoded = Encoder(OneIdPerLetter(), 4).encode_pairs(pairs)
    assert rows_of(encoded) == [
        (0, letters("abcde"), 2),
        (1, letters("bcdef"), 2),
        (2, letters("ghijk"), 4),
        (3, letters("ghijk"), 4),
        (3, letters("hijkl"), 1),
        (4, letters("\x00abcd"), 4),
        (4, letters("bcdef"), 2),
        (5, letters("efghi"), 1),
    ]
    assert encoded.truncated == [1, 2, 5]
    assert encoded.cut == [3, 4]
    assert encoded.empty == []


def test_nothing_to_score() -> None:
    """Catches a request without a continuation that is dropped, scored, or an error: lm_eval stops on it.

    A continuation that is the prefix token and no more leaves no token behind it, and is encoded by itself.
    """
    encoded = Encoder(OneIdPerLetter(), 4).encode_pairs([("a", ""), ("", ""), ("b", "c"), ("", "\x00")])
    assert encoded.empty == [0, 1] and encoded.alone == [3]
    assert rows_of(encoded) == [(2, letters("bc"), 1), (3, letters("\x00\x00"), 1)]
    none = Encoder(OneIdPerLetter(), 4).encode_pairs([])
    assert rows_of(none) == [] and none.requests.starts.tolist() == [0]


def test_prefix_token() -> None:
    """Catches a given 0 that is taken for nothing, and BOS and EOS in the wrong order."""
    tokenizer = OneIdPerLetter()
    assert Encoder(tokenizer, 4).prefix_token_id == 0
    assert Encoder(tokenizer, 4, prefix_token_id=7).prefix_token_id == 7
    tokenizer.bos_token_id = None
    assert Encoder(tokenizer, 4).prefix_token_id == 1
    assert Encoder(tokenizer, 4, prefix_token_id=0).prefix_token_id == 0
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match=r"neither a BOS nor an EOS token: give prefix_token_id=ID in --model_args"):
        Encoder(tokenizer, 4)
