"""Where a text can be cut so that its parts, encoded one by one, give the token ids of the whole.

Few-shot prompts repeat the same examples thousands of times. A tokenizer of the `tokenizers` library splits a text into words and
encodes each word by itself, so a text may be cut wherever its words end whatever stands around. Which places these are depends
on the tokenizer: GPT-2's pattern gives the last white space of a run to the next word, so "\\n\\n" must be cut before; Llama 3's
takes a line break into the punctuation before it, so it must be cut behind. Nothing is assumed: each kind of place (a `Rule`) is
proved for the tokenizer at hand by running its own normalizer and pre-tokenizer over all short texts around such a place, made of
one character of each class that their patterns tell apart. Where there is no pre-tokenizer that ends a word there (Llama 2,
Gemma), a BPE vocabulary proves it: no token holds the two characters side by side, so no merge can cross.

What cannot be proved is not cut. tokenization.py compares some of a run's own texts with whole encodings as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

PRINTABLE = frozenset(map(chr, range(33, 127)))
WORD = frozenset(character for character in PRINTABLE if character.isalnum())


@dataclasses.dataclass(frozen=True)
class Rule:
    """A place between a character of `left` and one of `right`.

    anchor: what stands in for the text on the left when the part on the right is encoded by itself; it ends in a character of
        `left`, so that nothing that a tokenizer does at the start of a text happens to the part.
    """

    left: frozenset[str]
    right: frozenset[str]
    anchor: str


# The wider form of each comes first.
_BEHIND_BREAK = (Rule(frozenset("\n"), PRINTABLE, "a\n"), Rule(frozenset("\n"), WORD, "a\n"))
_BEFORE_BREAK = (Rule(PRINTABLE, frozenset("\n"), "a"), Rule(WORD, frozenset("\n"), "a"))
_BEFORE_SPACE = (Rule(PRINTABLE, frozenset(" "), "a"), Rule(WORD, frozenset(" "), "a"))

# Normalizers that change a text character by character, or where they look further, show it in the proof's short texts.
_NORMALIZERS = frozenset({
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
    "Sequence", "StripAccents",
})  # fmt: skip
_PRE_TOKENIZERS = frozenset({
    "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence", "Split",
    "UnicodeScripts", "Whitespace", "WhitespaceSplit",
})  # fmt: skip
# One of each class that patterns tell apart: lower and upper case, the letters of "'s" and "'t", digits, the apostrophe,
# punctuation, a symbol, kinds of white space, letters beyond ASCII with and without case, a mark, an emoji.
_CLASSES = "aZst1'._$ \n\t\r\u00a0é中\u0301😀"


class Cuts:
    """The places where texts can be cut for one tokenizer. Empty (false) where nothing is proved."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a transformers tokenizer that hands its texts to the `tokenizers` library unchanged."""
        self._behind_break, self._before_break, self._before_space = _find_rules(tokenizer.backend_tokenizer)
        added = list(tokenizer.backend_tokenizer.get_added_tokens_decoder().values())
        self._added = tuple({token.content for token in added if token.content})
        self._last_of_added = frozenset(content[-1] for content in self._added)
        self._takes_space_behind = any(token.rstrip for token in added)
        self._taking_space_before = tuple(token.content for token in added if token.lstrip)

    def __bool__(self) -> bool:
        return any((self._behind_break, self._before_break, self._before_space))

    def split(self, text: str) -> list[tuple[str, str]]:
        """The parts of a text, each with its anchor ("" for the first); cut at blank lines, or at line breaks if it has none."""
        separator = "\n\n" if "\n\n" in text else "\n"
        first, *others = text.split(separator)
        parts, anchor, part = [], "", first
        for other in others:
            behind, before = part + separator, separator + other
            if rule := self._which(self._behind_break, behind, other):
                parts.append((anchor, behind))
                anchor, part = rule.anchor, other
            elif rule := self._which(self._before_break, part, before):
                parts.append((anchor, part))
                anchor, part = rule.anchor, before
            else:
                part += before
        return [*parts, (anchor, part)]

    def anchor_between(self, left: str, right: str) -> str | None:
        """The anchor of `right` where `left` and `right` can be encoded apart, else None."""
        for rule in (self._before_space, self._before_break, self._behind_break):
            if self._which(rule, left, right):
                return rule.anchor if rule else None
        return None

    def split_last_word(self, part: str) -> tuple[str, str, str] | None:
        """(all but the last words, anchor, last words) of a part; None if it has no place to be cut."""
        place = len(part)
        while (place := part.rfind(" ", 0, place)) > 0:
            if rule := self._which(self._before_space, part[:place], part[place:]):
                return part[:place], rule.anchor, part[place:]
        return None

    def _which(self, rule: Rule | None, left: str, right: str) -> Rule | None:
        """`rule` if it holds between the two. A token that is added to the vocabulary begins a new text behind itself."""
        if rule is None or left[-1:] not in rule.left or right[:1] not in rule.right:
            return None
        end = left.rstrip() if self._takes_space_behind else left
        if end[-1:] in self._last_of_added and end.endswith(self._added):
            return None
        return None if self._taking_space_before and right.startswith(self._taking_space_before) else rule


def _find_rules(backend: Any) -> tuple[Rule | None, Rule | None, Rule | None]:
    """Behind line breaks, before line breaks, before spaces: the widest rule of each that is proved."""
    if not (_is_known(backend.normalizer, _NORMALIZERS) and _is_known(backend.pre_tokenizer, _PRE_TOKENIZERS)):
        return None, None, None
    proof = _Proof(backend)
    behind, before, space = (
        next((rule for rule in rules if proof.holds(rule)), None) for rules in (_BEHIND_BREAK, _BEFORE_BREAK, _BEFORE_SPACE)
    )
    return behind, before, space


def _is_known(component: Any, known: frozenset[str]) -> bool:
    """Whether a normalizer or pre-tokenizer is made of known kinds alone. One that Python code makes up has no description."""
    if component is None:
        return True
    try:
        description = json.loads(component.__getstate__())
    except Exception:
        return False
    return {kind for kind in _kinds(description)} <= known


def _kinds(description: Any) -> Iterator[str]:
    if isinstance(description, dict):
        if "type" in description:
            yield str(description["type"])
        for key in ("normalizers", "pretokenizers"):
            yield from _kinds(description.get(key))
    elif isinstance(description, list):
        for one in description:
            yield from _kinds(one)


class _Proof:
    """Whether a rule holds for one tokenizer."""

    def __init__(self, backend: Any) -> None:
        self._normalizer, self._pre_tokenizer, self._model = backend.normalizer, backend.pre_tokenizer, backend.model
        self._added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self._backend = backend
        self._words = functools.cache(self._split_into_words)

    def holds(self, rule: Rule) -> bool:
        """Over all short texts around the place: the words are the same, or joined there where no merge can cross."""
        pair = re.compile(f"[{re.escape(''.join(rule.left))}][{re.escape(''.join(rule.right))}]")
        forms = [content if form is None else form for content in self._added for form in (None, self._normalize(content))]
        if getattr(self._model, "dropout", None) or any(map(pair.search, forms)):
            return False
        crossed = set()  # the characters on both sides, as the model sees them, of places within a word
        stem = self._words(rule.anchor)
        for left, right in _short_texts(rule):
            here, part, whole = self._words(left), self._words(rule.anchor + right), self._words(left + right)
            if part[: len(stem)] == stem and whole == here + part[len(stem) :]:
                continue
            # Not the end of a word, but the two words are those of the whole, joined.
            if len(part) < len(stem) or part[: len(stem) - 1] != stem[:-1] or not part[len(stem) - 1].startswith(stem[-1]):
                return False
            rest = part[len(stem) - 1][len(stem[-1]) :]
            if not rest or whole != [*here[:-1], here[-1] + rest, *part[len(stem) :]]:
                return False
            crossed.add(here[-1][-1] + rest[0])
        return not crossed or self._no_token_crosses(crossed)

    def _no_token_crosses(self, pairs: set[str]) -> bool:
        """A BPE merges two neighbours into a token of the vocabulary: one that crosses holds both characters side by side."""
        model = self._model
        if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        known = self._backend.get_vocab(with_added_tokens=False)
        if model.fuse_unk and not model.byte_fallback and not set("".join(pairs)) <= known.keys():
            return False  # two unknown characters would become one token
        pair = re.compile("|".join(map(re.escape, pairs)))
        return not any(map(pair.search, known))

    def _normalize(self, text: str) -> str:
        return str(self._normalizer.normalize_str(text)) if self._normalizer else text

    def _split_into_words(self, text: str) -> list[str]:
        text = self._normalize(text)
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)] if self._pre_tokenizer else [text]


def _short_texts(rule: Rule) -> Iterator[tuple[str, str]]:
    """Texts on the left and on the right of the place: all of two characters by class, and longer ones drawn at random."""
    classes = list(_CLASSES)
    ends = [character for character in classes if character in rule.left]
    begins = [character for character in classes if character in rule.right]
    yield from itertools.product(sorted(rule.left), sorted(rule.right))
    lefts = ["".join(text) for text in itertools.product(classes, ends)]
    rights = ["".join(text) for text in itertools.product(begins, classes)]
    yield from itertools.product(lefts, rights)
    draw = random.Random(0)
    for _ in range(2000):
        left = "".join(draw.choices(classes, k=draw.randint(0, 5))) + draw.choice(ends)
        yield left, draw.choice(begins) + "".join(draw.choices(classes, k=draw.randint(0, 5)))
