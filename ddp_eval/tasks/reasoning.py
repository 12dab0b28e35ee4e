"""Reasoning traces in generated text, by the rules of lm_eval's HF backend (0.4.13): what is kept, and where it is cut.

`think_end_token` in --model_args is a string or a token id. All up to its last occurrence is dropped before stop strings cut the
answer, because a trace may hold a stop string; where it does not occur, everything is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddp_eval.config import ThinkEnd


def template_arguments(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is rendered with beside the messages. enable_thinking, True or False, wins over its namesake."""
    arguments = dict(model_args.get("chat_template_args") or {})
    if model_args.get("enable_thinking") is not None:
        arguments["enable_thinking"] = model_args["enable_thinking"]
    return arguments


def finish_answer(
    tokens: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    until: Sequence[str],
    think_end: ThinkEnd | tuple[int, ...] = None,
) -> str:
    """The answer in a row of generated tokens.

    tokens:  what the model wrote, without the prompt; padding behind the end may follow.
    decode:  token ids -> text, special tokens skipped.
    until:   stop strings, the text of EOS among them; the first of each cuts what is left by those before it.
    think_end: a tuple is several token ids in a row.
    """
    if isinstance(think_end, (int, tuple)):
        end = (think_end,) if isinstance(think_end, int) else think_end
        starts = range(len(tokens) - len(end) + 1)
        behind = [index + len(end) for index in starts if tuple(tokens[index : index + len(end)]) == end]
        text = decode(tokens[behind[-1] :] if behind else tokens).lstrip()
    else:
        text = decode(tokens)
        if think_end:
            text = text.split(think_end)[-1].lstrip()
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
