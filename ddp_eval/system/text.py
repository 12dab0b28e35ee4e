"""Counts and sizes in words, and read from words."""

from __future__ import annotations

import re

GIB = 2**30


def format_bytes(count: int) -> str:
    """For people.

    >>> format_bytes(3 * 2**29), format_bytes(5 * 2**20)
    ('1.5 GiB', '5.0 MiB')
    """
    return f"{count / GIB:,.1f} GiB" if abs(count) >= GIB else f"{count / 2**20:.1f} MiB"


def count_packs(count: int) -> str:
    """For people.

    >>> count_packs(1), count_packs(3000)
    ('1 pack', '3,000 packs')
    """
    return f"{count:,} pack{'' if count == 1 else 's'}"


def read_count(text: str) -> int | None:
    """The number that digits name; None for anything else, for other scripts' digits and for more digits than any count has.

    >>> read_count("007"), read_count("-7"), read_count("\u00b2"), read_count("1" * 5000)
    (7, None, None, None)
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
