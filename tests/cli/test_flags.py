"""Flags to Config: against lm_eval's own parser where meanings are shared, and word by word where a user is told no."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval._cli.run import Run
from lm_eval._cli.utils import handle_cli_value_string, key_val_to_dict
from lm_eval._cli.utils import split_top_level as split_top_level_of_lm_eval
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_arg_string

from ddp_eval.cli.flags import build_parser, parse
from ddp_eval.cli.model_args import _IGNORED_MODEL_ARGS, _OPTIONAL_MODEL_ARGS, _REFUSED_MODEL_ARGS, KNOWN_MODEL_ARGS
from ddp_eval.config import DEFAULT_SEED, Config
from ddp_eval.errors import UserError
from ddp_eval.values import convert_value, split_top_level

MODEL = ["--model_args", "pretrained=m"]
BASE = [*MODEL, "--tasks", "t"]


def read(*argv: str) -> Config:
    return parse([*BASE, *argv])[0]


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv)
    return str(caught.value)


def read_by_lm_eval(argv: list[str]) -> EvaluatorConfig:
    parser = argparse.ArgumentParser()
    Run.create(parser.add_subparsers())
    return EvaluatorConfig.from_cli(parser.parse_args(["run", *argv]))


@pytest.mark.parametrize(
    "argv",
    [
        BASE,
        ["-a", "pretrained=m,dtype=float32", "add_bos_token=True", "-t", "a", "b,c"],
        ["-a", "pretrained=m", "-a", "dtype=auto", "-t", "a", "-t", "b"],
        ["-M", "hf", "-a", '{"pretrained": "m", "max_length": 64, "rope": {"factor": 2.0}}', "-t", "a"],
        ["-a", "pretrained=m,max_length=2048,prefix_token_id=1,attn_implementation=None", "-t", "a"],
        ["-a", "pretrained=org/a-model_b,revision=a=b", "-t", "dir/task-one.yaml"],
        ["-a", "pretrained=m,", "-t", "a", "--metadata", "tokenizer=gpt2", "max_seq_lengths=[4096,8192]"],
        [*BASE, "--gen_kwargs", "temperature=0.8", "top_p=0.95,do_sample=true", 'stop=["\\n\\n", ","]'],
        [*BASE, "--gen_kwargs", '{"until": ["a,b", "}"], "temperature": 0}'],
        [*BASE, "-L", "10"],
        [*BASE, "--limit", "0.25"],
        [*BASE, "--limit=1e2"],
        [*BASE, "-f", "0"],
        [*BASE, "--num_fewshot", "5"],
        [*BASE, "--num_fewshot", "5", "--num_fewshot", "3"],
        [*BASE, "--seed", "42"],
        [*BASE, "--seed", "0,None,8,52"],
        [*BASE, "--seed", "1, 2, 3"],
        [*BASE, "--seed", "None"],
        [*BASE, "-E", '{"t": [0, 5], "u": [1]}'],
        [*BASE, "--apply_chat_template"],
        [*BASE, "--apply_chat_template", "rag"],
        [*BASE, "--apply_chat_template", "--fewshot_as_multiturn", "false"],
        [*BASE, "--apply_chat_template", "--fewshot_as_multiturn"],
        [*BASE, "--apply_chat_template", "--fewshot_as_multiturn", "YES"],
        [*BASE, "--fewshot_as_multiturn", "0"],
        [*BASE, "--system_instruction", "Be brief, please."],
        [*BASE, "--system_instruction", ""],
        [*BASE, "--system_instruction", "--be-brief and kind"],
        [*BASE, "-o", "out", "-s"],
        [*BASE, "-o", "out", "-x"],
        [*BASE, "--show_config", "--wandb_args", "project=p,name=n", "--wandb_config_args", "a=1"],
        [*BASE, "--trackio_args", "project=p", "--hf_hub_log_args", "hub_results_org=o,push_results_to_hub=True"],
        [*BASE, "-a", "pretrained=m,enable_thinking=True,think_end_token=</think>"],
        [*BASE, "-w", "--include_path", "tasks", "--device", "cpu", "--confirm_run_unsafe_code"],
    ],
    ids=" ".join,
)
def test_the_same_command_line_means_what_it_means_to_lm_eval(argv: list[str]) -> None:
    """Catches a flag that is split, converted, merged or defaulted otherwise than by lm_eval 0.4.13."""
    ours, theirs = parse(argv)[0], read_by_lm_eval(argv)
    same = "model model_args tasks num_fewshot limit samples include_path output_path log_samples predict_only write_out"
    same += " apply_chat_template system_instruction fewshot_as_multiturn gen_kwargs trust_remote_code confirm_run_unsafe_code"
    same += " show_config wandb_args wandb_config_args trackio_args hf_hub_log_args"
    for name in same.split():
        theirs_value = getattr(theirs, name)
        if name == "tasks":
            theirs_value = [task for word in theirs_value for task in word.split(",")]
        assert _with_types(getattr(ours, name)) == _with_types(theirs_value), name
    assert list(ours.seed) == theirs.seed
    assert ours.model_args | ours.metadata == theirs.metadata


def _with_types(value: Any) -> str:
    """1, 1.0 and True are equal, and mean different things."""
    return repr(value)


VALUES = "true False TRUE none None 0 12 007 -1 +1 1.5 -0.5 1e3 1_000 inf nan 0x10 [1,2] (1,) {'a':1} 'q' \"1\" a/b '' [1, {[]:1}"


@pytest.mark.parametrize("text", [*VALUES.split(" "), "", " 2", "a b", "None,", "['a, b', \"c\"]", "$HOME", "3 apples", "٣"])
def test_a_value_is_converted_by_lm_evals_rule(text: str) -> None:
    """Catches a dtype, token id or switch that reaches the model with another type than lm_eval would give it.

    lm_eval has two rules: of text in files and Python calls, which here decides on numbers and words, and of flags.
    """
    expected = handle_arg_string(text)
    if isinstance(expected, str):
        try:
            expected = handle_cli_value_string(text)
        except TypeError:  # lm_eval breaks down on an unhashable key; we keep the text
            expected = text
    assert _with_types(convert_value(text)) == _with_types(expected)


def test_a_superscript_digit_stays_text() -> None:
    """Catches int("²"), on which lm_eval fails: isnumeric is not isdecimal."""
    assert convert_value("²") == "²"


@pytest.mark.parametrize(
    "text",
    ["a=1,b=2", "a=[1,2],b=3", "a={'x':(1,2)},b", "a='x,y',b=\"p,q\"", ",,a=1,", "a=],b=(,c", "a='it,b=1", "", "a=[(1,2],3),b=4"],
)
def test_commas_split_where_lm_eval_splits(text: str) -> None:
    """Catches a list or a quoted text that is torn at its commas."""
    assert split_top_level(text) == split_top_level_of_lm_eval(text)


@pytest.mark.parametrize("text", ["a=1,b=x", "a=b=c", "a=", "a=1,a=2", "stop=['a,b'],n=3"])
def test_pairs_are_read_as_lm_eval_reads_them(text: str) -> None:
    """Catches a value cut at its second = sign, and a first one that wins over the last."""
    assert read("--gen_kwargs", text).gen_kwargs == key_val_to_dict(text)


def test_pairs_and_json_mix_where_lm_eval_would_drop_or_fail() -> None:
    """Catches settings lost after a JSON object, and {…} refused inside of the first word: both are lm_eval's."""
    assert read("--gen_kwargs", '{"a": 1}', "b=2", '{"a": 3}').gen_kwargs == {"a": 3, "b": 2}
    assert read("--gen_kwargs", "a={'x': 1}, b=2").gen_kwargs == {"a": {"x": 1}, "b": 2}


DEMO_MODEL = "no pretrained= is in --model_args: this evaluates the small demo model that ships with ddp_eval"
DEMO_TASKS = "no --tasks are given: this evaluates the small demo tasks that ship with ddp_eval"


def test_nothing_said_is_the_embedded_default() -> None:
    """Catches a bare `torchrun -m ddp_eval` that evaluates nothing, or flags that switch the default off."""
    assert parse([]) == parse(["run"]) == (Config(model_args={"pretrained": "demo"}, tasks=["demo"]), [DEMO_MODEL, DEMO_TASKS])
    config, _ = parse(["--limit", "3", "-o", "out", "-a", "dtype=float32"])
    assert (config.limit, config.output_path, config.tasks) == (3.0, "out", ["demo"])
    assert config.model_args == {"dtype": "float32", "pretrained": "demo"}


def test_run_may_be_said_or_left_out() -> None:
    """Catches a default subcommand that parses otherwise than the named one."""
    assert parse(["run", *BASE, "-f", "2"]) == parse([*BASE, "-f", "2"])


def test_dashes_and_underscores_are_one_in_names_and_kept_in_values() -> None:
    """Catches a flag known in one spelling only, and a model name whose dashes are rewritten."""
    dashes = [
        "--model-args",
        "pretrained=my-model",
        "--tasks=a-b",
        "--num-fewshot=2",
        "--no-packing",
        "--system-instruction=--a-b",
    ]
    config, _ = parse(dashes)
    assert parse([token.replace("--no-packing", "--no_packing").replace("--num-f", "--num_f") for token in dashes])[0] == config
    assert (config.model_args, config.tasks, config.num_fewshot) == ({"pretrained": "my-model"}, ["a-b"], 2)
    assert (config.packing, config.system_instruction) == (False, "--a-b")


def test_our_own_flags() -> None:
    """Catches a flag that lm_eval lacks and that never reaches Config."""
    config = read("--overwrite", "--no_packing", "--max_pack_tokens", "512", "--bootstrap_iters", "0", "--model", "huggingface")
    assert (config.overwrite, config.packing, config.max_pack_tokens, config.bootstrap_iters) == (True, False, 512, 0)
    assert config.model == "hf"


def test_apply_chat_template_takes_true_and_false() -> None:
    """Catches `--apply_chat_template false` applying a template, as it does in lm_eval, where false is a template's name."""
    assert read("--apply_chat_template", "False").apply_chat_template is False
    assert read("--apply_chat_template", "true").apply_chat_template is True


def test_trust_remote_code_in_model_args_is_the_flag() -> None:
    """Catches two switches for one thing, of which one is forgotten."""
    for argv in (
        ["-a", "trust_remote_code=True"],
        ["--trust_remote_code"],
        ["--trust_remote_code", "-a", "trust_remote_code=False"],
    ):
        config = read(*argv)
        assert config.trust_remote_code and config.model_args == {"pretrained": "m"}
    assert not read("-a", "trust_remote_code=False").trust_remote_code


def test_samples_from_a_file(tmp_path: Path) -> None:
    """Catches a path that is taken for the mapping itself."""
    path = tmp_path / "samples.json"
    path.write_text('{"t": [3, 1]}')
    assert read("--samples", str(path)).samples == {"t": [3, 1]}


def test_what_no_longer_matters_is_accepted_and_said_to_be_ignored() -> None:
    """Catches an lm_eval command line that stops working, or a setting that is dropped without a word."""
    model_args = "batch_size=4,max_batch_size=8,logits_cache=False,truncation=True,softmax_dtype=float32,offload_folder=x"
    config, notes = parse([*BASE, "-b", "auto:4", "--max_batch_size", "64", "-v", "debug", "-a", model_args])
    assert config == Config(model_args={"pretrained": "m"}, tasks=["t"])
    assert notes == [
        "--batch_size is ignored: packs are sized by cost, not by a batch size",
        "--max_batch_size is ignored: packs are sized by cost, not by a batch size",
        "--verbosity is ignored: set the environment variable LMEVAL_LOG_LEVEL for lm_eval's messages",
        "model_args batch_size is ignored: packs are sized by cost, not by a batch size",
        "model_args max_batch_size is ignored: packs are sized by cost, not by a batch size",
        "model_args logits_cache is ignored: requests with the same prefix always share it",
        "model_args truncation is ignored: a request that is too long always keeps its last tokens",
        "model_args softmax_dtype is ignored: log-probabilities are always computed in float32",
        "model_args offload_folder is ignored: --layout goes by the memory that the GPUs have",
    ]


def test_model_args_that_are_switched_off_are_left_out() -> None:
    """Catches parallelize=False refused, or handed to a loader that does not know it."""
    config = read("-a", "parallelize=False,peft=None,load_in_8bit=False,backend=default,enable_thinking=None,dtype=auto")
    assert config.model_args == {"pretrained": "m", "dtype": "auto"}


def test_layouts_have_lm_evals_spellings_too() -> None:
    """Catches parallelize=True or tp_plan=auto that loses its meaning, or reaches the model's loader."""
    assert read().layout == "auto"
    assert read("--layout", "layers:4").layout == "layers:4"
    for setting, layout in {"parallelize=True": "layers", "tp_plan=auto": "tensor"}.items():
        config = read("-a", setting)
        assert (config.layout, config.model_args) == (layout, {"pretrained": "m"})
    assert read("-a", "parallelize=True", "--layout", "layers").layout == "layers"
    assert read("-a", "parallelize=False", "--layout", "tensor:2").layout == "tensor:2"


LAYOUTS = "--layout must be auto, measure, replicas, tensor:K, layers:K or shard:K with K of 2 or more, got "
REFUSED = {
    "--layout rows": LAYOUTS + "rows",
    "--layout layers:1": LAYOUTS + "layers:1",
    "--layout replicas:2": LAYOUTS + "replicas:2",
    "-a tp_plan=mine": "model_args tp_plan must be auto, got mine: the model brings its own plan",
    "-a parallelize=True --layout tensor:2": "--layout and parallelize=True ask for different layouts: give one of them",
    "--model vllm --numerics alone": (
        "--numerics alone is not for --model vllm, which batches requests as they come: give --model hf"
    ),
    "lst tasks": "unknown command lst: there are run (may be left out), sweep, ls, validate, plan, compare, report and reproduce",
    "--fewshots 3": "unknown flag --fewshots: did you mean --num_fewshot or --fresh?",
    "--model-arg pretrained=m": "unknown flag --model_arg: did you mean --model_args or --model?",
    "-limit 5": "unknown flag -limit: did you mean --limit?",
    "-z": "unknown flag -z: see --help for those there are",
    "--max_length 50": "unknown flag --max_length: give it as --model_args max_length=VALUE",
    "--limit 5 10": "10 belongs to no flag (see --help)",
    "--limit": "--limit needs a value (see --help)",
    "-t": "--tasks needs a value (see --help)",
    "--log_samples=yes": "--log_samples takes no value, got 'yes'",
    "--limit ten": "--limit must be a number, got ten",
    "--limit 0": "--limit must be more than 0 (documents per task, or a fraction below 1), got 0",
    "--limit -1": "--limit must be more than 0 (documents per task, or a fraction below 1), got -1",
    "--limit nan": "--limit must be more than 0 (documents per task, or a fraction below 1), got nan",
    "--limit 1.5": "--limit must be a whole number or a fraction below 1, got 1.5",
    "--num_fewshot -1": "--num_fewshot must be 0 or more, got -1",
    "--num_fewshot 2.0": "--num_fewshot must be a whole number, got 2.0",
    "--max_pack_tokens 0": "--max_pack_tokens must be 1 or more, got 0",
    "--bootstrap_iters few": "--bootstrap_iters must be a whole number, got few",
    "--model gguf": "--model must be hf or vllm, got gguf",
    "--seed x": "--seed must be whole numbers or None, got x",
    "--seed 1,2": "--seed must be 1 or 4 values (random, numpy, torch, few-shot), got 2",
    "--seed 1,2,3,4,5": "--seed must be 1 or 4 values (random, numpy, torch, few-shot), got 5",
    "--seed -1": "--seed must be 0 to 4294967295 for numpy, got -1",
    "--seed 0,1,99999999999999999999,3": (
        "--seed must be -9223372036854775808 to 18446744073709551615 for torch, got 99999999999999999999"
    ),
    "--gen_kwargs temperature": "--gen_kwargs must be key=value pairs, got 'temperature'",
    "--gen_kwargs =1": "--gen_kwargs must be key=value pairs, got '=1'",
    "--gen_kwargs {'a':1}": (
        "--gen_kwargs must be a JSON object, with double quotes, got {'a':1}: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    ),
    "--samples none.json": (
        "--samples must be a JSON object or the path of a file with one: none.json cannot be read (No such file or directory)"
    ),
    '--samples {"t":[]}': "--samples must name at least one document for task t",
    '--samples {"t":[-1]}': "--samples must list whole document numbers from 0 for task t, got [-1]",
    '--samples {"t":[0]} --limit 2': "--samples and --limit exclude each other: give one of them",
    "--fewshot_as_multiturn": "--fewshot_as_multiturn needs --apply_chat_template: turns exist only in a chat template",
    "--fewshot_as_multiturn maybe": "--fewshot_as_multiturn must be true or false, got maybe",
    "--log_samples": "--log_samples needs --output_path DIR, where the samples are to be written",
    "--predict_only": "--predict_only needs --output_path DIR, where the samples are to be written",
    "--output_path=": "--output_path must not be empty: leave it out instead",
    "--output_path out.json": "--output_path must be a directory, got out.json: results.json is written into it",
    "--config none.yaml": ("--config must be a YAML file that can be read: none.yaml cannot be read (No such file or directory)"),
    "-a pretrain=gpt2": "model_args pretrain is unknown: did you mean pretrained?",
    "-a dtpye=float32": "model_args dtpye is unknown: did you mean dtype?",
    "-a pretrained=": "model_args pretrained must be a path or a name, got nothing",
    '-a {"revision":1.5}': "model_args revision must be text, got 1.5 (revision='\"123\"' keeps a number as text)",
    "-a trust_remote_code=maybe": "model_args trust_remote_code must be true or false, got maybe",
    "-a device=cuda:1": "model_args device is not supported: use --device cuda:1",
    "-a backend=onnx": "model_args backend must be default, causal or seq2seq, got onnx",
    "-c cache.db": ("--use_cache is not supported: use --output_path DIR: the same command there resumes"),
    "--check_integrity": "--check_integrity is not supported: check tasks with python -m ddp_eval validate --tasks",
    "--cache_requests often": "--cache_requests must be true, refresh or delete, got often",
    "--wandb_config_args a=b": "--wandb_config_args needs --wandb_args, such as --wandb_args project=NAME",
    "--hf_hub_log_args token=secret": ("--hf_hub_log_args must not hold a token: set HF_TOKEN, or log in with hf auth login"),
    "--hf_hub_log_args output_path=o": "--hf_hub_log_args must not hold an output_path: give --output_path",
}
REFUSED |= {
    f"-a {setting}": f"model_args {setting.partition('=')[0]} is not supported yet: {why}"
    for setting, why in {
        "device_map=auto": "--layout says how the model lies over the ranks",
        "delta=d": "add the delta to the base model, save it, and evaluate what you saved",
        "autogptq=True": "leave it out, transformers loads a checkpoint whose config.json says that it is GPTQ",
        "gptqmodel=True": "leave it out, transformers loads a checkpoint whose config.json says that it is GPTQ",
        "gguf_file=x": "convert the model to safetensors and evaluate that",
        "mixed_precision_dtype=float16": "choose one precision for the whole model with dtype",
    }.items()
}


@pytest.mark.parametrize(("words", "sentence"), REFUSED.items(), ids=REFUSED)
def test_bad_flags_get_one_sentence(words: str, sentence: str) -> None:
    """Catches a traceback, an argparse usage dump, or a refusal that does not say what to do."""
    assert refusal([*(BASE if words.startswith("-") else []), *words.split(" ")]) == sentence


@pytest.mark.parametrize(
    ("argv", "tasks", "pretrained", "notes"),
    [
        (["-t", "arc_easy"], ["arc_easy"], "demo", [DEMO_MODEL]),
        (["-t", "arc_easy", "-a", "dtype=float32"], ["arc_easy"], "demo", [DEMO_MODEL]),
        (MODEL, ["demo"], "m", [DEMO_TASKS]),
        ([*MODEL, "-t", "arc_easy"], ["arc_easy"], "m", []),
    ],
)
def test_half_a_question_is_completed_and_said_to_be(argv: list[str], tasks: Any, pretrained: str, notes: list[str]) -> None:
    """Catches a default that the help promises and that is refused, and one that is taken without a word."""
    config, said = parse(argv)
    assert (config.tasks, config.model_args["pretrained"], said) == (tasks, pretrained, notes)


def test_a_list_of_no_tasks_is_refused() -> None:
    """Catches commas alone taken for the default."""
    assert refusal([*MODEL, "--tasks", ","]) == "--tasks must name at least one task"


@pytest.mark.parametrize("key", ["torch_dtype", "rope_theta", "code_revision", "use_cache", "max_position_embeddings"])
def test_what_the_loader_may_know_is_left_to_it(key: str) -> None:
    """Catches an argument of transformers' taken for a misspelt one of ours."""
    assert read("-a", f"{key}=1").model_args[key] == 1


def test_samples_file_that_is_no_json(tmp_path: Path) -> None:
    """Catches a traceback of json out of a file that the user named."""
    path = tmp_path / "samples.json"
    path.write_text("t: [1]")
    wanted = f"--samples must be a JSON object or the path of a file with one: {path} is not JSON: Expecting value"
    assert refusal([*BASE, "--samples", str(path)]).startswith(wanted)
    path.write_text("[1]")
    assert refusal([*BASE, "--samples", str(path)]).startswith("--samples must be a JSON object such as")


FILE = """
model_args: {pretrained: m, dtype: float32, max_length: 64}
tasks: [a, "b,c"]
num-fewshot: 5
limit: 10
seed: [1, null, 3, 4]
apply_chat_template: true
gen_kwargs: temperature=0.5,stop=["a,b"]
samples: null
use_cache: null
wandb_args: {}
batch_size: auto
"""


def test_a_config_file_holds_the_same_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    """Catches a YAML value that skips a conversion, a null taken for a value, or precedence turned round."""
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    config, notes = parse(["-C", str(path)])
    assert config == Config(
        model_args={"pretrained": "m", "dtype": "float32", "max_length": 64},
        tasks=["a", "b", "c"],
        num_fewshot=5,
        limit=10.0,
        seed=(1, None, 3, 4),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        gen_kwargs={"temperature": 0.5, "stop": ["a,b"]},
    )
    assert notes == ["--batch_size is ignored: packs are sized by cost, not by a batch size"]
    config, _ = parse(["--config", str(path), "--num_fewshot", "0", "-a", "pretrained=n", "--apply_chat_template", "false"])
    assert (config.num_fewshot, config.model_args, config.apply_chat_template) == (0, {"pretrained": "n"}, False)


@pytest.mark.parametrize(
    "text",
    [
        "model_args: {pretrained: m}\ntasks: a,b\nseed: 42",
        "model_args: pretrained=m,dtype=float32\ntasks: [a]\nseed: [1, 2, 3]",
        "model_args: {pretrained: m}\ntasks: [a]\nseed: null",
        "model_args: {pretrained: m}\ntasks: [a]\nsamples: {a: [1]}\nfewshot_as_multiturn: false",
        "model_args: {pretrained: m}\ntasks: [a]\nsamples: '{\"a\": [1]}'\npredict_only: true\noutput_path: out",
    ],
)
def test_a_config_file_means_what_it_means_to_lm_eval(text: str, tmp_path: Path) -> None:
    """Catches a YAML file of lm_eval's that gives other seeds, tasks or samples here."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    ours, theirs = parse(["--config", str(path)])[0], read_by_lm_eval(["--config", str(path)])
    for name in ("model_args", "samples", "fewshot_as_multiturn", "log_samples", "predict_only", "output_path"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.seed) == (theirs.seed or [None] * len(DEFAULT_SEED))
    assert ours.tasks == (theirs.tasks.split(",") if isinstance(theirs.tasks, str) else theirs.tasks)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fewshots: 3", "--config FILE has the unknown key fewshots: did you mean num_fewshot or fresh?"),
        ("config: other.yaml", "--config FILE must not name another config file"),
        ("5: 3", "--config FILE has the unknown key 5: see --help for those there are"),
        ("- a", "--config must hold flag names with their values, FILE holds ['a']"),
        ("", "--config must hold flag names with their values, FILE holds None"),
        (
            "use_cache: c.db",
            "--use_cache is not supported: use --output_path DIR: the same command there resumes",
        ),
        ("num_fewshot: true", "--num_fewshot must be a whole number, got True"),
        ("num_fewshot: 2.5", "--num_fewshot must be a whole number, got 2.5"),
        ("limit: [1]", "--limit must be a number, got [1]"),
        ("tasks: {a: 1}", "--tasks must be task names, got {'a': 1}"),
        ("tasks: [no]", "--tasks must be task names, got [False]"),
        ("model_args: 3", "--model_args must be key=value pairs, got 3"),
        ("output_path: 3", "--output_path must be text, got 3"),
        ("log_samples: maybe", "--log_samples must be true or false, got maybe"),
        ("seed: 1.5", "--seed must be whole numbers or None, got 1.5"),
        ("seed: []", "--seed must be 1 or 4 values (random, numpy, torch, few-shot), got 0"),
        ("samples: [1]", '--samples must be a JSON object such as {"task": [0, 5]}, or the path of a file with one'),
        ("apply_chat_template: 3", "--apply_chat_template must be text, got 3"),
    ],
)
def test_bad_config_files_get_the_sentences_of_bad_flags(text: str, sentence: str, tmp_path: Path) -> None:
    """Catches a key that is skipped because it is misspelt, and a value that no flag would have let through."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    flags = [] if text.startswith(("tasks", "model_args")) else BASE
    assert refusal(["--config", str(path), *flags]) == sentence.replace("FILE", str(path))


def test_a_config_file_that_is_no_yaml(tmp_path: Path) -> None:
    """Catches the many lines of a YAML error where one sentence is promised."""
    path = tmp_path / "run.yaml"
    path.write_text("tasks: [a\nlimit: 3")
    sentence = refusal(["--config", str(path)])
    assert sentence.startswith(f"--config must be a YAML file that can be read: {path} is not YAML: while parsing")
    assert "\n" not in sentence
    path.write_bytes(b"\xff\xfe\x00tasks")
    assert refusal(["--config", str(path)]).startswith(f"--config must be a YAML file that can be read: {path} ")


def test_help_is_short_and_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a flag that no user can find, one whose default is a secret, and help that outgrows a screen."""
    with pytest.raises(SystemExit) as caught:
        parse(["run", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(text.splitlines()) < 90 and max(map(len, text.splitlines())) <= 100
    assert text.startswith("usage: torchrun --nproc_per_node=N -m ddp_eval [run] [flags]")
    fields = [name for name in Config.__dataclass_fields__ if name != "packing"]
    for name in (*fields, "no_packing", "config", "batch_size", "max_batch_size", "verbosity", "version"):
        assert re.search(rf"--{name}\b", text), name
    assert "use_cache" not in text and text.isascii()


def test_every_flag_of_lm_eval_is_known() -> None:
    """Catches a flag of lm_eval that is called unknown instead of being served, ignored or refused with a reason."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    Run.create(subparsers)
    theirs = {spelling for action in subparsers.choices["run"]._actions for spelling in action.option_strings}
    ours = {spelling for action in build_parser()._actions for spelling in action.option_strings}
    assert theirs - ours == set()


def test_every_model_arg_of_lm_eval_is_known() -> None:
    """Catches an argument of lm_eval's HF backend that nobody has decided on: served, ignored, or refused with a reason."""
    theirs = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    by_flag = {"parallelize", "tp_plan", "trust_remote_code", "device"}
    served = {*KNOWN_MODEL_ARGS, *_OPTIONAL_MODEL_ARGS}
    decided = (served, set(_IGNORED_MODEL_ARGS), set(_REFUSED_MODEL_ARGS), by_flag)
    assert theirs <= set().union(*decided)
    assert sum(map(len, decided)) == len(set().union(*decided)), "each in one place"
    # what HFLM hands on to transformers
    assert {"load_in_8bit", "load_in_4bit", "quantization_config"} <= served


@pytest.mark.parametrize(("words", "kept"), [("", "true"), ("refresh", "refresh"), ("delete", "delete")])
def test_cache_requests_has_lm_evals_words(words: str, kept: str) -> None:
    """Catches the bare flag that means something else."""
    argv = ["--cache_requests", *words.split()]
    theirs = read_by_lm_eval([*BASE, *argv]).cache_requests
    assert theirs["rewrite_requests_cache"] == (kept == "refresh") and theirs["delete_requests_cache"] == (kept == "delete")
    assert read(*argv).cache_requests == kept
    assert read().cache_requests is None


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches --version failing in a checkout that was never installed."""
    with pytest.raises(SystemExit) as caught:
        parse(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"ddp_eval (\d\S*|\(not installed\))\n", capsys.readouterr().out)


def test_reading_flags_loads_no_heavy_library() -> None:
    """Catches an import that makes every rank pay seconds, or touches a GPU, before the flags are even read."""
    code = "import json, sys; from ddp_eval.cli.flags import parse; parse(['--limit', '3']); print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert not {"torch", "lm_eval", "transformers", "datasets", "numpy"} & set(loaded)
