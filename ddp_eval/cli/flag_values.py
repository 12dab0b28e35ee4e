"""The value of each flag, from a command line, a --config file or Python."""

from __future__ import annotations

from typing import Any

from ddp_eval.config import DEFAULT_SEED
from ddp_eval.errors import UserError
from ddp_eval.system import read_back
from ddp_eval.values import read_json_object

# lm_eval knows one engine by three names.
_MODEL_ALIASES = {"huggingface": "hf", "hf-auto": "hf"}


def to_text(flag: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{flag} must be text, got {value!r}")
    if not value.strip():
        raise UserError(f"{flag} must not be empty: leave it out instead")
    return value


def to_directory(flag: str, value: Any) -> str:
    path = to_text(flag, value)
    if path.endswith(".json"):
        raise UserError(f"{flag} must be a directory, got {path}: results.json is written into it")
    return path


def to_instruction(flag: str, value: Any) -> str | None:
    return to_text(flag, value) if value != "" else None


def to_model(flag: str, value: Any) -> str:
    name = to_text(flag, value)
    return _MODEL_ALIASES.get(name, name)


def to_count(flag: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{flag} must be a whole number, got {value}") from None


def to_number(flag: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{flag} must be a number, got {value}") from None


def to_switch(flag: str, value: Any) -> bool:
    text = str(value).lower()
    if text in ("true", "yes", "1"):
        return True
    if text in ("false", "no", "0"):
        return False
    raise UserError(f"{flag} must be true or false, got {value}")


def to_template(flag: str, value: Any) -> bool | str:
    """True: the tokenizer's own template; text: the template of that name. lm_eval takes the words true and false for names."""
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    return to_text(flag, value)


def to_cache(flag: str, value: Any) -> str | None:
    """lm_eval's three words, YAML's true and false, and the mapping that lm_eval makes of a word: off unless one says true.

    Config checks the word.
    """
    if isinstance(value, dict):
        words = {"delete_requests_cache": "delete", "rewrite_requests_cache": "refresh", "cache_requests": "true"}
        if unknown := [name for name in value if name not in words]:
            raise UserError(f"{flag} has the unknown key {unknown[0]}: there are {', '.join(words)}")
        given = (word for name, word in words.items() if to_switch(f"{flag} {name}", value.get(name) or False))
        return next(given, None)
    return None if value is False else "true" if value is True else to_text(flag, value)


def to_tasks(flag: str, value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{flag} must be task names, got {value!r}")
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    if not names:
        raise UserError(f"{flag} must name at least one task")
    return names


def to_samples(flag: str, value: Any) -> Any:
    """A mapping, JSON, or the path of a JSON file. What the mapping holds is checked by Config."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return read_json_object(flag, value)
    try:
        return read_back.read_json(to_text(flag, value))
    except UserError as error:
        raise UserError(f"{flag} must be a JSON object or the path of a file with one: {error}") from None


def to_seed(flag: str, value: Any) -> tuple[int | None, ...]:
    """One value for all four generators (random, numpy, torch, few-shot), or four, or three and the default of the fourth."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    seeds = [_to_one_seed(flag, item) for item in items]
    if len(seeds) == 1:
        seeds *= len(DEFAULT_SEED)
    if len(seeds) == len(DEFAULT_SEED) - 1:
        seeds.append(DEFAULT_SEED[-1])
    if len(seeds) != len(DEFAULT_SEED):
        raise UserError(f"{flag} must be 1 or 4 values (random, numpy, torch, few-shot), got {len(seeds)}")
    return tuple(seeds)


def _to_one_seed(flag: str, item: Any) -> int | None:
    if item is None or str(item).strip().lower() == "none":
        return None
    try:
        if isinstance(item, (bool, float)):
            raise ValueError
        return int(item)
    except (TypeError, ValueError):
        raise UserError(f"{flag} must be whole numbers or None, got {item}") from None
