"""(context, continuation) text -> token ids, by the rules of lm_eval's HF backend, to the last id.

The rules are those of `TemplateLM.loglikelihood`, `_encode_pair`, `HFLM.tok_encode` and `loglikelihood_rolling` (lm_eval 0.4.13).
lm_eval encodes one string at a time, each context once more for every continuation. Here the distinct parts of all texts go
through the tokenizer together, once (token_pool.py); some of a run's texts are encoded whole as well, and compared.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ddp_eval.packs.requests import Requests
from ddp_eval.system.tokenizer_calls import encode_batch, encode_each, is_plain
from ddp_eval.tasks.text_cuts import Cuts
from ddp_eval.tasks.token_pool import BATCH, Ids, Pair, PairMaker, PartsDiffer, TokenPool

log = logging.getLogger("ddp_eval")

MANY_CHARACTERS = 1_000_000  # looking for places to cut takes 0.1 s, in which half as many characters are encoded
CHECKED = 64  # texts of a run that are encoded whole as well
Encode = Callable[[Any, list[str], bool | None], list[list[int]]]  # tokenizer, texts, special -> ids


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokenised requests.

    requests:   those with something to score.
    owner:      (len(requests),) int64, the text request that each belongs to: rolling texts have one per window.
    truncated:  text requests whose context lost tokens on the left to fit the window.
    cut:        text requests whose continuation itself did not fit: it is scored in windows, like a rolling text.
    empty:      text requests with nothing to score: no text, or one that the tokenizer leaves without a token.
    alone:      text requests whose continuation, joined to the context, would have no token: it was encoded by itself.
    bare:       text requests with a context that has no token: the prefix token stands in for it.
    """

    requests: Requests
    owner: np.ndarray
    truncated: list[int]
    cut: list[int]
    empty: list[int]
    alone: list[int] = dataclasses.field(default_factory=list)
    bare: list[int] = dataclasses.field(default_factory=list)


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
        try:
            self._prefix = np.array(known[:1], dtype=np.int32)
            self._prefix_text = tokenizer.decode(self.prefix_token_id)
        except OverflowError:
            raise ValueError(f"prefix_token_id={self.prefix_token_id} in --model_args is no token id") from None
        self._may_cut = True

    def encode(self, texts: Iterable[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Token ids of each text. add_special_tokens=None: by the tokenizer's rule, unless the text brings its own BOS."""
        texts = list(texts)
        wanted = [self._special(text) if add_special_tokens is None else add_special_tokens for text in texts]
        return [ids.tolist() for ids in self._encode_all(texts, wanted, encode_each, cuts=None)]

    def encode_prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of prompts to go on from, by the rule of `HFLM.tok_batch_encode`."""
        bos = getattr(self.tokenizer, "bos_token", None)
        special = [False if bos is not None and text.startswith(bos) else self.add_bos_token for text in texts]
        if self.separate:
            special = [None] * len(texts)
        cuts = self._cuts_for(sum(map(len, texts)))
        found = self._in_parts(lambda: self._encode_all(texts, special, encode_batch, cuts)) if cuts else None
        if found is not None:
            chosen = _choose_to_check([not text.isascii() for text in texts])
            whole = self._encode_all([texts[index] for index in chosen], [special[index] for index in chosen], encode_batch, None)
            if not all(np.array_equal(found[index], ids) for index, ids in zip(chosen, whole, strict=True)):
                self._stop_cutting()
                found = None
        if found is None:
            found = self._encode_all(texts, special, encode_batch, None)
        return found

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        """Tokenise (context, continuation) pairs."""
        cuts = self._cuts_for(sum(len(context) + len(continuation) for context, continuation in pairs))
        found = self._in_parts(lambda: self._encode_pairs(pairs, cuts)) if cuts else None
        if found is not None:
            chosen = _choose_to_check([not (context.isascii() and continuation.isascii()) for context, continuation in pairs])
            if not _agree(found, chosen, self._encode_pairs([pairs[index] for index in chosen], None)):
                self._stop_cutting()
                found = None
        return self._encode_pairs(pairs, None) if found is None else found

    def encode_rolling(self, texts: Sequence[str]) -> Encoded:
        """Tokenise whole texts into disjoint windows of at most `max_length` predictions, each token predicted once."""
        collector = _Collector(self.max_length, self._prefix, self.separate)
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            for owner, ids in enumerate(self._encode_all(batch, list(map(self._special, batch)), encode_each, None), start):
                windows = list(rolling_windows(ids, self.prefix_token_id, self.max_length))
                for context, continuation in windows or [(self._prefix, ids[:0])]:
                    collector.add(owner, np.asarray(context, dtype=np.int32), continuation)
        return collector.finish()

    def collect(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Encoded:
        """The same for (context, continuation) that are token ids already."""
        collector = _Collector(self.max_length, self._prefix, self.separate)
        for owner, (context, continuation) in enumerate(pairs):
            collector.add(owner, np.asarray(context, dtype=np.int32), np.asarray(continuation, dtype=np.int32))
        return collector.finish()

    def _special(self, text: str) -> bool | None:
        return False if text.startswith(self._prefix_text) else self.add_bos_token

    def _cuts_for(self, num_characters: int) -> Cuts | None:
        """Where texts may be cut; None where nothing is certain, or for so little text that looking into it does not pay."""
        return self._cuts if num_characters >= MANY_CHARACTERS and self._may_cut else None

    @functools.cached_property
    def _cuts(self) -> Cuts | None:
        cuts = Cuts(self.tokenizer) if is_plain(self.tokenizer) else None
        return cuts or None

    def _in_parts(self, encode: Callable[[], Any]) -> Any:
        """What `encode` gives; None where the tokenizer turns out to need whole texts."""
        try:
            return encode()
        except PartsDiffer:
            self._stop_cutting()
            return None

    def _stop_cutting(self) -> None:
        log.warning("this tokenizer gives the parts of a text other ids than the whole: texts are encoded whole, which is slower")
        self._may_cut = False

    def _pool(self, encode: Encode, cuts: Cuts | None) -> TokenPool:
        return TokenPool(lambda texts, special: encode(self.tokenizer, texts, special), cuts)

    def _encode_all(self, texts: Sequence[str], special: Sequence[bool | None], encode: Encode, cuts: Cuts | None) -> list[Ids]:
        pool = self._pool(encode, cuts)
        numbers = [pool.add(text, rule) for text, rule in zip(texts, special, strict=True)]
        pool.fill()
        return [np.concatenate(pool.ids_of(parts)) for parts in numbers]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]], cuts: Cuts | None) -> Encoded:
        collector = _Collector(self.max_length, self._prefix, self.separate)
        pool = self._pool(encode_each, cuts)
        add = self._add_separately if self.separate else self._add_pair
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            if cuts is None or pool.num_characters > MANY_CHARACTERS * 8:
                pool = self._pool(encode_each, cuts)  # texts take memory, and those of long ago hardly come again
            makers: dict[str, PairMaker] = {}
            added = [add(pool, makers, *pair) for pair in batch]
            pool.fill()
            split = [self._split(pair[0], *one.ids(pool)) for pair, one in zip(batch, added, strict=True)]
            alone = self._encode_alone(batch, [index for index, (_, continuation) in enumerate(split) if not len(continuation)])
            for index, (pair, (context, continuation)) in enumerate(zip(batch, split, strict=True)):
                collector.add(start + index, context, alone.get(index, continuation), index in alone, is_bare=bool(pair[0]))
        return collector.finish()

    def _split(self, text: str, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """A pair's ids as lm_eval splits them. text: of the context."""
        if text:
            return context, continuation
        own = 1 if continuation[:1].tolist() == [self.prefix_token_id] else 0  # the continuation brings the prefix token
        return continuation[:own], continuation[own:]

    def _encode_alone(self, pairs: Sequence[tuple[str, str]], lost: list[int]) -> dict[int, Ids]:
        """Continuations by themselves, where the context's last token took them in; lm_eval stops on those.

        lost: which of `pairs` have no token behind the context. Returns those that do have some, by their place in `pairs`.
        """
        if self.separate:
            return {}  # each is encoded by itself already
        texts = [pairs[index][1] if not pairs[index][0] else _move_trailing_spaces(*pairs[index])[1] for index in lost]
        found = self._encode_all(texts, [False] * len(texts), encode_each, None)
        return {index: ids for index, text, ids in zip(lost, texts, found, strict=True) if text and len(ids)}

    def _add_pair(self, pool: TokenPool, makers: dict[str, PairMaker], context: str, continuation: str) -> Pair:
        if not context:
            return pool.add_whole_pair(None, (continuation, False))
        context, continuation = _move_trailing_spaces(context, continuation)
        if len(context) < len(self._prefix_text):  # the continuation may complete the text of the prefix token
            whole = context + continuation
            return pool.add_whole_pair((context, self._special(context)), (whole, self._special(whole)))
        maker = makers.get(context)
        if maker is None:
            maker = makers[context] = pool.add_context(context, self._special(context))
        return maker.add(continuation)

    def _add_separately(self, pool: TokenPool, makers: dict[str, PairMaker], context: str, continuation: str) -> Pair:
        if not context:
            return pool.add_two(None, (continuation, False))
        context, continuation = _move_trailing_spaces(context, continuation)
        return pool.add_two((context, self._special(context)), (continuation, False))


def _choose_to_check(is_odd: Sequence[bool]) -> list[int]:
    """Some of the texts, from all over; half of them, where there are any, odd ones: those beyond ASCII."""
    odd = [index for index, flag in enumerate(is_odd) if flag]
    places = [range(len(is_odd))[:: max(1, 2 * len(is_odd) // CHECKED)], odd[:: max(1, 2 * len(odd) // CHECKED)]]
    return sorted({index for some in places for index in some})


def _agree(found: Encoded, chosen: list[int], whole: Encoded) -> bool:
    """Whether the text requests `chosen` have the same tokens in both."""
    same = found.requests.select(np.flatnonzero(np.isin(found.owner, chosen)))
    return all(np.array_equal(getattr(same, name), getattr(whole.requests, name)) for name in ("tokens", "starts", "num_targets"))


def rolling_windows(tokens: Any, prefix_token: int, max_length: int) -> Iterable[tuple[Any, Any]]:
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
    """Gathers token lists into one `Requests`: a context that does not fit the window is cut from the left, a continuation that
    does not fit is scored in windows of its own, so that no token of it goes uncounted.

    prefix: stands in for a context without tokens. separate: context and continuation have a window each.
    """

    def __init__(self, max_length: int, prefix: Ids, separate: bool = False) -> None:
        self._max_length = max_length
        self._prefix = prefix
        self._separate = separate
        self._blocks: list[Ids] = []
        self._lengths: list[int] = []
        self._num_targets: list[int] = []
        self._owner: list[int] = []
        self._truncated: list[int] = []
        self._cut: list[int] = []
        self._empty: list[int] = []
        self._alone: list[int] = []
        self._bare: list[int] = []

    def add(self, owner: int, context: Ids, continuation: Ids, is_alone: bool = False, is_bare: bool = False) -> None:
        """is_alone, is_bare: to be noted as such, the latter if the context has no token."""
        if not len(continuation):
            self._empty.append(owner)
            return
        if is_alone:
            self._alone.append(owner)
        if not len(context):
            context = self._prefix
            if is_bare:
                self._bare.append(owner)
        if len(continuation) > self._max_length:
            self._cut.append(owner)
            self._add_windows(owner, context, continuation)
            return
        room = self._max_length if self._separate else self._max_length + 1 - len(continuation)
        if len(context) > room:
            self._truncated.append(owner)
            context = context[-room:]
        self._append(owner, context, continuation)

    def _add_windows(self, owner: int, context: Ids, continuation: Ids) -> None:
        """As lm_eval's rolling windows, behind the context's last token; a decoder of its own sees each behind the context."""
        if self._separate:
            for start in range(0, len(continuation), self._max_length):
                piece = continuation[start : start + self._max_length]
                self._append(owner, context[-self._max_length :], piece)
            return
        for before, piece in rolling_windows(continuation, context[-1], self._max_length):
            self._append(owner, np.asarray(before, dtype=np.int32), piece)

    def _append(self, owner: int, context: Ids, continuation: Ids) -> None:
        self._blocks += (context, continuation)
        self._lengths.append(len(context) + len(continuation))
        self._num_targets.append(len(continuation))
        self._owner.append(owner)

    def finish(self) -> Encoded:
        requests = Requests(
            tokens=np.concatenate([np.zeros(0, dtype=np.int32), *self._blocks], dtype=np.int32),
            starts=np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]),
            num_targets=np.array(self._num_targets, dtype=np.int32),
        )
        owner = np.array(self._owner, dtype=np.int64)
        return Encoded(requests, owner, self._truncated, self._cut, self._empty, self._alone, self._bare)
