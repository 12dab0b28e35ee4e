"""A replacement of something inside another library, with the reason for it."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterable
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """`owner.name` becomes `new`. why: what the library does there. read_in: the version that was read for it."""

    owner: Any
    name: str
    new: Any
    why: str
    read_in: str = "lm_eval 0.4.13"


def apply(patches: Iterable[Patch], stack: contextlib.ExitStack) -> None:
    """Put the replacements in place, and the originals back when `stack` closes."""
    for patch in patches:
        stack.enter_context(unittest.mock.patch.object(patch.owner, patch.name, patch.new))
