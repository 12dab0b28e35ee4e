"""What a chat template prints of the clock: prompts of another day are others, in a run by itself as among several."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from ddp_eval.config import Config

# transformers' function for templates; they also ask whether it is defined.
_CALL = re.compile(r"strftime_now\s*\(\s*(?:'([^']*)'|\"([^\"]*)\")?\s*(\))?")


def printed_dates(config: Config, tokenizer: Any) -> dict[str, str] | None:
    """{format: what templates print now}, {} for those that print nothing of the kind; None where their text does not tell."""
    if not config.apply_chat_template:
        return {}
    formats: set[str] = set()
    for found in (call for text in _templates(config, tokenizer) for call in _CALL.finditer(text)):
        format = found[1] if found[1] is not None else found[2]
        if format is None or found[3] is None:  # it is put together
            return None
        formats.add(format)
    return {one: datetime.datetime.now().strftime(one) for one in sorted(formats)}


def _templates(config: Config, tokenizer: Any) -> Iterator[str]:
    own = getattr(tokenizer, "chat_template", None)
    given = (config.model_args.get("chat_template_args") or {}).get("chat_template")
    for one in (*(own.values() if isinstance(own, dict) else (own,)), given):
        if isinstance(one, str):
            yield one
