"""Durations in words."""

from __future__ import annotations

__all__: list[str] = []  # for the library alone


def in_words(seconds: float) -> str:
    """A duration in suitable units.

    Args:
        seconds: how long.

    >>> in_words(3.21), in_words(74), in_words(4020)
    ('3.2 s', '1 min 14 s', '1 h 07 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
