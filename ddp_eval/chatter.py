"""What lm_eval says while it builds prompts, less what asks for nothing; for the command and the API alike."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

_LOGGERS = ("lm_eval.api.task", "lm_eval.config.task", "lm_eval.evaluator")
# Warnings that come with every run of some task, or that repeat what the user has just asked for.
_ENDS = (
    "For details see task Readme.",
    "using preconfigured rule.",
    "using default aggregation=weighted_perplexity",
    "using default aggregation=bits_per_byte",
    "using default higher_is_better=False",
    "using default higher_is_better=True",
    "using default aggregation=mean",
)
_STARTS = ("Overwriting default num_fewshot of ", "generation_kwargs: ")


@contextlib.contextmanager
def less_chatter() -> Iterator[None]:
    """Hold back lm_eval's warnings of these kinds until the block ends."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_matters)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    message = record.getMessage().strip()
    return not (message.endswith(_ENDS) or message.startswith(_STARTS))


def prompt_bar(documents: Iterable[Any], total: int) -> Any:
    """The bar of a task whose prompts are built: gone when it is done, and only where somebody watches."""
    quiet = True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None  # None: unless on a terminal
    return tqdm(documents, total=total, desc="building prompts", unit=" documents", leave=False, disable=quiet)
