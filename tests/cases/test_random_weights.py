"""Weights that no file decides: drawn from --seed, alike on every rank and at every start, or refused in one sentence."""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from launch import QUICK, launch
from tiny_configs import tiny_config

from ddp_eval.config import Config
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, draws, quantization
from ddp_eval.engines.hf.engine import HFEngine
from ddp_eval.errors import UserError
from ddp_eval.packs.plan import build_pack
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.run.planning import SINGLE, make_plan
from ddp_eval.run.runner import run

NEW_TOKENS = ["<one>", "<two>", "<three>"]
SEEDS = (0, 1234, 1234, 1234)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def other_global_generators() -> Iterator[None]:
    """Each test starts from generators that nobody has seeded, and leaves them as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.fixture(scope="module")
def adapter(tiny_model_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """adapter(kind) -> model_args of a model with an adapter whose tokenizer has three tokens more than the model."""
    peft = pytest.importorskip("peft")
    import transformers

    made: dict[str, dict[str, Any]] = {}

    def get(kind: str = "lora") -> dict[str, Any]:
        if kind in made:
            return made[kind]
        place, path = tmp_path_factory.mktemp(kind), tiny_model_path("llama")
        tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
        tokenizer.add_tokens(NEW_TOKENS)
        tokenizer.save_pretrained(place)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        options: dict[str, Any] = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
        if kind == "with its rows":
            model.resize_token_embeddings(len(tokenizer))
            options["modules_to_save"] = ["embed_tokens", "lm_head"]
        if kind == "with some rows":
            model.resize_token_embeddings(len(tokenizer))
            options["modules_to_save"] = ["lm_head"]
            options["trainable_token_indices"] = {"embed_tokens": [tiny_models.VOCAB_SIZE, tiny_models.VOCAB_SIZE + 2]}
        if kind == "by svd":
            options["init_lora_weights"] = "pissa_niter_2"  # which changes the base model's weights when it is put on
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.data = torch.randn_like(weight) * 0.3
        adapted.save_pretrained(place, save_embedding_layers=False)
        made[kind] = {"pretrained": str(path), "peft": str(place), "tokenizer": str(place)}
        return made[kind]

    return get


def load(model_args: dict[str, Any], seeds: Any = SEEDS, speaks: bool = True, own_code: bool = False) -> Any:
    config = checkpoint.load_config(model_args)
    with draws.loading_for(seeds, speaks, own_code):
        return checkpoint.load_weights(model_args, config, CPU)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rows_of_new_tokens_follow_from_the_seed(adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches rows drawn from the global generator (public report): other scores on each rank and at each start."""
    caplog.set_level(logging.WARNING, logger="ddp_eval")
    model_args, state = adapter(), torch.get_rng_state()
    first = weights_of(load(model_args))
    assert torch.equal(torch.get_rng_state(), state), "the prompts' draws go on as if nothing had been loaded"
    torch.manual_seed(99)
    assert same(weights_of(load(adapter(), speaks=False)), first)
    assert not same(weights_of(load(adapter(), seeds=(0, 1234, 5, 1234), speaks=False)), first)
    (said,) = [message for message in caplog.messages if "embeddings" in message]
    assert "of 3 tokens of the tokenizer (<one>, <two>, <three>): they are drawn from --seed, here 1234" in said


def test_rows_of_new_tokens_beside_a_thread_that_draws(adapter: Any) -> None:
    """Catches a seed set in the global generator, which lm_eval seeds and tasks draw from while the leader loads."""
    first, done = weights_of(load(adapter())), threading.Event()
    drawn: list[torch.Tensor] = []

    def draw_and_seed() -> None:
        while not done.is_set():
            torch.manual_seed(len(drawn))
            drawn.append(torch.rand(100))

    thread = threading.Thread(target=draw_and_seed)
    thread.start()
    try:
        again = [weights_of(load(adapter())) for _ in range(2)]
    finally:
        done.set()
        thread.join()
    assert len(drawn) > 10 and all(same(one, first) for one in again)


def test_rows_of_new_tokens_are_lm_evals(adapter: Any) -> None:
    """Catches draws of another kind than lm_eval's, whose numbers would differ by more than rounding."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(device="cpu", **adapter())  # downloads nothing; its constructor may draw, so the model is made again
    torch.manual_seed(1234)
    theirs._create_model(pretrained=adapter()["pretrained"], peft=adapter()["peft"])
    model, ours = theirs.model.get_base_model(), load(adapter())
    assert len(ours.lm_head.weight) == tiny_models.VOCAB_SIZE + 3
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)
    assert torch.equal(ours.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(("kind", "named"), [("with its rows", None), ("with some rows", "of 1 tokens of the tokenizer (<two>)")])
def test_rows_that_the_adapter_brings(kind: str, named: str | None, adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning about rows that are trained, and none about the one that is not."""
    caplog.set_level(logging.WARNING, logger="ddp_eval")
    model = load(adapter(kind))
    said = [message for message in caplog.messages if "embeddings" in message]
    assert len(said) == (named is not None) and all(str(named) in message for message in said)
    assert hasattr(model, "random_rows") is (named is not None)


def test_adapters_that_draw_where_they_are_put_on(adapter: Any) -> None:
    """Catches base weights that a randomised decomposition changes anew at each start (LoRA's pissa_niter)."""
    first = weights_of(load(adapter("by svd"), speaks=False))
    torch.manual_seed(99)
    assert same(weights_of(load(adapter("by svd"), speaks=False)), first)


def test_scores_with_rows_of_new_tokens_on_any_ranks(adapter: Any, tmp_path: Path) -> None:
    """Catches the same in whole runs (public report: four digests in six runs)."""
    args = ",".join(f"{key}={value}" for key, value in adapter().items())
    flags = ("--model_args", args, "--tasks", "demo_hellaswag", "--limit", 8, "--max_pack_tokens", 512)
    outcome = launch(2, *flags, "--output_path", tmp_path / "2", program=QUICK)
    assert outcome.returncode == 0, str(outcome)
    assert sum("they are drawn from --seed" in line for line in outcome.sentences()) == 1, str(outcome)
    assert "will be initialized from" not in outcome.stderr
    config = Config(
        model_args=adapter(),
        tasks=["demo_hellaswag"],
        limit=8,
        max_pack_tokens=512,
        output_path=str(tmp_path / "1"),
        device="cpu",
    )
    assert run(config, World(0, 0, 1, CPU)) is not None
    scores = [(tmp_path / ranks / "scores.parquet").read_bytes() for ranks in ("1", "2")]
    assert scores[0] == scores[1]
    engine = json.loads((tmp_path / "2" / "manifest.json").read_text())["engine"]
    assert engine["random_rows"] == {"tokens": [400, 401, 402], "seed": 1234}


@pytest.fixture
def edited(tiny_model_path: Callable[[str], Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """edited(drop, config, kind) -> model_args of a copy without the weights whose names hold `drop`, its config changed."""

    def edit(drop: str | None = None, kind: str = "llama", shorten: str | None = None, **config: Any) -> dict[str, Any]:
        source, place = tiny_model_path(kind), tmp_path / "edited"
        place.mkdir(exist_ok=True)
        for file in source.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        weights = safetensors.torch.load_file(place / "model.safetensors")
        weights = {name: weight for name, weight in weights.items() if drop is None or drop not in name}
        if shorten:
            weights[shorten] = weights[shorten][:-1].contiguous()
        safetensors.torch.save_file(weights, place / "model.safetensors", {"format": "pt"})
        settings = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(settings | config))
        return {"pretrained": str(place)}

    return edit


def test_weights_that_are_not_there(edited: Any) -> None:
    """Catches a random head, and a random layer, that are scored with; tied weights and computed ones may be absent."""
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, such as lm_head\.weight: they would be random$"):
        load(edited(drop="lm_head"))
    with pytest.raises(UserError, match=r"lacks 9 of the model's weights, such as model\.layers\.1\.input_layernorm\.weight"):
        load(edited(drop="layers.1."))
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, such as model\.embed_tokens\.weight"):
        load(edited(drop="embed_tokens"))
    assert load(edited(drop="lm_head", tie_word_embeddings=True)).lm_head.weight is not None
    model = load(edited())
    assert model.model.rotary_emb.inv_freq.isfinite().all() and model.model.rotary_emb.inv_freq[0] == 1


def test_weights_that_their_class_says_are_no_matter(edited: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a random weight that transformers leaves out of its report: where the class declares that it may be missing."""
    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", ["lm_head", "norm"])
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, such as lm_head\.weight: they would be random$"):
        load(edited(drop="lm_head"))
    load(edited(drop="model.norm.weight"))  # ones, by its class


def test_bias_of_zeros_that_is_in_no_checkpoint(edited: Any) -> None:
    """Catches a BART refused: its final_logits_bias is computed."""
    import transformers

    model_args = edited(drop="final_logits_bias", kind="bart")
    config = checkpoint.load_config(model_args)
    model = checkpoint.load_weights(model_args, config, CPU, transformers.AutoModelForSeq2SeqLM)
    assert not model.final_logits_bias.any()


def test_weights_of_other_shapes(edited: Any) -> None:
    """Catches a head that is drawn anew since its shape is another, and a sentence that names neither."""
    args = edited(shorten="lm_head.weight")
    shapes = (
        r"1 weights of its checkpoint have another shape than the model's, such as lm_head\.weight, \(399, 32\) "
        r"instead of \(400, 32\)"
    )
    with pytest.raises(UserError, match=rf"^cannot load the model {args['pretrained']}: {shapes}$"):
        load(args)
    with pytest.raises(UserError, match=rf"^cannot load the model .*: {shapes}: they would be random$"):
        load({**args, "ignore_mismatched_sizes": True})


def test_weights_that_are_left_out(edited: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches layers that a config does not have, dropped without a word, and the words on every rank."""
    caplog.set_level(logging.WARNING)
    args = edited(num_hidden_layers=1)
    load(args, speaks=False)
    assert not caplog.messages
    load(args)
    assert caplog.messages == [
        f"the checkpoint {args['pretrained']} has 9 weights that a LlamaForCausalLM has no place for, such as "
        "model.layers.1.input_layernorm.weight: they are left out"
    ]


def test_a_base_model_below_an_adapter_in_one_directory(edited: Any, adapter: Any) -> None:
    """Catches a random head where transformers reports only what the adapter lacks."""
    for file in Path(adapter()["peft"]).glob("adapter_*"):
        Path(edited()["pretrained"], file.name).write_bytes(file.read_bytes())
    assert "lora" in " ".join(name for name, _ in load(edited()).named_parameters())
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, such as lm_head\.weight"):
        load(edited(drop="lm_head"))


def test_a_module_that_an_adapter_lacks(adapter: Any, tmp_path: Path) -> None:
    """Catches the base model's head scored with, or a KeyError, where the adapter's config says that it brings one."""
    for file in Path(adapter()["peft"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(UserError, match=r"lacks weights for this model: there is no base_model\.model\.lm_head\.weight$"):
        load({**adapter(), "peft": str(tmp_path)})


def test_weights_of_an_adapter_that_have_no_place(adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches half of an adapter dropped without a word."""
    caplog.set_level(logging.WARNING, logger="ddp_eval")
    for file in Path(adapter()["peft"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    load({**adapter(), "peft": str(tmp_path)})
    assert any("has 4 weights that the model has no place for, such as base_model.model." in text for text in caplog.messages)


OWN_CODE = """
import random
import numpy as np
import torch
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("set_later", torch.zeros(3), persistent=False)
        self.register_buffer("projection", torch.randn(3), persistent=False)
        self.by_hand = random.random(), float(np.random.rand())

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            self.set_later.data.fill_(3.0)

    def forward(self, *args, **kwargs):
        outcome = super().forward(*args, **kwargs)
        if NOISE:
            outcome.logits = outcome.logits + torch.randn_like(outcome.logits)
        return outcome

NOISE = False
"""


@pytest.fixture
def own_code(edited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """own_code(text) -> model_args of a checkpoint with this code."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(text: str = OWN_CODE) -> dict[str, Any]:
        args = edited(auto_map={"AutoModelForCausalLM": "own.Own"})
        Path(args["pretrained"], "own.py").write_text(text)
        return {**args, "trust_remote_code": True}

    return make


def python_and_numpy_states() -> tuple[Any, list[int]]:
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tolist()


def test_buffers_that_a_constructor_computes(own_code: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches memory taken for values: transformers 5 keeps buffers in no file only if `_init_weights` sets them."""
    caplog.set_level(logging.WARNING, logger="ddp_eval")
    state = torch.get_rng_state()
    models = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed)
        before = python_and_numpy_states()
        models.append(load(own_code(), speaks=seed == 1, own_code=True))
        assert python_and_numpy_states() == before
    for model in models:
        assert model.scale.tolist() == [2.0] * 3 and model.set_later.tolist() == [3.0] * 3
        assert model.mask.tolist() == torch.ones(4, 4).bool().tril().tolist()
    assert torch.equal(models[0].projection, models[1].projection) and models[0].projection.unique().numel() == 3
    assert models[0].by_hand == models[1].by_hand
    assert torch.equal(torch.get_rng_state(), state)
    assert [text for text in caplog.messages if "draws" in text] == [
        f"the model {own_code()['pretrained']} draws 1 of its buffers at random, such as projection: from --seed, here 1234"
    ]


def test_buffers_that_nothing_can_compute(own_code: Any) -> None:
    """Catches the same where the constructor cannot be run a second time."""
    once = (
        OWN_CODE.replace("super().__init__(config)", "super().__init__(config); assert not MADE; MADE.append(1)") + "\nMADE = []"
    )
    with pytest.raises(
        UserError, match=r"sets 3 of its buffers nowhere but in its constructor, such as mask, .* in its _init_weights"
    ):
        load(own_code(once), own_code=True)


def test_a_model_that_draws_whenever_it_runs(own_code: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches scores that differ from start to start since the forward draws from the global generator (Reformer's hashes do)."""
    caplog.set_level(logging.WARNING, logger="ddp_eval")
    args = own_code(OWN_CODE.replace("NOISE = False", "NOISE = True"))
    scores = []
    for start, seed in enumerate(("1234", "1234", "5")):
        torch.manual_seed(start)
        config = Config(
            model_args={key: value for key, value in args.items() if key != "trust_remote_code"},
            trust_remote_code=True, tasks=["demo_lambada"], limit=4, bootstrap_iters=0, device="cpu", packing=False,
            seed=(0, 1234, int(seed), 1234), output_path=str(tmp_path / str(start)),
        )  # fmt: skip
        assert run(config, World(0, 0, 1, CPU)) is not None
        scores.append((tmp_path / str(start) / "scores.parquet").read_bytes())
    assert scores[0] == scores[1] != scores[2]
    assert "the model draws at random whenever it runs: from --seed, here 1234, and its input" in caplog.messages


def test_hashes_that_are_drawn(caplog: pytest.LogCaptureFixture) -> None:
    """Catches Reformer in rows with others, whose lengths its hashes go by, and draws that a short forward does not make."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("reformer")).eval()
    requests = requests_from_lists([np.random.default_rng(0).integers(2, 400, 300).tolist()] * 2, [4, 9])
    sums = []
    for seed in (0, None):
        model.config.hash_seed = seed
        for module in model.modules():
            if hasattr(module, "hash_seed"):
                module.hash_seed = seed
        caplog.clear()
        engine = HFEngine(model, CPU)
        decision = make_plan(engine, requests, packing=True, max_pack_tokens=None)
        assert decision.instead == SINGLE and "sorts tokens by hashes" in str(decision.why_rows)
        sums.append([engine.collect(engine.launch(build_pack(decision.plan, 0)))["logprob"] for _ in range(2)])
        assert any("draws at random" in message for message in caplog.messages) == (seed is None)
        engine.close()
    assert all(np.array_equal(first, again) for first, again in sums) and not np.array_equal(sums[0], sums[1])


def test_quantisation_by_examples_is_refused() -> None:
    """Catches weights that depend on which examples a quantisation has drawn; a checkpoint that is quantised only names them."""
    plain, quantised_one = tiny_models.CONFIGS["llama"](), tiny_models.CONFIGS["llama"]()
    quantised_one.quantization_config = {"quant_method": "gptq", "bits": 4}
    args = {"quantization_config": {"quant_method": "gptq", "bits": 4, "dataset": "c4"}}
    with pytest.raises(
        UserError, match=r"with dataset=c4 would quantise by examples drawn while loading: quantise the model, save"
    ):
        quantization.check_data_free(args, plain)
    quantization.check_data_free(args, quantised_one)
    quantization.check_data_free({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, plain)


def _draw_in_every_way() -> list[torch.Tensor]:
    mean, ones = torch.zeros(2), torch.ones(2)
    return [
        torch.randn(3), torch.rand(2), torch.randint(9, (4,)), torch.randint(1, 9, (4,)), torch.randperm(9),
        torch.normal(mean, ones), torch.normal(0.0, 1.0, (3,)), torch.nn.Linear(2, 3).weight,
        torch.nn.Embedding(30, 2).weight, torch.rand_like(ones),
        torch.randn_like(ones), torch.randint_like(ones, 9), torch.randint_like(ones, 1, 9), torch.bernoulli(ones / 2),
        torch.multinomial(torch.ones(9), 4), torch.nn.functional.dropout(torch.ones(9)), torch.poisson(ones * 4),
        torch.nn.init.trunc_normal_(torch.ones(3)), torch.empty(3).exponential_(), torch.empty(3).geometric_(0.3),
        torch.empty(3).cauchy_(), torch.empty(3).log_normal_(), torch.empty(5).random_(), torch._standard_gamma(ones),
        torch.svd_lowrank(torch.arange(36.0).view(6, 6), q=2)[0],
        torch.distributions.MultivariateNormal(mean, torch.eye(2)).sample(),
    ]  # fmt: skip


def test_every_way_to_draw() -> None:
    """Catches an operation of torch's that still draws from the global generator, or comes to other numbers than from it."""
    torch.manual_seed(7)
    expected = _draw_in_every_way()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    with draws.Draws(7):
        drawn = _draw_in_every_way()
        own = torch.rand(2, generator=torch.Generator().manual_seed(3))
    assert [torch.equal(*pair) for pair in zip(drawn, expected, strict=True)] == [True] * len(expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(own, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_memory_that_nobody_has_written_to() -> None:
    """Catches values taken for none, and none for values."""
    with draws.Draws(0) as mode:
        kinds = [torch.empty(4, dtype=kind) for kind in (torch.float32, torch.bfloat16, torch.int64, torch.bool)]
        written = [
            torch.empty(4).fill_(float("nan")),
            torch.empty(4).copy_(torch.arange(4.0)),
            torch.zeros(4),
            torch.ones(4).bool(),
        ]
        in_place = torch.empty(4)
        in_place.data.fill_(1.0)
        drawn = torch.empty(4).normal_()
    assert all(mode.left_unwritten(one) for one in kinds)
    assert not any(mode.left_unwritten(one) for one in [*written, in_place, drawn])
    assert mode.drew(drawn) and mode.drew(drawn[1:]) and not any(mode.drew(one) for one in [*kinds, *written, in_place])
