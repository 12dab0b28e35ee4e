"""lm_eval's requests for text -> prompts and how to decode them, by the rules of its HF backend at batch size 1.

The rules are those of `HFLM.generate_until`, `tok_batch_encode` and `_model_generate` (lm_eval 0.4.13). Leader only: it imports
lm_eval's helpers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import handle_arg_string

from ddp_eval.config import ThinkEnd, read_think_end
from ddp_eval.errors import UserError, one_line
from ddp_eval.packs.batches import Prompts, Settings, as_bytes
from ddp_eval.tasks.reasoning import finish_answer
from ddp_eval.tasks.tokenization import Encoder

MAX_GEN_TOKS = 256  # lm_eval's default


class GenerationRequests:
    """Requests for text, as (context, generation settings) pairs, and what becomes of their answers.

    tasks: of each request, for messages. seed: --seed's third value, torch's; None draws one.
    think_end_token, max_gen_toks: as in lm_eval's model_args; the second is for tasks that set no limit, 256 if not given.
    stops_behind_thinking: with think_end_token, only EOS ends an answer, and stop strings cut what is behind the thinking;
        the end of thinking may be made of special tokens. So it is in lm_eval's vLLM backend.
    truncated: requests that lost the left end of their prompt. bare: those whose prompt has no token: the prefix token is it.
    Raises UserError for settings that leave no room or cannot be meant.
    """

    def __init__(
        self,
        encoder: Encoder,
        pairs: Sequence[tuple[str, dict[str, Any]]],
        tasks: Sequence[str],
        seed: int | None,
        think_end_token: str | int | None = None,
        max_gen_toks: int | None = None,
        stops_behind_thinking: bool = False,
    ) -> None:
        self._tokenizer = encoder.tokenizer
        self._think_end: ThinkEnd | tuple[int, ...] = read_think_end({"think_end_token": think_end_token})
        late = stops_behind_thinking and self._think_end is not None
        if late and isinstance(self._think_end, str):
            self._think_end = _as_special(self._tokenizer, self._think_end)
        self._separate = encoder.separate
        self._max_gen_toks = max_gen_toks or MAX_GEN_TOKS
        self._eos = _eos_text(self._tokenizer)
        self.truncated: list[int] = []
        self.bare: list[int] = []
        settings: dict[str, int] = {}
        kinds_of: list[Settings] = []
        kinds, limits, tokens = [], [], []
        encoded = encoder.encode_prompts([context for context, _ in pairs])
        for index, (ids, (_, gen_kwargs), task) in enumerate(zip(encoded, pairs, tasks, strict=True)):
            chosen, limit, max_prompt = self._settle(gen_kwargs, task, encoder.max_length)
            if not len(ids):
                self.bare.append(index)
                ids = np.array([encoder.prefix_token_id], dtype=np.int32)
            if len(ids) > max_prompt:
                self.truncated.append(index)
                ids = ids[-max_prompt:]
            if chosen.name() not in settings:
                settings[chosen.name()] = len(settings)
                kinds_of.append(chosen)
            total = chosen.options.get("max_length")
            if total is not None and int(total) <= len(ids) and not self._separate:
                raise UserError(f"the task {task} asks for max_length={total}, and its prompt alone has {len(ids)} tokens")
            # lm_eval bounds an encoder-decoder's tokens, the first of which is given, as if the prompt were among them.
            given = 1 if self._separate else len(ids)
            kinds.append(settings[chosen.name()])
            limits.append((limit + len(ids) if total is None else int(total)) - given)
            tokens.append(np.array(ids, dtype=np.int32))
        self._cuts = [one.until for one in kinds_of]
        ends = [tuple(text for text in cuts if text == self._eos) if late else cuts for cuts in self._cuts]
        bare = [
            Settings(until, {key: value for key, value in one.options.items() if key != "max_length"})
            for until, one in zip(ends, kinds_of, strict=True)
        ]
        seeds = _seed_each(tokens, kinds, bare, seed)
        self.prompts = Prompts(tokens, kinds, limits, seeds, bare, tasks)

    def _settle(self, gen_kwargs: Any, task: str, max_length: int) -> tuple[Settings, int, int]:
        """Settings, maximum tokens of the answer, maximum tokens of the prompt."""
        if not isinstance(gen_kwargs, dict):
            raise UserError(f"the task {task} gives generation settings that are no mapping: {gen_kwargs!r}")
        try:
            options: dict[str, Any] = dict(normalize_gen_kwargs(_read_texts(gen_kwargs), self._max_gen_toks))
            until = handle_stop_sequences(options.pop("until", None), eos=self._eos)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the task {task} gives generation settings that cannot be meant: {error}") from None
        if not all(isinstance(text, str) for text in until):
            raise UserError(f"until of the task {task} must be a text or a list of texts, got {one_line(until, 80)}")
        if not isinstance(options.get("do_sample"), bool):
            raise UserError(f"do_sample of the task {task} must be true or false, got {one_line(options['do_sample'], 80)}")
        limit = int(options.pop("max_gen_toks"))
        if limit < 1:
            raise UserError(f"max_gen_toks of the task {task} must be 1 or more, got {limit}")
        max_prompt = max_length if self._separate else max_length - limit
        if max_prompt < 1:
            raise UserError(
                f"the task {task} asks for answers of up to {limit} tokens, which leaves no room for its prompts in the model's "
                f"{max_length}: give --gen_kwargs max_gen_toks=N with a smaller N, or a larger max_length in --model_args"
            )
        options["temperature"] = options.get("temperature", 0.0)
        return Settings(tuple(until), options), limit, max_prompt

    def decode_with(self, tokenizer: Any) -> None:
        """From now on `read` uses this tokenizer, which gives the same ids and texts."""
        self._tokenizer = tokenizer

    def read(self, kind: int, answer: list[int]) -> str:
        """What lm_eval makes of an answer's tokens: its text after the thinking, up to the first stop string."""
        return finish_answer(
            answer,
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            self._cuts[kind],
            self._think_end,
        )


def _read_texts(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Numbers, switches and None that came as text, by lm_eval's rule for the command line: "false" is no True."""
    read = {
        name: handle_arg_string(value) if isinstance(value, str) and name != "until" else value
        for name, value in gen_kwargs.items()
    }
    if isinstance(read.get("do_sample"), (int, np.bool_)):
        read["do_sample"] = bool(read["do_sample"])  # 1 means True
    return {name: value for name, value in read.items() if name != "until" or value is not None}


def _as_special(tokenizer: Any, text: str) -> str | tuple[int, ...]:
    """The ids of a text with special tokens in it, which no decoded answer would show; of any other, the text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tuple(ids) if set(ids) & set(tokenizer.all_special_ids) else text


def _eos_text(tokenizer: Any) -> str | None:
    return None if tokenizer.eos_token_id is None else str(tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False))


def _seed_each(tokens: Sequence[Any], kinds: Sequence[int], settings: Sequence[Settings], seed: int | None) -> list[int]:
    """What each random answer is drawn from: its prompt, its settings, how often the same came before, and the seed.

    Never a rank, a batch or a place in a list: the same request has the same draws, whatever else is evaluated.
    """
    seen: dict[bytes, int] = {}
    base = np.random.SeedSequence().entropy if seed is None else seed
    seeds = []
    for ids, kind in zip(tokens, kinds, strict=True):
        if not settings[kind].is_random:
            seeds.append(0)
            continue
        content = hashlib.sha256(f"{base} {settings[kind].name()} ".encode("utf-8", "surrogatepass") + as_bytes(ids)).digest()
        repeat = seen.get(content, 0)
        seen[content] = repeat + 1
        digest = hashlib.sha256(content + repeat.to_bytes(8, "little")).digest()
        seeds.append(int.from_bytes(digest[:8], "little") or 1)
    return seeds
