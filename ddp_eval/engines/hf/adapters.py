"""PEFT adapters (LoRA and similar) on a transformers model, by lm_eval's rules: its layers stay layers, nothing is merged.

The optional package peft puts an adapter's layers into the model itself, which stays the transformers model that the engine
knows.
Adapters that work by virtual tokens before the input are refused: a prefix tree has no room for them.

A tokenizer with more tokens than the model has rows makes the rows as lm_eval does: drawn around the mean of the others. Those
that the adapter brings replace them. What is left of them is scored with, since every softmax runs over all rows: it comes from
--seed, alike on all ranks, and the run says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import unittest.mock
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ddp_eval.engines.hf import loading_report, model_files
from ddp_eval.engines.hf.draws import Draws, loading
from ddp_eval.errors import UserError, one_line

log = logging.getLogger("ddp_eval")

_MOST_NAMED = 5  # tokens


def check_adapter(model_args: Mapping[str, Any]) -> None:
    """Raise UserError when the adapter of `peft=` is not there, or peft is not installed. Loads no weight."""
    name = model_args.get("peft")
    if not name:
        return
    looks_local = str(name).startswith(("/", "./", "../", "~")) or os.path.isdir(name)
    if looks_local and not os.path.isfile(os.path.join(os.path.expanduser(name), "adapter_config.json")):
        raise UserError(f"model_args peft={name} holds no adapter: adapter_config.json is missing")
    if os.path.isdir(os.path.expanduser(name)):
        model_files.check_shards(os.path.expanduser(name))
    _import_peft()


def commit_of(model_args: Mapping[str, Any]) -> str:
    """The hub's commit of the adapter of `peft=`, as far as the cache knows; "" for a directory, as in lm_eval."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    name, revision = os.path.expanduser(str(model_args["peft"])), model_args.get("revision")
    if os.path.isdir(name):
        return ""
    try:
        return extract_commit_hash(cached_file(name, "adapter_config.json", revision=revision, local_files_only=True), None) or ""
    except OSError:
        return ""


def apply_adapter(model: Any, tokenizer: Any, model_args: Mapping[str, Any]) -> Any:
    """The model with the layers of the adapter `peft=` in it. tokenizer: its length is that of the embeddings, as in lm_eval.

    What is drawn comes from the seed of `draws.loading_for`. Raises UserError when the adapter cannot be read, is of another
    model, lacks weights or needs virtual tokens.
    """
    peft = _import_peft()
    name, revision = os.path.expanduser(str(model_args["peft"])), str(model_args.get("revision", "main"))
    try:
        config = peft.PeftConfig.from_pretrained(name, revision=revision)
    except Exception as error:
        raise UserError(f"cannot read the adapter {name}: {one_line(error)}") from error
    _check_kind(config, f"the adapter {name}")
    with (
        loading_report.without_repeats(),
        Draws(loading().seeds[2]),
        _unused_weights(peft) as unused,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        try:
            added = _resize(model, len(tokenizer))
            adapted = peft.PeftModel.from_pretrained(model, name, revision=revision)
        except KeyError as error:  # a whole module that its config names
            raise UserError(f"the adapter {name} lacks weights for this model: there is no {one_line(error.args[0])}") from error
        except Exception as error:
            raise UserError(f"cannot put the adapter {name} on this model: {one_line(error)}") from error
    lacking = next((str(one.message) for one in said if "missing adapter keys" in str(one.message)), None)
    if lacking:
        raise UserError(f"the adapter {name} lacks weights for this model: {one_line(lacking)}")
    if unused and loading().speaks:
        log.warning("the adapter %s has %d weights that the model has no place for, such as %s", name, len(unused), min(unused))
    base = adapted.get_base_model()
    _note_random_rows(base, added, tokenizer, name)
    return base


def _resize(model: Any, num_tokens: int) -> dict[int, list[torch.Tensor]]:
    """Give the model a row for each token, as lm_eval does. Returns copies of the added rows by token, of input and output."""
    known = model.config.get_text_config().vocab_size
    if known == num_tokens:
        return {}
    with torch.no_grad():
        model.resize_token_embeddings(num_tokens)
        return {token: [weight[token].clone() for weight in _rows_of(model)] for token in range(known, num_tokens)}


def _rows_of(model: Any) -> list[torch.Tensor]:
    """(V, H) weights of the input and the output embeddings, with what an adapter has changed in them; once if they are tied."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    weights = [end.weight for end in ends if isinstance(getattr(end, "weight", None), torch.Tensor)]
    return weights[:1] if len(weights) == 2 and weights[0] is weights[1] else weights


def _note_random_rows(model: Any, added: dict[int, list[torch.Tensor]], tokenizer: Any, name: str) -> None:
    """Report the tokens of whose added rows one is still as it was drawn; the engine's description keeps them."""
    if not added:
        return
    with torch.no_grad():
        weights = _rows_of(model)
        random = [
            token
            for token, drawn in added.items()
            if any(torch.equal(weight[token].to(row.dtype), row) for weight, row in zip(weights, drawn, strict=False))
        ]
    if not random:
        return
    seed = loading().seeds[2]
    model.random_rows = {"tokens": random, "seed": seed}
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(random[:_MOST_NAMED])))
    if loading().speaks:
        log.warning(
            "neither the model nor the adapter %s has the embeddings of %d tokens of the tokenizer (%s%s): they are drawn from "
            "--seed, here %d, around the mean of the others, as lm_eval draws them, and have a part in every probability",
            *(name, len(random), names, ", ..." if len(random) > _MOST_NAMED else "", seed),
        )


@contextlib.contextmanager
def _unused_weights(peft: Any) -> Iterator[set[str]]:
    """Names of an adapter's weights that have no place in the model: `from_pretrained` keeps them to itself."""
    unused: set[str] = set()
    load = peft.peft_model.set_peft_model_state_dict

    def load_and_keep(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        unused.update(result.unexpected_keys)
        return result

    with unittest.mock.patch.object(peft.peft_model, "set_peft_model_state_dict", load_and_keep):
        yield unused


def unwrap(adapted: Any) -> Any:
    """The transformers model inside a PeftModel, its adapter's layers in it. Raises UserError where they need virtual tokens."""
    for name in adapted.active_adapters:
        _check_kind(adapted.peft_config[name], "the model's adapter")
    return adapted.get_base_model()


def _check_kind(config: Any, what: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "XLORA":
        raise UserError(
            f"{what} is of the type {kind}, which mixes adapters of other directories by the whole input and is not supported: "
            "evaluate it with lm_eval's own hf model"
        )
    if getattr(config, "alora_invocation_tokens", None) or kind == "SHADOW":
        raise UserError(
            f"{what} acts by what stands in the whole input ({'invocation tokens' if kind == 'LORA' else kind}), which is not "
            "supported: evaluate it with lm_eval's own hf model"
        )
    if config.is_prompt_learning:
        raise UserError(
            f"{what} is of the type {kind}, which puts virtual tokens before the input and is not supported: "
            "evaluate it with lm_eval's own hf model"
        )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"peft= in --model_args needs the package peft, which cannot be imported ({one_line(error)}): pip install '.[peft]'"
        ) from None
    return peft
