"""Texts -> token ids exactly as a transformers tokenizer gives them, many at a time where that is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ddp_eval.errors import UserError, one_line

# What lies between a text and the `tokenizers` library in transformers 5.23. A tokenizer with one of its own is called as it is.
_ON_THE_WAY = (
    "__call__",
    "encode",
    "backend_tokenizer",
    "_encode_plus",
    "_convert_encoding",
    "_get_padding_truncation_strategies",
    "set_truncation_and_padding",
)


# What lies between ids and their text.
_ON_THE_WAY_BACK = ("decode", "batch_decode", "_decode", "backend_tokenizer")


def encode_each(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
    """Ids of each text by `tokenizer.encode(text)`, as `HFLM.tok_encode` calls it.

    special: as `add_special_tokens`; None: the tokenizer's default.
    """
    if not is_plain(tokenizer):
        return [_checked(text, tokenizer.encode(text, **_options(special))) for text in texts]
    return _encode_plain(tokenizer, texts, special)


def encode_batch(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
    """Ids of each text by `tokenizer([text])`, as `HFLM.tok_batch_encode` calls it at batch size 1.

    special: see `encode_each`.
    """
    if not is_plain(tokenizer):
        return [_call(tokenizer, text, special) for text in texts]
    return _encode_plain(tokenizer, texts, special)


def decoder_of(tokenizer: Any) -> Callable[[list[list[int]]], list[str]]:
    """Gives the text of each row of ids by `tokenizer.batch_decode`, called as `MultiTokenEOSCriteria` does if it is its own."""
    if decodes_plainly(tokenizer):
        return lambda rows: list(tokenizer.batch_decode(rows))
    import torch

    return lambda rows: [tokenizer.batch_decode(torch.tensor([row]))[0] if row else "" for row in rows]


def _checked(text: str, ids: Iterable[Any]) -> list[int]:
    """Raises UserError for what is no id: None, of a tokenizer in Python that knows no unknown token, or one beyond 32 bits."""
    found = list(ids)
    for token in found:
        if token is None or not 0 <= token < 2**31:
            raise UserError(
                f"the tokenizer gives {one_line(repr(text), 60)} the token id {token}, which is none: give the model's own "
                "tokenizer, or another as tokenizer=NAME in --model_args"
            )
    return found


def _call(tokenizer: Any, text: str, special: bool | None) -> list[int]:
    """lm_eval's call to the letter: a method that the model's author wrote may look at any of it."""
    side, tokenizer.padding_side = getattr(tokenizer, "padding_side", None), "left"
    padding = {} if getattr(tokenizer, "pad_token", None) is None else {"padding": "longest"}  # lm_eval always has one
    try:
        row = tokenizer([text], truncation=False, return_tensors="pt", **padding, **_options(special))["input_ids"][0]
    finally:
        tokenizer.padding_side = side
    return [int(token) for token in row]


def _encode_plain(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
    def ask(part: list[str]) -> list[list[int]]:
        found = tokenizer(part, return_attention_mask=False, verbose=False, **_options(special))
        return [list(row) for row in found["input_ids"]]

    if len(texts) < 2:
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


def decodes_plainly(tokenizer: Any) -> bool:
    """The same on the way back, from ids to a text."""
    return not any(_has_own(tokenizer, name) for name in _ON_THE_WAY_BACK)


def _has_own(tokenizer: Any, name: str) -> bool:
    from transformers import PreTrainedTokenizerFast

    usual = getattr(PreTrainedTokenizerFast, name, None)
    return getattr(type(tokenizer), name, None) is not usual or name in vars(tokenizer)


def _options(special: bool | None) -> dict[str, bool]:
    return {} if special is None else {"add_special_tokens": special}
