"""What transformers finds while it loads a checkpoint: weights that are not in it are refused, those left out are named.

`from_pretrained(..., output_loading_info=True)` returns less than it finds (5.23): not the missing weights that the model's class
declares to be no matter, and of a directory that holds an adapter too only what the adapter lacks. So its last step is watched.
Legitimately absent are tied weights, whose partner is there, and what the model's code computes: position ids, masks, the
frequencies of rotary embeddings. Those that its constructor computes, and nothing else, are lost on the way: transformers
constructs without memory and then takes whatever is there. Their values are fetched from the constructor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import threading
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

from ddp_eval.engines.hf.draws import Draws, loading
from ddp_eval.errors import UserError, one_line

log = logging.getLogger("ddp_eval")

# What transformers logs of a load on every rank, and this module or adapters.py once.
_REPEATED = (
    "The tied weights mapping and config for this model",
    " LOAD REPORT",
    "The new embeddings will be initialized from",
    "The new lm_head weights will be initialized from",
)


@dataclasses.dataclass
class LoadingReport:
    """Names in the model: weights that are not in the checkpoint, weights of other shapes there (name, shape, the model's shape),
    weights of the checkpoint that the model has no place for, buffers that nothing was written to and those that were drawn.
    """

    missing: set[str] = dataclasses.field(default_factory=set)
    mismatched: set[tuple[str, Any, Any]] = dataclasses.field(default_factory=set)
    unexpected: set[str] = dataclasses.field(default_factory=set)
    unconverted: dict[str, str] = dataclasses.field(default_factory=dict)
    unwritten: set[str] = dataclasses.field(default_factory=set)
    drawn: set[str] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def watched(name: str, draws: Draws) -> Iterator[LoadingReport]:
    """Loads of transformers models in the block add to what is yielded; their tables in the log are left out.

    name: of the checkpoint, for errors. draws: the mode that the block loads under.
    Raises UserError in place of an error of the block over weights of other shapes or that cannot be converted.
    """
    from transformers import PreTrainedModel

    found = LoadingReport()
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def look_and_adjust(model: Any, info: Any) -> None:
        missing = set(info.missing_keys)
        adjust(model, info)
        _add(found, model, info, missing - info.missing_keys, draws)

    try:
        patched = unittest.mock.patch.object(PreTrainedModel, "_adjust_missing_and_unexpected_keys", look_and_adjust)
        with without_repeats(), patched:
            yield found
    except Exception as error:
        if found.mismatched:
            raise UserError(f"cannot load the model {name}: {_of_other_shapes(found)}") from error
        if found.unconverted:
            key = min(found.unconverted)
            why = found.unconverted[key].strip().splitlines()[-1]
            raise UserError(
                f"cannot load the model {name}: {len(found.unconverted)} weights of its checkpoint cannot be converted into the "
                f"model's, such as {key} ({one_line(why)})"
            ) from error
        raise


@contextlib.contextmanager
def without_repeats() -> Iterator[None]:
    """Hold back what transformers would log of a load on every rank, and this package reports once."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_not_repeated)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_repeated)


def refuse_random(name: str, found: LoadingReport) -> None:
    """Raise UserError where weights of the model came from nowhere: nothing may be scored with them."""
    if found.missing:
        raise UserError(
            f"the checkpoint {name} lacks {len(found.missing)} of the model's weights, such as {min(found.missing)}: "
            "they would be random"
        )
    if found.mismatched:
        raise UserError(f"cannot load the model {name}: {_of_other_shapes(found)}: they would be random")


def name_unused(name: str, found: LoadingReport, model: Any) -> None:
    """Report, from the rank that speaks, what of the checkpoint the model does not take, and what it draws for itself."""
    if not loading().speaks:
        return
    if found.unexpected:
        log.warning(
            "the checkpoint %s has %d weights that a %s has no place for, such as %s: they are left out",
            *(name, len(found.unexpected), type(model).__name__, min(found.unexpected)),
        )
    if found.drawn:
        log.warning(
            "the model %s draws %d of its buffers at random, such as %s: from --seed, here %d",
            *(name, len(found.drawn), min(found.drawn), loading().seeds[2]),
        )


def name_untied(name: str, model: Any) -> None:
    """Report, from the rank that speaks, weights that the config says are one and the checkpoint has apart: they stay apart.

    transformers (5.23) leaves them so too. lm_eval ties them once it has loaded, vLLM takes the first alone: other numbers.
    """
    if not (loading().speaks and hasattr(model, "get_expanded_tied_weights_keys")):
        return
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = sorted(declared.keys() - model.all_tied_weights_keys.keys())
    if apart:
        log.warning(
            "the config of %s ties %s to %s, and the checkpoint has another: it is used as it is, where lm_eval and vLLM tie it",
            *(name, apart[0], declared[apart[0]]),
        )


def compute_unwritten(name: str, found: LoadingReport, model: Any, draws: Draws) -> None:
    """Give the buffers that nothing was written to the values that the model's constructor computes. Within `draws`.

    Raises UserError where it cannot be run.
    """
    if not found.unwritten:
        return
    try:
        made = _construct(model)
        for key in found.unwritten:
            buffer, value = model.get_buffer(key), made.get_buffer(key)
            if value.is_meta or value.shape != buffer.shape:
                raise ValueError(f"it makes {tuple(value.shape)} on {value.device}")
            with torch.no_grad():
                buffer.copy_(value)
            if draws.drew(value):
                found.drawn.add(key)
    except Exception as error:
        raise UserError(
            f"the code of the model {name} sets {len(found.unwritten)} of its buffers nowhere but in its constructor, such as "
            f"{min(found.unwritten)}, which transformers leaves without values, and they cannot be computed ({one_line(error)}): "
            "set them in its _init_weights"
        ) from error


def _construct(model: Any) -> Any:
    """Another model of its class, by its constructor: buffers with values, parameters without."""
    register, usual, thread = torch.nn.Module.register_parameter, torch.get_default_dtype(), threading.get_ident()

    def register_without_values(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and threading.get_ident() == thread:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    config = copy.deepcopy(model.config)
    try:
        torch.set_default_dtype(model.dtype)  # as from_pretrained constructs it
        with unittest.mock.patch.object(torch.nn.Module, "register_parameter", register_without_values), torch.device("cpu"):
            return type(model)(config)
    finally:
        torch.set_default_dtype(usual)


def _add(found: LoadingReport, model: Any, info: Any, no_matter: set[str], draws: Draws) -> None:
    """no_matter: what is missing and is so by the word of the model's class, which is taken where the code computes it."""
    found.missing |= info.missing_keys
    found.mismatched |= info.mismatched_keys
    found.unexpected |= info.unexpected_keys
    found.unconverted |= info.conversion_errors
    for key in no_matter:
        tensor = model.get_parameter_or_buffer(key)
        if key in (
            model._keys_to_ignore_on_save or ()
        ):  # no checkpoint has it: computed over what was drawn (Marian's positions)
            continue
        if draws.drew(tensor) or draws.left_unwritten(tensor):
            found.missing.add(key)
    for path, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            buffer, key = module._buffers.get(leaf), f"{path}.{leaf}" if path else leaf
            if buffer is not None and draws.left_unwritten(buffer):
                found.unwritten.add(key)
            elif buffer is not None and draws.drew(buffer):
                found.drawn.add(key)


def _of_other_shapes(found: LoadingReport) -> str:
    key, there, here = min(found.mismatched, key=str)
    return (
        f"{len(found.mismatched)} weights of its checkpoint have another shape than the model's, such as {key}, {tuple(there)} "
        f"instead of {tuple(here)}"
    )


def _is_not_repeated(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(mark in message for mark in _REPEATED)
