"""Run packs through a transformers model: mask, forward, head (checkpoint.py loads it, ops/logprobs.py reads its logits).

Letters: L pack length, B rows, R reads, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.distributed.world import World
from ddp_eval.engines import DYNAMIC_ROTARY, Capabilities, OnProgress
from ddp_eval.engines.hf import by_depth, capabilities, checkpoint, layer_configs, limits, mamba_scan, model_cache, state_tree
from ddp_eval.engines.hf.attention_choice import attend_with, choose_attention
from ddp_eval.engines.hf.base import TransformersEngine
from ddp_eval.engines.hf.cache_sizes import CacheSizes, measure_cache
from ddp_eval.engines.hf.costs import active_parameters, flops_of_pair_and_read, largest_pack, pad_lengths
from ddp_eval.engines.hf.draws import ForwardDraws
from ddp_eval.engines.ops import logprobs as readout
from ddp_eval.engines.ops import masks as attention
from ddp_eval.engines.ops import onednn_linear, rotary
from ddp_eval.engines.ops import tree_attention as blocks
from ddp_eval.engines.ops.last_layer import LastLayer
from ddp_eval.errors import LostContact, UserError, is_out_of_memory
from ddp_eval.packs.batches import Batch, BatchLimits, Settings
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import STATES, Pack, pad_tail
from ddp_eval.packs.states import ForwardLimits
from ddp_eval.system import compile_cache

Result = TypeVar("Result")


class HFEngine(TransformersEngine):
    """One replica of a causal transformers model on one device.

    Plain rows and chains run with the attention implementation that the model came with (`plain_attention`), trees with
    `tree_attention`, which may be a faster one; `close` puts the first back.

    keep_attention: use the model's own for trees too. whole: see TransformersEngine.
    Raises nothing for models that packs cannot serve: `why_not_packs` then says why, and only rows must be run.
    """

    name = "hf"
    decodes_by_cache = False  # through the model's own cache, not by attention of ours; `why_not_batches` finds out

    def __init__(self, model: Any, device: torch.device, keep_attention: bool = False, whole: Any = None) -> None:
        super().__init__(model, device, whole)
        self.plain_attention = getattr(self.config, "_attn_implementation", None) or "eager"
        self.tree_attention = self.plain_attention if keep_attention else choose_attention(model, self.plain_attention, device)
        self._attention = self.plain_attention
        self._stateful_rope = [
            (module, prefix)
            for module in model.modules()
            if hasattr(module, "max_seq_len_cached")
            for prefix, kind in _rope_types(module)
            if kind == "dynamic"
        ]
        self._own_draws = ForwardDraws(device, capabilities.draws(self.config))
        self._faster = contextlib.ExitStack()
        if device.type == "cuda":
            compile_cache.keep_private()
        if device.type == "cpu" and self.dtype == torch.float32:
            self._faster.callback(onednn_linear.install(model))
            self._faster.callback(rotary.install(model))
        self.last_layer = LastLayer(model)
        self._keeps_reads = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._counting = by_depth.counting_of(model)
        self._takes_positions = capabilities.takes_positions(model)
        self._cache_argument = model_cache.cache_argument(model)
        self._chunked_layers = mamba_scan.chunked_layers(model)
        self.why_not_states = None if self._cache_argument else "its forward takes no cache"
        self._rules, self.why_not_packs = capabilities.tree_rules(model, self.config, self.tree_attention)
        self.why_not_rows = capabilities.why_not_rows(self.config)
        self.capabilities = Capabilities(
            launches_ahead=device.type != "cpu",
            equal_lengths_beyond=capabilities.equal_lengths_beyond(self.config),
            max_tree_tokens=capabilities.max_tree_tokens(self.config),
            reaches=capabilities.reaches(self.config),
        )

    def close(self) -> None:
        """Give the model back as it came."""
        self.last_layer.close()
        self._faster.close()
        self._attend_with(self.plain_attention)
        self._forget_lengths()

    @property
    def attention_now(self) -> str:
        """The attention implementation that the model runs with at this moment."""
        return self._attention

    def _attend_with(self, implementation: str) -> None:
        if implementation != self._attention:
            attend_with(self.model, implementation)
            self._attention = implementation

    def _forget_lengths(self) -> None:
        """Dynamic rotary scaling remembers the longest input so far: its numbers would depend on the order of forwards."""
        for module, prefix in self._stateful_rope:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            module.register_buffer(f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False)

    def max_reads(self) -> int | None:
        """How many reads keep one forward's logits within 1 GiB of float32; None where they are never all there at once."""
        return None if self.splits_head else max(1, 2**30 // (4 * self.vocab_size))

    def max_tokens(self) -> int:
        return largest_pack(self.config, self.tree_attention, self.device)

    @property
    def splits_head(self) -> bool:
        """Whether the body can run alone and the head (and what follows it, such as a cap) on rows of its output."""
        return self._shortcuts[0]

    @property
    def skips_unread(self) -> bool:
        """Whether the last layer's output may be left out where it is not read."""
        return self._shortcuts[1]

    @functools.cached_property
    def _shortcuts(self) -> tuple[bool, bool]:
        """splits_head, skips_unread. The model is asked, on a few tokens: both must come to the logits of its plain forward."""
        tokens = torch.arange(4, device=self.device)[None] % self.vocab_size
        columns = torch.tensor([1, 3], device=self.device)
        body = self.model.base_model
        splits = skips = False
        with self._unless_unable(), self._inference():
            self._attend_with(self.plain_attention)
            with self._own_draws.watching():
                whole = self.model(input_ids=tokens, use_cache=False).logits[0, columns]
            if body is not self.model and self.model.get_output_embeddings() is not None:
                with self._unless_unable():
                    logits = self._run(lambda: self._head(body(input_ids=tokens, use_cache=False).last_hidden_state[0, columns]))
                    splits = _agree(logits, whole, self.dtype)
            if self.last_layer.index is not None:
                with self._unless_unable(), self.last_layer.only(columns):
                    skips = _agree(self.model(input_ids=tokens, use_cache=False).logits[0, columns], whole, self.dtype)
        return splits, skips

    @contextlib.contextmanager
    def _unless_unable(self) -> Iterator[None]:
        """Ignore what a model raises that cannot do a thing. Short memory is no such thing: it raises UserError."""
        try:
            yield
        except LostContact:
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise UserError(
                    f"{self.device} has no memory left beside the model for a forward of four tokens: "
                    "give a device with more memory, or spread the model over several (--layout)"
                ) from None

    def cost_model(self) -> CostModel:
        """Floating-point operations of a forward, from the model's shape alone."""
        layers = layer_configs.num_layers(self.config) or 1
        pair, read = flops_of_pair_and_read(self.config)
        # A forward's fixed cost (launches, Python) in the operations that the device could have done meanwhile.
        fixed_per_layer = 3e10 if self.device.type == "cuda" else 1.5e7
        few_seconds = 1.2e15 if self.device.type == "cuda" else 3e11
        return CostModel(
            enough=few_seconds,
            forward=fixed_per_layer * layers,
            token=self.flops_per_token(),
            pair=pair,
            read=read,
            slowdown=2.0,
            dense=self.tree_attention in ("sdpa", "eager"),
            idle=512 if self.device.type == "cuda" else 64,
        )

    def flops_per_token(self) -> float:
        return 2.0 * active_parameters(self.whole, self.config)

    def flops_left_out(self) -> tuple[float, float]:
        """What the last layer saves at a token that is not read: of `flops_per_token`, and for each token that it would see."""
        if not self.skips_unread:
            return 0.0, 0.0
        cost = self.cost_model()
        at_pair = cost.pair / self.config.num_hidden_layers if self.tree_attention == blocks.NAME else 0.0
        return 2.0 * active_parameters(self.last_layer.feed_forward, self.config), at_pair

    def input_shape(self, pack: Pack) -> tuple[int, int]:
        """(B, L) of the token ids that a pack's forward is given."""
        if pack.rows:
            return int((pack.depth == 0).sum()), int(pack.depth.max()) + 1
        return 1, pad_lengths(self._attention_for(pack), len(pack))

    def launch(self, pack: Pack) -> readout.Launched:
        """Start a pack's forward pass; on CUDA it goes on after this returns. `collect` waits for it."""
        splits_head = self.splits_head

        def compute() -> readout.Launched:
            values = self._forward_rows(pack) if pack.rows else self._forward_tree(pack)
            return self._read_off(values, splits_head, pack)

        with self._inference(), self._own_draws.seeded_by(pack.tokens, pack.depth):
            return self._launch_states(pack) if pack.kind == STATES else self._run(compute)

    def _launch_states(self, pack: Pack) -> readout.Launched:
        """`launch` for a pack that takes several forwards; the head runs in the last one's step."""
        self._attend_with(self.plain_attention)
        tree, splits_head = state_tree.StateTree(self, pack), self.splits_head

        def advance() -> readout.Launched | None:
            tree.advance()
            return self._read_off(tree.values, splits_head, pack) if tree.is_done and tree.values is not None else None

        with mamba_scan.beginning_at_states(self.model):
            while (launched := self._run(advance)) is None:
                pass
        return launched

    @functools.cached_property
    def most_positions(self) -> int | None:
        """Tokens of a forward, its cache included, beyond which it has no positions, or computes all of them otherwise."""
        counts = limits.limits_of(self.whole).positions, self.capabilities.equal_lengths_beyond
        return min((count for count in counts if count is not None), default=None)

    def forward_limits(self) -> ForwardLimits:
        """Of one forward of a pack whose caches are shared."""
        sizes, max_tokens = self.cache_sizes, 8192 if self.device.type == "cuda" else 2048
        limits = ForwardLimits(max_tokens, model_cache.max_rows(self.device), self.cost_model().most_padding)
        if sizes is None:
            return limits
        # Copies are appended to, which takes twice their memory for a moment.
        fitting = functools.cache(lambda tokens: model_cache.most_copies(self.device, 2 * sizes.row_bytes(tokens)))
        return limits._replace(rows_that_fit=fitting)

    @functools.cached_property
    def cache_sizes(self) -> CacheSizes | None:
        """What rows of the model's own cache take; None where that is not known."""
        return measure_cache(self.whole, self.dtype)

    def call_with_cache(
        self, tokens: npt.NDArray[Any], columns: npt.NDArray[Any], depth: int, cache: Any, keep: bool
    ) -> tuple[torch.Tensor, Any]:
        """A forward behind `depth` tokens, whose cache is `cache`; None where there are none.

        tokens: (B, L) ids. keep: whether the cache behind them is needed.
        Returns (B, len(columns), H or V) values at those columns, and the cache; None unless it is needed.
        """
        fed, wanted = self.to_device(tokens), self.to_device(columns)
        positions = torch.arange(depth, depth + fed.shape[1], device=self.device).expand(len(fed), -1)
        kept: list[Any] = []
        note = (lambda output: kept.append(self._cache_of(output))) if keep else None
        kwargs = self._cache_kwargs(cache, positions) if keep or cache is not None else self._position_kwargs(positions)
        with mamba_scan.in_short_chunks(self._chunked_layers, fed.shape[1]):
            values = self._call(fed, wanted, note, **kwargs)
        return values, kept[0] if keep else None

    def _cache_kwargs(self, cache: Any, positions: torch.Tensor) -> dict[str, Any]:
        """What a forward at `positions`, (B, L), is given that goes on from `cache`, or begins one where it is None."""
        given = {str(self._cache_argument): cache} if cache is not None else {}
        return {"use_cache": True, **self._position_kwargs(positions), **given}

    def _cache_of(self, output: Any) -> Any:
        """The cache that a forward returns. Raises ValueError if there is none."""
        cache = getattr(output, str(self._cache_argument), None)
        if cache is None:
            raise ValueError("its forward returns no cache")
        return cache

    def _run(self, compute: Callable[[], Result]) -> Result:
        """`compute()`: one forward of the model, of which its body and its head may be called by themselves."""
        return compute()

    @functools.cached_property
    def why_not_batches(self) -> str | None:
        """Why texts must be generated one by one with the model's own `generate`; None if batches have proved themselves."""
        from ddp_eval.engines.hf import decode

        if self.capabilities.equal_lengths_beyond is not None:
            return DYNAMIC_ROTARY
        why = decode.check_decoding(self) if self._takes_positions else capabilities.NO_POSITIONS
        if why is None or self.why_not_states is not None:
            return why
        self.decodes_by_cache = True
        why_not = decode.check_decoding(self)
        self.decodes_by_cache = why_not is None
        return None if why_not is None else f"{why}; with its own cache, {why_not}"

    def check_settings(self, settings: Settings, pad: int | None) -> bool:
        from ddp_eval.engines.hf import sampling

        return sampling.TokenSampler(self.model, settings, pad).is_served

    def generation_sizes(self) -> BatchLimits:
        """By the memory that keys and values take, 1 GiB on a CPU and 8 on a GPU, and by how many rows fill the device."""
        from ddp_eval.engines.hf import decode

        return decode.choose_sizes(self)

    def generate(self, batch: Batch, tokenizer: Any, on_progress: OnProgress) -> list[list[int]]:
        from ddp_eval.engines.hf import decode

        _ = self.splits_head  # asks the model
        with self._own_draws.seeded_by(*batch.prompts):
            return decode.generate(self, batch, tokenizer, on_progress)

    @contextlib.contextmanager
    def inference(self, implementation: str | None) -> Iterator[None]:
        """Forwards under this attention implementation, or the model's own; no gradients, no autocast."""
        _ = self.splits_head  # asks the model under its own implementation
        with self._inference():
            self._attend_with(implementation or self.plain_attention)
            yield

    def next_logits(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, V) logits behind (B, 1) tokens."""
        logits: torch.Tensor = self._run(lambda: self._whole(input_ids=tokens, use_cache=False, **kwargs).logits)
        return logits[:, -1]

    def next_with_cache(
        self, tokens: torch.Tensor, cache: Any, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """(B, V) logits behind (B, L) tokens that follow on those of `cache`, and the cache behind them.

        positions: (B, L). mask: (B, cached + L), 0 for padding; None where there is none.
        """
        kwargs = self._cache_kwargs(cache, positions)
        kwargs |= {"attention_mask": mask} if mask is not None else {}
        kwargs |= {"logits_to_keep": 1} if self._keeps_reads else {}
        scan = mamba_scan.beginning_at_states(self.model) if tokens.shape[1] > 1 else contextlib.nullcontext()
        with scan, mamba_scan.in_short_chunks(self._chunked_layers, tokens.shape[1]):
            output = self._run(lambda: self._whole(input_ids=tokens, **kwargs))
        return output.logits[:, -1], self._cache_of(output)

    def logits_at(self, tokens: torch.Tensor, columns: npt.NDArray[Any] | None, **kwargs: Any) -> torch.Tensor | None:
        """(len(columns), V) logits of one row, (1, L) tokens; None if none are asked for."""
        wanted = self.to_device(np.zeros(1, dtype=np.int64) if columns is None else columns)

        def compute() -> torch.Tensor | None:
            values = self._call(tokens, wanted, **kwargs)[0]
            if columns is None:
                return None
            return self._head(values) if self.splits_head else values

        return self._run(compute)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        # A caller's autocast would change the numbers from run to run of a training loop's settings.
        with self._without_gradients(), torch.autocast(self.device.type, enabled=False), _one_sequence_a_row():
            self._forget_lengths()
            yield

    def _without_gradients(self) -> contextlib.AbstractContextManager[None]:
        return torch.inference_mode()

    def _forward_tree(self, pack: Pack) -> torch.Tensor:
        """(R, H) hidden states (or (R, V) logits) at the reads of a prefix tree in one line."""
        self._attend_with(self._attention_for(pack))
        masked = self._attention == blocks.NAME or not pack.is_chain
        pack = pad_tail(pack, self.input_shape(pack)[1], masked)
        tokens = self.to_device(pack.tokens)
        depth = self.to_device(pack.depth)
        counting = self._counting if masked else None
        mask = self._make_mask(pack, depth) if masked and (counting is None or counting.takes_mask) else None
        reads = self.to_device(pack.reads)
        with counting.count(depth, self.to_device(pack.end)) if counting is not None else contextlib.nullcontext():
            return self._call(tokens[None], reads, attention_mask=mask, **self._position_kwargs(depth[None]))[0]

    def _position_kwargs(self, positions: torch.Tensor) -> dict[str, Any]:
        """positions: (B, L). Some models that count by themselves (BLOOM, MPT) take none."""
        return {"position_ids": positions} if self._takes_positions else {}

    def _attention_for(self, pack: Pack) -> str:
        """Chains need no mask. Blocks serve them too, and leave out of the last layer what is not read."""
        return self.plain_attention if pack.is_chain and self.tree_attention != blocks.NAME else self.tree_attention

    def _make_mask(self, pack: Pack, depth: torch.Tensor) -> Any:
        """What the model takes as `attention_mask`, by its attention implementation."""
        if self.tree_attention != blocks.NAME:
            return attention.make_mask(self.tree_attention, depth, self.to_device(pack.end), self._rules, self.dtype)
        runs = blocks.split(pack.depth)
        masks = {}
        for kind, rule in self._rules.items():
            make = functools.partial(blocks.make_blocks, runs, pack.depth, pack.end, rule, self.dtype, self.device)
            last = {self.last_layer.index: make(reads=pack.reads)} if self.skips_unread else {}
            masks[kind] = blocks.as_attention_mask(make(), last, self.device)
        return masks.get("", masks)

    def _forward_rows(self, pack: Pack) -> torch.Tensor:
        """The same of plain rows, padded on the right to the longest: causal models never look there."""
        self._attend_with(self.plain_attention)
        starts = np.flatnonzero(pack.depth == 0)
        row_of_token = np.cumsum(pack.depth == 0) - 1
        padded = np.zeros((len(starts), int(pack.depth.max()) + 1), dtype=np.int64)
        padded[row_of_token, pack.depth] = pack.tokens
        columns, column_of_read = np.unique(pack.depth[pack.reads], return_inverse=True)
        output = self._call(self.to_device(padded), self.to_device(columns))
        return output[self.to_device(row_of_token[pack.reads]), self.to_device(column_of_read)]

    def _call(
        self, tokens: torch.Tensor, columns: torch.Tensor, note: Callable[[Any], None] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(B, len(columns), H) hidden states of those columns; their (…, V) logits of a model whose head cannot run alone.

        note: is given the whole output.
        """
        kwargs = {"input_ids": tokens, "use_cache": False, **kwargs}
        with self.last_layer.only(columns) if self.skips_unread else contextlib.nullcontext():
            if self.splits_head:
                output = self.model.base_model(**kwargs)
                values: torch.Tensor = output.last_hidden_state[:, columns]
            elif self._keeps_reads:
                output = self._whole(logits_to_keep=columns, **kwargs)
                values = output.logits
            else:
                output = self._whole(**kwargs)
                values = output.logits[:, columns]
        if note is not None:
            note(output)
        return values

    @property
    def _whole(self) -> Callable[..., Any]:
        """The whole model's forward, as `_run` calls it."""
        forward: Callable[..., Any] = self.model
        return forward

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, H) hidden states -> (n, V) logits, by the model's own forward with its body left out."""
        body = self.model.base_model
        stand_in = _body_output()(last_hidden_state=hidden[None])
        nothing = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with unittest.mock.patch.object(body, "forward", lambda *args, **kwargs: stand_in):
            logits: torch.Tensor = self._whole(input_ids=nothing, use_cache=False).logits[0]
        return logits

    def _read_off(self, values: torch.Tensor, hidden: bool, pack: Pack) -> readout.Launched:
        """Log-probabilities in float32, block by block of reads: never all logits at once, nor a second copy of them.

        values: (R, H) hidden states, or (R, V) logits with `hidden` false.
        """
        step = readout.head_rows(self.vocab_size)
        order = np.argsort(pack.answer_reads, kind="stable")
        reads, targets, items = pack.answer_reads[order], pack.answer_targets[order], pack.answer_items[order]
        edges = np.searchsorted(reads, np.arange(0, len(values) + step, step))
        parts = []
        for first, (start, stop) in zip(range(0, len(values), step), itertools.pairwise(edges.tolist()), strict=True):
            rows = values[first : first + step]
            logits = self._head(rows) if hidden else rows
            wanted = self.to_device(reads[start:stop] - first), self.to_device(targets[start:stop])
            parts.append(readout.score_tokens(logits, *wanted, items[start:stop]))
        back = self.to_device(np.argsort(order, kind="stable"))
        return readout.copy_to_host(pack, readout.join_scores(parts, back))

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array.astype(np.int64, copy=False))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # from other memory a copy waits for what the device is at
        return tensor.to(self.device, non_blocking=True)


@functools.cache
def _body_output() -> type:
    """The class of what a body returns, with None for all else that heads ask of it: routers' logits, a cache, ...

    One for the process: torch keeps each class of the kind for good.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class BodyOutput(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return BodyOutput


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Where it is given no mask, transformers (5.23) looks at positions for a second sequence, which has a GPU wait. None is."""
    from transformers import masking_utils

    with unittest.mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None, create=True):
        yield


@contextlib.contextmanager
def without_halves(world: World, pack: Pack) -> Iterator[None]:
    """For ranks that share a replica: one alone cannot run a pack in halves when memory is short. Raises UserError then."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"rank {world.rank} ran out of memory on {world.device} in a pack of {len(pack)} tokens, "
            f"{len(pack.reads)} of them scored: give --max_pack_tokens {max(1, len(pack) // 2)}"
        ) from None


def _agree(parts: torch.Tensor, whole: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways came to the same logits. Broken weights give NaN both ways; they are reported where they end up.

    dtype: the model's. Products of other shapes may run by other kernels, whose results are a few of its steps apart.
    """
    if parts.shape != whole.shape:
        return False
    allowed = min(max(1e-3, 4 * torch.finfo(dtype).eps), 2**-5)
    parts, whole = parts.float(), whole.float()
    largest = float(whole.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
    # Rounding moves some of them; another way moves all.
    off = float((parts - whole).abs().nan_to_num(posinf=0.0).mean())
    return off <= allowed / 4 * largest and torch.allclose(parts, whole, rtol=allowed, atol=allowed * largest, equal_nan=True)


def _rope_types(module: Any) -> list[tuple[str, str]]:
    """(how its names begin, the kind of scaling) of a rotary module: one, or one for each kind of layer."""
    found = getattr(module, "rope_type", None)
    return [(f"{layer}_", kind) for layer, kind in found.items()] if isinstance(found, dict) else [("", str(found))]


def load_engine(model_args: dict[str, Any], config: Any, device: torch.device) -> HFEngine:
    """Load a replica's weights onto `device`. Raises UserError for unusable files, arguments or too little memory."""
    return HFEngine(
        checkpoint.load_weights(model_args, config, device), device, keep_attention="attn_implementation" in model_args
    )
