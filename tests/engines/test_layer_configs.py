"""Configs whose layers differ: what is read from them is read layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ddp_eval.engines.hf import config_check, costs, layer_configs, tensor_parallel
from ddp_eval.engines.hf.engine import HFEngine
from ddp_eval.errors import UserError
from ddp_eval.placement.memory import measure_model

SMALL: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 200,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def gemma4() -> Any:
    """Its second layer has heads of twice the size."""
    options: dict[str, Any] = {**SMALL, "intermediate_size": 64, "per_layer_config": {1: {"head_dim": 16}}}
    return transformers.Gemma4TextConfig(**options)


def gemma3n() -> Any:
    """Its feed-forward layers differ, in a list."""
    return transformers.Gemma3nTextConfig(
        **SMALL, intermediate_size=[64, 96], num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0], laurel_rank=8,
        altup_num_inputs=2,
    )  # fmt: skip


def build(config: Any, device: str = "meta") -> Any:
    with torch.device(device):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_values_by_layer() -> None:
    """Catches a value of one layer that is taken for all, and transformers' error where there is none for all."""
    assert layer_configs.read_each(gemma4(), "head_dim") == [8, 16]
    assert layer_configs.read(gemma4(), "head_dim") == 16
    assert layer_configs.read_each(gemma3n(), "intermediate_size") == [64, 96]
    assert layer_configs.read(gemma3n(), "intermediate_size") == 96
    assert layer_configs.read(gemma4(), "no_such_name", 7) == 7
    assert costs.head_shapes(gemma4()) == [(4, 2, 8), (4, 2, 16)]


@pytest.mark.parametrize("make", [gemma4, gemma3n])
def test_sizes_and_costs(make: Any) -> None:
    """Catches costs, memory or a check of a config that stops at a value that differs by layer."""
    config = make()
    config_check.check_config(config, "it", None)
    heads = sum(heads * size for heads, _, size in costs.head_shapes(config))
    assert costs.flops_of_pair_and_read(config)[0] == 4.0 * heads
    sizes = measure_model(build(config), torch.device("cpu"))
    assert sizes.attended == max(8 * size for _, _, size in costs.head_shapes(config))
    assert sizes.inner == layer_configs.read(config, "intermediate_size") and len(sizes.layers) == 2
    assert HFEngine(build(config, "cpu"), torch.device("cpu")).generation_sizes().slot_tokens > 0


def test_tensor_parallel_checks_every_layer() -> None:
    """Catches `list % int`, and one layer whose size the ranks do not divide."""
    tensor_parallel.check_model(build(gemma3n()), 2)
    config = gemma3n()
    config.intermediate_size = [64, 97]
    with pytest.raises(UserError, match="97 columns"):
        tensor_parallel.check_model(build(config), 2)


def test_tensor_parallel_leaves_layers_that_look_at_all_columns() -> None:
    """Catches Gemma 3n's cutoff, of the mean and spread of its feed-forward columns, taken from a rank's share of them."""
    config = gemma3n()
    config.activation_sparsity_pattern = [0.95, 0.0]
    with pytest.raises(UserError, match="cannot split gemma3n_text models: their feed-forward layers"):
        tensor_parallel.check_model(build(config), 2)


def test_tensor_parallel_checks_what_is_split() -> None:
    """Catches DeepSeek V4 refused for its one key-value head, which its plan leaves whole."""
    whole = build(transformers.LlamaConfig(**{**PLAIN, "num_key_value_heads": 1}))
    with pytest.raises(UserError, match="1 key-value heads"):
        tensor_parallel.check_model(whole, 2)
    whole._tp_plan = {name: style for name, style in whole.tp_plan.items() if "k_proj" not in name and "v_proj" not in name}
    tensor_parallel.check_model(whole, 2)


@pytest.mark.parametrize(("make", "advice"), [(transformers.GPT2Config, "layers:2"), (transformers.MambaConfig, "replicas")])
def test_advice_for_models_without_a_plan(make: Any, advice: str) -> None:
    """Catches advice that does not work: Mamba was told to try layers, which refuses it."""
    config = make(vocab_size=100, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=1)
    config.num_attention_heads = 4
    with pytest.raises(UserError, match=f"no plan for them: give --layout {advice}"):
        tensor_parallel.check_model(build(config), 2)
