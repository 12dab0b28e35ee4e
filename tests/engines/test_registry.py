"""What an engine must bring, shown by one that knows nothing of its model: every token is as likely as another."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from places import GENERATION_TASKS

from ddp_eval import config as config_module
from ddp_eval.config import ENGINES, Config, EngineName
from ddp_eval.distributed.world import World, join_group
from ddp_eval.engines import Capabilities, Engine
from ddp_eval.engines.hf import checkpoint
from ddp_eval.engines.registry import EngineSpec, spec_of
from ddp_eval.errors import UserError
from ddp_eval.output import tables
from ddp_eval.packs.cut import CostModel
from ddp_eval.packs.plan import Pack
from ddp_eval.packs.results import Results, make_results
from ddp_eval.run import runner


class Uniform(Engine):
    capabilities = Capabilities(serves_generation=False)

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def vocab_size(self) -> int:
        return int(self.whole.config.vocab_size)

    def describe(self) -> dict[str, Any]:
        return {"name": "uniform", "class": "none", "parameters": 0, "dtype": "torch.float32"}

    def max_tokens(self) -> int:
        return 512

    def cost_model(self) -> CostModel:
        return CostModel()

    def flops_per_token(self) -> float:
        return 1.0

    def launch(self, pack: Pack) -> Any:
        return SimpleNamespace(pack=pack)

    def collect(self, launched: Any) -> Results:
        count = len(launched.pack.answer_items)
        return make_results(launched.pack, np.full(count, -math.log(self.vocab_size)), np.zeros(count, dtype=bool))


class UniformSpec(EngineSpec):
    def load(self, config: Config, model_config: Any, world: World) -> Engine:
        return Uniform(checkpoint.whole_model(config.loader_args, model_config))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uniform_engine", SimpleNamespace(SPEC=UniformSpec()))
    monkeypatch.setitem(config_module.ENGINES, "uniform", EngineName("uniform_engine"))


def test_every_engine_has_its_spec() -> None:
    """Catches a name that --model takes and that nothing stands behind, and an input that leaves vLLM no room for an answer."""
    for name in ENGINES:
        assert isinstance(spec_of(name), EngineSpec)
    assert spec_of("hf").longest_input({"max_model_len": 9}, 64) == 64
    assert spec_of("vllm").longest_input({"max_model_len": 9}, 64) == 8 and spec_of("vllm").longest_input({}, 64) == 63


def run(tasks: list[str], **options: Any) -> Any:
    config = Config(model="uniform", model_args={"pretrained": "demo"}, tasks=tasks, limit=3, bootstrap_iters=0, **options)
    return runner.run(config, join_group("cpu"))


@pytest.mark.usefixtures("registered")
def test_a_new_engine_is_a_module_and_a_line(tmp_path: Path) -> None:
    """Catches a name of an engine that is asked for elsewhere, and a member of Engine without a default that few need."""
    results = run(["demo_hellaswag", "demo_wikitext"], output_path=str(tmp_path))
    assert results["ddp_eval"]["engine"]["name"] == "uniform" and results["ddp_eval"]["layout"] == "replicas"
    scores = tables.read_scores(tmp_path / tables.SCORES)
    vocab_size = checkpoint.load_config({"pretrained": "demo"}).vocab_size
    np.testing.assert_allclose(scores.loglikelihood, -np.array(scores.num_tokens) * math.log(vocab_size))
    with pytest.raises(UserError, match="--model must be hf, vllm or uniform, got another"):
        Config(model="another")
    with pytest.raises(UserError, match="--layout tensor:2 is not for --model uniform: give --layout replicas"):
        run(["demo_hellaswag"], layout="tensor:2")


@pytest.mark.usefixtures("registered")
def test_an_engine_that_only_scores() -> None:
    """Catches an engine asked for texts that it cannot give, with a traceback for an answer."""
    with pytest.raises(UserError, match="the task gen_boolean generates text, which the engine uniform does not serve"):
        run(["gen_boolean"], include_path=str(GENERATION_TASKS))
