"""What runs packs: transformers (hf, tensor, layers, seq2seq) or vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.packs.batches import Batch, Settings, Sizes
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import Pack


class Engine(Protocol):
    """One replica of a model, or this rank's part of one.

    whole: the whole replica's model, on the meta device where this rank holds a part of it.
    bears_results: False on the ranks of a replica that only help: what they collect does not count.
    launches_ahead: `launch` returns before the work is done, so that the next can be launched before this is collected.
    on_trial: set while a trial plan runs, in which parts of a replica turn an error into NaN.
    takes_pairs: an encoder-decoder, whose packs are those of pairing.py.
    why_not_packs: why only rows must be run, or None.
    tree_attention, plain_attention: the attention implementations of trees, and of all else; empty where there is none to choose.
    keeps_apart: each request of a pack has a row of its own, so that no NaN of others can reach it, and no padding.
    isolates_requests: a request's numbers depend on how long the others in its forward are.
    largest_tree: the most tokens of a pack in which the model goes by the positions that it is given; None: any number.
    longest_reach: the widest window or chunk of its layers, in tokens.
    why_not_batches: why texts must be generated one by one, or None.
    most_new_tokens: the limit on answers that the checkpoint sets, and that goes before the tasks' own; None: there is none.
    check_settings: whether batches serve these settings of generation; raises ValueError for those that cannot be meant.
    generate: the tokens of each answer of a batch; tells of requests done and tokens computed meanwhile.
    flops_per_token: floating-point operations of the whole replica's layers, without attention and head.
    """

    whole: Any
    bears_results: bool
    launches_ahead: bool
    takes_pairs: bool
    keeps_apart: bool
    on_trial: bool
    why_not_packs: str | None
    tree_attention: str
    plain_attention: str

    @property
    def why_not_batches(self) -> str | None: ...
    @property
    def most_new_tokens(self) -> int | None: ...
    @property
    def isolates_requests(self) -> bool: ...
    @property
    def largest_tree(self) -> int | None: ...
    @property
    def longest_reach(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def describe(self) -> dict[str, Any]: ...
    def max_tokens(self) -> int: ...
    def max_reads(self) -> int | None: ...
    def cost_model(self) -> CostModel: ...
    def flops_per_token(self) -> float: ...
    def launch(self, pack: Pack) -> Any: ...
    def collect(self, launched: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]: ...
    def check_settings(self, settings: Settings, pad: int | None) -> bool: ...
    def generation_sizes(self) -> Sizes: ...
    def generate(self, batch: Batch, tokenizer: Any, tell: Callable[[int, int], None]) -> list[list[int]]: ...


# Mean error per scored token, in nats, that rounding alone can bring: logits near 16 have steps of 2^-3 in bfloat16.
ROUNDING = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
