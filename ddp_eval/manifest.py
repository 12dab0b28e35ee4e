"""What someone else needs to check or repeat a run: facts about model, tasks, plan, software and hardware."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ddp_eval import digests, machine
from ddp_eval.config import Config
from ddp_eval.distributed import World
from ddp_eval.engines import checkpoint
from ddp_eval.errors import one_line

log = logging.getLogger("ddp_eval")

_MOST_DIGESTED_BYTES = 2**30  # of weights that were passed in; no file of theirs is known

# What a tokenizer keeps in its directory, beside the weights.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip


def describe_run(
    config: Config, world: World, results_dict: dict[str, Any], facts: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    """The manifest. facts: of engine, prompts and plan; model: from `describe_model` or `describe_loaded_model`."""
    return {
        "config": config.recorded,
        "working_directory": os.getcwd(),  # what relative paths in the config start from
        "model": model,
        "tasks": {"versions": results_dict["versions"], "n_samples": results_dict["n-samples"]},
        **facts,
        "ranks": {"world_size": world.world_size, "device": world.device.type},
        "seeds": dict(zip(("random", "numpy", "torch", "fewshot"), config.seed, strict=True)),
        "packages": machine.describe_packages(),
        "hardware": machine.describe_hardware(),
        "git": machine.git_commit(os.path.dirname(__file__)),
    }


def describe_model(name: str, model_args: dict[str, Any], revision: str | None) -> dict[str, Any]:
    """Content digests of the model's and the tokenizer's files, None, with a warning, where they cannot be read; and `see_model`.

    name: the path or hub name that was loaded. revision: the hub's commit, or None for a directory.
    """
    tokenizer, adapter = str(model_args.get("tokenizer") or name), model_args.get("peft")
    return {
        "pretrained": model_args["pretrained"],
        "revision": revision,
        "seen": see_model(model_args),  # before they are read: what changes meanwhile is looked at again
        "model_files": _digest(name, model_args, None),
        "tokenizer_files": _digest(tokenizer, model_args, _TOKENIZER_FILES),
        **({"adapter_files": _digest(adapter, _place_of_adapter(model_args), None)} if adapter else {}),
    }


def see_model(model_args: dict[str, Any]) -> str | None:
    """Equal as long as nobody writes to the model's and tokenizer's files, which it does not read: paths, sizes, times of change.

    A copy's differ, though its digests do not. None if the files cannot be found.
    """
    name, adapter = checkpoint.resolve_pretrained(model_args), model_args.get("peft")
    facts = []
    try:
        folders = [_folder(each, model_args) for each in (name, str(model_args.get("tokenizer") or name))]
        folders += [_folder(adapter, _place_of_adapter(model_args))] if adapter else []
        for folder in dict.fromkeys(folders):
            for path in sorted(Path(folder).iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    found = path.stat()
                    facts.append(f"{path.absolute()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}")
    except Exception:
        return None
    return digests.digest_strings(facts)


def is_same_model(manifest: dict[str, Any], model_args: dict[str, Any]) -> bool:
    """Whether the model's files are those of a finished run, as far as they can be read now; read whole if they were touched."""
    known, seen = manifest.get("model"), see_model(model_args)
    if not isinstance(known, dict) or seen in (None, known.get("seen")):
        return True
    now = describe_model(checkpoint.resolve_pretrained(model_args), model_args, None)
    kinds = ("model_files", "tokenizer_files", "adapter_files")
    return all(None in (known.get(kind), now.get(kind)) or known[kind] == now[kind] for kind in kinds)


def describe_loaded_model(model: Any) -> dict[str, Any]:
    """What tells one model that was passed in from another; its digest where that is a matter of a second, else None."""
    weights = model.state_dict()
    size_bytes = sum(weight.nbytes for weight in weights.values())
    return {
        "class": type(model).__name__,
        "parameters": int(model.num_parameters()),
        "dtype": str(model.dtype),
        "weights_bytes": size_bytes,
        "weights_sha256": _digest_weights(weights) if size_bytes <= _MOST_DIGESTED_BYTES else None,
    }


def _digest_weights(weights: dict[str, torch.Tensor]) -> str:
    """One SHA-256 over names, types, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(name: str, model_args: dict[str, Any], files: tuple[str, ...] | None) -> dict[str, Any] | None:
    try:
        return digests.digest_directory(_folder(name, model_args), files)
    except Exception as error:
        log.warning("the files of %s are not in the manifest: %s", name, one_line(error, 200))
        return None


def _place_of_adapter(model_args: dict[str, Any]) -> dict[str, Any]:
    """The revision is the adapter's too, by lm_eval's rule; a subfolder is the model's alone."""
    return {key: model_args[key] for key in ("revision",) if key in model_args}


def _folder(name: str, model_args: dict[str, Any]) -> str:
    """The directory that holds the files of a local model or adapter, or of one of the hub in the cache."""
    name = os.path.expanduser(name)
    if os.path.isdir(name):
        return os.path.join(name, model_args.get("subfolder") or "")
    import transformers

    place = {key: model_args[key] for key in ("revision", "subfolder") if key in model_args}
    for file in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        found = transformers.utils.cached_file(
            name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False, **place
        )
        if found:
            return os.path.dirname(found)
    raise FileNotFoundError(f"no files of {name} are in the cache")
