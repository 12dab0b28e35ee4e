"""From a checkpoint, by lm_eval's model_args: its config, tokenizer and weights as transformers loads them.

What transformers raises over names, files and arguments that users give becomes one sentence (UserError).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import re
from typing import Any

import torch

from ddp_eval.config import PROMPT_ARGS
from ddp_eval.engines.hf import adapters, config_check, loading_report, model_files, quantization
from ddp_eval.engines.hf.draws import Draws, loading
from ddp_eval.engines.ops import masks
from ddp_eval.errors import UserError, is_out_of_memory, one_line
from ddp_eval.system import hub

# model_args that are read here or elsewhere in this package; the rest goes to `from_pretrained`.
_OWN_ARGS = (*PROMPT_ARGS, "pretrained", "tokenizer", "device", "peft", "backend")
ALIGNMENT = 64  # bytes
_LOADER_ARGS = ("dtype", "attn_implementation")  # for from_pretrained, not fields of the config
_SHARED_ARGS = ("revision", "subfolder", "trust_remote_code")


def resolve_pretrained(model_args: dict[str, Any]) -> str:
    """The path or hub name to load; "demo" is the small model in this package."""
    from ddp_eval import demo

    name = str(model_args["pretrained"])
    if name == "demo":
        return demo.MODEL_PATH
    looks_local = name.startswith(("/", "./", "../", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_local and not os.path.isdir(os.path.expanduser(name)):
        raise UserError(f"the model directory {name} does not exist")
    return os.path.expanduser(name) if name.startswith("~") else name


def load_config(model_args: dict[str, Any]) -> Any:
    """The model's transformers config. Raises UserError when there is none."""
    import transformers

    name, file = resolve_pretrained(model_args), os.path.join(model_args.get("subfolder") or "", "config.json")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, file)):
        raise UserError(f"the directory {name} holds no model: config.json is missing")
    own = (*_OWN_ARGS, *_SHARED_ARGS, *_LOADER_ARGS)
    overrides = {key: value for key, value in model_args.items() if key not in own and not quantization.is_own(key)}
    if os.path.isdir(name):
        config_check.check_file(os.path.join(name, file), str(model_args["pretrained"]), overrides)
        model_files.check_shards(os.path.join(name, model_args.get("subfolder") or ""))
    with _as_user_error(f"cannot load the model {model_args['pretrained']}"):
        if not os.path.isdir(name):
            hub.check_reach(name, file, model_args.get("revision"), model_args.get("cache_dir"))
        config, _ = transformers.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **overrides, **_shared(model_args))
    window = model_args.get("max_length") or model_args.get("max_model_len")
    config_check.check_config(config, str(model_args["pretrained"]), window)
    adapters.check_adapter(model_args)
    quantization.check_data_free(model_args, config)
    return config


def is_seq2seq(model_args: dict[str, Any], config: Any) -> bool:
    """Whether the model runs as an encoder-decoder, by lm_eval's rule: `backend=`, else the kind of its config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    backend = model_args.get("backend", "default")
    if backend != "default":
        return bool(backend == "seq2seq")
    known = getattr(config, "model_type", None) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return known and getattr(config, "is_encoder_decoder", True)  # the decoder of such a model alone is causal


def auto_class(config: Any, is_pair: bool = False) -> Any:
    """transformers' class that loads the model of a config: lm_eval's, and where that does not know the kind of model (those that
    read images, too: Qwen3-VL, Mistral 3, ...), the one that gives it a language head.

    is_pair: as an encoder-decoder. Raises UserError for models that only describe images, have no vocabulary, or do not
    predict the next token.
    """
    import transformers

    if is_pair:
        return transformers.AutoModelForSeq2SeqLM
    if not reads_images(config):
        return transformers.AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{config.model_type} models are encoder-decoders that read images, and cannot be evaluated on text alone"
        )
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        raise UserError(f"{config.model_type} models have no vocabulary, and cannot be evaluated on text")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    if "Diffusion" in str(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)):
        raise UserError(f"{config.model_type} models denoise whole blocks of text, and have no probability of the next token")
    return transformers.AutoModelForMultimodalLM


def reads_images(config: Any) -> bool:
    """Whether the model reads images or sound, and transformers' class of causal models does not know it."""
    from transformers.models.auto import modeling_auto

    causal, multimodal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return type(config) in multimodal and type(config) not in causal and not own_code


def window_config(config: Any) -> Any:
    """What lm_eval's rule for the window is applied to: of a model that it cannot load, the language model's config."""
    return config.get_text_config() if reads_images(config) else config


def load_tokenizer(model_args: dict[str, Any]) -> Any:
    """The tokenizer named by `tokenizer=`, else the model's own. Raises UserError when there is none."""
    import transformers

    name = str(model_args.get("tokenizer") or resolve_pretrained(model_args))
    options = {**_shared(model_args), "use_fast": model_args.get("use_fast_tokenizer", True)}
    if model_args.get("add_bos_token") is not None:
        options["add_bos_token"] = model_args["add_bos_token"]
    with _as_user_error(f"cannot load a tokenizer from {name} (another can be given as tokenizer=NAME in --model_args)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    if not len(tokenizer):
        raise UserError(
            f"the tokenizer in {name} has no vocabulary: are its files missing? Another can be given as tokenizer=NAME"
        )
    return tokenizer


def whole_model(model_args: dict[str, Any], config: Any, is_pair: bool = False) -> Any:
    """The model with shapes and no weights: on the meta device, in the dtype that it would be loaded in; where neither the config
    nor model_args say that, in float32.

    is_pair: as an encoder-decoder.
    """
    dtype = _dtype(model_args.get("dtype", "auto"))
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    options: dict[str, Any] = {**trust(model_args)}
    if model_args.get("attn_implementation") in masks.IMPLEMENTATIONS:  # others may not be installed here
        options["attn_implementation"] = model_args["attn_implementation"]
    with _as_user_error(f"cannot build the model {model_args['pretrained']}"), torch.device("meta"):
        # transformers writes the dtype into the config, by which others would then load.
        return auto_class(config, is_pair).from_config(copy.deepcopy(config), dtype=dtype, **options)


def load_weights(
    model_args: dict[str, Any],
    config: Any,
    device: torch.device,
    source: Any = None,
    part: bool = False,
    keeps_freed: bool = True,
    **options: Any,
) -> Any:
    """A model in evaluation mode on `device`. What loading draws comes from the seed of `draws.loading_for`.

    source: the class whose `from_pretrained` loads it; `auto_class` if not given. part: it takes only some of the
    checkpoint's weights. keeps_freed: see `keep_freed_memory`. options: for `from_pretrained`.
    """
    if device.type == "cpu":
        (keep_freed_memory if keeps_freed else return_freed_memory)()
    name = resolve_pretrained(model_args)
    if os.path.isdir(name):
        is_pair = is_seq2seq(model_args, config)
        config_check.check_size(
            lambda: int(whole_model(model_args, config, is_pair).num_parameters()),
            config,
            os.path.join(name, model_args.get("subfolder") or ""),
            str(model_args["pretrained"]),
        )
    extra = _loader_options(model_args, config, device)
    draws = Draws(loading().seeds[2])
    with (
        loading_report.watched(str(model_args["pretrained"]), draws) as found,
        _as_user_error(f"cannot load the model {model_args['pretrained']}"),
        draws,
    ):
        loaded: Any = (source or auto_class(config)).from_pretrained(
            name,
            config=config,
            dtype=_dtype(model_args.get("dtype", "auto")),
            output_loading_info=True,
            **_shared(model_args),
            **extra,
            **options,
        )
    model, more = loaded
    found.missing |= more["missing_keys"]  # of an adapter that lies in the same directory
    loading_report.refuse_random(name, found)
    with draws:
        loading_report.compute_unwritten(name, found, model, draws)
    if not part:
        loading_report.name_unused(name, found, model)
        loading_report.name_untied(name, model)
    if model_args.get("peft"):
        model = adapters.apply_adapter(model, load_tokenizer(model_args), model_args)
    try:
        model = (model if "device_map" in extra else model.to(device)).eval()
        if device.type == "cpu":
            align_weights(model)
        return model
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"the model {name} does not fit into the memory of {device}") from None


def _loader_options(model_args: dict[str, Any], config: Any, device: torch.device) -> dict[str, Any]:
    """What of model_args goes to `from_pretrained`, but for what all loaders share. Quantised weights are put on the device."""
    # What names a field of the config is in it already.
    own = (*_OWN_ARGS, *_SHARED_ARGS, "dtype")
    options = {
        key: value
        for key, value in model_args.items()
        if key not in own and not quantization.is_own(key) and (key in _LOADER_ARGS or not hasattr(config, key))
    }
    options.update(quantization.loading_options(model_args))
    if quantization.is_quantised(model_args, config):
        options["device_map"] = {"": str(device)}
    return options


def align_weights(model: Any) -> None:
    """Move float32 weights to addresses that are multiples of 64, as torch's own memory is.

    Weights mapped from a file begin anywhere, and MKL's last bits go by the address: the same weights in other files, received
    from another rank or gathered from several would give other numbers.
    """
    for weight in model.parameters():
        plain = type(weight.data) is torch.Tensor and weight.dtype == torch.float32 and weight.device.type == "cpu"
        if plain and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()


def keep_freed_memory() -> None:
    """Have glibc keep what tensors give back instead of returning it to the kernel.

    Otherwise each large tensor of each forward is mapped again and zeroed page by page: 10% of a run of a small model.
    """
    if libc := _glibc():
        libc.mallopt(_MMAP_MAX, 0)  # all from the heap
        libc.mallopt(_TRIM_THRESHOLD, 2**30)


def return_freed_memory() -> None:
    """Have glibc return large tensors to the kernel as soon as they are freed: weights that are gathered come and go.

    What it would keep of them came to more than the whole model.
    """
    if libc := _glibc():
        libc.mallopt(_MMAP_MAX, 2**16)
        libc.mallopt(_MMAP_THRESHOLD, 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 2**20)
        libc.malloc_trim(0)  # what was kept so far


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of <malloc.h>


def _glibc() -> Any:
    """The C library, None where it is another one."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _shared(model_args: dict[str, Any]) -> dict[str, Any]:
    """Without trust_remote_code transformers would ask on the terminal whether to run a checkpoint's code, on every rank."""
    return {key: model_args[key] for key in _SHARED_ARGS if key in model_args} | trust(model_args)


def trust(model_args: dict[str, Any]) -> dict[str, bool]:
    """For each loader of transformers."""
    return {"trust_remote_code": bool(model_args.get("trust_remote_code"))}


def _dtype(name: Any) -> Any:
    """A torch dtype by its name; "auto" is the checkpoint's own."""
    if name == "auto" or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, str(name), None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserError(f"dtype in --model_args must be auto, float32, bfloat16 or float16, got {name}")
    return found


@contextlib.contextmanager
def _as_user_error(what: str) -> Any:
    """Turn what transformers raises over unusable names, files and arguments into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise UserError(f"{what}: it takes no model_args {unknown[1]}") from error
        first = one_line(error, 1000).split(". ")[0].removesuffix(".")
        if "`trust_remote_code" in str(error):
            first += ": --trust_remote_code runs it"
        raise UserError(f"{what}: {one_line(first)}{hub.advice(error)}") from error
