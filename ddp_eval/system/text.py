"""Counts and sizes in words."""

from __future__ import annotations

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
