"""Escapes untrusted text for a terminal, which interprets control characters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from unionfs.settings.words import printable

_PLAIN_WORD = re.compile(r"[\w@%+=:,./-]+")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def all_printable(value: Any) -> Any:
    """Return a JSON value with all strings made `printable`."""
    match value:
        case str():
            return printable(value)
        case dict() if type(value) is not dict:  # one that has a text of its own
            return type(value)({all_printable(key): all_printable(inner) for key, inner in value.items()})
        case Mapping():
            return {all_printable(key): all_printable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [all_printable(inner) for inner in value]
        case _:
            return value


def shell_word(name: bytes) -> str:
    """Return a file name quoted for the shell if necessary, as in ls(1)."""
    text = os.fsdecode(name)
    if _PLAIN_WORD.fullmatch(text) and text.isprintable():
        return text
    if text.isprintable():
        return "'" + text.replace("'", "'\\''") + "'"
    pieces = []
    for char in text:
        if char in _ESCAPES:
            pieces.append(_ESCAPES[char])
        elif char.isprintable():
            pieces.append(char)
        else:
            pieces += [f"\\{byte:03o}" for byte in os.fsencode(char)]
    return "$'" + "".join(pieces) + "'"
