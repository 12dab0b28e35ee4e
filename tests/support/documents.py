"""The README, CONTRIBUTING.md and the pages of docs/: their fenced blocks with their markers, their headings and their links.

A block of commands has a comment in the line above it that says how it is tested:

    <!-- runs -->                                   as it stands, behind the others of its page (test_page_commands.py)
    <!-- runs in: tests/…/test_x.py::test_y -->     by that test
    <!-- needs: gpu -->                             by nobody here: one of NEEDS
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ("bash", "sh", "shell", "console", "python")  # languages of blocks that somebody types or pastes
NEEDS = ("gpu", "cluster", "network", "docker", "kubernetes", "vllm")
RUNS = "runs"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*) *$")
_MARKER = re.compile(r"^ *<!-- (?P<words>.*?) -->$")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(?P<title>.+?) *$")


@dataclasses.dataclass(frozen=True)
class Block:
    """marker: the words of the comment in the line above, "" where there is none. line: of the opening fence, from 1."""

    page: Path
    line: int
    language: str
    text: str
    marker: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    lines, found, number = page.read_text(encoding="utf-8").splitlines(), [], 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            stop = next(other for other in range(number + 1, len(lines)) if lines[other].strip() == "```")
            above = _MARKER.match(lines[number - 1]) if number else None
            text = "\n".join(line.removeprefix(fence["indent"]) for line in lines[number + 1 : stop])
            found.append(Block(page, number + 1, fence["language"], text, above["words"] if above else ""))
            number = stop
        number += 1
    return found


def evaluations_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """(how ddp_eval is started, its words) for each of its commands in a block of shell commands."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|()<>"):
                yield from _evaluation(command)
                command = []
            else:
                command.append(word)


def starts_in(text: str) -> Iterator[tuple[int, list[str]]]:
    """(ranks, words) of each command of a block that `runs`, 0 ranks without torchrun. `export` sets what launches have anyway.

    Raises ValueError for a line that is anything else.
    """
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "ddp_eval"]:
            yield 0, words[3:]
        elif words[:2] == ["torchrun", "--standalone"] and words[3:5] == ["-m", "ddp_eval"]:
            yield int(words[2].removeprefix("--nproc_per_node=")), words[5:]
        elif words and words != ["export", "OMP_NUM_THREADS=1"]:
            raise ValueError(f"not a command that the tests can run: {line}")


def _evaluation(command: list[str]) -> Iterator[tuple[str, list[str]]]:
    for place, word in enumerate(command):
        if command[place : place + 2] == ["-m", "ddp_eval"]:
            yield "module", command[place + 2 :]
        elif word.endswith("slurm/eval.sh"):
            yield "slurm", command[place + 1 :]


def links_of(page: Path) -> list[str]:
    """Targets of a page's links, those to other hosts left out."""
    targets = [match["target"] for match in _LINK.finditer(_without_code(page))]
    return [target for target in targets if not re.match(r"https?://|mailto:", target)]


def anchors_of(page: Path) -> set[str]:
    """What `#…` can lead to on a page, by the rule of GitHub and MkDocs for plain headings."""
    found: set[str] = set()
    for line in _without_code(page, inline=False).splitlines():
        heading = _HEADING.match(line)
        if heading:
            found.add(re.sub(r"[^\w\- ]", "", heading["title"].lower()).strip().replace(" ", "-"))
    return found


def _without_code(page: Path, inline: bool = True) -> str:
    """The page without fenced blocks and, with `inline`, without code in its lines."""
    text = page.read_text(encoding="utf-8")
    for block in blocks_of(page):
        text = text.replace(block.text, "", 1) if block.text else text
    return re.sub(r"`[^`\n]*`", "", text) if inline else text
