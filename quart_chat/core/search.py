"""What a search finds: pieces of text, as they are written, in any case."""

from __future__ import annotations

from collections.abc import Sequence

SEARCHED_CHARS = 64 * 1024
"""A message is searched up to here; what lies beyond is not found."""


def fold(text: str) -> str:
    """Return the searched part of a text without differences of case.

    The four letters i of Turkish are one, because a capital I has two small forms.
    """
    folded = text[:SEARCHED_CHARS].casefold()
    if folded.isascii():
        return folded
    return folded.replace("i\u0307", "i").replace("\u0131", "i")


def pieces(query: str) -> list[str]:
    """Split a query at white space; return each piece once, folded."""
    return list(dict.fromkeys(fold(piece) for piece in query.split()))


def contains(text: str, pieces: Sequence[str]) -> bool:
    """Return whether every piece occurs in the text."""
    folded = fold(text)
    return all(piece in folded for piece in pieces)
