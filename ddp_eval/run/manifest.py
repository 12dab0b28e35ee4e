"""What someone else needs to check or repeat a run: facts about model, tasks, plan, software and hardware."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddp_eval.config import Config
from ddp_eval.distributed.sharding import class_name, is_sharded
from ddp_eval.distributed.world import World
from ddp_eval.engines.hf import adapters, checkpoint, model_files
from ddp_eval.errors import UserError, one_line
from ddp_eval.output import versions
from ddp_eval.system import digests, machine

log = logging.getLogger("ddp_eval")

_MOST_DIGESTED_BYTES = 2**30  # of weights that were passed in; no file of theirs is known

# Of a description of a model's files: what must be the same for two runs to be of one model.
FILES = ("model_files", "tokenizer_files", "adapter_files", "code_files")


@functools.cache
def own_commit() -> dict[str, Any] | None:
    """Of the code that this process has imported, as `git_commit`: looked up once, since the files may change meanwhile."""
    return machine.git_commit(os.path.dirname(__file__))


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
        "packages": versions.describe_packages(),
        "hardware": machine.describe_hardware(),
        "git": own_commit(),
    }


def describe_model(name: str, model_args: dict[str, Any], revision: str | None, read_all: bool = False) -> dict[str, Any]:
    """Content digests of the model's and the tokenizer's files, None, with a warning, where they cannot be read; and `see_model`.

    name: the path or hub name that was loaded. model_args: as the loader takes them. revision: the hub's commit, or None for a
    directory. read_all: take no blob of the cache at its word.
    Raises UserError for an index of weights that leads out of the model's directory.
    """
    seen = see_model(model_args)  # before they are read: what changes meanwhile is looked at again
    found: dict[str, Any] = {}
    for kind, place in _places(name, model_args).items():
        try:
            files = [(prefix, digests.digest_directory(folder, names, read_all)["files"]) for prefix, folder, names in place()]
            merged = {f"{prefix}{file}": digest for prefix, one in files for file, digest in one.items()}
            if kind == "code_files" and not merged:
                continue
            over_all = digests.digest_strings(part for item in sorted(merged.items()) for part in item)
            found[kind] = {"sha256": over_all, "files": dict(sorted(merged.items()))}
        except UserError:
            raise
        except Exception as error:
            log.warning("the files of %s (%s) are not in the manifest: %s", name, kind, one_line(error, 200))
            found[kind] = None
    return {"pretrained": model_args["pretrained"], "revision": revision, "seen": seen, **found}


def describe_steady_model(model_args: dict[str, Any], revision: str | None, before: dict[str, str] | None) -> dict[str, Any]:
    """As `describe_model`, of a model that was loaded since `before`, which `look_at_model` gave.

    Raises UserError where a file that was there then is another now: what was loaded may be neither.
    """
    found = describe_model(checkpoint.resolve_pretrained(model_args), model_args, revision)
    now = look_at_model(model_args) or {}
    for path, look in (before or {}).items():
        if now.get(path, look) != look and model_files.is_loaded(path):
            raise UserError(f"{path} was written to while the model was loaded from it: start again when nobody writes there")
    return found


def see_model(model_args: dict[str, Any]) -> str | None:
    """Equal as long as nobody writes to the model's and tokenizer's files, which it does not read: paths, sizes, times of change.

    A copy's differ, though its digests do not. None if the files cannot be found.
    """
    looks = look_at_model(model_args)
    return None if looks is None else digests.digest_strings(f"{path} {look}" for path, look in sorted(looks.items()))


def look_at_model(model_args: dict[str, Any]) -> dict[str, str] | None:
    """{path: where it leads, size, times of change} of every file of the model. None if they cannot be found."""
    looks = {}
    try:
        for place in _places(checkpoint.resolve_pretrained(model_args), model_args).values():
            for _, folder, names in place():
                for path in (Path(folder).absolute() / name for name in names):
                    found = path.stat()
                    looks[str(path)] = f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    except UserError:
        raise
    except Exception:
        return None
    return looks


def is_same_model(manifest: dict[str, Any], model_args: dict[str, Any]) -> bool:
    """Whether the model's files are those of a finished run, as far as they can be read now; read whole if they were touched."""
    known, seen = manifest.get("model"), see_model(model_args)
    if not isinstance(known, dict) or seen in (None, known.get("seen")):
        return True
    now = describe_model(checkpoint.resolve_pretrained(model_args), model_args, None, read_all=True)
    return all(None in (known.get(kind), now.get(kind)) or known[kind] == now[kind] for kind in FILES)


def model_info(config: Config, model_config: Any, engine: dict[str, Any]) -> dict[str, Any]:
    """What lm_eval's HF backend says of its model in results["config"]. engine: what the engine says of itself."""
    adapter = config.model_args.get("peft")
    return {
        "model_num_parameters": engine["parameters"],
        "model_dtype": engine["dtype"],
        "model_revision": config.model_args.get("revision", "main"),
        "model_sha": getattr(model_config, "_commit_hash", None) or "",
        **({"peft_sha": adapters.commit_of(config.model_args)} if adapter else {}),
    }


def describe_loaded_model(model: Any) -> dict[str, Any]:
    """What tells one model that was passed in from another; its digest where that is a matter of a second, else None.

    Weights that are spread over ranks have none: this runs on one rank.
    """
    weights = model.state_dict()
    size_bytes = sum(weight.nbytes for weight in weights.values())
    is_small = size_bytes <= _MOST_DIGESTED_BYTES and not is_sharded(model)
    return {
        "class": class_name(model),
        "parameters": int(model.num_parameters()),
        "dtype": str(model.dtype),
        "weights_bytes": size_bytes,
        "weights_sha256": _digest_weights(weights) if is_small else None,
    }


def _digest_weights(weights: dict[str, torch.Tensor]) -> str:
    """One SHA-256 over names, types, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


Places = list[tuple[str, str, list[str]]]  # (what goes before the names in digests, directory, names of files in it)


def _places(name: str, model_args: dict[str, Any]) -> dict[str, Callable[[], Places]]:
    """Where each kind of files lies; asked for one at a time, since one may be out of reach."""
    tokenizer, adapter = str(model_args.get("tokenizer") or name), model_args.get("peft")
    code = bool(model_args.get("trust_remote_code"))

    def of_model() -> Places:
        folder = _folder(name, model_args)
        return [("", folder, model_files.names_of_model(folder, code))]

    def of_tokenizer() -> Places:
        if os.path.isfile(os.path.expanduser(tokenizer)):
            path = Path(tokenizer).expanduser()
            return [("", str(path.parent), [path.name])]
        folder = _folder(tokenizer, model_args)
        own = tokenizer == name or os.path.realpath(folder) == os.path.realpath(_folder(name, model_args))
        return [("", folder, model_files.names_of_tokenizer(folder, own, code))]

    def of_adapter() -> Places:
        folder = _folder(str(adapter), _place_of_adapter(model_args))
        return [("", folder, model_files.names_of_model(folder))]

    def of_code() -> Places:
        """Modules of other repositories, and of the model's own where its weights lie in a folder of it."""
        whole = [one for one in dict.fromkeys((name, tokenizer)) if not os.path.isfile(os.path.expanduser(one))]
        folders = dict.fromkeys(_folder(one, model_args) for one in whole)
        modules = dict.fromkeys(module for folder in folders for module in model_files.code_of_others(folder))
        found = [_folder_of_module(*module, model_args) for module in modules]
        places = list(dict.fromkeys(one for one in found if one is not None))
        if model_args.get("subfolder"):
            up = os.path.relpath(".", str(model_args["subfolder"]))
            places += [("", os.path.join(folder, up)) for folder in folders]
        return [(prefix, folder, model_files.names_of_code(folder)) for prefix, folder in places]

    kinds: dict[str, Callable[[], Places]] = {"model_files": of_model, "tokenizer_files": of_tokenizer}
    return kinds | ({"adapter_files": of_adapter} if adapter else {}) | ({"code_files": of_code} if code else {})


def _place_of_adapter(model_args: dict[str, Any]) -> dict[str, Any]:
    """The revision is the adapter's too, by lm_eval's rule; a subfolder and the place of a cache are the model's alone."""
    return {key: model_args[key] for key in ("revision",) if key in model_args}


def _folder(name: str, model_args: dict[str, Any]) -> str:
    """The directory that holds the files of a local model or adapter, or of one of the hub in the cache."""
    name = os.path.expanduser(name)
    if os.path.isdir(name):
        return os.path.join(name, model_args.get("subfolder") or "")
    import transformers

    place = {key: model_args[key] for key in ("revision", "subfolder", "cache_dir") if key in model_args}
    if model_args.get("download_dir"):  # vLLM's word for it
        place["cache_dir"] = model_args["download_dir"]
    for file in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        found = transformers.utils.cached_file(
            name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False, **place
        )
        if found:
            return os.path.dirname(found)
    raise FileNotFoundError(f"no files of {name} are in the cache")


def _folder_of_module(place: str, file: str, model_args: dict[str, Any]) -> tuple[str, str] | None:
    """(what goes before its names, directory) of a repository or directory whose code a checkpoint names.

    None for a module that nobody has fetched, such as that of a model with another head: it is not run.
    """
    import huggingface_hub

    if os.path.isdir(place):
        return f"{place}--", place
    options = {"revision": model_args.get("code_revision"), "cache_dir": model_args.get("cache_dir")}
    found = huggingface_hub.try_to_load_from_cache(place, file, **options)
    return (f"{place}--", os.path.dirname(found)) if isinstance(found, str) else None
