"""The words of `--filter`: KEY=VALUE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from unionfs.errors import UserError, quoted

_ANY: Mapping[str, Sequence[str]] = MappingProxyType({})


def parse_filters(
    words: Iterable[str], keys: Sequence[str], values: Mapping[str, Sequence[str]] = _ANY
) -> list[tuple[str, str]]:
    """Parse KEY=VALUE words with one of these keys; `values`: all that a key may have. Raises UserError."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"invalid filter {quoted(word)}; write KEY=VALUE.")
        if key not in keys:
            raise UserError(f"unknown filter {quoted(key)}; the filters are {', '.join(keys)}.")
        if value not in values.get(key, (value,)):
            raise UserError(
                f"unknown {key} {quoted(value)} in a filter; write one of {', '.join(values[key])}."
            )
        found.append((key, value))
    return found
