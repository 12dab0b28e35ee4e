"""A tiny config for each of transformers' model types: its defaults made small, with each kind of its layers present.

Sizes are set by the names that configs use; what names alone cannot tell stands in `OVERRIDES`. Windows, chunks and top-k of
indexers are shorter than a request of the walk (walk_models.py), so that each of them cuts something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
WINDOW, TOP_K, POSITIONS = 24, 16, 2048
MOST_LAYERS = 8
VOCAB_SIZE = 2048  # of the tokenizer in the package

# Name of a field -> value, the first pattern that matches the whole name.
RULES: tuple[tuple[str, int], ...] = (
    (r"hidden_size_per_layer_input", 8),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|backbone_hidden_size|dim_model|text_hidden_size",
        HIDDEN,
    ),
    (r"output_hidden_size|out_hidden_size|projection_dim|projector_hidden_size|mm_hidden_size|text_embed_dim", HIDDEN),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|context_length|max_target_positions", POSITIONS),
    (r"num_hidden_layers|n_layers?|num_layers|depth|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers", LAYERS),
    (
        r"num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|num_encoder_attention_heads",
        HEADS,
    ),
    (r"num_decoder_attention_heads|attention_heads|swa_num_attention_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|swa_num_key_value_heads|num_global_key_value_heads", KV_HEADS),
    (r"head_dim|attention_head_dim|swa_head_dim|v_head_dim|swa_v_head_dim|d_kv|qk_nope_head_dim|dim_head", HEAD_DIM),
    (r"global_head_dim", 2 * HEAD_DIM),
    (r"qk_rope_head_dim", HEAD_DIM),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"q_lora_rank|o_lora_rank", 32),
    (r"kv_lora_rank", 16),
    (
        r"intermediate_size|n_inner|ffn_dim|d_ff|ffn_hidden_size|encoder_ffn_dim|decoder_ffn_dim|dim_ff|mlp_hidden_size|feed_forward_size",
        128,
    ),
    (r"intermediate_size_mlp|dense_intermediate_size|block_ff_dim|prefix_dense_intermediate_size", 128),
    (r"moe_intermediate_size|expert_ffn_hidden_size|shared_expert_intermediate_size|shared_intermediate_size", 32),
    (r"moe_shared_expert_intermediate_size|expert_hidden_size", 32),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts|moe_k|num_experts_per_token|moe_top_k", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"n_group|topk_group|num_expert_groups|num_groups_for_topk", 1),
    (
        r"sliding_window|sliding_window_size|attention_chunk_size|attention_window_size|window_size|local_attention|chunk_size",
        WINDOW,
    ),
    (r"index_topk|indexer_topk|index_top_k", TOP_K),
    (r"index_n_heads|indexer_heads|index_num_heads", 16),
    (r"index_head_dim|indexer_head_dim", 32),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_key_head_dim|linear_value_head_dim", HEAD_DIM),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 2),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"mamba_chunk_size|chunk_length", 16),
    (r"image_size", 28),
    (r"patch_size", 14),
)
# What a list of one value a layer is called, beside those that have `layer` in their name.
KEEP_LISTS = re.compile(r"architectures|.*token_ids?|rope_.*|.*_section|keys_to_ignore.*")
NOT_TEXT = re.compile(r".*(vision|audio|image|video|speech|qformer|vq|depth_|quant|perceiver|projector|protein).*")


def tiny_config(model_type: str) -> Any:
    """The config. Raises what transformers raises for sizes that do not go together."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    fields = _shrink(kind().to_dict())
    _merge(fields, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    if isinstance(fields.get("text_config"), dict):
        _merge(fields["text_config"], {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    if fields.get("is_encoder_decoder") and fields.get("decoder_start_token_id") is None:
        fields["decoder_start_token_id"] = 0
    _merge(fields, OVERRIDES.get(model_type, {}))
    return kind.from_dict({name: value for name, value in fields.items() if value is not DROP})


DROP: Any = object()  # in place of a value: leave it to the config's class


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` over `fields`; a dict that holds "_whole" takes another's place instead of being merged with it."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict) and "_whole" not in value:
            _merge(fields[name], value)
        elif isinstance(value, dict):
            fields[name] = {key: one for key, one in value.items() if key != "_whole"}
        else:
            fields[name] = value


def _shrink(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of those within it, with small sizes."""
    layers = next(
        (fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if type(fields.get(name)) is int), 0
    )
    small: dict[str, Any] = {}
    kept = _choose_layers(fields, layers)
    for name, value in fields.items():
        if name == "per_layer_config" and isinstance(value, dict):
            by_number = {int(number): changes for number, changes in value.items()}
            small[name] = {place: _shrink(by_number[index]) for place, index in enumerate(kept) if index in by_number}
        elif isinstance(value, dict):
            value = _scale_sections(value) if "mrope_section" in value else value
            small[name] = _shrink(value) if name.endswith("config") or name in ("encoder", "decoder") else value
        elif isinstance(value, (list, tuple)):
            per_layer = len(value) == layers and not KEEP_LISTS.fullmatch(name)
            small[name] = [_small_value(name, value[index]) for index in kept] if per_layer and kept else value
        else:
            small[name] = _small_value(name, value)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if kept and type(fields.get(name)) is int:
            small[name] = len(kept)
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _scale_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose parts for time, height and width add up to half of what is turned of a head."""
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    part = half * 3 // 8
    return {**rope, "mrope_section": [half - 2 * part, part, part]}


def _small_value(name: str, value: Any) -> Any:
    if type(value) is not int or value < 1:
        return value
    if "vocab_size" in name:
        return VOCAB_SIZE
    return next((min(size, value) if size > 4 else size for pattern, size in RULES if re.fullmatch(pattern, name)), value)


def _choose_layers(fields: dict[str, Any], layers: int) -> list[int]:
    """Numbers of layers that together have each kind that the whole model has; the last one is kept."""
    lists: Iterable[Any] = [
        value
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == layers and "type" in name and not KEEP_LISTS.fullmatch(name)
    ]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * layers
    firsts = {kinds[index]: index for index in reversed(range(layers))} if layers else {}
    chosen = sorted(firsts.values())
    if len(chosen) < 2 and layers > 1:
        chosen = list(range(min(LAYERS, layers)))
    return chosen[:MOST_LAYERS]


_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "num_hidden_layers": 3}
_UP_TO_THREE = {"num_hidden_layers": 3}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_GEMMA_3N = {
    "num_hidden_layers": 4,
    "layer_types": _SLIDING_AND_FULL * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [128, 96, 128, 96],
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
_GEMMA_4_SHARED = {"num_hidden_layers": 4, "layer_types": _SLIDING_AND_FULL * 2, "num_kv_shared_layers": 2}
_GEMMA_4_SHARED["per_layer_config"] = {1: {"head_dim": 32}, 3: {"head_dim": 32}}
_GEMMA_4 = {"per_layer_config": {1: {"head_dim": 32}}}
_DOTS_3 = {
    "head_dim": 64,
    "per_layer_config": {
        2: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 48},
        "_whole": True,
    },
}
_ROPE_OF_8 = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_ROPE_OF_4 = {**_ROPE_OF_8, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_ROPE_BY_KIND = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _SLIDING_AND_FULL}
_QWEN_4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": TOP_K,
    "indexer_compress_ratio": 1,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 1000,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_HYBRID, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {**_UP_TO_THREE, "attn_layer_period": 3, "attn_layer_offset": 1},
    "cohere_compass_text": {"layer_types": _SLIDING_AND_FULL, "rope_parameters": {**_ROPE_BY_KIND, "_whole": True}},
    "dots3_note": {
        "text_config": _DOTS_3,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_output_size": HIDDEN},
    },
    "cohere_compass": {"text_config": {"layer_types": _SLIDING_AND_FULL, "rope_parameters": {**_ROPE_BY_KIND, "_whole": True}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}, "moe_intermediate_size": [32, 32]}},
    "granite4_vision": {"downsample_rate": "1/4", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1, 1, 1, 1]},
    "hunyuan_vl": {"text_config": {"head_dim": HEAD_DIM, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}, "text_config": {"rope_scaling_layers": [0, 1]}},
    "mistral4": {"head_dim": 2 * HEAD_DIM, "qk_head_dim": 2 * HEAD_DIM},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _ROPE_OF_8}, "vision_start_token_id": 6},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 6},
    "xlstm": {"hidden_size": 2 * HIDDEN, "embedding_dim": 2 * HIDDEN, "num_blocks": LAYERS},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "step3p7": {
        "text_config": {
            "layer_types": _SLIDING_AND_FULL,
            "sliding_window": WINDOW,
            "rope_parameters": {**_ROPE_BY_KIND, "_whole": True},
        }
    },
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "blt": {
        "vocab_size": VOCAB_SIZE,
        "encoder_hash_byte_group_vocab": 100,
        "encoder_config": {"vocab_size": VOCAB_SIZE, "hidden_size_global": HIDDEN},
        "decoder_config": {"vocab_size": VOCAB_SIZE, "hidden_size_global": HIDDEN},
        "patcher_config": {"vocab_size": VOCAB_SIZE},
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "dots3_note_text": _DOTS_3,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": {"text_config": _GEMMA_4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": _GEMMA_3N,
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma4_unified_text": _GEMMA_4_SHARED,
    "hrm_text": {"num_hidden_layers": DROP, "num_layers_per_stack": 1, "prefix_lm": False},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "ministral": {"head_dim": HEAD_DIM},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0}},
    "xlm": {"emb_dim": HIDDEN, "n_words": VOCAB_SIZE},
    "xlnet": {"d_head": HEAD_DIM},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "marian": {"decoder_start_token_id": 1},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM, "hybrid_layer_ids": DROP},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "reformer": {"is_decoder": True, "hash_seed": 0, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [32, 64]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "glm46v": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "glmga": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "glm_ocr": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "qwen2_vl": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "glm4v": {"text_config": {"rope_parameters": _ROPE_OF_8}},
    "glm4v_moe": {"text_config": {"rope_parameters": _ROPE_OF_4}},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2, "linear_head_dim": HEAD_DIM, "linear_num_heads": 4},
    "qwen4_exp_text": _QWEN_4,
    "qwen4_exp": {"text_config": _QWEN_4},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "index_topk": 4},
}
