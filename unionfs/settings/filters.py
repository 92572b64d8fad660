"""The words of `--filter`: KEY=VALUE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unionfs.errors import UserError, quoted


def parse_filters(words: Iterable[str], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Parse KEY=VALUE words with one of these keys. Raises UserError."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"invalid filter {quoted(word)}; write KEY=VALUE.")
        if key not in keys:
            raise UserError(f"unknown filter {quoted(key)}; the filters are {', '.join(keys)}.")
        found.append((key, value))
    return found
