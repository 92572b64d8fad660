"""Filters for lists of volumes, with Docker's keys; a volume must match all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from unionfs.errors import UserError, quoted
from unionfs.storage.model import Volume

_KEYS = ("name", "label", "label!", "driver", "dangling", "anonymous")
_TRUE, _FALSE = frozenset({"1", "true", "t", "yes"}), frozenset({"0", "false", "f", "no"})


def parse_filters(words: Iterable[str]) -> list[tuple[str, str]]:
    """Parse KEY=VALUE words (also `label!=x`) into pairs. Raises UserError."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"invalid filter {quoted(word)}; write KEY=VALUE.")
        if key not in _KEYS:
            raise UserError(f"the filter {quoted(key)} is not known; there are {', '.join(_KEYS)}.")
        if key in ("dangling", "anonymous"):
            truth(value, key)
        if key == "name":
            try:
                re.compile(value)
            except re.error as error:
                raise UserError(
                    f"the filter name={quoted(value)} is not a valid regular expression: {error}."
                ) from error
        found.append((key, value))
    return found


def truth(value: str, key: str) -> bool:
    """Parse a boolean (`true`, `1` ...). Raises UserError."""
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise UserError(f"the filter {key}={quoted(value)} is neither true nor false; write one of the two.")


def matches(volume: Volume, filters: Iterable[tuple[str, str]], *, used: bool) -> bool:
    """Whether a volume passes all filters. A name filter is a regular expression, matched anywhere."""
    return all(_holds(volume, key, value, used) for key, value in filters)


def _holds(volume: Volume, key: str, value: str, used: bool) -> bool:
    match key:
        case "name":
            return re.search(value, volume.name) is not None
        case "driver":
            return volume.driver == value
        case "dangling":
            return truth(value, key) != used
        case "anonymous":
            return truth(value, key) == volume.anonymous
        case "label":
            return _has_label(volume, value)
        case _:
            return not _has_label(volume, value)


def _has_label(volume: Volume, text: str) -> bool:
    name, equals, wanted = text.partition("=")
    return name in volume.labels and (not equals or volume.labels[name] == wanted)
