"""Cut prompts that ask for text into batches, the unit of work of generation. Pure numpy, no model, no ranks.

A batch is a queue: a fixed number of slots decode together, a row leaves at its stop string, and the next of the queue takes its
place. What a batch holds follows from the prompts, their settings and the model's shape alone, so that every row sees the same
neighbours, and comes to the same bits, on any number of ranks and after a resume.

    family     prompts that begin alike (the questions behind the same few-shot examples): cut into batches of their own, whose
               common prefix is computed and kept once
    strangers  all others, and families of a few: batches of prompts of about the same length

Letters: N prompts as they were asked for, M items (distinct ones: a greedy answer is computed once), G batches, T tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddp_eval.packs.plan import digest_arrays
from ddp_eval.packs.requests import IntArray

NO_TOKEN = -1  # the end of an answer at which the model's scores were NaN or infinite, so that there was nothing to choose
LEAST_SHARED = 32  # tokens that make prompts a family
LEAST_FAMILY = 4  # prompts that are worth a batch of their own
LEAST_BATCH = 32  # prompts: fewer keep no slots filled
BATCHES = 64  # to aim at for the whole run, so that it spreads over ranks


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode, as lm_eval's `normalize_gen_kwargs` and `handle_stop_sequences` leave it.

    until: strings that end an answer. options: for transformers' `generate`, but for lengths.
    """

    until: tuple[str, ...]
    options: dict[str, Any]

    def name(self) -> str:
        """Equal for equal settings."""
        return json.dumps([self.until, self.options], sort_keys=True, default=str)

    @property
    def is_random(self) -> bool:
        return bool(self.options.get("do_sample"))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is asked for, in lm_eval's order.

    tokens:   N arrays of token ids, at least one each.
    kinds:    (N,) index into `settings`.
    limits:   (N,) most tokens of an answer, 1 or more.
    seeds:    (N,) what random answers are drawn from; 0 for greedy ones.
    tasks:    N names, for messages.
    """

    tokens: Sequence[IntArray]
    kinds: Sequence[int]
    limits: Sequence[int]
    seeds: Sequence[int]
    settings: Sequence[Settings]
    tasks: Sequence[str]

    def __len__(self) -> int:
        return len(self.tokens)


NO_PROMPTS = Prompts((), (), (), (), (), ())


class BatchLimits(NamedTuple):
    """What an engine decodes together.

    slot_tokens: most tokens that all slots hold. max_slots: rows. queue: most prompts of a batch.
    """

    slot_tokens: int
    max_slots: int
    queue: int


@dataclasses.dataclass(frozen=True, eq=False)
class TextPlan:
    """All batches of a run as flat arrays that are cheap to send; see `plan_batches`.

    tokens:       (T,) int32, of each item what it does not share with the one before it in its batch.
    starts:       (M+1,) int64, where each item's own tokens start.
    shared:       (M,) int32, leading tokens that it shares with the one before it; 0 for the first of a batch.
    limits:       (M,) int32, most tokens of an answer.
    seeds:        (M,) uint64.
    item_starts:  (G+1,) int64, where each batch's items start.
    kinds:        (G,) int32, index into `settings`.
    slots:        (G,) int32, how many rows decode together; 0: the model's own `generate` answers one by one.
    prefix:       (G,) int32, leading tokens common to all prompts of a batch, computed once.
    num_requests: (G,) int32, requests that a batch answers.
    """

    tokens: IntArray
    starts: IntArray
    shared: IntArray
    limits: IntArray
    seeds: npt.NDArray[np.uint64]
    item_starts: IntArray
    kinds: IntArray
    slots: IntArray
    prefix: IntArray
    num_requests: IntArray
    settings: tuple[Settings, ...]

    @property
    def num_batches(self) -> int:
        return len(self.kinds)

    @property
    def num_items(self) -> int:
        return len(self.shared)

    def digest(self) -> str:
        """A name for exactly this work."""
        return digest_arrays("\n".join(kind.name() for kind in self.settings).encode("utf-8", "surrogatepass"), self)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One unit of work: prompts in the order in which they take slots. Members as in TextPlan; items: which of the plan's."""

    prompts: list[IntArray]
    limits: list[int]
    seeds: list[int]
    settings: Settings
    slots: int
    prefix: int
    items: range

    def __len__(self) -> int:
        return len(self.prompts)


def plan_batches(prompts: Prompts, sizes: BatchLimits, alone: Sequence[bool]) -> tuple[TextPlan, IntArray]:
    """Cut `prompts` into batches, the most expensive last.

    alone: for each of `prompts.settings`, whether the model's own `generate` must answer one by one.
    Returns the plan and (N,) int64: the item that answers each prompt.
    """
    items: dict[tuple[int, int, int, bytes], int] = {}
    columns = (prompts.kinds, prompts.limits, prompts.seeds, map(as_bytes, prompts.tokens))
    named: list[tuple[int, int, int, bytes]] = list(zip(*columns, strict=True))
    item_of_prompt = np.array([items.setdefault(name, len(items)) for name in named], dtype=np.int64)
    counts = np.bincount(item_of_prompt, minlength=len(items))
    first = {name: index for index, name in reversed(list(enumerate(named)))}
    tokens = [prompts.tokens[first[name]] for name in items]
    kinds, limits, seeds, texts = zip(*items, strict=True) if items else ((), (), (), ())

    queue = min(sizes.queue, max(LEAST_BATCH, -(-len(items) // BATCHES)))
    batches: list[list[int]] = []
    for kind in sorted(set(kinds), key=lambda kind: prompts.settings[kind].name()):
        members = sorted((item for item in range(len(items)) if kinds[item] == kind), key=lambda item: (texts[item], seeds[item]))
        if alone[kind]:
            batches += _cut(members, LEAST_BATCH)
        else:
            batches += _cut_by_prefix(members, tokens, limits, queue)

    facts = [_describe(batch, tokens, limits, sizes, alone[kinds[batch[0]]]) for batch in batches]
    order = sorted(range(len(batches)), key=lambda index: facts[index].cost)
    flat = [item for index in order for item in batches[index]]
    heads = {batches[index][0] for index in order}
    shared = [
        0 if item in heads else common(tokens[before], tokens[item]) for before, item in zip([-1, *flat], flat, strict=False)
    ]
    own = [tokens[item][skip:] for item, skip in zip(flat, shared, strict=True)]
    new_number = np.empty(len(items), dtype=np.int64)
    new_number[flat] = np.arange(len(items))
    plan = TextPlan(
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *own]).astype(np.int32),
        starts=offsets_of([len(part) for part in own]),
        shared=np.array(shared, dtype=np.int32),
        limits=np.array([limits[item] for item in flat], dtype=np.int32),
        seeds=np.array([seeds[item] for item in flat], dtype=np.uint64),
        item_starts=offsets_of([len(batches[index]) for index in order]),
        kinds=np.array([kinds[batches[index][0]] for index in order], dtype=np.int32),
        slots=np.array([facts[index].slots for index in order], dtype=np.int32),
        prefix=np.array([facts[index].prefix for index in order], dtype=np.int32),
        num_requests=np.array([counts[batches[index]].sum() for index in order], dtype=np.int32),
        settings=tuple(prompts.settings),
    )
    return plan, new_number[item_of_prompt]


def build_batch(plan: TextPlan, index: int) -> Batch:
    """Lay out batch `index` of `plan`."""
    items = range(int(plan.item_starts[index]), int(plan.item_starts[index + 1]))
    prompts: list[IntArray] = []
    for item in items:
        own = plan.tokens[plan.starts[item] : plan.starts[item + 1]]
        prompts.append(np.concatenate([prompts[-1][: plan.shared[item]], own]) if prompts else own)
    span = slice(items.start, items.stop)
    return Batch(
        prompts,
        plan.limits[span].tolist(),
        plan.seeds[span].tolist(),
        plan.settings[plan.kinds[index]],
        int(plan.slots[index]),
        int(plan.prefix[index]),
        items,
    )


def common(left: IntArray, right: IntArray) -> int:
    """How many leading tokens are the same.

    >>> common(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


def as_bytes(tokens: IntArray) -> bytes:
    """Bytes that sort as the tokens do."""
    return np.asarray(tokens).astype(">u4").tobytes()


class _Facts(NamedTuple):
    slots: int
    prefix: int
    cost: float


def _describe(batch: list[int], tokens: Sequence[IntArray], limits: Sequence[int], sizes: BatchLimits, alone: bool) -> _Facts:
    lengths = [len(tokens[item]) for item in batch]
    answers = sum(limits[item] for item in batch)
    if alone:
        return _Facts(0, 0, sum(lengths) + 4.0 * answers)
    ends = [common(tokens[batch[0]], tokens[item]) for item in batch[1:]]
    prefix = min([min(lengths) - 1, *ends])
    prefix = prefix if prefix >= LEAST_SHARED and len(batch) > 1 else 0
    longest = max(len(tokens[item]) - prefix + limits[item] for item in batch)
    slots = max(1, min(sizes.max_slots, sizes.slot_tokens // longest, len(batch)))
    return _Facts(slots, prefix, sum(lengths) - prefix * (len(batch) - 1) + float(answers))


def _cut_by_prefix(members: list[int], tokens: Sequence[IntArray], limits: Sequence[int], queue: int) -> list[list[int]]:
    """members: sorted by their tokens."""
    families: list[list[int]] = []
    for before, item in zip([None, *members], members, strict=False):
        alike = before is not None and common(tokens[before], tokens[item]) >= max(LEAST_SHARED, len(tokens[item]) // 4)
        if alike:
            families[-1].append(item)
        else:
            families.append([item])
    large = [family for family in families if len(family) >= LEAST_FAMILY]
    strangers = [family for family in families if len(family) < LEAST_FAMILY]
    strangers.sort(key=lambda family: -max(len(tokens[item]) + limits[item] for item in family))
    pooled = [item for family in strangers for item in family]
    return [batch for family in [*large, pooled] for batch in _cut(family, queue)]


def _cut(members: list[int], most: int) -> list[list[int]]:
    """Even pieces of at most `most`."""
    pieces = -(-len(members) // most)
    edges = [len(members) * piece // pieces for piece in range(pieces + 1)] if pieces else []
    return [members[start:stop] for start, stop in itertools.pairwise(edges)]


def offsets_of(lengths: Sequence[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


NO_TEXTS = plan_batches(NO_PROMPTS, BatchLimits(1, 1, 1), ())[0]
