"""Decode a batch of prompts through a transformers model: our own loop over its forward, with keys and values kept in slots.

    admit   the prompts that take free slots run as one prefix tree behind the batch's common prefix, whose keys and values are
            computed once and kept once for all rows
    step    one token of every row; a row that has come to its end gives its slot to the last row, and the next of the queue
            takes the free one

The model runs without a cache of transformers': its attention calls `attend`, which keeps the keys and values it is given and
attends to those kept. So any model whose attention goes through transformers' AttentionInterface will do; `check_decoding` has
it prove itself against plain forwards. Others answer by their own `generate`, one request at a time (lone.py).

Letters: B rows, S slots, P tokens of the common prefix, W tokens kept of the longest row beyond it, L tokens of a tree,
V vocabulary, K key-value heads, Q query heads for each of them, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines import ROUNDING
from ddp_eval.engines.hf import generate_one
from ddp_eval.engines.ops import tree_attention
from ddp_eval.engines.ops.masks import LayerRule, layer_rules
from ddp_eval.engines.stop_strings import StopRule
from ddp_eval.errors import one_line
from ddp_eval.packs.batches import NO_TOKEN, Batch, Settings, Sizes, as_bytes, common
from ddp_eval.packs.requests import IntArray

if TYPE_CHECKING:
    from ddp_eval.engines.hf import engine as hf

NAME = "ddp_eval_decode"  # the attention implementation's name towards transformers
ADMIT_TOKENS = 256  # prompts wait for free slots until they bring so many tokens together: a forward of few is dear
SIGN_STEPS = 64  # between two signs of life
FEW = 8  # answers that tell whether others, too, end in NaN of their own

Tell = Callable[[int, int], None]  # (requests done, tokens done), from time to time


def generate(engine: hf.HFEngine, batch: Batch, tokenizer: Any, tell: Tell) -> list[list[int]]:
    """The tokens of every answer of `batch`, its stop string, EOS or NO_TOKEN included."""
    register()
    rule = StopRule(tokenizer, batch.settings.until)
    pad = tokenizer.pad_token_id
    if not batch.slots:
        return generate_one.answer_all(engine, batch, rule, pad, tell)
    with engine.inference(NAME):
        answers = _Loop(engine, batch, rule, pad, tell).run()
        # Their own NaN, or a neighbour's: see contagion.py. Where the first few come to it by themselves, so will the others.
        broken = [index for index, answer in enumerate(answers) if answer[-1] == NO_TOKEN]
        for place, index in enumerate(broken):
            if place == FEW and all(answers[one][-1] == NO_TOKEN for one in broken[:FEW]):
                break
            again = _Loop(engine, _single(batch, index), rule, pad, lambda requests, tokens: tell(0, tokens))
            answers[index] = again.run()[0]
    return answers


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


class _Loop:
    """One batch under way. Rows stand in slots 0 … B-1 without a gap."""

    def __init__(self, engine: hf.HFEngine, batch: Batch, rule: StopRule, pad: int | None, tell: Tell) -> None:
        self._batch, self._rule, self._tell = batch, rule, tell
        self._chooser = Chooser(engine.model, batch.settings, pad)
        self._answers: list[list[int]] = [[] for _ in batch.prompts]
        self._draws = [_draws(seed, limit) for seed, limit in zip(batch.seeds, batch.limits, strict=True)]
        width = max(len(prompt) - batch.prefix + limit for prompt, limit in zip(batch.prompts, batch.limits, strict=True))
        self._rows = Rows(engine, batch.prompts[0][: batch.prefix], batch.slots, width)
        self._in_slot: list[int] = []  # the prompt of each row
        self._next = 0

    def run(self) -> list[list[int]]:
        """The tokens of every answer."""
        batch, since = self._batch, 0
        if batch.prefix:
            self._tell(0, batch.prefix)
        while self._next < len(batch) or self._in_slot:
            if taken := self._take():
                prompts = [batch.prompts[index][batch.prefix :] for index in taken]
                self._in_slot += taken
                computed, logits = self._rows.admit(prompts)
                self._settle(len(self._in_slot) - len(taken), logits)
                self._tell(0, computed)
            if self._in_slot:
                last = [self._answers[index][-1] for index in self._in_slot]
                self._settle(0, self._rows.step(last))
                since += 1
                if since % SIGN_STEPS == 0:
                    self._tell(0, 0)
        return self._answers

    def _take(self) -> list[int]:
        """The prompts to admit now: as many as there are free slots, if these are enough."""
        free = min(self._batch.slots - len(self._in_slot), len(self._batch) - self._next)
        taken = list(range(self._next, self._next + free))
        fresh = sum(len(self._batch.prompts[index]) - self._batch.prefix for index in taken)
        if self._in_slot and free < self._batch.slots // 2 and fresh < ADMIT_TOKENS:
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
                self._tell(1, len(answer))


class Rows:
    """Keys and values of the rows that decode together, and the two forwards over them."""

    def __init__(self, engine: hf.HFEngine, prefix: IntArray, slots: int, width: int) -> None:
        self._engine, self._slots, self._width = engine, slots, width
        self._rules = layer_rules(engine.config)
        self._prefix_length = len(prefix)
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer, (K, P, D) each
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer, (S, K, width, D) each
        self._lengths: list[int] = []  # tokens kept of each row, the prefix not counted
        self._layer = 0
        if len(prefix):
            tree = _Tree(prefix, np.arange(len(prefix)), np.full(len(prefix), len(prefix)), [])
            fresh = self._run_tree(tree, None, 0)[0]
            self._prefix = [(key[0].contiguous(), value[0].contiguous()) for key, value in fresh]

    def __len__(self) -> int:
        return len(self._lengths)

    def admit(self, prompts: Sequence[IntArray]) -> tuple[int, torch.Tensor]:
        """Put `prompts`, without the common prefix, into the next slots.

        Returns the tokens computed and (len(prompts), V) logits of what comes next.
        """
        logits, computed = [], 0
        most = self._engine.max_tokens()
        for group in _groups(prompts, most):
            tree = grow_tree(prompts[group.start : group.stop])
            ends = np.array([path[-1] for path in tree.paths])
            fresh, last = self._run_tree(tree, ends, self._prefix_length)
            self._keep(tree, fresh)
            logits.append(last)
            computed += len(tree.tokens)
        return computed, torch.cat(logits)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to every row. Returns (B, V) logits of what comes next."""
        device, rows = self._engine.device, len(self._lengths)
        at = torch.tensor(self._lengths, device=device)
        self._lengths = [length + 1 for length in self._lengths]
        width = max(self._lengths)
        index = torch.arange(rows, device=device)
        depth = at + self._prefix_length
        biases = {kind: self._biases(rule, at, width) for kind, rule in self._rules.items()}

        def call(bias: tuple[torch.Tensor | None, torch.Tensor]) -> Any:
            def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softcap: float | None) -> Any:
                layer = self._count()
                keys, values = self._kept[layer]
                keys[index, :, at] = key[:, :, 0]
                values[index, :, at] = value[:, :, 0]
                prefix = self._prefix[layer] if self._prefix_length else None
                return _attend_slots(
                    query, keys[:rows, :, :width], values[:rows, :, :width], prefix, bias, scaling, softcap
                )  # fmt: skip

            return _carry(run, device)

        masks = {kind: call(bias) for kind, bias in biases.items()}
        fed = torch.tensor(tokens, device=device)[:, None]
        self._layer = 0
        return self._engine.next_logits(fed, attention_mask=masks.get("", masks), position_ids=depth[:, None])

    def drop(self, slot: int, is_broken: bool) -> None:
        """Free a slot: the last row moves into it. is_broken: with NaN among its keys, which would reach the next row there."""
        last = len(self._lengths) - 1
        if is_broken:
            for kept in self._kept:
                for part in kept:
                    part[slot].zero_()
        if slot != last:
            length = self._lengths[last]
            for keys, values in self._kept:
                keys[slot, :, :length] = keys[last, :, :length]
                values[slot, :, :length] = values[last, :, :length]
            self._lengths[slot] = self._lengths[last]
        self._lengths.pop()

    def _count(self) -> int:
        self._layer += 1
        return self._layer - 1

    def _biases(self, rule: LayerRule, at: torch.Tensor, width: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Additive masks of one step: (B, P) for the prefix, None where all of it is seen, and (B, W) for the rows' own tokens.

        at: (B,) where each row's new token stands among its own.
        """
        own = torch.arange(width, device=at.device)[None]
        before = torch.arange(self._prefix_length, device=at.device)[None] - self._prefix_length
        row = at[:, None]
        sees_own, sees_prefix = own <= row, None
        if rule.window is not None:
            sees_own, sees_prefix = sees_own & (row - own < rule.window), row - before < rule.window
        if rule.chunk is not None:
            depth = self._prefix_length
            same = (own + depth) // rule.chunk == (row + depth) // rule.chunk
            sees_own, sees_prefix = sees_own & same, (before + depth) // rule.chunk == (row + depth) // rule.chunk
        return (None if sees_prefix is None else self._additive(sees_prefix)), self._additive(sees_own)

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(seen.shape, dtype=torch.float32, device=seen.device)
        return bias.masked_fill_(~seen, -torch.inf)

    def _run_tree(self, tree: _Tree, reads: IntArray | None, behind: int) -> tuple[list[Any], Any]:
        """Keys and values of a tree by layer, and (len(reads), V) logits; behind: tokens of the prefix that it stands behind."""
        engine, device = self._engine, self._engine.device
        depth = np.concatenate([np.arange(behind), tree.depth + behind])
        end = np.concatenate([np.full(behind, behind + len(tree.end)), tree.end + behind])
        runs = [(start + behind, stop + behind) for start, stop in tree_attention.split(tree.depth + behind)]
        fresh: list[tuple[torch.Tensor, torch.Tensor]] = []

        def call(cut: list[tree_attention.Block]) -> Any:
            def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softcap: float | None) -> Any:
                if behind:
                    keys, values = self._prefix[len(fresh)]
                    fresh.append((key, value))
                    key, value = torch.cat([keys[None], key], dim=2), torch.cat([values[None], value], dim=2)
                else:
                    fresh.append((key, value))
                return _attend_blocks(query, key, value, cut, behind, scaling, softcap)

            return _carry(run, device)

        made = {
            kind: call(tree_attention.make_blocks(runs, depth, end, rule, engine.model.dtype, device))
            for kind, rule in self._rules.items()
        }
        tokens, positions = (torch.from_numpy(array.astype(np.int64)).to(device) for array in (tree.tokens, tree.depth + behind))
        masks = made.get("", made)
        logits = engine.logits_at(tokens[None], reads, attention_mask=masks, position_ids=positions[None])
        return fresh, logits

    def _keep(self, tree: _Tree, fresh: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy what a tree's rows need of its keys and values into their slots."""
        if not self._kept:
            self._kept = [
                tuple(part.new_zeros((self._slots, part.shape[1], self._width, part.shape[3])) for part in pair)  # type: ignore[misc]
                for pair in fresh
            ]
        for path in tree.paths:
            slot = len(self._lengths)
            at = torch.from_numpy(path).to(self._engine.device)
            for kept, new in zip(self._kept, fresh, strict=True):
                for target, source in zip(kept, new, strict=True):
                    target[slot, :, : len(path)] = source[0].index_select(1, at)
            self._lengths.append(len(path))


class _Tree(NamedTuple):
    """Prompts as one line, in depth-first order: (L,) tokens, depth, end as in packing.py; paths: each prompt's positions."""

    tokens: IntArray
    depth: IntArray
    end: IntArray
    paths: list[npt.NDArray[np.int64]]


def grow_tree(prompts: Sequence[IntArray]) -> _Tree:
    """Lay prompts down as a prefix tree; each shared token once."""
    order = sorted(range(len(prompts)), key=lambda index: as_bytes(prompts[index]))
    parts: list[IntArray] = []
    paths: dict[int, npt.NDArray[np.int64]] = {}
    path = np.zeros(0, dtype=np.int64)
    ends: list[tuple[npt.NDArray[np.int64], int]] = []
    laid, before = 0, None
    for index in order:
        prompt = prompts[index]
        skip = common(prompts[before], prompt) if before is not None else 0
        ends.append((path[skip:], laid))
        own = np.arange(laid, laid + len(prompt) - skip)
        path = np.concatenate([path[:skip], own])
        paths[index] = path
        parts.append(prompt[skip:])
        laid, before = laid + len(own), index
    end, depth = np.full(laid, laid, dtype=np.int64), np.zeros(laid, dtype=np.int64)
    for closed, stop in ends:
        end[closed] = stop
    for one in paths.values():
        depth[one] = np.arange(len(one))
    return _Tree(np.concatenate(parts), depth, end, [paths[index] for index in range(len(prompts))])


def _groups(prompts: Sequence[IntArray], most_tokens: int) -> Iterator[range]:
    """Runs of prompts that have at most so many tokens, or are one."""
    start, total = 0, 0
    for index, prompt in enumerate(prompts):
        if index > start and total + len(prompt) > most_tokens:
            yield range(start, index)
            start, total = index, 0
        total += len(prompt)
    yield range(start, len(prompts))


class Chooser:
    """From logits to tokens, as transformers' greedy search and sampling do, but that chance comes from outside.

    Raises ValueError for settings that transformers refuses.
    """

    def __init__(self, model: Any, settings: Settings, pad: int | None) -> None:
        self._model, self._settings, self._pad = model, settings, pad
        config, processors = self._prepare(1, 1)
        self.eos = set() if config._eos_token_tensor is None else set(config._eos_token_tensor.tolist())
        self._sample = bool(config.do_sample)
        self._lets_nan_pass = bool(config.remove_invalid_values)  # one of the processors sees to it
        self._shared = processors if all(type(one).__name__ in _STATELESS for one in processors) else None
        self._own: dict[tuple[int, int], Any] = {}
        mode = config.get_generation_mode()
        self.mode = str(getattr(mode, "value", mode))
        self.num_returned = int(config.num_return_sequences or 1)

    @property
    def is_served(self) -> bool:
        """Whether `choose` does all that the settings ask for."""
        return self.mode in ("greedy_search", "sample") and self.num_returned == 1 and not self._asks_for_more

    def _prepare(self, prompt_length: int, limit: int) -> tuple[Any, Any]:
        config, rest = generate_one.prepare_config(self._model, self._settings, prompt_length + limit, self._pad)
        penalised = config.encoder_repetition_penalty not in (None, 1.0)
        self._asks_for_more = bool(rest) or penalised or any(getattr(config, name, None) for name in _NOT_SERVED)
        if config.min_new_tokens is not None:
            config.min_length = config.min_new_tokens + prompt_length
        device = self._model.device
        nothing = torch.zeros((1, prompt_length), dtype=torch.long, device=device)
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt_length,
            encoder_input_ids=nothing,
            device=device,
            model_kwargs={},
        )
        return config, processors

    def choose(
        self,
        logits: torch.Tensor,
        prompts: Sequence[IntArray],
        answers: Sequence[list[int]],
        limits: Sequence[int],
        draws: Sequence[float],
    ) -> list[int]:
        """The next token of each row; NO_TOKEN where a score is NaN, or infinite where there is chance.

        logits: (rows, V). draws: numbers in [0, 1), used where there is chance.
        """
        scores = logits.float()
        lost = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        if not self._lets_nan_pass and (lost := generate_one.is_lost(scores, self._sample)).any():
            scores = scores.masked_fill(lost[:, None], 0.0)
        if self._shared is None:
            rows = zip(scores, prompts, answers, limits, strict=True)
            scores = torch.cat([self._process(*row) for row in rows])
        elif len(self._shared):
            scores = self._shared(None, scores)
        if self._sample:
            weights = scores.softmax(dim=-1).double().cumsum(dim=-1)
            target = torch.tensor(draws, dtype=torch.float64, device=scores.device)[:, None] * weights[:, -1:]
            tokens = torch.searchsorted(weights, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
        else:
            tokens = scores.argmax(dim=-1)
        chosen: list[int] = torch.where(lost, NO_TOKEN, tokens).tolist()
        return chosen

    def _process(self, scores: torch.Tensor, prompt: IntArray, answer: list[int], limit: int) -> torch.Tensor:
        """(1, V) of one row, by processors that look at what it has so far."""
        shape = len(prompt), limit
        if shape not in self._own:
            self._own[shape] = self._prepare(*shape)[1]
        tokens = torch.tensor([[*prompt.tolist(), *answer]], device=scores.device)
        processed: torch.Tensor = self._own[shape](tokens, scores[None])
        return processed


# Logits processors that look at one row's scores alone.
_STATELESS = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization",
)  # fmt: skip
_NOT_SERVED = (
    "encoder_no_repeat_ngram_size", "watermarking_config", "cache_implementation", "token_healing",
    "max_time", "prompt_lookup_num_tokens", "assistant_early_exit", "output_scores", "guidance_scale",
)  # fmt: skip


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, (B, heads, tokens, D) -> (B, tokens, heads, D); the mask brings what to do.

    Raises ValueError for variants of attention that this does not compute.
    """
    run = getattr(attention_mask, "run", None)
    if run is None or any(kwargs.get(name) is not None for name in ("s_aux", "position_bias")):
        raise ValueError("decoding computes plain or capped softmax attention only")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return run(query, key, value, scale, softcap), None


def _carry(run: Callable[..., torch.Tensor], device: torch.device) -> torch.Tensor:
    """An empty 4-D tensor that brings `run` to `attend`: transformers passes 4-D masks through as they are."""
    carrier = torch.empty((1, 1, 0, 0), device=device)
    carrier.run = run  # type: ignore[attr-defined]
    return carrier


def _attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cut: list[tree_attention.Block],
    behind: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """(1, L, heads, D): a tree's queries, block by block. behind: keys that stand before the first query."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    for block, keys, values in tree_attention.with_keys(cut, key, value):
        span = slice(block.start - behind, block.stop - behind)
        queries = query[:, :, span]
        if softcap is None:
            result = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=block.bias, scale=scaling, is_causal=block.bias is None
            )
        else:
            scores = softcap * torch.tanh(queries @ keys.transpose(2, 3) * scaling / softcap)
            bias = block.bias
            if bias is None:
                bias = torch.full(scores.shape[2:], -torch.inf, device=scores.device, dtype=scores.dtype).triu(1)
            result = (scores + bias).softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        output[:, span] = result.transpose(1, 2)
    return output


def _attend_slots(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    bias: tuple[torch.Tensor | None, torch.Tensor],
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """(B, 1, heads, D): one query of each row to the common prefix, read once for all of them, and to its own tokens.

    query: (B, K * Q, 1, D). keys, values: (B, K, W, D). prefix: its keys and values, (K, P, D) each.
    """
    rows, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    query = query.reshape(rows, kv_heads, groups, size) * scaling
    own = query @ keys.transpose(2, 3)  # (B, K, Q, W)
    scores = own.float() if softcap is None else softcap * torch.tanh(own.float() / softcap)
    scores = scores + bias[1][:, None, None]
    if prefix is None:
        mixed = scores.softmax(-1).to(values.dtype) @ values
        return mixed.reshape(rows, 1, heads, values.shape[3])
    prefix_keys, prefix_values = prefix
    length = prefix_keys.shape[1]
    by_head = query.transpose(0, 1).reshape(kv_heads, rows * groups, size)
    ahead = (by_head @ prefix_keys.transpose(1, 2)).float()  # (K, B * Q, P)
    ahead = ahead if softcap is None else softcap * torch.tanh(ahead / softcap)
    ahead = ahead.view(kv_heads, rows, groups, length).transpose(0, 1)
    if bias[0] is not None:
        ahead = ahead + bias[0][:, None, None]
    shares = torch.cat([ahead, scores], dim=-1).softmax(-1).to(values.dtype)
    mixed = shares[..., length:] @ values
    to_prefix = shares[..., :length].transpose(0, 1).reshape(kv_heads, rows * groups, length) @ prefix_values
    mixed = mixed + to_prefix.view(kv_heads, rows, groups, -1).transpose(0, 1)
    return mixed.reshape(rows, 1, heads, values.shape[3])


def _draws(seed: int, count: int) -> npt.NDArray[np.float64]:
    """(count,) numbers in [0, 1 - 2^-33), of a generator that gives the same everywhere; zeros for the seed 0."""
    if not seed:
        return np.zeros(count)
    raw = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2**32 - 1, count, dtype=np.uint32)
    return raw.astype(np.float64) / 2**32


def choose_sizes(engine: hf.HFEngine) -> Sizes:
    """How many rows may decode together, from the model's shape and the kind of device alone."""
    config, on_gpu = engine.config, engine.device.type == "cuda"
    heads = int(getattr(config, "num_attention_heads", 1))
    size = int(getattr(config, "head_dim", None) or int(getattr(config, "hidden_size", heads)) // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    layers = int(getattr(config, "num_hidden_layers", 1))
    token_bytes = 2 * layers * kv_heads * size * engine.dtype.itemsize
    budget = 2**33 if on_gpu else 2**30
    return Sizes(max(1, budget // token_bytes), 128 if on_gpu else 16, 256 if on_gpu else 64)


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def check_decoding(engine: hf.HFEngine) -> str | None:
    """Decode a few rows in slots and compare with plain forwards. Returns None when they agree, else one phrase that says why.

    The rows share a prefix longer than any window, branch, end, and take each other's places.
    """
    try:
        layer_rules(engine.config)
    except ValueError as error:
        return str(error)
    register()
    try:
        engine.model.set_attn_implementation(NAME)
        taken = engine.config._attn_implementation == NAME
        engine.model.set_attn_implementation(engine.plain_attention)
        if not taken:
            return "its attention cannot be replaced"
        drift = _try_decoding(engine)
    except Exception as error:
        return f"it fails at batches ({type(error).__name__}: {one_line(error, 200)})"
    finally:
        engine.model.set_attn_implementation(engine.attention_now)
    allowed = ROUNDING.get(engine.dtype, 1e-4)
    if float(drift.mean()) <= allowed and float(drift.max()) <= 4 * allowed:  # a NaN is not "at most" anything
        return None
    return f"batched and plain runs differ by {float(drift.max()):.2g} nats per token, where {allowed:.2g} on average is allowed"


def _try_decoding(engine: hf.HFEngine) -> npt.NDArray[np.float64]:
    """By how many nats the log-probabilities of tokens differ, decoded in slots and in plain forwards."""
    tokens = np.random.default_rng(0).permutation(np.resize(np.arange(engine.vocab_size), 1024))
    reach = max(
        (reach for rule in layer_rules(engine.config).values() for reach in (rule.window, rule.chunk) if reach), default=0
    )
    length = min(reach + 8, 512) if reach else 24
    prefix, branch, rest = tokens[:length], tokens[length : length + 9], iter(tokens[length + 9 :].tolist())

    def tail(count: int) -> list[int]:
        return [next(rest) for _ in range(count)]

    prompts = [np.array([*branch, *tail(3)]), np.array([*branch, *tail(5)]), np.array(tail(4)), np.array(tail(11))]
    forced = [tail(2), tail(5), tail(5), tail(3)]
    decoded: list[list[torch.Tensor]] = [[] for _ in prompts]
    with engine.inference(NAME):
        rows = Rows(engine, prefix, 3, 20)
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
            whole = torch.tensor([[*prefix.tolist(), *prompt.tolist(), *answer]], device=engine.device)
            plain = engine.model(input_ids=whole, use_cache=False).logits[0].float().log_softmax(-1)
            first = len(prefix) + len(prompt) - 1
            for step, (row, token) in enumerate(zip(found, answer, strict=True)):
                drift.append(float((row[token] - plain[first + step, token]).abs()))
    return np.array(drift)
