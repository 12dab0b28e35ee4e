"""Settings given as text, such as key=value pairs: the same text means the same by flag, in a --config file and in Python.

lm_eval 0.4.13 has two parsers for them. That of its flags (`lm_eval._cli.utils`) reads lists and dicts, but makes "-7" a float
and leaves "none" a text. That of text in config files and Python calls (`lm_eval.utils.simple_parse_args_string`) reads -7 and
None, but cuts lists at their commas. Here the second decides whether a value is a number, a switch or None, and the first decides
everything else; tests/cases/test_values.py compares with both. Light: every rank reads its flags before torch loads.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Container
from typing import Any

from ddp_eval.errors import UserError, one_line
from ddp_eval.system import read_back

_WHOLE_NUMBER = re.compile(r"[+-]?\d+")
_WORDS = {"true": True, "false": False, "none": None}

# Of model_args: names and paths. A revision of digits alone is one, too.
TEXT_MODEL_ARGS = ("pretrained", "tokenizer", "revision", "subfolder", "peft")


def convert_value(text: str) -> Any:
    """The value of key=value: true, false or none, a whole number, a float, a Python literal, else the text itself.

    >>> [convert_value(text) for text in ("-7", "1e3", "None", "[1, 'a']", "'7'", "a b")]
    [-7, 1000.0, None, [1, 'a'], '7', 'a b']
    """
    bare = text.strip()
    if bare.lower() in _WORDS:
        return _WORDS[bare.lower()]
    with contextlib.suppress(ValueError):  # so many digits that Python refuses them make a float
        if _WHOLE_NUMBER.fullmatch(bare):
            return int(bare)
    with contextlib.suppress(ValueError):
        return float(bare)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def split_top_level(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets, braces and quotes, by lm_eval's rule; empty parts are dropped."""
    parts, part, depth, quote = [], "", 0, ""
    for char in text:
        if char == "," and not depth and not quote:
            parts.append(part)
            part = ""
            continue
        part += char
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[({":
            depth += 1
        elif char in "])}":
            depth = max(depth - 1, 0)
    return [part for part in [*parts, part] if part]


def read_args(flag: str, value: Any) -> dict[str, Any]:
    """A mapping, or words that each are key=value pairs or a JSON object; later ones win.

    lm_eval drops the words after a JSON object and fails on key={…} in the first word; here both are read.
    Raises UserError, naming the flag, for anything else.
    """
    texts = TEXT_MODEL_ARGS if flag == "--model_args" else ()
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{flag} must be key=value pairs, got {value!r}")
    merged: dict[str, Any] = {}
    for word in words:
        merged.update(read_json_object(flag, word) if word.lstrip().startswith("{") else _read_pairs(flag, word, texts))
    return merged


def read_json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        parsed = read_back.parse_json(text)
    except ValueError as error:
        why = one_line(error).removeprefix("is not JSON: ")
        raise UserError(f"{flag} must be a JSON object, with double quotes, got {one_line(text)}: {why}") from None
    assert isinstance(parsed, dict), "JSON text that starts with { is an object"
    return parsed


def _read_pairs(flag: str, text: str, texts: Container[str]) -> dict[str, Any]:
    pairs = {}
    for part in split_top_level(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not part.strip():
            continue
        if not equals or not key:
            raise UserError(f"{flag} must be key=value pairs, got {part!r}")
        pairs[key] = _convert_text(value) if key in texts else convert_value(value)
    return pairs


def _convert_text(text: str) -> str | None:
    """The value of an argument that is text: what looks like a number stays as it was typed."""
    value = convert_value(text)
    return value if value is None or isinstance(value, str) else text.strip()
