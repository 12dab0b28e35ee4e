"""Adapters and quantised weights: the numbers of lm_eval's own HF backend, and one sentence where something is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tolerance
import torch

from ddp_eval import demo
from ddp_eval.api import evaluate
from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.errors import UserError
from ddp_eval.output.tables import read_scores
from ddp_eval.run.manifest import describe_model, see_model
from ddp_eval.run.runner import run

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")

TASKS = ["demo_hellaswag", "demo_lambada"]


def save_adapter(model_path: Path, directory: Path, kind: str = "lora", seed: int = 1, **model_options: Any) -> Path:
    """An adapter with weights that move the scores by whole nats."""
    peft = pytest.importorskip("peft")
    import transformers

    options = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=16, **options),
        "head": lambda: peft.LoraConfig(r=4, lora_alpha=16, modules_to_save=["lm_head"], **options),
        "ia3": lambda: peft.IA3Config(**options, feedforward_modules=["down_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    if "tokens" in model_options:
        model.resize_token_embeddings(model_options["tokens"])
    adapted = peft.get_peft_model(model, configs[kind]())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.data = torch.randn_like(weight) * 0.3 + (1.0 if "ia3" in name else 0.0)
    adapted.save_pretrained(directory)
    return directory


def scores_of_lm_eval(**lm_args: Any) -> tuple[dict[str, list[float]], tolerance.Rounding]:
    """Log-probabilities by task, and the bounds of the model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Given float64 for its softmax it adds in float64, as we do: its float32 sums are off by 1e-4 at a thousand nats.
    lm = HFLM(device="cpu", batch_size=1, softmax_dtype="float64", **lm_args)
    manager = TaskManager(include_path=demo.TASKS_PATH, include_defaults=False)
    results: Any = lm_eval.simple_evaluate(model=lm, tasks=TASKS, task_manager=manager, limit=2, bootstrap_iters=0)
    scores = {task: [answer[0][0] for one in samples for answer in one["resps"]] for task, samples in results["samples"].items()}
    return scores, tolerance.of(lm.model)


def our_scores(directory: Path, **model_args: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
    config = Config(model_args=model_args, tasks=TASKS, limit=2, bootstrap_iters=0, device="cpu", output_path=str(directory))
    results = run(config, World(0, 0, 1, torch.device("cpu")))
    assert results is not None
    scores = read_scores(directory / "scores.parquet")
    names, values = np.array(scores.task), np.array(scores.loglikelihood)
    return {task: values[names == task].tolist() for task in TASKS}, results["ddp_eval"]


def assert_close(directory: Path, theirs: dict[str, list[float]], rounding: tolerance.Rounding) -> None:
    """Compare our run in `directory` with lm_eval's scores."""
    scores = read_scores(directory / "scores.parquet")
    rounding.assert_close(scores.loglikelihood, [value for task in TASKS for value in theirs[task]], scores.num_tokens)


@pytest.mark.parametrize("kind", ["lora", "head", "ia3"])
def test_adapters_give_lm_evals_numbers(kind: str, tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches an adapter that is loaded and not used, or merged into other layers; packs serve it."""
    model = tiny_model_path("llama")
    adapter = save_adapter(model, tmp_path / "adapter", kind)
    ours, section = our_scores(tmp_path / "out", pretrained=str(model), peft=str(adapter))
    assert_close(tmp_path / "out", *scores_of_lm_eval(pretrained=str(model), peft=str(adapter)))
    assert section["batching"] == "packs"
    bare, _ = our_scores(tmp_path / "bare", pretrained=str(model))
    assert abs(np.array(ours[TASKS[0]]) - bare[TASKS[0]]).max() > 0.5


def test_an_adapter_for_a_longer_tokenizer(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches embeddings that are not resized to the tokenizer's length first, as lm_eval does: the adapter brings new tokens."""
    model = tiny_model_path("llama")
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    adapter = save_adapter(model, tmp_path / "adapter", "head", tokens=len(tokenizer))
    args = {"pretrained": str(model), "peft": str(adapter), "tokenizer": str(tmp_path / "tokenizer")}
    # The new token's embedding is random on either side, and no prompt has it; its row of the head is the adapter's.
    our_scores(tmp_path / "out", **args)
    assert_close(tmp_path / "out", *scores_of_lm_eval(**args))


def test_adapters_that_cannot_be_served(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches virtual tokens left out in silence, weights left at random, a directory of no adapter."""
    model = str(tiny_model_path("llama"))
    prompt = save_adapter(Path(model), tmp_path / "prompt", "prompt")
    with pytest.raises(UserError, match=r"is of the type PROMPT_TUNING, which puts virtual tokens before the input"):
        our_scores(tmp_path / "a", pretrained=model, peft=str(prompt))
    with pytest.raises(UserError, match=r"holds no adapter: adapter_config\.json is missing"):
        our_scores(tmp_path / "b", pretrained=model, peft=str(tmp_path))
    invoked = save_adapter(Path(model), tmp_path / "invoked")
    settings = json.loads((invoked / "adapter_config.json").read_text())
    (invoked / "adapter_config.json").write_text(json.dumps(settings | {"alora_invocation_tokens": [5, 6]}))
    with pytest.raises(UserError, match=r"acts by what stands in the whole input \(invocation tokens\)"):
        our_scores(tmp_path / "d", pretrained=model, peft=str(invoked))
    other = save_adapter(Path(model), tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj", "k_proj"]}))
    with pytest.raises(UserError, match="lacks weights for this model: Found missing adapter keys"):
        our_scores(tmp_path / "c", pretrained=model, peft=str(other))


def test_the_manifest_knows_the_adapter(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches two adapters taken for the same run: work of one would be resumed with the other."""
    model = str(tiny_model_path("llama"))
    first, second = (save_adapter(Path(model), tmp_path / str(seed), seed=seed) for seed in (1, 2))
    prints = [see_model({"pretrained": model, **({"peft": str(p)} if p else {})}) for p in (None, first, second)]
    assert len(set(prints)) == 3 and None not in prints
    described = describe_model(model, {"pretrained": model, "peft": str(first)}, None)
    assert "adapter_model.safetensors" in described["adapter_files"]["files"]
    assert "adapter_files" not in describe_model(model, {"pretrained": model}, None)


def test_a_loaded_model_with_an_adapter(tiny_model_path: Callable[[str], Path], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Catches a training loop's PeftModel that runs without packs, without its adapter, or without its virtual tokens."""
    peft = pytest.importorskip("peft")
    import transformers

    path = tiny_model_path("llama")
    adapter, prompt = save_adapter(path, tmp_path / "adapter"), save_adapter(path, tmp_path / "prompt", "prompt")
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    model = peft.PeftModel.from_pretrained(base, adapter)
    options: dict[str, Any] = {"limit": 2, "bootstrap_iters": 0, "output_path": str(tmp_path / "out")}
    results = evaluate(model, tiny_tokenizer, TASKS, **options)
    assert results is not None and results["ddp_eval"]["batching"] == "packs"
    ours, _ = our_scores(tmp_path / "again", pretrained=str(path), peft=str(adapter))
    assert_close(tmp_path / "out", ours, tolerance.of(model))
    with pytest.raises(UserError, match="the model's adapter is of the type PROMPT_TUNING"):
        evaluate(peft.PeftModel.from_pretrained(base, prompt), tiny_tokenizer, TASKS, **options)


def test_peft_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches an ImportError, and one that comes only when the prompts are built."""
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^peft= in --model_args needs the package peft, .* pip install '\.\[peft\]'$"):
        our_scores(tmp_path / "out", pretrained="demo", peft=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["load_in_8bit", "load_in_4bit"])
def test_weights_quantised_while_loading(setting: str, tmp_path: Path) -> None:
    """Catches settings that do not reach transformers: lm_eval 0.4.13 itself fails on them with transformers 5."""
    pytest.importorskip("bitsandbytes")
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = demo.MODEL_PATH  # wide enough for blocks of 64
    settings = {setting: True, "dtype": "float32"}
    ours, section = our_scores(tmp_path / "out", pretrained=model, **settings)
    quantisation = transformers.BitsAndBytesConfig(**{setting: True})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantisation, device_map={"": "cpu"}, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "_create_model", lambda self, **_: setattr(self, "_model", loaded))
        theirs, rounding = scores_of_lm_eval(pretrained=model, tokenizer=tokenizer)
    bare, _ = our_scores(tmp_path / "bare", pretrained=model)
    moved = abs(np.array(ours[TASKS[0]]) - bare[TASKS[0]]).max()
    assert moved > 0.01
    if setting == "load_in_4bit":
        assert_close(tmp_path / "out", theirs, rounding)
    else:
        # Eight-bit products round activations, by blocks that neighbours share: either side is as far off as that moves it.
        for task, values in theirs.items():
            assert np.abs(np.array(ours[task]) - values).max() < 2 * moved, task
    assert section["engine"]["parameters"]


@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ({"bnb_4bit_quant_type": "nf4"}, "model_args bnb_4bit_quant_type needs load_in_8bit=True or load_in_4bit=True"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "model_args for quantised weights cannot be used"),
        ({"quantization_config": {"quant_method": "none such"}}, "model_args for quantised weights cannot be used"),
        ({"load_in_4bit": True, "quantization_config": {"a": 1}}, "exclude each other: give one of them"),
    ],
)
def test_settings_of_quantised_weights(model_args: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Catches a setting without effect, and transformers' traceback."""
    with pytest.raises(UserError, match=sentence):
        our_scores(tmp_path / "out", pretrained="demo", **model_args)


def test_only_whole_copies_serve_them(tiny_model_path: Callable[[str], Path]) -> None:
    """Catches adapters and quantised weights split over ranks, where nobody puts the adapter on."""
    from ddp_eval.engines.hf import checkpoint
    from ddp_eval.placement.choose import choose_layout

    world = World(0, 0, 2, torch.device("cpu"), ranks_per_node=2)
    model_args = {"pretrained": str(tiny_model_path("llama"))}
    model_config = checkpoint.load_config(model_args)
    for more, what in (({"peft": "a"}, "a model with an adapter"), ({"load_in_8bit": True}, "quantised weights")):
        for layout in ("tensor:2", "shard:2"):
            config = Config(model_args={**model_args, **more}, layout=layout)
            with pytest.raises(UserError, match=f"--layout {layout} cannot split {what}: give --layout replicas"):
                choose_layout(config, model_config, world)
        with pytest.raises(UserError, match=f"--layout measure is not for {what}"):
            choose_layout(Config(model_args={**model_args, **more}, layout="measure"), model_config, world)
        with pytest.raises(UserError, match=f"model_args {next(iter(more))} is not for --model vllm"):
            choose_layout(Config(model="vllm", model_args={**model_args, **more}), model_config, world)
        assert str(choose_layout(Config(model_args={**model_args, **more}), model_config, world)[0]) == "replicas"
        with pytest.raises(UserError, match=f"--load broadcast cannot send {what}: give --load disk"):
            choose_layout(Config(model_args={**model_args, **more}, load="broadcast"), model_config, world)
