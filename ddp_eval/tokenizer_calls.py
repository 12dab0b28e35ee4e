"""Texts -> token ids exactly as a transformers tokenizer gives them, many at a time where that is the same."""

from __future__ import annotations

from typing import Any

# What lies between a text and the `tokenizers` library in transformers 5.23. A tokenizer with one of its own is called as it is.
_ON_THE_WAY = (
    "__call__",
    "encode",
    "_encode_plus",
    "_convert_encoding",
    "_get_padding_truncation_strategies",
    "set_truncation_and_padding",
)


def encode_each(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
    """Ids of each text by `tokenizer.encode(text)`. special: as `add_special_tokens`; None: the tokenizer's default."""
    if _has_own(tokenizer, "encode") or _has_own(tokenizer, "__call__"):
        return [list(tokenizer.encode(text, **_options(special))) for text in texts]
    return encode_batch(tokenizer, texts, special)


def encode_batch(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
    """Ids of each text by `tokenizer(texts)`. special: as `add_special_tokens`; None: the tokenizer's default."""

    def ask(part: list[str]) -> list[list[int]]:
        found = tokenizer(part, return_attention_mask=False, verbose=False, **_options(special))
        return [list(row) for row in found["input_ids"]]

    if len(texts) < 2 or not is_plain(tokenizer):
        return ask(texts) if texts else []
    # What the library beneath has besides ids (offsets, words, masks) takes longer than the ids. Asking for the first text the
    # long way sets it up as the tokenizer's own settings have it.
    first = ask(texts[:1])
    found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=True if special is None else special)
    ids = [encoding.ids for encoding in found]
    return ids if ids[:1] == first else ask(texts)


def is_plain(tokenizer: Any) -> bool:
    """Whether all that a tokenizer does with texts is to hand them to the `tokenizers` library."""
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast) and not any(_has_own(tokenizer, name) for name in _ON_THE_WAY)


def _has_own(tokenizer: Any, name: str) -> bool:
    from transformers import PreTrainedTokenizerFast

    usual = getattr(PreTrainedTokenizerFast, name, None)
    return getattr(type(tokenizer), name, None) is not usual or name in vars(tokenizer)


def _options(special: bool | None) -> dict[str, bool]:
    return {} if special is None else {"add_special_tokens": special}
