"""What a model has no row for: token ids beyond its embeddings, positions beyond its table. A run is checked before any forward.

On a CPU such an id ends in an IndexError of torch's, on CUDA in an assertion of the device that takes the process with it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ddp_eval.engines import Engine
from ddp_eval.engines.hf import checkpoint
from ddp_eval.errors import OutOfRange, UserError
from ddp_eval.packs.batches import Prompts
from ddp_eval.packs.requests import Requests

log = logging.getLogger("ddp_eval")

# What transformers (5.23) calls a table of positions: an embedding with a row for each, or a buffer of sines.
_TABLE = re.compile(r"wpe|embed_positions|position_embeddings?|positions_embed|pos_emb(ed)?|position_embeds_layer")
_TOWER = re.compile(r"vision|visual|image|audio|speech")  # in names of what lies beside a language model
_BUFFER = re.compile(r"embed_positions|pos_encoding")


class Limits(NamedTuple):
    """Rows of a model's tables; None where there is no table, or none that is known.

    fed, predicted: of the embedding of its input, of its head. In an encoder-decoder `fed` is the encoder's.
    positions: tokens that a causal model, or the encoder, can be fed at once. answer: the same of a decoder behind an encoder.
    """

    fed: int | None
    predicted: int | None
    positions: int | None
    answer: int | None


def limits_of(model: Any, is_pair: bool = False) -> Limits:
    """Of a transformers model, whole, with weights or on the meta device. is_pair: it runs as an encoder-decoder."""
    fed = _rows(_ask(model, "get_input_embeddings"), "num_embeddings")
    predicted = _rows(_ask(model, "get_output_embeddings"), "out_features")
    if is_pair:
        encoder, decoder = _ask(model, "get_encoder"), _ask(model, "get_decoder")
        encoder_rows = _rows(_ask(encoder, "get_input_embeddings"), "num_embeddings")
        decoder_rows = _rows(_ask(decoder, "get_input_embeddings"), "num_embeddings")
        return Limits(encoder_rows or fed, _least(predicted, decoder_rows), _positions(encoder), _positions(decoder))
    return Limits(fed, predicted, _positions(model), None)


def check_window(model_args: Mapping[str, Any], config: Any) -> None:
    """Raise UserError for a `max_length` beyond the model's table of positions, before any weight is read.

    A model without such a table takes any: rotary and relative positions go on. It is built on the meta device, and only where
    `max_length` is more than its config says.
    """
    given = model_args.get("max_length")
    text_config = getattr(config, "text_config", None) or config
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    said = next((int(length) for name in names if (length := getattr(text_config, name, None)) is not None), 2048)  # as lm_eval
    if not given or given <= said:
        return
    is_pair = checkpoint.is_seq2seq(dict(model_args), config)
    try:
        limits = limits_of(checkpoint.whole_model(dict(model_args), config, is_pair), is_pair)
    except UserError:  # the loader will say more
        return
    refuse_window(given, limits)


def refuse_window(given: int | None, limits: Limits) -> None:
    """Raise UserError where `given`, the max_length of --model_args, is more than there are positions."""
    most = _least(limits.positions, limits.answer)
    if given and most is not None and given > most:
        raise UserError(f"max_length={given} in --model_args is more than the model has positions for: give {most} or less")


def check_requests(requests: Requests, prompts: Prompts, engine: Engine, model_args: Mapping[str, Any]) -> None:
    """Hold all ids and lengths of a run against the limits of its model.

    Raises OutOfRange for the first that is beyond them, UserError for a prefix token or a window that is.
    """
    is_pair = engine.capabilities.is_encoder_decoder
    limits = limits_of(engine.whole, is_pair)
    refuse_window(model_args.get("max_length"), limits)
    given = model_args.get("prefix_token_id")
    if given is not None and limits.fed is not None and given >= limits.fed:
        raise UserError(f"prefix_token_id={given} in --model_args is no id of the model, which has {limits.fed:,} of them")
    start = getattr(engine.whole.config, "decoder_start_token_id", None) if is_pair else None
    if isinstance(start, int) and limits.predicted is not None and not 0 <= start < limits.predicted:
        raise UserError(f"the model's config has decoder_start_token_id={start}, and its ids are 0 to {limits.predicted - 1:,}")
    _check_ids(requests, prompts, limits, is_pair)
    _check_lengths(requests, prompts, limits, is_pair)
    if engine.window is not None:
        _check_engine(requests, prompts, engine.window)


def shorten_answers(prompts: Prompts, limits: Limits, is_pair: bool) -> Prompts:
    """The prompts with answers that end where the model's positions do: transformers would fail there."""
    most = limits.answer if is_pair else limits.positions
    if most is None:
        return prompts
    # The last token of an answer is not fed; a decoder is fed one that comes before it.
    rooms = [most if is_pair else most - len(tokens) + 1 for tokens in prompts.tokens]
    shortened = [max(1, min(limit, room)) for limit, room in zip(prompts.limits, rooms, strict=True)]
    count = sum(new != old for new, old in zip(shortened, prompts.limits, strict=True))
    if not count:
        return prompts
    log.warning("%d answers end where the model's %d positions do, before the tasks' own limits", count, most)
    return dataclasses.replace(prompts, limits=shortened)


def _check_ids(requests: Requests, prompts: Prompts, limits: Limits, is_pair: bool) -> None:
    fed, predicted = (np.iinfo(np.int32).max if rows is None else rows for rows in (limits.fed, limits.predicted))
    least = min(fed, predicted)
    if len(requests.tokens) and (requests.tokens.min() < 0 or requests.tokens.max() >= least):
        is_target = _find_targets(requests)
        is_fed = ~is_target
        if not is_pair:  # of a causal model, all but the last are fed
            is_fed = np.ones(len(requests.tokens), dtype=bool)
            is_fed[requests.starts[1:] - 1] = False
        beyond = (requests.tokens < 0) | (is_fed & (requests.tokens >= fed)) | (is_target & (requests.tokens >= predicted))
        if beyond.any():
            place = int(beyond.argmax())
            index = int(np.searchsorted(requests.starts, place, side="right")) - 1
            raise _unknown_id(index, False, int(requests.tokens[place]), fed if is_fed[place] else predicted)
    for index, tokens in enumerate(prompts.tokens):
        if int(tokens.max()) >= fed or int(tokens.min()) < 0:
            beyond = (tokens >= fed) | (tokens < 0)
            raise _unknown_id(index, True, int(tokens[int(beyond.argmax())]), fed)


def _unknown_id(index: int, is_prompt: bool, token: int, rows: int) -> OutOfRange:
    return OutOfRange(index, is_prompt, token, f"the model has {rows:,} token ids, and the tokenizer gives {token}")


def _find_targets(requests: Requests) -> npt.NDArray[np.bool_]:
    """(tokens,) whether a token is to be predicted."""
    lengths = np.diff(requests.starts)
    place = np.arange(len(requests.tokens)) - np.repeat(requests.starts[:-1], lengths)
    found: npt.NDArray[np.bool_] = place >= np.repeat(lengths - requests.num_targets, lengths)
    return found


def _check_lengths(requests: Requests, prompts: Prompts, limits: Limits, is_pair: bool) -> None:
    lengths = np.diff(requests.starts)
    counts = ((lengths - requests.num_targets, limits.positions), (requests.num_targets, limits.answer))
    for fed, most in counts if is_pair else ((lengths - 1, limits.positions),):
        if most is not None and len(fed) and fed.max() > most:
            index = int(fed.argmax())
            raise _too_long(index, False, int(fed[index]), most)
    for index, tokens in enumerate(prompts.tokens):
        if limits.positions is not None and len(tokens) > limits.positions:
            raise _too_long(index, True, len(tokens), limits.positions)


def _check_engine(requests: Requests, prompts: Prompts, window: int) -> None:
    """The engine's own window against what it is to hold at once: all of a request, a prompt with its answer."""
    held = (np.diff(requests.starts), np.array([len(tokens) for tokens in prompts.tokens], dtype=np.int64) + prompts.limits)
    for is_prompt, counts in enumerate(held):
        if len(counts) and counts.max() > window:
            count, index = int(counts.max()), int(counts.argmax())
            sentence = f"the engine's window has {window:,} tokens, and is to hold {count:,}"
            raise OutOfRange(index, bool(is_prompt), None, f"{sentence}: give max_model_len={window} in --model_args, or {count}")


def _too_long(index: int, is_prompt: bool, count: int, most: int) -> OutOfRange:
    sentence = f"the model has {most:,} positions, and is to be fed {count:,} tokens: give max_length={most} in --model_args"
    return OutOfRange(index, is_prompt, None, sentence)


def _positions(model: Any) -> int | None:
    """Tokens that the model's table of positions has rows for."""
    if model is None:
        return None
    found = [rows for holder in _holders(model) for rows in _tables_in(holder)]
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if not _TOWER.search(name))
    found += [buffer.shape[0] for name, buffer in buffers if _BUFFER.fullmatch(name.rsplit(".", 1)[-1])]
    if getattr(getattr(model, "config", None), "model_type", None) == "mpt":  # its ALiBi is made for so many, once
        found.append(int(model.config.max_seq_len))
    return min(found, default=None)


def _holders(model: Any) -> Iterator[Any]:
    """Modules that may hold the table: those beside the embedding of tokens, not those of a tower for images or sound."""
    embedding = _ask(model, "get_input_embeddings")
    decoder, encoder = _ask(model, "get_decoder"), getattr(getattr(model, "base_model", None), "encoder", None)  # RoFormer's
    yield from (holder for holder in (model, decoder, encoder) if isinstance(holder, torch.nn.Module))
    for module in model.modules():
        if embedding is not None and any(child is embedding for child in module.children()):
            yield module


def _tables_in(holder: Any) -> Iterator[int]:
    for name, table in holder.named_children():
        grows = hasattr(table, "make_weight")
        if type(table).__name__ == "ProphetNetPositionalEmbeddings":  # it clamps; its decoder also asks for the next position
            if type(holder).__name__ == "ProphetNetDecoder":
                yield table.num_embeddings - table.padding_idx - 2
        elif isinstance(table, torch.nn.Embedding) and _TABLE.fullmatch(name) and not grows:
            padding = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from behind it
            yield table.num_embeddings - int(getattr(table, "offset", padding))


def _ask(model: Any, name: str) -> Any:
    """What a method of transformers' gives, None where a model lacks it."""
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _rows(module: Any, name: str) -> int | None:
    count = getattr(module, name, None)
    return int(count) if isinstance(count, int) else None


def _least(*counts: int | None) -> int | None:
    return min((count for count in counts if count is not None), default=None)
