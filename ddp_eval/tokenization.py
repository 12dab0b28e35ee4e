"""(context, continuation) text -> token ids, by the rules of lm_eval's HF backend, to the last id.

The rules are those of `TemplateLM.loglikelihood`, `_encode_pair`, `HFLM.tok_encode` and `loglikelihood_rolling` (lm_eval 0.4.13).
lm_eval encodes one string at a time; here the distinct strings of a batch go through the tokenizer together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ddp_eval.packing import Requests

BATCH = 2048  # strings per call of the tokenizer: enough for its threads, little enough that Python lists stay small


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokenised requests.

    requests:   those with something to score.
    owner:      (len(requests),) int64, the text request that each belongs to: rolling texts have one per window.
    truncated:  text requests whose context lost tokens on the left to fit the window.
    cut:        text requests whose continuation itself did not fit: only its last `max_length` tokens are scored.
    empty:      text requests with nothing to score.
    """

    requests: Requests
    owner: np.ndarray
    truncated: list[int]
    cut: list[int]
    empty: list[int]


class Encoder:
    """lm_eval's way from text to ids, for one tokenizer.

    max_length:       tokens that the model can attend to at once.
    add_bos_token:    as in lm_eval's model_args; None leaves it to the tokenizer.
    prefix_token_id:  what an empty context becomes; None means BOS, or EOS where there is no BOS.
    separate:         for encoder-decoders: a continuation is encoded by itself, and fits a window of its own.
    Raises ValueError when the tokenizer has neither and none is given.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        separate: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.add_bos_token = add_bos_token
        self.separate = separate
        candidates = (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        known = [token for token in candidates if token is not None]
        if not known:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token: give prefix_token_id=ID in --model_args")
        self.prefix_token_id: int = known[0]
        self._prefix_text = tokenizer.decode(self.prefix_token_id)

    def encode(self, texts: Iterable[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Token ids of each text. add_special_tokens=None: by the tokenizer's rule, unless the text brings its own BOS."""
        return _tokenize_distinct(self.tokenizer, [(text, self._special(text, add_special_tokens)) for text in texts])

    def _special(self, text: str, asked: bool | None) -> bool | None:
        if asked is not None:
            return asked
        return False if text.startswith(self._prefix_text) else self.add_bos_token

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts to go on from, by the rule of `HFLM.tok_batch_encode`; an empty one becomes the prefix token."""
        bos = getattr(self.tokenizer, "bos_token", None)
        wanted = [(text, False if bos is not None and text.startswith(bos) else self.add_bos_token) for text in texts]
        if self.separate:
            wanted = [(text, None) for text in texts]
        return [row or [self.prefix_token_id] for row in _tokenize_distinct(self.tokenizer, wanted)]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        """Tokenise (context, continuation) pairs."""
        collector = _Collector(self.max_length, self.separate)
        for start in range(0, len(pairs), BATCH):
            for owner, (context, continuation) in enumerate(self._split_batch(pairs[start : start + BATCH]), start):
                collector.add(owner, context or [self.prefix_token_id], continuation)
        return collector.finish()

    def encode_rolling(self, texts: Sequence[str]) -> Encoded:
        """Tokenise whole texts into disjoint windows of at most `max_length` predictions, each token predicted once."""
        collector = _Collector(self.max_length, self.separate)
        for start in range(0, len(texts), BATCH):
            for owner, tokens in enumerate(self.encode(texts[start : start + BATCH]), start):
                windows = list(rolling_windows(tokens, self.prefix_token_id, self.max_length))
                for context, continuation in windows or [([self.prefix_token_id], [])]:
                    collector.add(owner, context, continuation)
        return collector.finish()

    def _split_batch(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        if self.separate:
            return self._split_separately(pairs)
        moved = [_move_trailing_spaces(context, continuation) for context, continuation in pairs]
        empty = [not context for context, _ in pairs]
        in_context = iter(
            self.encode(
                text
                for (context, continuation), alone in zip(moved, empty, strict=True)
                if not alone
                for text in (context + continuation, context)
            )
        )
        continuations = [continuation for (_, continuation), alone in zip(moved, empty, strict=True) if alone]
        on_their_own = iter(self.encode(continuations, add_special_tokens=False))
        split = []
        for alone in empty:
            if alone:
                split.append(self._behind_prefix(next(on_their_own)))
            else:
                whole, head = next(in_context), next(in_context)
                split.append((head, whole[len(head) :]))
        return split

    def _split_separately(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        moved = [
            _move_trailing_spaces(context, continuation) if context else ("", continuation) for context, continuation in pairs
        ]
        contexts = self.encode(context for context, _ in moved)
        continuations = self.encode((continuation for _, continuation in moved), add_special_tokens=False)
        return [
            (context, continuation) if text else self._behind_prefix(continuation)
            for (text, _), context, continuation in zip(pairs, contexts, continuations, strict=True)
        ]

    def _behind_prefix(self, continuation: list[int]) -> tuple[list[int], list[int]]:
        """An empty context becomes the prefix token, unless the continuation brings it."""
        if continuation[:1] == [self.prefix_token_id]:
            return continuation[:1], continuation[1:]
        return [self.prefix_token_id], continuation


def _tokenize_distinct(tokenizer: Any, wanted: Sequence[tuple[str, bool | None]]) -> list[list[int]]:
    """Token ids of each (text, `special` of `_tokenize`), the same list for those that are equal."""
    known: dict[tuple[str, bool | None], list[int]] = {}
    for special in (True, False, None):
        texts = list(dict.fromkeys(text for text, rule in wanted if rule is special))
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            known.update(((text, special), row) for text, row in zip(part, _tokenize(tokenizer, part, special), strict=True))
    return [known[key] for key in wanted]


def _tokenize(tokenizer: Any, texts: list[str], special: bool | None) -> list[list[int]]:
    """Token ids of each text. special: as `add_special_tokens`; None: the tokenizer's default."""
    options = {} if special is None else {"add_special_tokens": special}

    def ask(part: list[str]) -> list[list[int]]:
        return [list(row) for row in tokenizer(part, return_attention_mask=False, verbose=False, **options)["input_ids"]]

    if len(texts) == 1 or not _is_plain_backend(tokenizer):
        return ask(texts)
    # What the library beneath has besides ids (offsets, words, masks) takes longer than the ids. Asking for the first text the
    # long way sets it up as the tokenizer's own settings have it.
    first = ask(texts[:1])
    found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=True if special is None else special)
    ids = [encoding.ids for encoding in found]
    return ids if ids[:1] == first else ask(texts)


def _is_plain_backend(tokenizer: Any) -> bool:
    """Whether all that a tokenizer does with texts is to hand them to the `tokenizers` library."""
    from transformers import PreTrainedTokenizerFast

    kind, own = type(tokenizer), vars(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) and name not in own
        for name in ("__call__", "_encode_plus", "_convert_encoding")
    )


def rolling_windows(tokens: list[int], prefix_token: int, max_length: int) -> Iterable[tuple[list[int], list[int]]]:
    """lm_eval's `get_rolling_token_windows` with one token of context, made disjoint.

    >>> list(rolling_windows([1, 2, 3, 4, 5], prefix_token=0, max_length=2))
    [([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5])]

    The last window reaches back so that it is as long as the others: its context is what the others have predicted.
    """
    for begin in range(0, len(tokens), max_length):
        stop = min(begin + max_length, len(tokens))
        context_from = max(stop - max_length - 1, -1)
        context = [prefix_token] if begin == 0 else tokens[context_from:begin]
        yield context, tokens[begin:stop]


def _move_trailing_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the continuation's first token."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


class _Collector:
    """Gathers token lists into one `Requests`, cutting what does not fit the window from the left.

    separate: context and continuation have a window each.
    """

    def __init__(self, max_length: int, separate: bool = False) -> None:
        self._max_length = max_length
        self._separate = separate
        self._blocks: list[np.ndarray] = []
        self._num_targets: list[int] = []
        self._owner: list[int] = []
        self._truncated: list[int] = []
        self._cut: list[int] = []
        self._empty: list[int] = []

    def add(self, owner: int, context: list[int], continuation: list[int]) -> None:
        if not continuation:
            self._empty.append(owner)
            return
        room = self._max_length if self._separate else self._max_length + 1 - len(continuation)
        if len(continuation) > self._max_length:
            self._cut.append(owner)
        elif len(context) > room:
            self._truncated.append(owner)
        if self._separate:
            continuation = continuation[-self._max_length :]
            sequence = context[-self._max_length :] + continuation
        else:
            sequence = (context + continuation)[-(self._max_length + 1) :]
        self._blocks.append(np.array(sequence, dtype=np.int32))
        self._num_targets.append(min(len(continuation), len(sequence) - 1))
        self._owner.append(owner)

    def finish(self) -> Encoded:
        lengths = np.array([len(block) for block in self._blocks], dtype=np.int64)
        requests = Requests(
            tokens=np.concatenate([np.zeros(0, dtype=np.int32), *self._blocks]),
            starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            num_targets=np.array(self._num_targets, dtype=np.int32),
        )
        return Encoded(requests, np.array(self._owner, dtype=np.int64), self._truncated, self._cut, self._empty)
