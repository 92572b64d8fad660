"""Filters for lists of volumes, with Docker's keys; a volume must match all of them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import datetime

from unionfs.errors import UserError, quoted
from unionfs.settings import filters
from unionfs.storage.model import Volume

KEYS = ("name", "label", "label!", "driver", "dangling", "anonymous", "until")
_TRUE, _FALSE = frozenset({"1", "true", "t", "yes"}), frozenset({"0", "false", "f", "no"})


def parse_filters(words: Iterable[str]) -> list[tuple[str, str]]:
    """Parse KEY=VALUE words (also `label!=x`) into pairs. Raises UserError."""
    found = []
    for key, value in filters.parse_filters(words, KEYS):
        if key in ("dangling", "anonymous"):
            truth(value, key)
        if key == "until":
            value = str(moment_of(value))
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
    raise UserError(f"invalid value {key}={quoted(value)}; write true or false.")


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def moment_of(text: str) -> float:
    """Parse the value of `until`: a time of ISO 8601, seconds since the epoch, or a duration ago such as 24h
    or 1h30m. Returns seconds since the epoch. Raises UserError.
    """
    if re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
        return time.time() - sum(float(count) * _UNITS[unit] for count, unit in parts)
    try:
        return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UserError(
            f"invalid time {quoted(text)} in until=; write a duration as 24h or 1h30m, or a time as "
            "2026-01-31T12:00."
        ) from None


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
        case "until":
            return volume.created < float(value)
        case "label":
            return _has_label(volume, value)
        case _:
            return not _has_label(volume, value)


def _has_label(volume: Volume, text: str) -> bool:
    name, equals, wanted = text.partition("=")
    return name in volume.labels and (not equals or volume.labels[name] == wanted)
