"""What decoding needs from an engine: a causal model, its device and window, and logits at chosen places."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy.typing as npt
import torch

from ddp_eval.engines.hf.cache_sizes import CacheSizes


class CausalModel(Protocol):
    """See engine.py, which is one; stated here so that decode.py, kv_slots.py and generate_one.py need not import it."""

    model: Any
    config: Any
    device: torch.device
    plain_attention: str
    decodes_by_cache: bool

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def attention_now(self) -> str: ...
    @property
    def cache_sizes(self) -> CacheSizes | None: ...
    def max_tokens(self) -> int: ...
    def inference(self, implementation: str | None) -> AbstractContextManager[None]: ...
    def next_logits(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor: ...
    def next_with_cache(
        self, tokens: torch.Tensor, cache: Any, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]: ...
    def logits_at(self, tokens: torch.Tensor, columns: npt.NDArray[Any] | None, **kwargs: Any) -> torch.Tensor | None: ...
