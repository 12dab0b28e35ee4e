"""Which requests may share a forward of a causal transformers model, by its config and the arguments of its forward."""

from __future__ import annotations

import inspect
import re
from typing import Any

from ddp_eval.engines.hf import by_depth
from ddp_eval.engines.ops import masks, tree_attention

NO_POSITIONS = "its forward takes no attention mask and positions"


def takes_positions(model: Any) -> bool:
    """Whether its forward takes an attention mask and positions."""
    return {"attention_mask", "position_ids"} <= set(inspect.signature(model.forward).parameters)


def why_not_rows(config: Any) -> str | None:
    """Why each request must run by itself, where a short trial would not show it; None for almost all."""
    return "its attention sorts tokens by hashes, which go by the length of a row" if _hashes(config) else None


def draws(config: Any) -> bool:
    """Whether forwards draw at random, if only long ones: Reformer's hashes, unless its config seeds them."""
    return _hashes(config) and getattr(config, "hash_seed", None) is None


def _hashes(config: Any) -> bool:
    return "lsh" in (getattr(config, "attn_layers", None) or ())


def equal_lengths_beyond(config: Any) -> int | None:
    """Tokens of a forward from which on its rotary frequencies go by the longest request: what the model was first trained on.

    None where they never do. Positions decide in transformers (5.23), so a pack counts by its deepest token.
    """
    lengths = []
    for part in _rope_parts(config):
        if part.get("rope_type") in ("dynamic", "longrope"):
            known = [part.get(_ROPE), getattr(config, _ROPE, None)]
            if part["rope_type"] == "dynamic":
                known.append(getattr(config, "max_position_embeddings", None))
            lengths.append(min((int(length) for length in known if length), default=0))
    return min(lengths, default=None)


def max_tree_tokens(config: Any) -> int | None:
    """Llama 4 scales the queries of layers without rotary positions by a token's index in the forward, whatever its position:

        index       0 ... floor_scale - 2   floor_scale - 1 ...
        scale       1                       1 + attn_scale * log(2) ...

    (transformers 5.23). Below the first step index and position come to the same.
    """
    return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", False) else None


def tree_rules(model: Any, config: Any, implementation: str) -> tuple[dict[str, masks.LayerRule], str | None]:
    """What each kind of layer sees in a pack whose attention is `implementation`; or nothing, and why only rows must be run."""
    if implementation not in (*masks.IMPLEMENTATIONS, tree_attention.NAME):
        return {}, f"its attention implementation {implementation} takes no tree mask"
    if by_depth.counting_of(model) is not None:
        return {"": masks.LayerRule()}, None
    if not takes_positions(model):
        return {}, NO_POSITIONS
    try:
        return masks.layer_rules(config), None
    except ValueError as error:
        return {}, str(error)


# What configs call lengths, in tokens, at which a layer begins to compute otherwise.
_REACHES = re.compile(r"sliding_window\w*|\w*window_size|\w*chunk_size|\w*chunk_length|\w*index\w*_(topk|budget)|\w*block_size")
_DELTA_CHUNK = 64  # tokens that layers of gated delta rules compute together, which no config says
_ROPE = "original_max_position_embeddings"


def reaches(config: Any) -> tuple[int, ...]:
    """Lengths of a forward at which some layer begins to compute otherwise: windows, chunks, top-k of an indexer, ..."""
    found = {value for name, value in config.to_dict().items() if _REACHES.fullmatch(name) and type(value) is int}
    rates = getattr(config, "compress_rates", None) or {}
    rates = [rate for rate in (rates.values() if isinstance(rates, dict) else rates) if type(rate) is int]
    found.update(rates)
    # What is chosen from are runs of tokens: DeepSeek V4's compressed ones, MiniMax M3's blocks.
    found.update((getattr(config, "index_topk", None) or 0) * rate for rate in rates)
    found.add((getattr(config, "index_topk_blocks", None) or 0) * (getattr(config, "index_block_size", None) or 0))
    if "linear_attention" in masks.layer_kinds(config):
        found.add(_DELTA_CHUNK)
    found.update(length for length in (equal_lengths_beyond(config),) if length)
    return tuple(sorted(value for value in found if value > 0))


def _rope_parts(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary positions: of all layers, or of each kind."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]
