"""One parser of values: by flag, in a --config file and in Python the same text means the same, and what lm_eval reads it as.

Sources: public reports about flags that came out as another type than by file (`top_k=-7`, `min_p=none`, a revision of digits),
and a `--config` file of lm_eval's own whose examples were drawn otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import lm_eval
import pytest
import torch
import yaml
from lm_eval._cli.run import Run
from lm_eval._cli.utils import handle_cli_value_string
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import handle_arg_string

from ddp_eval import demo
from ddp_eval.api import config_from_options
from ddp_eval.cli import flags
from ddp_eval.config import Config
from ddp_eval.distributed import world
from ddp_eval.errors import UserError
from ddp_eval.tasks import fingerprints, harness, select
from ddp_eval.tasks.request_types import Asked
from ddp_eval.tasks.tokenization import Encoder
from ddp_eval.telemetry.meter import Phases
from ddp_eval.values import convert_value

BASE = ["--model_args", "pretrained=m", "--tasks", "t"]
WORDS = "-7 +7 7 007 none None NONE true False 1e3 -1e-3 1_000 0x10 inf nan - +-5 ² ٣ (1,) '7' </think> 1.2.3 b'x' a=b"
TEXTS = [*WORDS.split(), "", " 5 ", " none ", "[1, 2]", "['a,b', \"c\"]", "{'a': -7}", '"none"', "'a\\nb'", "a b", "9" * 5000]


def lm_evals(text: str) -> Any:
    """What lm_eval makes of a value: as text of a file or a call; where that stays text, as a flag, which knows lists."""
    found = handle_arg_string(text)
    if not isinstance(found, str):
        return found
    try:
        return handle_cli_value_string(text)
    except (ValueError, TypeError, MemoryError, RecursionError):  # lm_eval breaks down on these
        return text


@pytest.mark.parametrize("text", [*TEXTS, "[" * 50, "None,", "[1, {[]:1}"])
def test_a_value_is_what_lm_eval_reads(text: str) -> None:
    """Catches -7.0 for -7, the text 'none' for None, and a list that is torn at its commas."""
    assert repr(convert_value(text)) == repr(lm_evals(text))


@hypothesis.given(st.text(max_size=12) | st.text("0123456789+-.eE_ '\"[](){},nNoOtruefals", max_size=10))
def test_any_value_is_what_lm_eval_reads(text: str) -> None:
    """Catches a text beyond the table that becomes another value, or that ends in a traceback."""
    assert repr(convert_value(text)) == repr(lm_evals(text))


@hypothesis.given(st.dictionaries(st.sampled_from(["top_k", "min_p", "until", "a b"]), st.sampled_from(TEXTS), min_size=1))
def test_flag_file_and_python_mean_the_same(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str]) -> None:
    """Catches one of the ways in with a parser of its own. A text that lm_eval takes in a file means in it what lm_eval says."""
    text = ",".join(f"{key}={value}" for key, value in pairs.items())
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump({"model_args": "pretrained=m", "tasks": ["t"], "gen_kwargs": text}))
    by_flag = flags.parse([*BASE, "--gen_kwargs", text])[0].gen_kwargs
    assert repr(by_flag) == repr({key: lm_evals(value) for key, value in pairs.items()})
    by_file = flags.parse(["--config", str(file)])[0]
    assert by_file.model_args == {"pretrained": "m"}
    given: Any = text  # for a dict
    for other in (by_file, Config(gen_kwargs=given), config_from_options(["t"], gen_kwargs=given)):
        assert repr(other.gen_kwargs) == repr(by_flag)
    theirs = EvaluatorConfig.from_config(file).gen_kwargs
    if all(isinstance(value, (int, float, type(None))) for value in theirs.values()):
        assert repr(by_flag) == repr(theirs)


@pytest.mark.parametrize("revision", ["123", "0123", "7e12345", "1.10", "'123'", "true", "abc"])
def test_a_revision_is_text(revision: str) -> None:
    """Catches a commit or branch made of digits that is refused, loses its zeros or becomes infinity; lm_eval fails on it."""
    bare = revision.strip("'")
    by_flag = flags.parse([*BASE, "--model_args", f"revision={revision},dtype=float32"])[0]
    assert by_flag.model_args == {"pretrained": "m", "revision": bare, "dtype": "float32"}
    given: Any = f"pretrained=m,revision={revision}"  # for a dict
    assert Config(model_args=given).model_args["revision"] == bare
    of_lm_eval = {"pretrained": "m", "revision": 123}  # as its text gives it
    assert flags.config_of_model(of_lm_eval)[0].model_args["revision"] == "123"
    assert flags.parse([*BASE, "--model_args", "revision=none"])[0].model_args["revision"] is None


OPTIONS: dict[str, list[Any]] = {
    "limit": ["2.5", "many", "-1", "0", "inf", True],
    "num_fewshot": ["-1", "two", 2.0],
    "bootstrap_iters": ["1.5"],
    "seed": ["1,2", "x"],
    "samples": ['{"t": []}', "{}"],
    "gen_kwargs": ["top_k", 5],
    "numerics": ["fastest"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_what_a_flag_refuses_python_and_files_refuse(name: str, value: Any, tmp_path: Path) -> None:
    """Catches a TypeError from a Python call or a file where the flag says in one sentence what is wrong."""

    def refusal(read: Callable[[], Any]) -> str:
        with pytest.raises(UserError) as caught:
            read()
        return str(caught.value)

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"tasks": ["t"], name: value}))
    sentence = refusal(lambda: config_from_options(["t"], **{name: value}))
    assert sentence.startswith(f"--{name} ") and sentence == refusal(lambda: flags.parse(["--config", str(file)]))
    if isinstance(value, str):
        assert sentence == refusal(lambda: flags.parse([*BASE, f"--{name}={value}"]))


def test_text_options_of_a_python_call() -> None:
    """Catches options that lm_eval's Python function takes as text and that were used as they came."""
    found = config_from_options(["t"], limit="3", num_fewshot="2", seed="5", samples=None, gen_kwargs="", metadata="a=-1")
    assert (found.limit, found.num_fewshot, found.seed, found.gen_kwargs, found.metadata) == (3.0, 2, (5,) * 4, {}, {"a": -1})
    assert config_from_options(["t"], seed=None).seed == (None,) * 4
    assert config_from_options(["t"], limit=3).limit == 3


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:12"])
def test_a_gpu_where_there_is_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches lm_eval's silent change to the CPU, which may take days, taken over here: the flag is refused as it was typed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^--device {device} was asked for, but torch sees no CUDA device here: leave it out"):
        world.choose_device(device, 0)
    with pytest.raises(UserError, match=r"^--device must be cuda or cpu, got cuda:first$"):
        world.choose_device("cuda:first", 0)


CACHE_WORDS = {
    "{}": None,
    "{cache_requests: false}": None,
    "{cache_requests: null}": None,
    "{cache_requests: false, rewrite_requests_cache: false, delete_requests_cache: false}": None,
    "{cache_requests: true}": "true",
    "{cache_requests: true, rewrite_requests_cache: true, delete_requests_cache: false}": "refresh",
    "{cache_requests: false, rewrite_requests_cache: false, delete_requests_cache: true}": "delete",
}


@pytest.mark.parametrize("text", CACHE_WORDS)
def test_cache_requests_in_a_file(text: str, tmp_path: Path) -> None:
    """Catches a mapping, of which lm_eval's own default is an empty one, that switches something on."""
    file = tmp_path / "config.yaml"
    file.write_text(f"model_args: pretrained=m\ntasks: [t]\ncache_requests: {text}\n")
    ours, theirs = flags.parse(["--config", str(file)])[0].cache_requests, EvaluatorConfig.from_config(file).cache_requests
    assert ours == CACHE_WORDS[text]
    assert (ours in ("true", "refresh")) == bool(theirs.get("cache_requests", False))
    assert (ours == "delete") == bool(theirs.get("delete_requests_cache", False))


def test_no_word_for_the_cache_is_guessed(tmp_path: Path) -> None:
    """Catches a mapping of mappings, or of names that do not exist, taken for a yes."""
    for text, sentence in {
        "{cache_requests: {}}": None,
        "{cache_requests: {cache_requests: true}}": "--cache_requests cache_requests must be true or false, got",
        "{chache: true}": "--cache_requests has the unknown key chache: there are delete_requests_cache",
        "sometimes": "--cache_requests must be true, refresh or delete, got sometimes",
    }.items():
        file = tmp_path / "config.yaml"
        file.write_text(f"cache_requests: {text}\n")
        if sentence is None:
            assert flags.parse(["--config", str(file)])[0].cache_requests is None
            continue
        with pytest.raises(UserError, match=f"^{sentence}"):
            flags.parse(["--config", str(file)])


def test_the_defaults_of_lm_eval_in_a_file(tmp_path: Path) -> None:
    """Catches a file that names every setting of lm_eval's with its default, and that means something or is refused."""
    file = tmp_path / "config.yaml"
    mine = {"model_args": {"pretrained": "m"}, "tasks": ["t"], "device": None}  # lm_eval's is a GPU
    file.write_text(yaml.safe_dump(dataclasses.asdict(EvaluatorConfig()) | mine))
    assert flags.parse(["--config", str(file)])[0] == flags.parse(BASE)[0]


DRAWN = """\
task: drawn
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
fewshot_config: {sampler: default}
doc_to_text: '{{question}}'
doc_to_choice: [one, two]
doc_to_target: 0
"""


class _Stop(Exception):
    """Carries what was asked for out of lm_eval."""


class _Asked(LM):
    """A model that lm_eval asks, and that answers nothing."""

    def loglikelihood(self, requests: Any) -> Any:
        raise _Stop(fingerprints.describe_prompts(requests, {})["prompts_sha256"])

    loglikelihood_rolling = generate_until = loglikelihood


def _prompts_of_lm_eval(file: Path, folder: Path) -> str:
    parser = argparse.ArgumentParser()
    Run.create(parser.add_subparsers())
    config = EvaluatorConfig.from_cli(parser.parse_args(["run", "--config", str(file)]))
    manager = select.TaskManager(include_path=str(folder), include_defaults=False, metadata=config.metadata)
    seeds = config.seed or [None] * 4
    with pytest.raises(_Stop) as stopped:
        lm_eval.simple_evaluate(
            model=_Asked(),
            tasks=config.tasks,
            num_fewshot=config.num_fewshot,
            task_manager=manager,
            random_seed=seeds[0],
            numpy_random_seed=seeds[1],
            torch_random_seed=seeds[2],
            fewshot_random_seed=seeds[3],
        )
    return str(stopped.value)


def _our_prompts(file: Path, tokenizer: Any) -> str:
    config, _ = flags.parse(["--config", str(file)])

    def stop(asked: Asked) -> Any:
        raise _Stop(asked.fingerprints["prompts_sha256"])

    encoder = Encoder(tokenizer, 2048, None, None)
    with pytest.raises(_Stop) as stopped:
        harness.evaluate_tasks(config, encoder, None, stop, Phases(), [demo.TASKS_PATH])
    return str(stopped.value)


def test_a_file_of_lm_evals_draws_the_same_examples(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a seed list, or a cache that lm_eval's defaults name, that makes a file mean other prompts here than to lm_eval."""
    monkeypatch.chdir(tmp_path)  # the data's paths are relative
    for split, count in (("train", 40), ("test", 6)):
        lines = (json.dumps({"question": f"{split} question {number}"}) for number in range(count))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "drawn.yaml").write_text(DRAWN)
    prompts = {}
    for name, settings in {
        "list": "seed: [0, 1234, 1234, 1234]",
        "list and cache": "seed: [0, 1234, 1234, 1234]\ncache_requests: {}",
        "one": "seed: 42\ncache_requests: {}",
        "default": "",
        "text": "seed: '7'",
    }.items():
        file = tmp_path / f"{name}.config"
        file.write_text(f"model_args: {{pretrained: m}}\ntasks: [drawn]\nnum_fewshot: 2\ninclude_path: .\n{settings}\n")
        prompts[name] = _our_prompts(file, tiny_tokenizer)
        assert prompts[name] == _prompts_of_lm_eval(file, tmp_path), name
    assert prompts["list"] == prompts["list and cache"] == prompts["default"]
    assert len(set(prompts.values())) == 3
