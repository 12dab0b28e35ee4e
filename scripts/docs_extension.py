"""Docstrings for the site's Python API page: lines such as "limit:  documents per task" become a list.

A griffe extension, which mkdocs.yml names. Docstrings here are plain text in which a name, a colon and its meaning stand on a
line, and the lines that continue it are indented; Markdown would join them into one paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ENTRY = re.compile(r"(?P<name>\w+(?:, \w+)*): +(?P<meaning>\S.*)")


class ListEntries(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(_with_lists(obj.docstring.value))


def _with_lists(text: str) -> Iterator[str]:
    in_list = False
    for line in text.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            yield from () if in_list else ("",)
            yield f"- `{entry['name']}`: {entry['meaning']}"
        elif in_list and line and not line.startswith(" "):
            yield from ("", line)
        else:
            yield line
        in_list = bool(entry) or (in_list and line.startswith(" "))
