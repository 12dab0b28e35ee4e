"""Decode a batch of prompts through a transformers model: our own loop over its forward, with keys and values kept in slots.

    admit   the prompts that take free slots run as one prefix tree behind the batch's common prefix, whose keys and values are
            computed once and kept once for all rows
    step    one token of every row; a row that has come to its end gives its slot to the last row, and the next of the queue
            takes the free one

The model runs without a cache of transformers': its attention calls `attend`, which keeps the keys and values it is given and
attends to those kept (kv_slots.py). So any model whose attention goes through transformers' AttentionInterface will do. Others
keep rows in a cache of their own (cache_slots.py): those whose layers keep a state, or whose attention has parts of its own.
`check_decoding` has either prove itself against plain forwards. Where neither does, the model's own `generate` answers, one
request at a time (generate_one.py).

Letters: B rows, S slots, P tokens of the common prefix, W tokens kept of the longest row beyond it, L tokens of a tree,
V vocabulary, K key-value heads, Q query heads for each of them, D head size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines import ROUNDING, OnProgress
from ddp_eval.engines.hf import generate_one
from ddp_eval.engines.hf.attention_choice import attend_with
from ddp_eval.engines.hf.cache_slots import CacheSlots
from ddp_eval.engines.hf.capabilities import reaches
from ddp_eval.engines.hf.costs import head_shapes
from ddp_eval.engines.hf.kv_slots import NAME, KVSlots, register
from ddp_eval.engines.hf.sampling import TokenSampler, draws_of
from ddp_eval.engines.ops.masks import layer_rules, needs_dense_masks
from ddp_eval.engines.stop_strings import StopRule
from ddp_eval.errors import LostContact, one_line
from ddp_eval.packs.batches import NO_TOKEN, Batch, BatchLimits
from ddp_eval.packs.requests import IntArray

if TYPE_CHECKING:
    from ddp_eval.engines.hf.causal_model import CausalModel

ADMIT_TOKENS = 256  # prompts wait for free slots until they bring so many tokens together: a small forward costs almost as much
HEARTBEAT_STEPS = 64  # between two signs of life
MOST_REACH, MOST_INDEXED = 512, 4096  # tokens that a trial's prefix goes beyond, at most; with an indexer that sees the padding
NAN_PROBE = 8  # answers that show whether others, too, end in NaN of their own


def generate(engine: CausalModel, batch: Batch, tokenizer: Any, on_progress: OnProgress) -> list[list[int]]:
    """The tokens of every answer of `batch`, its stop string, EOS or NO_TOKEN included."""
    register()
    rule = StopRule(tokenizer, batch.settings.until)
    pad = tokenizer.pad_token_id
    if not batch.slots:
        return generate_one.answer_all(engine, batch, rule, pad, on_progress)
    with engine.inference(_implementation(engine)):
        answers = BatchDecoder(engine, batch, rule, pad, on_progress).run()
        # Their own NaN, or a neighbour's: see run/nan_retry.py. Where the first few come to it by themselves, so will the others.
        broken = [index for index, answer in enumerate(answers) if answer[-1] == NO_TOKEN]
        for place, index in enumerate(broken):
            if place == NAN_PROBE and all(answers[one][-1] == NO_TOKEN for one in broken[:NAN_PROBE]):
                break
            again = BatchDecoder(engine, _single(batch, index), rule, pad, lambda requests, tokens: on_progress(0, tokens))
            answers[index] = again.run()[0]
    return answers


def _implementation(engine: CausalModel) -> str | None:
    """Under which attention rows decode; None: the model's own."""
    return None if engine.decodes_by_cache else NAME


def _slots(engine: CausalModel, prefix: IntArray, slots: int, width: int) -> KVSlots | CacheSlots:
    return (CacheSlots if engine.decodes_by_cache else KVSlots)(engine, prefix, slots, width)


def _single(batch: Batch, index: int) -> Batch:
    item = batch.items[index]
    return dataclasses.replace(
        batch,
        prompts=[batch.prompts[index]],
        limits=[batch.limits[index]],
        seeds=[batch.seeds[index]],
        slots=1,
        prefix=0,
        items=range(item, item + 1),
    )


class BatchDecoder:
    """One batch under way. Rows stand in slots 0 … B-1 without a gap."""

    def __init__(self, engine: CausalModel, batch: Batch, rule: StopRule, pad: int | None, on_progress: OnProgress) -> None:
        self._batch, self._rule, self._on_progress = batch, rule, on_progress
        self._chooser = TokenSampler(engine.model, batch.settings, pad)
        self._answers: list[list[int]] = [[] for _ in batch.prompts]
        self._draws = [draws_of(seed, limit) for seed, limit in zip(batch.seeds, batch.limits, strict=True)]
        width = max(len(prompt) - batch.prefix + limit for prompt, limit in zip(batch.prompts, batch.limits, strict=True))
        self._rows = _slots(engine, batch.prompts[0][: batch.prefix], batch.slots, width)
        self._in_slot: list[int] = []  # the prompt of each row
        self._next = 0

    def run(self) -> list[list[int]]:
        """The tokens of every answer."""
        batch, since = self._batch, 0
        if batch.prefix:
            self._on_progress(0, batch.prefix)
        while self._next < len(batch) or self._in_slot:
            if taken := self._take():
                prompts = [batch.prompts[index][batch.prefix :] for index in taken]
                self._in_slot += taken
                computed, logits = self._rows.admit(prompts)
                self._settle(len(self._in_slot) - len(taken), logits)
                self._on_progress(0, computed)
            if self._in_slot:
                last = [self._answers[index][-1] for index in self._in_slot]
                self._settle(0, self._rows.step(last))
                since += 1
                if since % HEARTBEAT_STEPS == 0:
                    self._on_progress(0, 0)
        return self._answers

    def _take(self) -> list[int]:
        """The prompts to admit now: as many as there are free slots, if these are enough."""
        free = min(self._rows.slots - len(self._in_slot), len(self._batch) - self._next)
        taken = list(range(self._next, self._next + free))
        fresh = sum(len(self._batch.prompts[index]) - self._batch.prefix for index in taken)
        if self._in_slot and free < self._rows.slots // 2 and fresh < ADMIT_TOKENS:
            return []
        self._next += free
        return taken

    def _settle(self, first: int, logits: torch.Tensor) -> None:
        """Choose a token for the rows from `first` on, and let those go that have come to their end.

        logits: (rows, V).
        """
        batch, rows = self._batch, self._in_slot[first:]
        answers = [self._answers[index] for index in rows]
        draws = [self._draws[index][len(answer)] for index, answer in zip(rows, answers, strict=True)]
        prompts = [batch.prompts[index] for index in rows]
        chosen = self._chooser.choose(logits, prompts, answers, [batch.limits[index] for index in rows], draws)
        for answer, token in zip(answers, chosen, strict=True):
            answer.append(token)
        ended = self._rule.ends(answers)
        for slot in reversed(range(first, first + len(rows))):
            index = self._in_slot[slot]
            answer = self._answers[index]
            if ended[slot - first] or answer[-1] in self._chooser.eos or len(answer) >= batch.limits[index]:
                self._rows.drop(slot, answer[-1] == NO_TOKEN)
                self._in_slot[slot] = self._in_slot[-1]
                self._in_slot.pop()
                self._on_progress(1, len(answer))


def choose_sizes(engine: CausalModel) -> BatchLimits:
    """How many rows may decode together, from the model's shape and the kind of device alone."""
    config, on_gpu = engine.config, engine.device.type == "cuda"
    token_bytes = 2 * sum(kv_heads * size for _, kv_heads, size in head_shapes(config)) * engine.dtype.itemsize
    budget = 2**33 if on_gpu else 2**30
    return BatchLimits(max(1, budget // token_bytes), 128 if on_gpu else 16, 256 if on_gpu else 64)


def check_decoding(engine: CausalModel) -> str | None:
    """Decode a few rows in slots and compare with plain forwards. Returns None when they agree, else one phrase that says why.

    The rows share a prefix longer than any window, branch, end, and take each other's places.
    """
    try:
        why = None if engine.decodes_by_cache else _why_no_attention(engine)
        if why is not None:
            return why
        drift = _try_decoding(engine)
    except LostContact:
        raise
    except Exception as error:
        return f"it fails at batches ({type(error).__name__}: {one_line(error, 200)})"
    finally:
        attend_with(engine.model, engine.attention_now)
    allowed = ROUNDING.get(engine.dtype, 1e-4)
    if float(drift.mean()) <= allowed and float(drift.max()) <= 4 * allowed:  # a NaN is not "at most" anything
        return None
    return f"batched and plain runs differ by {float(drift.max()):.2g} nats per token, where {allowed:.2g} on average is allowed"


def _why_no_attention(engine: CausalModel) -> str | None:
    """Why the model's attention cannot be replaced, or None."""
    try:
        layer_rules(engine.config)
    except ValueError as error:
        return str(error)
    register()
    attend_with(engine.model, NAME)
    taken = engine.config._attn_implementation == NAME
    attend_with(engine.model, engine.plain_attention)
    return None if taken else "its attention cannot be replaced"


def _try_decoding(engine: CausalModel) -> npt.NDArray[np.float64]:
    """By how many nats the log-probabilities of tokens differ, decoded in slots and in plain forwards."""
    most = MOST_INDEXED if engine.decodes_by_cache and needs_dense_masks(engine.config) else MOST_REACH
    reach = max((reach for reach in reaches(engine.config) if reach < most), default=0)
    tokens = np.random.default_rng(0).permutation(np.resize(np.arange(engine.vocab_size), max(1024, 2 * reach)))
    length = reach + 8 if reach else 24
    prefix, branch, rest = tokens[:length], tokens[length : length + 9], iter(tokens[length + 9 :].tolist())

    def tail(count: int) -> list[int]:
        return [next(rest) for _ in range(count)]

    prompts = [np.array([*branch, *tail(3)]), np.array([*branch, *tail(5)]), np.array(tail(4)), np.array(tail(11))]
    forced = [tail(2), tail(5), tail(5), tail(3)]
    decoded: list[list[torch.Tensor]] = [[] for _ in prompts]
    with engine.inference(_implementation(engine)):
        rows = _slots(engine, prefix, 3, 20)
        in_slot = [0, 1, 2]
        logits = rows.admit(prompts[:3])[1]
        while in_slot:
            for row, index in zip(logits, in_slot, strict=True):
                decoded[index].append(row.float().log_softmax(-1))
            for slot in reversed(range(len(in_slot))):
                index = in_slot[slot]
                if len(decoded[index]) == len(forced[index]):
                    rows.drop(slot, False)
                    in_slot[slot] = in_slot[-1]
                    in_slot.pop()
                    if index == 0:
                        decoded[3].append(rows.admit([prompts[3]])[1][0].float().log_softmax(-1))
                        in_slot.append(3)
            if in_slot:
                logits = rows.step([forced[index][len(decoded[index]) - 1] for index in in_slot])
    drift = []
    with engine.inference(None):
        for prompt, answer, found in zip(prompts, forced, decoded, strict=True):
            asked = [*prefix.tolist(), *prompt.tolist()]
            plain = (_step_by_step if engine.decodes_by_cache else _in_one_forward)(engine, asked, answer)
            given = list(zip(found, plain, answer, strict=True))
            if engine.decodes_by_cache:  # and with positions of the model's own, which may begin elsewhere (Kosmos-2.5)
                given.append((found[0], _in_one_forward(engine, asked, answer[:1])[0], answer[0]))
            for row, expected, token in given:
                drift.append(float((row[token] - expected.float().log_softmax(-1)[token]).abs()))
    return np.array(drift)


def _in_one_forward(engine: CausalModel, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    """(V,) logits before each token of the answer."""
    whole = torch.tensor([[*prompt, *answer]], device=engine.device)
    logits = engine.model(input_ids=whole, use_cache=False).logits[0]
    return list(logits[len(prompt) - 1 : -1])


def _step_by_step(engine: CausalModel, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    """The same as the model's own `generate` comes to them: some layers have other code for a step (Nemotron-H: 2e-3 nats)."""
    cache, logits = None, []
    for start, fed in enumerate([prompt, *([token] for token in answer[:-1])], start=len(prompt) - 1):
        tokens = torch.tensor([fed], device=engine.device)
        first = 0 if cache is None else start
        positions = torch.arange(first, first + len(fed), device=engine.device)[None]
        found, cache = engine.next_with_cache(tokens, cache, positions, None)
        logits.append(found[0])
    return logits
