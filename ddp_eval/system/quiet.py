"""What other libraries say, less what asks for nothing, and put back as it was: for processes that are a caller's."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
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
def quiet_libraries() -> Iterator[None]:
    """Hold back lm_eval's warnings of these kinds until the block ends."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_matters)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_matters)


@contextlib.contextmanager
def only_rank_zero_logs(speaks: bool) -> Iterator[None]:
    """While weights load: no bars but where somebody watches the one rank that speaks; of the others no warnings either."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as transformers

    bars, no_bars_of_hub = transformers.is_progress_bar_enabled(), are_progress_bars_disabled()
    loggers = [] if speaks else [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "ddp_eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if not (speaks and sys.stderr.isatty()):
        transformers.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.enable_progress_bar()  # those of the hub, too
        if no_bars_of_hub:
            disable_progress_bars()


def _matters(record: logging.LogRecord) -> bool:
    message = record.getMessage().strip()
    return not (message.endswith(_ENDS) or message.startswith(_STARTS))


def prompt_bar(documents: Iterable[Any], total: int) -> Any:
    """The bar of a task whose prompts are built: gone when it is done, and only where somebody watches."""
    quiet = True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None  # None: unless on a terminal
    return tqdm(documents, total=total, desc="building prompts", unit=" documents", leave=False, disable=quiet)
