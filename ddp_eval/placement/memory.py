"""What a model takes of a rank's memory under each layout: its weights to the byte, the room that packs need by estimate.

Everything comes from the model on the meta device, so that no weight is read. The estimate of activations counts the largest
tensors that are alive at once in one layer of a forward without gradients; what the allocator and CUDA keep for themselves is a
share of the card (`usable_bytes`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ddp_eval.engines.hf.attention_choice import choose_attention
from ddp_eval.engines.ops import tree_attention
from ddp_eval.system import machine
from ddp_eval.system.text import GIB

if TYPE_CHECKING:
    from ddp_eval.engines.hf.cache_sizes import CacheSizes

# Kept free of each GPU: CUDA's context and libraries, and what the allocator cannot hand out.
_CONTEXT_BYTES, _ALLOCATOR_SHARE = GIB, 0.95
# While the mask of sliding layers is made, for each pair of tokens: a difference of int64, and what is seen twice.
_MASK_BYTES = 10


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's weights by place, and the widths that decide what a pack needs.

    layers: of each layer. head: 0 where the head uses the embedding's weights (`tied`). rest: norms, learned positions.
    vectors: of all weights that tensor parallelism leaves whole (one dimension), which are in the others too.
    active: weights that one token multiplies with, of each layer; experts by the share that is routed to.
    hidden, inner, attended, vocab: values per token in the residual stream, the feed-forward layer, queries with keys and
    values, and the logits.
    largest_pack: tokens of the largest pack that is planned. mask, scores: bytes for each pair of tokens of a pack: what making
    its mask takes, and what the scores of all heads take where attention is eager.
    device: that it runs on. cache: of a model that packs do not serve, which runs with copies of its own cache; None of others.
    """

    layers: list[int]
    embedding: int
    head: int
    rest: int
    vectors: int
    tied: bool
    value_bytes: int
    active: list[float]
    hidden: int
    inner: int
    attended: int
    vocab: int
    largest_pack: int
    mask: int
    scores: int
    device: torch.device
    cache: CacheSizes | None

    @property
    def weights(self) -> int:
        """Bytes of a whole copy."""
        return sum(self.layers) + self.embedding + self.head + self.rest


def measure_model(whole: Any, device: torch.device) -> ModelSizes:
    """The sizes of a transformers model on the meta device, when it runs on `device`."""
    from ddp_eval.engines.hf import cache_sizes, capabilities, costs, layer_configs

    config = whole.config.get_text_config()
    layers = layer_configs.modules_of_layers(whole)
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    layer_bytes = [_bytes(layer) for layer in layers]
    embedding_bytes = _bytes(embedding) if embedding is not None else 0
    head_bytes = 0 if tied or head is None else _bytes(head)
    total = _bytes(whole)
    hidden, shapes = int(layer_configs.read(config, "hidden_size", 1)), costs.head_shapes(config)
    heads = max(heads for heads, _, _ in shapes)
    attention = choose_attention(whole, getattr(config, "_attn_implementation", None) or "eager", device)
    _, why_not_packs = capabilities.tree_rules(whole, config, attention)
    return ModelSizes(
        layers=layer_bytes,
        embedding=embedding_bytes,
        head=head_bytes,
        rest=total - sum(layer_bytes) - embedding_bytes - head_bytes,
        vectors=sum(weight.nbytes for weight in whole.parameters() if weight.dim() < 2),
        tied=tied,
        value_bytes=next(whole.parameters()).element_size(),
        active=[costs.active_parameters(layer, config) for layer in layers] or [costs.active_parameters(whole, config)],
        hidden=hidden,
        inner=_inner_width(config, hidden),
        attended=max((heads + 2 * kv_heads) * head_dim for heads, kv_heads, head_dim in shapes),
        vocab=int(config.vocab_size),
        largest_pack=costs.largest_pack(config, attention, device),
        mask=0 if attention == tree_attention.NAME else _MASK_BYTES,
        scores=costs.SCORE_BYTES * heads if attention == "eager" else 0,
        device=device,
        cache=cache_sizes.measure_cache(whole, next(whole.parameters()).dtype) if why_not_packs else None,
    )


def _bytes(module: Any) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _inner_width(config: Any, hidden: int) -> int:
    """Values per token in the widest feed-forward layer; with experts, in all that a token is sent to."""
    from ddp_eval.engines.hf.layer_configs import read

    dense = int(read(config, "intermediate_size") or read(config, "n_inner") or 4 * hidden)
    routed = int(read(config, "num_experts_per_tok", 0))
    one = int(read(config, "moe_intermediate_size") or dense)
    return max(dense, routed * one + int(read(config, "shared_expert_intermediate_size", 0))) if routed else dense


def pack_bytes(sizes: ModelSizes, max_tokens: int, ranks: int, has_head: bool = True, in_flight: int = 0) -> int:
    """Room that the forward of one pack takes. ranks: over how many its matrices are split; in_flight: hidden states kept."""
    from ddp_eval.engines.ops.logprobs import head_rows

    per_token = 6 * sizes.hidden + (3 * sizes.inner + 2 * sizes.attended) // ranks + in_flight * sizes.hidden
    # Logits of some reads at a time, with their log-softmax in float32 and its input.
    reads = min(max_tokens, head_rows(sizes.vocab))
    logits = reads * sizes.vocab * (sizes.value_bytes + 2 * 4) if has_head else 0
    pairs = max_tokens**2 * (sizes.mask + -(-sizes.scores // ranks))
    return max_tokens * per_token * sizes.value_bytes + pairs + logits


def room_bytes(sizes: ModelSizes, max_tokens: int, ranks: int) -> int:
    """As `pack_bytes`, on a rank that holds all layers, with the copies of the model's own cache where it runs with these."""
    from ddp_eval.engines.hf import model_cache

    copies = 0
    if sizes.cache is not None:
        copies = model_cache.copies_bytes(sizes.device, sizes.cache.row_bytes(max_tokens, ranks))
    return pack_bytes(sizes, max_tokens, ranks) + copies


def usable_bytes(card_bytes: int) -> int:
    """What of a GPU's memory a model and its packs can have."""
    return max(0, int((card_bytes - _CONTEXT_BYTES) * _ALLOCATOR_SHARE))


def memory_of_rank(device: torch.device, ranks_per_node: int) -> int:
    """Bytes that one rank can use here: of its GPU, or its share of what the machine has free."""
    if device.type == "cuda":
        return usable_bytes(torch.cuda.get_device_properties(device).total_memory)
    return machine.free_bytes() // max(1, ranks_per_node)
