"""The one kind of error that a user of the command line sees."""

from __future__ import annotations


class UserError(Exception):
    """`str(error)` is one full sentence for the user: the thing, the cause and the cure."""


def quoted(path: str) -> str:
    """A path as it appears in a sentence: as it is, unless it holds what would break the line."""
    return path if path.isprintable() and path else repr(path)


def reason(error: OSError) -> str:
    """The cause within a sentence, in the C library's words, in small letters as a part of a sentence."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
