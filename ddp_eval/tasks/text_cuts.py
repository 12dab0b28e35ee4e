"""Where a text can be cut so that its parts, encoded one by one, give the token ids of the whole.

Few-shot prompts repeat the same examples thousands of times. A tokenizer of the `tokenizers` library splits a text into words and
encodes each word by itself, so a text may be cut wherever a word ends whatever stands around. Which places these are depends on
the tokenizer: GPT-2's pattern gives the last white space of a run to the next word, so "\\n\\n" must be cut before; Llama 3's
takes line breaks into the punctuation before them, so it must be cut behind.

Cuts are made only for tokenizers whose components are known one by one: normalizers that work character by character, and
patterns made of branches of which none can match across such a place (`_BRANCHES`). How they work together is then tested with
the tokenizer's own normalizer and pre-tokenizer, on short texts around the place made of one character of each class that the
patterns tell apart. Where there is no pre-tokenizer that ends a word there (Llama 2, Gemma), the vocabulary of a BPE decides: if
no token holds white space behind another character, no merge crosses. Everything else is encoded whole, and tokenization.py
compares some of a run's own texts with whole encodings.
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
SHORT_LINE = 32  # characters; shorter lines are not worth a part of their own
_MAX_TRIES = 16  # places that are looked at for the last words of a text

_NORMALIZERS = frozenset({
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "StripAccents",
})  # fmt: skip
_PRE_TOKENIZERS = frozenset({
    "BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
})  # fmt: skip
# A match of these never has white space behind another character, but for line breaks behind punctuation, and looks no further
# than one character. Of GPT-2, Llama 3, Qwen 2 and 3, GPT-4o, DeepSeek, Falcon, BLOOM and those who took theirs over.
_BRANCHES = frozenset({
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'(?:[sdmt]|ll|ve|re)", "'(?i:[sdmt]|ll|ve|re)",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\p{L}+", r"\p{N}+", r"\p{N}", r"\p{Nd}", r"\p{N}{1,3}", r"\p{N}{1,2}",
    r"\d", r"\d{1,3}", r"[0-9]", r"[0-9][0-9][0-9]", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[\p{P}\p{S}]+[\r\n]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n/]*",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", r"\p{Han}+",
    " ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+",
    r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s",
})  # fmt: skip
# One of each class that the patterns tell apart: lower and upper case, the letters of "'s" and "'t", digits, the apostrophe,
# punctuation, a symbol, kinds of white space, letters beyond ASCII with and without case, a mark, an emoji.
_CLASSES = "aZst1'._$ \n\t\r\u00a0éд中ع\u0301😀"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of place: before or behind one kind of white space, next to a visible character.

    space:    " " or a line break.
    behind:   whether the place is behind the white space or before it.
    visible:  the ASCII characters that may stand on the other side.
    letters:  whether letters beyond ASCII may stand there, too.
    """

    space: str
    behind: bool
    visible: frozenset[str]
    letters: bool

    @property
    def anchor(self) -> str:
        """What stands in for all text before the place when the part behind it is encoded by itself."""
        return "a" + self.space if self.behind else "a"

    def fits(self, before: str, after: str) -> bool:
        """Whether the place between two characters is of this kind."""
        space, other = (before, after) if self.behind else (after, before)
        return space == self.space and (other in self.visible or (self.letters and other > "\x7f" and other.isalpha()))


def _widest_first(space: str, behind: bool) -> list[Rule]:
    return [Rule(space, behind, visible, letters) for visible in (PRINTABLE, WORD) for letters in (True, False)]


class Cuts:
    """The places where texts can be cut for one tokenizer. False where there are none."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a transformers tokenizer that hands its texts to the `tokenizers` library unchanged."""
        backend = tokenizer.backend_tokenizer
        self._behind_break, self._before_break, self._before_space = _find_rules(backend)
        added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
        self._added = tuple({token.content for token in added})
        self._last_of_added = frozenset(content[-1] for content in self._added)
        self._takes_space_behind = any(token.rstrip for token in added)
        self._taking_space_before = tuple(token.content for token in added if token.lstrip)

    def __bool__(self) -> bool:
        return any((self._behind_break, self._before_break, self._before_space))

    def split(self, text: str) -> list[tuple[str, str]]:
        """The parts of a text, each with its anchor ("" for the first); cut at blank lines, or at line breaks if it has none."""
        separator, min_length = ("\n\n", 1) if "\n\n" in text else ("\n", SHORT_LINE)
        parts, anchor, begin = [], "", 0
        place = text.find(separator)
        while place >= 0:
            behind = place + len(separator)
            if place - begin >= min_length:
                if self._may_cut(self._behind_break, text, behind):
                    parts.append((anchor, text[begin:behind]))
                    begin, anchor = behind, "a\n"
                elif self._may_cut(self._before_break, text, place):
                    parts.append((anchor, text[begin:place]))
                    begin, anchor = place, "a"
            place = text.find(separator, behind)
        return [*parts, (anchor, text[begin:])]

    def anchor_between(self, left: str, right: str) -> str | None:
        """The anchor of `right` where `left` and `right` can be encoded apart, else None."""
        for rule in (self._before_space, self._before_break, self._behind_break):
            if rule is not None and left and right and self._may_cut(rule, left, len(left), right):
                return rule.anchor
        return None

    def split_last_words(self, part: str) -> tuple[str, str, str] | None:
        """(all but the last words, anchor, last words) of a part; None if no place to cut it is near its end."""
        place = len(part)
        for _ in range(_MAX_TRIES):
            place = max(part.rfind(" ", 0, place), part.rfind("\n", 0, place))
            if place <= 0:
                return None
            if self._may_cut(self._before_space, part, place) or self._may_cut(self._before_break, part, place):
                return part[:place], "a", part[place:]
        return None

    def _may_cut(self, rule: Rule | None, text: str, place: int, behind: str | None = None) -> bool:
        """Whether `rule` holds at a place of a text. behind: the text behind the place, if it is not `text` that goes on.

        A token that is added to the vocabulary begins a new text behind itself.
        """
        right, start = (text, place) if behind is None else (behind, 0)
        if rule is None or start >= len(right) or not rule.fits(text[place - 1], right[start]):
            return False
        if text[place - 1] in self._last_of_added and text.endswith(self._added, 0, place):
            return False
        if self._takes_space_behind and text[:place].rstrip().endswith(self._added):
            return False
        return not (self._taking_space_before and right.startswith(self._taking_space_before, start))


def _find_rules(backend: Any) -> tuple[Rule | None, Rule | None, Rule | None]:
    """Behind line breaks, before line breaks, before spaces: the widest rule of each that holds."""
    try:
        if not (_is_known(backend.normalizer, _is_known_normalizer) and _is_known(backend.pre_tokenizer, _is_known_splitter)):
            return None, None, None
        test = _Test(backend)
        if not test.added_tokens_are_plain():
            return None, None, None
        behind, before, space = (
            next((rule for rule in _widest_first(*place) if test.holds(rule)), None)
            for place in (("\n", True), ("\n", False), (" ", False))
        )
        return behind, before, space
    except Exception:  # a component that fails on some text: nothing is certain
        return None, None, None


def _is_known(component: Any, is_known: Any) -> bool:
    """Whether a normalizer or pre-tokenizer is made of known ones alone. One that Python code makes up has no description."""
    return component is None or all(map(is_known, _leaves(json.loads(component.__getstate__()))))


def _leaves(description: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if description["type"] == "Sequence":
        for one in description.get("normalizers") or description["pretokenizers"]:
            yield from _leaves(one)
    else:
        yield description


def _is_known_normalizer(one: dict[str, Any]) -> bool:
    """Those that change a text character by character."""
    if one["type"] != "Replace":
        return one["type"] in _NORMALIZERS
    pattern, content = one["pattern"], one["content"]
    if pattern in ({"String": " "}, {"Regex": " {2,}"}):
        return len(content) == 1 and (content == " " or not content.isspace())
    return bool(content) and PRINTABLE.issuperset(content) and PRINTABLE.issuperset(pattern.get("String", " "))


def _is_known_splitter(one: dict[str, Any]) -> bool:
    if one["type"] == "Punctuation":
        return one.get("behavior") != "Removed"
    if one["type"] != "Split":
        return one["type"] in _PRE_TOKENIZERS
    pattern, how = one["pattern"], (one["behavior"], bool(one["invert"]))
    if pattern == {"String": " "}:
        return how[0].startswith("MergedWith")
    if how not in (("Isolated", False), ("Removed", True)):  # the second keeps the matches and nothing else: all, by `\s+`
        return False
    return all(branch in _BRANCHES for branch in _split_branches(pattern.get("Regex", "")))


def _split_branches(pattern: str) -> list[str]:
    """A pattern's branches, split at each "|" that stands in no bracket.

    >>> _split_branches("'s|(?i:a|b)|[|]")
    ["'s", '(?i:a|b)', '[|]']
    """
    branches, depth, in_class = [""], 0, False
    for token in re.findall(r"\\.|.", pattern, re.DOTALL):
        if token == "|" and not depth and not in_class:
            branches.append("")
            continue
        branches[-1] += token
        if in_class:
            in_class = token != "]"
        elif token == "[":
            in_class = True
        elif token in "()":
            depth += 1 if token == "(" else -1
    return branches


class _Test:
    """Whether a rule holds for one tokenizer, as far as its own normalizer and pre-tokenizer show on short texts."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._normalizer, self._pre_tokenizer, self._model = backend.normalizer, backend.pre_tokenizer, backend.model
        self._added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
        self._words = functools.cache(self._split_into_words)

    def added_tokens_are_plain(self) -> bool:
        """Whether added tokens are found where their text stands, whatever stands around, and none is the anchor."""
        exact = {"NFC", "Prepend", "Replace"}  # leave ASCII as it is, and make nothing else of it
        described = [] if self._normalizer is None else _leaves(json.loads(self._normalizer.__getstate__()))
        changes = any(one["type"] not in exact for one in described)
        for token in self._added:
            text = token.content
            if text == "a" or (token.single_word and (text[0].isspace() or text[-1].isspace())):
                return False
            if (token.lstrip or token.rstrip) and any(map(str.isspace, text)):
                return False
            if token.normalized and self._normalizer is not None and (changes or not PRINTABLE.issuperset(text)):
                return False
        return True

    def holds(self, rule: Rule) -> bool:
        """Over all short texts around the place: the words are the same, or joined there where no merge can cross."""
        if getattr(self._model, "dropout", None) or any(
            rule.fits(*pair) for token in self._added for pair in itertools.pairwise(token.content)
        ):
            return False
        if rule.behind and any(rule.space in token.content for token in self._added):
            return False  # the anchor would hold an added token
        crossed: set[str] = set()  # the characters on both sides, as the model sees them, of places within a word
        stem = self._words(rule.anchor)
        for left, right in _short_texts(rule):
            here, part, whole = self._words(left), self._words(rule.anchor + right), self._words(left + right)
            if part[: len(stem)] == stem and whole == here + part[len(stem) :]:
                continue
            # Not the end of a word: then the two words are those of the whole, joined.
            if not here or len(part) < len(stem) or part[: len(stem) - 1] != stem[:-1]:
                return False
            rest = part[len(stem) - 1].removeprefix(stem[-1])
            if not rest or stem[-1] + rest != part[len(stem) - 1]:
                return False
            if whole != [*here[:-1], here[-1] + rest, *part[len(stem) :]]:
                return False
            crossed.add(here[-1][-1] + rest[0])
        return not crossed or self._no_merge_crosses(rule, crossed)

    def _no_merge_crosses(self, rule: Rule, pairs: set[str]) -> bool:
        """A BPE merges two neighbours into a token of the vocabulary: one that crosses holds both characters side by side."""
        model = self._model
        if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix or not model.unk_token:
            return False
        known = self._backend.get_vocab(with_added_tokens=False)
        # Characters that the vocabulary lacks must become their bytes: left out or fused, they would let others meet.
        if not (set("".join(pairs)) <= known.keys() or (model.byte_fallback and known.keys() >= _ALL_BYTES)):
            return False
        spaces = "".join({pair[not rule.behind] for pair in pairs})
        if rule.behind:
            crossing = re.compile(f"[{re.escape(spaces)}][^{re.escape(spaces)}]")
        else:
            crossing = re.compile(f"[^{re.escape(spaces)}][{re.escape(spaces)}]")
        return not any(map(crossing.search, known))

    def _normalize(self, text: str) -> str:
        return str(self._normalizer.normalize_str(text)) if self._normalizer else text

    def _split_into_words(self, text: str) -> list[str]:
        text = self._normalize(text)
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)] if self._pre_tokenizer else [text]


_ALL_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def _short_texts(rule: Rule) -> Iterator[tuple[str, str]]:
    """Texts before and behind the place: all of two characters by class, and longer ones drawn at random."""
    classes = list(_CLASSES)
    others = [other for other in classes if rule.fits(*((rule.space, other) if rule.behind else (other, rule.space)))]
    ends, begins = ([rule.space], others) if rule.behind else (others, [rule.space])
    for other in sorted(rule.visible):
        yield (rule.space, other) if rule.behind else (other, rule.space)
    lefts = ["".join(text) for text in itertools.product(classes, ends)]
    rights = ["".join(text) for text in itertools.product(begins, classes)]
    yield from itertools.product(lefts, rights)
    draw = random.Random(0)
    for _ in range(1000):
        left = "".join(draw.choices(classes, k=draw.randint(0, 5))) + draw.choice(ends)
        yield left, draw.choice(begins) + "".join(draw.choices(classes, k=draw.randint(0, 5)))
