"""What runs packs: transformers (engines/hf) or vLLM. `registry.py` finds an engine by its name."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ddp_eval.packs.batches import LEAST_BATCH, Batch, BatchLimits, Settings
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import Pack
from ddp_eval.packs.results import Results

OnProgress = Callable[[int, int], None]  # called now and then with (requests done, tokens computed)


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What is true of a loaded engine for as long as it lives. The defaults describe a causal model on one rank.

    reports_results: False on the ranks of a replica that only help: what they collect does not count.
    launches_ahead: `launch` returns before the work is done, so that the next can be launched before this is collected.
    is_encoder_decoder: its packs are those of packs/pairs.py.
    rows_are_independent: each request of a pack has a row of its own, so that no NaN of others can reach it, and no padding.
    equal_lengths_beyond: where some request has more tokens than this, the numbers of each depend on how long the others in its
        forward are, and rows must be of one length; None: never.
    serves_generation: it answers with texts, too (`generate`).
    max_tree_tokens: the most tokens of a pack in which the model uses the positions that it is given; None: any number.
    reaches: lengths, in tokens, at which a layer begins to compute otherwise: windows, chunks, top-k of an indexer, ...
    """

    reports_results: bool = True
    launches_ahead: bool = False
    is_encoder_decoder: bool = False
    rows_are_independent: bool = False
    equal_lengths_beyond: int | None = None
    serves_generation: bool = True
    max_tree_tokens: int | None = None
    reaches: tuple[int, ...] = ()


class Engine(abc.ABC):
    """One replica of a model, or this rank's part of one.

    An engine must say what it is (`describe`, `dtype`, `vocab_size`), what a pack costs (`max_tokens`, `cost_model`,
    `flops_per_token`) and run one (`launch`, `collect`). Everything else has a default: one that scores and no more replaces
    `capabilities` by serves_generation=False.

    whole: the whole replica's model, on the meta device where this rank holds a part of it.
    window: tokens of an input and its answer that the engine itself takes; None: as many as the model has positions for.
    why_not_packs: why no packs must be run, or None. why_not_rows: why not even rows with others, or None.
    why_not_states: why no packs of trees that share caches (packs/states.py) must be run, or None.
    tree_attention, plain_attention: the attention implementations of trees, and of all else; empty where there is none to choose.
    is_probe: set while a trial plan runs, in which parts of a replica turn an error into NaN: the other ranks wait for them.
    """

    whole: Any
    window: int | None = None
    capabilities = Capabilities()
    why_not_packs: str | None = None
    why_not_rows: str | None = None
    why_not_states: str | None = "the engine has no caches to share"
    tree_attention: str = ""
    plain_attention: str = ""
    is_probe: bool = False

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """What the model computes in."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int: ...

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the numbers beside weights and requests. Has "name", "class", "parameters" and "dtype"."""

    @abc.abstractmethod
    def max_tokens(self) -> int:
        """The most tokens of a pack worth planning; a longer request still gets a pack of its own."""

    def max_reads(self) -> int | None:
        """The most scored positions of a pack; None: any number."""
        return None

    @abc.abstractmethod
    def cost_model(self) -> CostModel:
        """What a pack costs, in any one unit."""

    @abc.abstractmethod
    def flops_per_token(self) -> float:
        """Floating-point operations of the whole replica's layers, without attention and head."""

    @abc.abstractmethod
    def launch(self, pack: Pack) -> Any:
        """Start a pack. Returns what `collect` takes; its `pack` says which one it is."""

    @abc.abstractmethod
    def collect(self, launched: Any) -> Results:
        """(items,) RESULT of a pack that was launched, as `make_results` makes them."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """For all forwards of some work: ranks that share the weights run the same number of them in the block."""
        return contextlib.nullcontext()

    @property
    def why_not_batches(self) -> str | None:
        """Why texts must be generated one by one, or None."""
        return None

    @property
    def most_new_tokens(self) -> int | None:
        """The limit on answers that the checkpoint sets, and that goes before the tasks' own; None: there is none."""
        return None

    def check_settings(self, settings: Settings, pad: int | None) -> bool:
        """Whether batches serve these settings of generation. Raises ValueError for those that cannot be meant."""
        return True

    def generation_sizes(self) -> BatchLimits:
        """How much may be decoded together: one prompt at a time, if nothing else is said."""
        return BatchLimits(1, 1, LEAST_BATCH)

    def generate(self, batch: Batch, tokenizer: Any, on_progress: OnProgress) -> list[list[int]]:
        """The tokens of each answer of a batch."""
        raise NotImplementedError(f"{type(self).__name__} does not generate")

    def close(self) -> None:
        """Give the model back as it came."""
        return


# Why there are no packs where `Capabilities.equal_lengths_beyond` is passed.
DYNAMIC_ROTARY = "its rotary frequencies depend on the longest request of a forward pass"
# Mean error per scored token, in nats, that rounding alone can bring: logits near 16 have steps of 2^-3 in bfloat16.
ROUNDING = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
# The same where a model's own rows differ by more than that: beyond it, something else than rounding is at work.
LARGEST_ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
