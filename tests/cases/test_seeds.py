"""What --seed decides, value by value: the tasks' draws, few-shot examples, sampled texts; whatever loads meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_models
import torch

from ddp_eval.cli import flags
from ddp_eval.config import DEFAULT_SEED, Config
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf.draws import Loading, loading, loading_for
from ddp_eval.errors import UserError
from ddp_eval.run.runner import run
from ddp_eval.tasks.generation_requests import GenerationRequests
from ddp_eval.tasks.tokenization import Encoder

pytestmark = pytest.mark.usefixtures("no_lm_eval_index")

GENERATORS = ("random", "numpy", "torch", "fewshot")
_DRAW = (random.random, np.random.rand, lambda: float(torch.rand(1)))


class Enough(UserError):
    """Stops a run that has built its prompts."""


def _task(slot: int) -> dict[str, Any]:
    """A task whose prompts hold what its own code draws from one of the global generators, or examples drawn by lm_eval."""
    rows = [{"text": f"number {index}", "drawn": ""} for index in range(9)]

    def change(split: Any) -> Any:
        return split.map(lambda row: {"drawn": str(_DRAW[slot]())}, load_from_cache_file=False) if slot < 3 else split

    return {
        "task": f"of_{GENERATORS[slot]}", "output_type": "loglikelihood", "test_split": "test", "training_split": "test",
        "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)), "process_docs": change,
        "doc_to_text": "{{text}} {{drawn}}", "doc_to_target": " yes", "num_fewshot": 3 if slot == 3 else 0,
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def generators_as_they_were() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.fixture
def prompts_of(tiny_model_path: Callable[[str], Path]) -> Callable[..., dict[str, str]]:
    """prompts_of(seed, **options) -> a digest of each task's prompts, by the generator that they are drawn from."""

    def build(seed: Any, **options: Any) -> dict[str, str]:
        found: dict[str, str] = {}

        def stop(known: dict[str, Any]) -> None:
            found.update(known["prompts_by_task"])
            raise Enough("enough")

        options = {"model_args": {"pretrained": str(tiny_model_path("llama"))}, **options}
        config = Config(tasks=[_task(slot) for slot in range(4)], seed=seed, bootstrap_iters=0, device="cpu", **options)
        with pytest.raises(Enough):
            run(config, World(0, 0, 1, torch.device("cpu")), stop)
        return {generator: found[f"of_{generator}"] for generator in GENERATORS}

    return build


def test_each_value_decides_its_own_draws(prompts_of: Callable[..., dict[str, str]]) -> None:
    """Catches a value that is ignored, one that decides another's draws, 0 taken for none, and draws of no seed at all."""
    usual = prompts_of(DEFAULT_SEED)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert prompts_of(DEFAULT_SEED) == usual
    for slot, generator in enumerate(GENERATORS):
        drawn = {}
        for value in (0, 7, *([-1] if slot != 1 else [])):
            seed = [3, 3, 3, 3]
            seed[slot] = value
            drawn[value] = prompts_of(tuple(seed))
            assert prompts_of(tuple(seed)) == drawn[value] if value == 0 else True
        assert len({one[generator] for one in drawn.values()}) == len(drawn), generator
        others = [{name: digest for name, digest in one.items() if name != generator} for one in drawn.values()]
        assert all(one == others[0] for one in others), generator


def test_none_leaves_one_generator_alone(prompts_of: Callable[..., dict[str, str]]) -> None:
    """Catches None taken for 0 or for the default, and one None that leaves the others unseeded: lm_eval's rule."""
    for slot, generator in enumerate(GENERATORS):
        seed: list[int | None] = [3, 3, 3, 3]
        seed[slot] = None
        one, other = prompts_of(tuple(seed)), prompts_of(tuple(seed))
        assert one[generator] != other[generator], generator
        assert {**one, generator: ""} == {**other, generator: ""}


OWN_CODE = """
import random
import time
import numpy as np
import torch
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        until = time.monotonic() + 1  # all the while that prompts would be built
        while time.monotonic() < until:
            random.seed(99), np.random.seed(99)
            time.sleep(0.001)
        self.drawn = random.random(), np.random.rand(), torch.randn(3, device="cpu")
"""


def test_what_loads_meanwhile_decides_nothing(
    prompts_of: Callable[..., dict[str, str]], tiny_model_path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches prompts that depend on when, beside them, a checkpoint's code draws, or an adapter's rows are drawn."""
    import json
    import shutil

    import transformers.dynamic_module_utils as modules

    peft = pytest.importorskip("peft")
    import transformers

    usual = prompts_of(DEFAULT_SEED)
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = tmp_path / "own"
    shutil.copytree(tiny_model_path("llama"), own)
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    (own / "own.py").write_text(OWN_CODE)
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", [*__import__("sys").path])
        assert prompts_of(DEFAULT_SEED, model_args={"pretrained": str(own)}, trust_remote_code=True) == usual

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path("llama"))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_models.make_tokenizer(model_max_length=2048)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    more = {"peft": str(tmp_path / "adapter"), "tokenizer": str(tmp_path / "adapter")}
    assert prompts_of(DEFAULT_SEED, model_args={"pretrained": str(tiny_model_path("llama")), **more}) == usual


@pytest.mark.parametrize(
    ("given", "seed"),
    [
        (["--seed", "None"], (None,) * 4),
        (["--seed", "none"], (None,) * 4),
        (["--seed", "0"], (0,) * 4),
        (["--seed=-1,0,-1,-1"], (-1, 0, -1, -1)),
        (["--seed", "0,None,none,0"], (0, None, None, 0)),
    ],
)
def test_values_on_the_command_line(given: list[str], seed: tuple[int | None, ...]) -> None:
    """Catches none, minus one and nought read as one another."""
    assert flags.parse(["-a", "pretrained=m", "-t", "t", *given])[0].seed == seed
    assert Config(seed=seed).seed == seed


def test_loads_draw_from_the_third_value() -> None:
    """Catches None that leaves each rank to draw its own weights, and a load outside of a run with no seed."""
    assert loading() == Loading((0, 1234, 1234), True)
    for given, expected in (((None,) * 4, (0, 1234, 1234)), ((0, 0, 0, 0), (0, 0, 0)), ((-1, 5, -1, 7), (-1, 5, -1))):
        with loading_for(given, speaks=False):
            assert loading() == Loading(expected, False)
    assert loading() == Loading((0, 1234, 1234), True)


def test_sampled_texts_follow_from_the_third_value(tiny_tokenizer: Any) -> None:
    """Catches texts drawn from 0 as from no seed, and from another of the values; None draws anew."""
    encoder = Encoder(tiny_tokenizer, 512, None, None)
    request = [("a prompt", {"until": ["."], "do_sample": True, "temperature": 1.0})]

    def drawn(seed: int | None) -> list[int]:
        return list(GenerationRequests(encoder, request, ["task"], seed).prompts.seeds)

    assert drawn(0) == drawn(0) and drawn(-1) == drawn(-1) and drawn(None) != drawn(None)
    assert len({drawn(seed)[0] for seed in (0, -1, 1, 1234)}) == 4
