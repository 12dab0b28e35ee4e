"""Texts that are encoded in parts: the ids of the whole, for the families of tokenizers that models come with."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from ddp_eval.tasks import text_cuts, tokenization
from ddp_eval.tasks.text_cuts import Cuts, Rule
from ddp_eval.tasks.tokenization import Encoded, Encoder

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<s>", "</s>", "<unk>"]
HOSTILE = (
    "Answer:\n\nQ. It's  a\n \ntest'll\r\n\r\nZoë e\u0301\n\n東京。\n\n😀👍🏽 \u200b\t\n123 45,6  \u00a0x\u3000\n\n\n\n  end.\n"
)


def splitting(*patterns: str) -> Any:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre_tokenizer: Any, normalizer: Any = None, bos: bool = False) -> Tokenizer:
    """A BPE over bytes, trained so that it merges line breaks and spaces where its pattern lets it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*tiny_models.training_text()[:30], *[HOSTILE] * 20], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentence_piece(normalizer: Any, pre_tokenizer: Any, crossing: bool = False) -> Tokenizer:
    """A BPE over characters with bytes to fall back on. crossing: with tokens that hold a word's end and a line break."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    text = [
        *(line for one in tiny_models.training_text()[:30] for line in one.split("\n")),
        *(["a.\n\nQ: x\nA: b y "] * 50 if crossing else []),
    ]
    trained.train_from_iterator(text, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            model["vocab"], [tuple(pair) for pair in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def t5() -> Tokenizer:
    tokenizer = tiny_models.train(tiny_models.unigram(), tiny_models.training_text())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def with_added(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPACES = normalizers.Replace(" ", "▁")
GPT2 = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
BREAKS = [AddedToken("\n" * count, normalized=False, special=False) for count in range(1, 5)]
CHAT = [AddedToken(text, normalized=False, special=True) for text in ("<|im_start|>", "<|im_end|>", "[INST]", "end")]
FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(GPT2()),
    "roberta": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "starcoder": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2()])),
    "falcon": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), GPT2()])),
    "llama3": lambda: byte_level(splitting(LLAMA3), bos=True),
    "qwen2": lambda: byte_level(splitting(QWEN2), normalizers.NFC()),
    "o200k": lambda: byte_level(splitting(O200K)),
    "deepseek": lambda: byte_level(splitting(r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK), bos=True),
    "bloom": lambda: byte_level(splitting(r" ?[^(\s|[.,!?…。\uff0c、।\u06d4،])]+")),
    "llama2": lambda: sentence_piece(LEGACY, None),
    "llama2_with_tokens_across": lambda: sentence_piece(LEGACY, None, crossing=True),
    "gemma": lambda: with_added(sentence_piece(SPACES, pre_tokenizers.Split(" ", "merged_with_previous")), *BREAKS),
    "mistral": lambda: sentence_piece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace_always": lambda: sentence_piece(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "unigram": lambda: tiny_models.train(tiny_models.unigram(), tiny_models.training_text()),
    "t5": t5,
    "bert": lambda: tiny_models.train(tiny_models.word_piece(), tiny_models.training_text()),
    "chat": lambda: with_added(byte_level(splitting(LLAMA3)), *CHAT),
    "phi3": lambda: with_added(
        sentence_piece(LEGACY, None),
        AddedToken("<|end|>", rstrip=True, normalized=False, special=True),
        AddedToken("<|user|>", lstrip=True, rstrip=True, normalized=False, special=True),
    ),
    "spaces_added": lambda: with_added(byte_level(GPT2()), *(AddedToken(" " * count, normalized=False) for count in (2, 3, 4))),
    "words_added": lambda: with_added(
        byte_level(GPT2()), AddedToken("the", single_word=True), AddedToken("Answer", normalized=True), AddedToken("is a ")
    ),
}
# Behind line breaks, before them, before spaces.
EXPECTED = {
    "gpt2": (False, True, True),
    "roberta": (False, True, True),
    "llama3": (True, True, True),
    "qwen2": (True, True, True),
    "o200k": (True, True, True),
    "deepseek": (True, True, True),
    "llama2": (True, True, True),
    "gemma": (False, True, True),
    "unigram": (False, False, True),
}


@functools.cache
def make_tokenizer(family: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=FAMILIES[family](), bos_token="<s>", eos_token="</s>")


@functools.cache
def encoders(family: str) -> tuple[Encoder, Encoder]:
    """One that cuts texts, one that never does."""
    cutting, whole = (Encoder(make_tokenizer(family), 10**6) for _ in range(2))
    whole._may_cut = False
    return cutting, whole


PARTS = st.sampled_from([
    "\n\n", "\n", " ", "  ", "\n\n\n", "\r\n\r\n", "\t", " \n", "\n ", "\u00a0", "\u3000", "Question:", "Answer:", "Answer", " B",
    "A.", "it's", " we'll", "'s", "123", "4567", "3.5", "...", "!?", "_", "(x)", "东京", "東京。", "é", "e\u0301", "\u0301", "😀",
    "👍🏽", "\u200b", "\u200d", "नमस्ते", "العربية", "\u017f", "İ", "ﬁ", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]",
    "end", "<|end|>", "<|user|>", "the", "is a ", "\x00", "\x85", "\u2028", "\ufffd", "a", "Z", "0", "the quick brown fox", "",
])  # fmt: skip
TEXTS = st.lists(PARTS, max_size=14).map("".join)


def rows_of(encoded: Encoded) -> list[tuple[int, list[int], int]]:
    bounds = itertools.pairwise(encoded.requests.starts.tolist())
    tokens = [encoded.requests.tokens[begin:stop].tolist() for begin, stop in bounds]
    return list(zip(encoded.owner.tolist(), tokens, encoded.requests.num_targets.tolist(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60)
@given(contexts=st.lists(TEXTS, min_size=1, max_size=6), continuations=st.lists(TEXTS, min_size=1, max_size=4))
def test_pairs_in_parts(family: str, contexts: list[str], continuations: list[str]) -> None:
    """Catches a cut where a word or a token goes on, special tokens in the middle, and what happens at a text's start."""
    cutting, whole = encoders(family)
    pairs = list(itertools.product(contexts, continuations))
    found = cutting._encode_pairs(pairs, cutting._cuts)
    assert rows_of(found) == rows_of(whole.encode_pairs(pairs))


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_prompts_in_parts(family: str, texts: list[str]) -> None:
    """Catches the same in prompts to go on from, where tokens behind the text stay behind it."""
    cutting, whole = encoders(family)
    special = [None for _ in texts]
    found = cutting._encode_all(texts, special, tokenization.encode_batch, cutting._cuts)
    assert [ids.tolist() for ids in found] == [list(whole.tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("family", EXPECTED)
def test_places_are_found(family: str) -> None:
    """Catches a proof that no tokenizer passes: everything would be right, and encoded again and again."""
    cuts = Cuts(make_tokenizer(family))
    rules = (cuts._behind_break, cuts._before_break, cuts._before_space)
    assert tuple(rule is not None for rule in rules) == EXPECTED[family]


def test_shared_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches examples that go through the tokenizer again for every document, and documents for every choice."""
    monkeypatch.setattr(tokenization, "CHECKED", 2)
    monkeypatch.setattr(tokenization, "MANY_CHARACTERS", 10_000)
    examples = [f"Question: what is {number} and {number}?\nAnswer: B" for number in range(20)]
    pairs = [
        ("\n\n".join([*examples, f"Question: and {document}?\nAnswer:"]), f" {choice}")
        for document in range(100)
        for choice in "ABCD"
    ]
    seen: list[str] = []
    encode = tokenization.encode_each

    def watched(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
        seen.extend(texts)
        return encode(tokenizer, texts, special)

    monkeypatch.setattr(tokenization, "encode_each", watched)
    encoder = Encoder(make_tokenizer("llama3"), 10**6)
    encoded = encoder.encode_pairs(pairs)
    assert len(encoded.requests) == 400
    checked = [context + continuation for context, continuation in (pairs[0], pairs[200], pairs[399])]
    assert len([text for text in seen if "what is 7" in text and len(text) < 100]) == 1
    assert sum(map(len, seen)) < sum(map(len, examples)) + 100 * 60 + 3 * sum(map(len, checked))


def test_a_wrong_cut_is_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run's own texts that nobody compares: a proof that is wrong for a tokenizer would change its ids unsaid."""
    tokenizer = make_tokenizer("gpt2")
    behind = Rule("\n", True, text_cuts.PRINTABLE, letters=True)
    monkeypatch.setattr(text_cuts, "_find_rules", lambda backend: (behind, None, None))
    pairs = [(f"Example {number}.\n\nQuestion {number}:", " yes") for number in range(300)]
    monkeypatch.setattr(tokenization, "MANY_CHARACTERS", 0)
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        found = Encoder(tokenizer, 10**6).encode_pairs(pairs)
    whole = Encoder(tokenizer, 10**6)
    whole._may_cut = False
    assert rows_of(found) == rows_of(whole.encode_pairs(pairs))
    assert "texts are encoded whole" in caplog.text


class OwnEncode(transformers.PreTrainedTokenizerFast):
    """One that puts a token of its own before what it encodes, by `encode` alone."""

    def encode(self, text: str, *rest: Any, **options: Any) -> list[int]:
        return [2, *super().encode(text, *rest, **options)]


def llama3_with(text: str, **options: bool) -> Tokenizer:
    return with_added(byte_level(splitting(LLAMA3)), AddedToken(text, **options))


WHITE_SPACE = [" the", "the\n", " ", "\n\n"]
UNCERTAIN: dict[str, Callable[[], Tokenizer]] = {
    "words left out": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.CharDelimiterSplit("."), GPT2()])),
    "line breaks left out": lambda: byte_level(GPT2(), normalizers.Replace("\n", "")),
    "tags left out": lambda: byte_level(GPT2(), normalizers.Replace(Regex("<[^>]+>"), "")),
    "tags with a space": lambda: byte_level(GPT2(), normalizers.Replace("<br />", "\n")),
    "a look behind": lambda: byte_level(GPT2(), normalizers.Replace(Regex(r"(?<=12) "), "_")),
    "words of eight and a space": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w{8} "), "isolated"), GPT2()])
    ),
    "quotations": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex('"[^"]*"'), "isolated"), GPT2()])),
    "the anchor": lambda: with_added(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), AddedToken("a")),
    "lower case": lambda: with_added(byte_level(GPT2(), normalizers.Lowercase()), AddedToken("[END]", normalized=True)),
    **{f"{text!r} alone": functools.partial(llama3_with, text, single_word=True) for text in WHITE_SPACE},
    **{f"{text!r} taking space": functools.partial(llama3_with, text, lstrip=True) for text in WHITE_SPACE},
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_components_that_are_not_known_cut_nothing(case: str) -> None:
    """Catches a tokenizer that passes the test on short texts, and matches across a cut in longer ones."""
    assert not Cuts(transformers.PreTrainedTokenizerFast(tokenizer_object=UNCERTAIN[case]()))


def test_parts_that_differ_end_no_run(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an assertion in place of the long way where the anchor itself comes out otherwise."""
    monkeypatch.setattr(tokenization, "MANY_CHARACTERS", 0)
    encoder = Encoder(make_tokenizer("gpt2"), 10**6)
    assert encoder._cuts is not None
    monkeypatch.setattr(encoder._cuts, "anchor_between", lambda left, right: left[-1:])
    vocabulary = encoder.tokenizer.get_vocab()
    merged = next(word for word in sorted(vocabulary) if len(word) == 2 and word.isascii() and word.isalpha())
    pairs = [(f"Question:\n{merged[0]}", merged[1])] * 3
    with caplog.at_level(logging.WARNING, "ddp_eval"):
        found = encoder.encode_pairs(pairs)
    assert rows_of(found) == rows_of(encoders("gpt2")[1].encode_pairs(pairs))
    assert "texts are encoded whole" in caplog.text


def test_blank_context_of_an_encoder_decoder() -> None:
    """Catches a context of white space that becomes the prefix token: lm_eval encodes what is left of it, nothing."""
    encoder = Encoder(make_tokenizer("t5"), 10**6, separate=True)
    tokens = encoder.encode_pairs([(" ", "token.")]).requests.tokens.tolist()
    assert tokens == [
        *make_tokenizer("t5")("")["input_ids"],
        *make_tokenizer("t5")(" token.", add_special_tokens=False)["input_ids"],
    ]


def test_no_cut_where_nothing_is_certain() -> None:
    """Catches cuts for tokenizers that run code of their own, draw at random, or look at a text's ends."""
    own = OwnEncode(tokenizer_object=FAMILIES["gpt2"](), bos_token="<s>")
    assert Encoder(own, 100)._cuts is None
    pairs = [(f"Example {number}.\n\nQuestion:", " yes") for number in range(300)]
    encoded = Encoder(own, 100).encode_pairs(pairs)
    bounds = encoded.requests.starts
    for index in (0, 299):
        ids = encoded.requests.tokens[bounds[index] : bounds[index + 1]].tolist()
        assert ids == own.encode(pairs[index][0] + pairs[index][1])

    stripping = FAMILIES["gpt2"]()
    stripping.normalizer = normalizers.Strip()
    assert not Cuts(transformers.PreTrainedTokenizerFast(tokenizer_object=stripping))
    random = FAMILIES["gpt2"]()
    random.model = models.BPE(dropout=0.5)
    assert not Cuts(transformers.PreTrainedTokenizerFast(tokenizer_object=random))


def test_the_check_sees_all_of_a_run() -> None:
    """Catches a sample of the first texts alone, or one without those beyond ASCII."""
    chosen = tokenization._choose_to_check([index in (7, 500) for index in range(1000)])
    assert {7, 500} <= set(chosen) and len(chosen) <= tokenization.CHECKED + 1
    assert np.diff(sorted(set(chosen) - {7, 500})).max() <= 1000 / 16
