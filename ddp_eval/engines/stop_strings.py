"""When an answer ends at a stop string, by lm_eval's rule (`MultiTokenEOSCriteria` of lm_eval 0.4.13) to the letter.

A stop string of n tokens is looked for in the text of the last n + 2 tokens of the answer, whatever it is made of there: it may
begin and end within tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddp_eval.packs.batches import NO_TOKEN
from ddp_eval.system.tokenizer_calls import decoder_of


class StopRule:
    """The stop strings of one kind of request, for one tokenizer."""

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self._decode = decoder_of(tokenizer)
        self._by_window: dict[int, list[str]] = {}
        for text in until:
            window = len(tokenizer.encode(text, add_special_tokens=False)) + 2
            self._by_window.setdefault(window, []).append(text)

    def ends(self, answers: Sequence[list[int]]) -> list[bool]:
        """Whether each answer, as long as it is now, has just come to a stop string, or to NO_TOKEN."""
        found = [answer[-1:] == [NO_TOKEN] for answer in answers]
        for window, texts in self._by_window.items():
            tails = [[] if end else answer[-window:] for answer, end in zip(answers, found, strict=True)]
            decoded = self._decode(tails)
            for row, tail in enumerate(decoded):
                found[row] = found[row] or any(text in tail for text in texts)
        return found
