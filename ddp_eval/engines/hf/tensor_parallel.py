"""Tensor parallelism: each rank of a replica holds a share of every matrix, by transformers' own plan for the model.

All ranks of a replica run the same packs and come to the same logits; the first of them bears the results. The numbers are those
of one rank but for the order of sums (within 1e-6 nats in float32).

transformers learns of the replicas by `dp_replicate_size`. A slice of a device mesh, which its documentation offers for the
same end, is silently ignored in 5.23: the model is then split over all ranks and their data mixed.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, costs, engine, layer_configs, pipeline_parallel
from ddp_eval.engines.ops import logprobs
from ddp_eval.errors import UserError
from ddp_eval.packs.plan import Pack

# Names of matrices in transformers' plans whose columns belong to heads, or are the width of a feed-forward layer.
_SPLIT = {
    "attention heads": re.compile(r"\.(q_proj|q_b_proj|qkv_proj|query_key_value|query|c_attn)$"),
    "key-value heads": re.compile(r"\.(k_proj|v_proj|qkv_proj|query_key_value|key|value|c_attn)$"),
    "columns of its feed-forward layers": re.compile(
        r"\.(mlp|feed_forward)\.(gate_proj|up_proj|gate_up_proj|fc1|dense_h_to_4h|c_fc|w1)$"
    ),
    "columns of its experts": re.compile(r"\.experts\.gate_up_proj$"),
}


def check_model(whole: Any, ranks: int) -> None:
    """Raise UserError unless the model `whole` (on the meta device) can be split over `ranks` ranks.

    transformers refuses a model without a plan only while it loads; heads that do not divide it splits, to fail in the forward.
    """
    config = whole.config.get_text_config()
    if not whole.tp_plan:
        raise UserError(
            f"--layout tensor:{ranks} cannot split {config.model_type} models: transformers has no plan for them: "
            f"give --layout {f'layers:{ranks}' if config.model_type in pipeline_parallel.MODEL_TYPES else 'replicas'}"
        )
    if any(getattr(config, "activation_sparsity_pattern", None) or ()):
        raise UserError(
            f"--layout tensor:{ranks} cannot split {config.model_type} models: their feed-forward layers keep the largest of all "
            "columns, and a rank has some"
        )
    shapes = costs.head_shapes(config)
    sizes = {
        "attention heads": {heads for heads, _, _ in shapes},
        "key-value heads": {kv_heads for _, kv_heads, _ in shapes},
        "columns of its feed-forward layers": set(layer_configs.read_each(config, "intermediate_size", ranks)),
        "columns of its experts": set(layer_configs.read_each(config, "moe_intermediate_size", ranks)),
    }
    for what, names in _SPLIT.items():
        uneven = sorted(size for size in sizes[what] if size % ranks)
        if uneven and any(names.search(name) for name in whole.tp_plan):
            size = uneven[0]
            raise UserError(f"--layout tensor:{ranks} must divide the model's {size} {what}: {size} = {_division(size, ranks)}")


def _division(size: int, ranks: int) -> str:
    whole, left = divmod(size, ranks)
    return f"{ranks} x {whole} + {left}"


def load_tensor_engine(model_args: dict[str, Any], config: Any, world: World) -> TensorEngine:
    """Load this rank's share onto its device. Collective. Raises UserError for what cannot be split or loaded."""
    from transformers.distributed import DistributedConfig

    whole = checkpoint.whole_model(model_args, config)
    check_model(whole, world.ranks_per_replica)
    split = DistributedConfig(tp_size=world.ranks_per_replica, dp_replicate_size=world.replicas)
    model = checkpoint.load_weights(model_args, config, world.device, copies_apart(type(whole)), distributed_config=split)
    return TensorEngine(model, world, whole, keep_attention="attn_implementation" in model_args)


def copies_apart(base: type) -> type:
    """`base` whose `from_pretrained` splits the matrices within each copy and leaves the copies to themselves.

    transformers wraps copies in FSDP, for their gradients. Here there are none, and FSDP's hooks fail in inference mode.
    """

    def maybe_distribute_model(cls: Any, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        alone = dataclasses.replace(distributed_config, dp_replicate_size=1)
        return base.maybe_distribute_model.__func__(cls, model, alone, mesh_manager)  # type: ignore[attr-defined]

    own = {
        "maybe_distribute_model": classmethod(maybe_distribute_model),
        # transformers looks into the module of a class to learn what attention it can do.
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), own)


class TensorEngine(engine.HFEngine):
    """One rank of a replica. The same packs in the same order must be launched on all of them."""

    def __init__(self, model: Any, world: World, whole: Any, keep_attention: bool = False) -> None:
        super().__init__(model, world.device, keep_attention, whole)
        self.world = world
        self.capabilities = dataclasses.replace(self.capabilities, reports_results=world.shard_index == 0)
        # Both ask the model, which takes all ranks of a replica: now, while they are all here.
        _ = self.splits_head
        _ = self.why_not_batches

    def describe(self) -> dict[str, Any]:
        """As of one rank, and over how many the sums are spread: that decides their last bits."""
        return {**super().describe(), "tensor_ranks": self.world.ranks_per_replica}

    def launch(self, pack: Pack) -> logprobs.Launched:
        """As of a model on one rank; in a trial, NaN where the forward fails (it does on all ranks alike)."""
        try:
            with engine.without_halves(self.world, pack):
                return super().launch(pack)
        except UserError:
            raise
        except Exception:
            if not self.is_probe:
                raise
            return logprobs.Launched(pack, logprobs.nan_scores(len(pack.answer_reads)))
