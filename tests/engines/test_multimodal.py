"""Models that read images, too, evaluated on text: loaded by their own class, and right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from engine_runs import CPU, assert_equal_answers, build_prefix_tree, load, run, to_requests
from tiny_configs import tiny_config

from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, layer_configs, pipeline_parallel
from ddp_eval.engines.hf.load import wrap_model
from ddp_eval.errors import UserError
from ddp_eval.placement.memory import measure_model
from ddp_eval.run.planning import make_plan
from ddp_eval.tasks.harness import max_length_of


def make(kind: str) -> Any:
    """A random model of `kind`, in float32, its matrices wide enough for positions to show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = checkpoint.auto_class(tiny_config(kind)).from_config(tiny_config(kind), dtype=torch.float32).eval()
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                torch.nn.init.normal_(module.weight, 0.0, 0.25)
    return model


@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral3", "smolvlm"])
def test_text_in_packs(kind: str, tmp_path: Path) -> None:
    """Catches a checkpoint that AutoModelForCausalLM does not know refused, though its own class has a language head."""
    model = make(kind)
    model.save_pretrained(tmp_path)
    tiny_models.make_tokenizer().save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert type(engine.model) is type(model)
    requests, expected = build_prefix_tree(model, seed=1)
    plan, item_of_request, why_rows, _ = make_plan(engine, to_requests(requests), packing=True, max_pack_tokens=None)
    assert why_rows is None and not plan.rows
    assert_equal_answers(run(engine, plan, item_of_request), expected)


def test_window_of_the_language_model() -> None:
    """Catches the default of 2,048 for a model whose language model says how long its window is."""
    config = tiny_config("qwen3_vl")
    config.text_config.max_position_embeddings = 777
    assert max_length_of({}, checkpoint.window_config(config), tiny_models.make_tokenizer()) == 777


def test_models_that_cannot_be_evaluated_on_text() -> None:
    """Catches a traceback for a model that only describes images."""
    with pytest.raises(UserError, match="florence2 models are encoder-decoders that read images"):
        checkpoint.auto_class(transformers.Florence2Config(is_encoder_decoder=True))
    with pytest.raises(UserError, match="pi0 models have no vocabulary"):
        checkpoint.auto_class(transformers.PI0Config())
    with pytest.raises(UserError, match="diffusion_gemma models denoise whole blocks of text"):
        checkpoint.auto_class(tiny_config("diffusion_gemma"))


def test_layers_of_a_language_model_within_another() -> None:
    """Catches a traceback for Gemma 3's multimodal class, and its tower for images, of as many layers, sharded in their place."""
    whole = make("gemma3").to("meta")
    with pytest.raises(UserError, match="cannot split gemma3 models"):
        pipeline_parallel.plan_stages(whole, 2)
    sizes = measure_model(whole, CPU)
    language = whole.get_decoder().layers
    assert layer_configs.modules_of_layers(whole) == list(language)
    assert len(whole.model.vision_tower.encoder.layers) == len(language)
    assert sizes.layers == [sum(weight.nbytes for weight in layer.parameters()) for layer in language]


def test_a_model_that_cannot_score_text() -> None:
    """Catches a traceback of ours where transformers itself cannot run the model, and lm_eval neither."""
    model = make("mistral3")
    engine: Any = wrap_model(model, World(0, 0, 1, CPU))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("pixel_values are needed")

    model.model.forward = fail
    with pytest.raises(UserError, match="cannot score text, one request at a time: ValueError: pixel_values are needed"):
        make_plan(engine, to_requests([([1, 2, 3], 1)]), packing=True, max_pack_tokens=None)


@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm"])
def test_towers_keep_their_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where a tower cannot attend as the language model does, and a caller's model left changed."""
    model = make(kind)
    (tower,) = [module for name, module in model.named_modules() if name in ("model.visual", "model.vision_model")]
    monkeypatch.setattr(type(tower), "_supports_sdpa", False)
    tower.config._attn_implementation_internal = "eager"
    assert model.config._attn_implementation == "sdpa"
    engine: Any = wrap_model(model, World(0, 0, 1, CPU))
    assert engine.tree_attention == "ddp_eval_blocks"
    with engine.inference(engine.tree_attention):
        assert model.config.get_text_config()._attn_implementation == "ddp_eval_blocks"
    assert engine.why_not_batches is None
    engine.close()
    assert tower.config._attn_implementation == "eager"
    assert model.config.get_text_config()._attn_implementation == model.config._attn_implementation == "sdpa"
