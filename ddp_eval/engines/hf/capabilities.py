"""Which requests may share a forward of a causal transformers model, by its config and the arguments of its forward."""

from __future__ import annotations

import inspect
from typing import Any

from ddp_eval.engines.ops import masks, tree_attention

DYNAMIC_ROTARY = "its rotary frequencies depend on the longest request of a forward pass"
NO_POSITIONS = "its forward takes no attention mask and positions"


def takes_positions(model: Any) -> bool:
    """Whether its forward takes an attention mask and positions."""
    return {"attention_mask", "position_ids"} <= set(inspect.signature(model.forward).parameters)


def needs_equal_lengths(config: Any) -> bool:
    """Whether a request's numbers depend on how long the others in its forward are: rows must then be of one length."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    return bool(kinds & {"dynamic", "longrope"})


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
    if not takes_positions(model):
        return {}, NO_POSITIONS
    if needs_equal_lengths(config):
        return {}, DYNAMIC_ROTARY
    try:
        return masks.layer_rules(config), None
    except ValueError as error:
        return {}, str(error)


def longest_reach(rules: dict[str, masks.LayerRule]) -> int | None:
    """The widest window or chunk of the model's layers, in tokens; None if all attend to everything."""
    reaches = [reach for rule in rules.values() for reach in (rule.window, rule.chunk) if reach]
    return max(reaches, default=None)
