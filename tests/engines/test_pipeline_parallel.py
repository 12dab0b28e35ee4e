"""The layers engine: stages of a model, one after another in this process, against the model whole."""

import collections
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers

from ddp_eval.distributed import collectives
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import checkpoint, pipeline_parallel
from ddp_eval.engines.hf import engine as hf
from ddp_eval.errors import UserError
from ddp_eval.packs.cut import CostModel, plan_packs
from ddp_eval.packs.plan import build_pack
from ddp_eval.packs.requests import requests_from_lists
from ddp_eval.packs.rows import plan_rows

SHAPE = {**tiny_models._SHAPE, "num_hidden_layers": 5}
SMALL = tiny_models._SMALL
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama_tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 7}, sliding_window=8, query_pre_attn_scalar=8
    ),
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_layer=5, n_head=4, n_positions=2048),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE),
    "granite": lambda: transformers.GraniteConfig(**SHAPE),
}


class Wire:
    """What one stage sends and the next receives, in place of torch.distributed."""

    def __init__(self, monkeypatch):
        self.sent: collections.deque[Any] = collections.deque()
        wire = self

        class Incoming:
            def __init__(self, world, tensor, source):
                self.tensor = tensor

            def wait(self):
                hidden = wire.sent.popleft()
                assert hidden.shape == self.tensor.shape and hidden.dtype == self.tensor.dtype
                return hidden

        class Outgoing:
            def __init__(self, world, tensor, target):
                wire.sent.append(tensor.clone())

            def wait(self):
                pass

        monkeypatch.setattr(collectives, "Incoming", Incoming)
        monkeypatch.setattr(collectives, "Outgoing", Outgoing)


def save(kind, directory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    model.save_pretrained(directory)
    return {"pretrained": str(directory)}


def a_plan(rows):
    """Two packs with shared prefixes, of different lengths, or batches of rows."""
    random = np.random.default_rng(0)
    prefix = random.integers(2, 400, 20).tolist()
    sequences = [prefix + random.integers(2, 400, count).tolist() for count in (3, 9, 12, 5)]
    sequences += [random.integers(2, 400, count).tolist() for count in (40, 11)]
    requests = requests_from_lists(sequences, [2, 3, 4, 5, 20, 1])
    return plan_rows(requests, max_tokens=64)[0] if rows else plan_packs(requests, CostModel(pair=0.1), max_tokens=50)[0]


def run_engines(engines, plan):
    """Every pack through one stage after another; the sums and flags of the last."""
    for engine in engines:
        ahead = [engine.launch(build_pack(plan, index)) for index in range(plan.num_packs)]
        collected = [engine.collect(launched) for launched in ahead]
    results = np.concatenate(collected)
    return results["logprob"], results["greedy"]


def load_stages(model_args, stages):
    config = checkpoint.load_config(model_args)
    device = torch.device("cpu")
    worlds = [World(rank, rank, stages, device, ranks_per_replica=stages) for rank in range(stages)]
    return [pipeline_parallel.load_layers_engine(model_args, config, world) for world in worlds]


@pytest.mark.parametrize("kind", CONFIGS)
def test_stages_give_the_bits_of_the_whole(kind, tmp_path, monkeypatch):
    """Catches a scaled embedding or a position added twice, a norm or head left out, and a layer under another one's mask."""
    Wire(monkeypatch)
    model_args = save(kind, tmp_path)
    whole = hf.load_engine(model_args, checkpoint.load_config(model_args), torch.device("cpu"))
    for stages in (2, 3):
        engines = load_stages(model_args, stages)
        for rows in (False, True):
            plan = a_plan(rows)
            assert plan.num_packs > 1
            expected, expected_greedy = run_engines([whole], plan)
            sums, greedy = run_engines(engines, plan)
            assert np.ptp(expected) > 1
            np.testing.assert_array_equal(sums, expected)
            np.testing.assert_array_equal(greedy, expected_greedy)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_a_stage_holds_its_weights_alone(kind, tmp_path):
    """Catches weights of other stages that stay in memory, layers that are on no stage, and costs reckoned from a part."""
    model_args = save(kind, tmp_path)
    whole = hf.load_engine(model_args, checkpoint.load_config(model_args), torch.device("cpu"))
    engines = load_stages(model_args, 3)
    names = [set(dict(engine.model.named_parameters())) for engine in engines]
    assert set.union(*names) == set(dict(whole.model.named_parameters()))
    ends = {name for name in names[0] if "layers" not in name and ".h." not in name}
    assert sum(map(len, names)) == len(set.union(*names)) + (1 if engines[2].stage.tied else 0)
    assert all("embed" in name or "wte" in name or "wpe" in name for name in ends)
    for engine in engines:
        assert engine.cost_model() == whole.cost_model()
        assert engine.describe() == whole.describe()
        assert all(not parameter.is_meta for parameter in engine.model.parameters())


def test_a_stage_opens_its_files_alone(tmp_path, monkeypatch):
    """Catches a stage that maps the whole checkpoint into its memory."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"](), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="60kB")
    files = sorted(tmp_path.glob("*.safetensors"))
    opened = []
    real_open = transformers.modeling_utils.safe_open
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda file, **kw: opened.append(file) or real_open(file, **kw))
    engines = load_stages({"pretrained": str(tmp_path)}, 3)
    assert len(files) > 5
    assert len(opened) <= 2 * len(files), "not every file on each of three stages"
    assert all(not parameter.is_meta for engine in engines for parameter in engine.model.parameters())


def test_models_that_cannot_be_split(tmp_path):
    """Catches a model of unknown inner order that is cut all the same, and stages with nothing in them."""
    mpt = tiny_models.make_model("mpt").to("meta")
    with pytest.raises(UserError, match="--layout layers cannot split mpt models"):
        pipeline_parallel.plan_stages(mpt, 2)
    with pytest.raises(UserError, match="layers:3 splits a model of 2 layers into more parts than it has layers"):
        pipeline_parallel.plan_stages(tiny_models.make_model("llama").to("meta"), 3)


def test_a_trial_that_fails_ends_in_nan(tmp_path, monkeypatch):
    """Catches stages that wait for ever for the hidden states of one that could not take a pack."""
    wire = Wire(monkeypatch)
    engines = load_stages(save("llama", tmp_path), 2)
    plan = a_plan(rows=False)

    def fail(*args, **kwargs):
        raise RuntimeError("this layer takes no such mask")

    for failing in (0, 1):
        layer = engines[failing].model.model.layers[0 if failing == 0 else 4]
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", fail)
            with pytest.raises(RuntimeError, match="no such mask"):
                run_engines(engines, plan)
            wire.sent.clear()
            for engine in engines:
                engine.is_probe = True
            sums, _ = run_engines(engines, plan)
            assert np.isnan(sums).all()
        for engine in engines:
            engine.is_probe = False
