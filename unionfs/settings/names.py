"""Names of volumes and containers: Docker's rule, and names of anonymous volumes."""

from __future__ import annotations

import os
import re

from unionfs.errors import UserError, quoted

# Docker's RestrictedNamePattern (daemon/names): at least two characters.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_LONGEST = 255  # NAME_MAX: the name becomes a directory name


def is_name(text: str) -> bool:
    """Return whether this is a valid name of a volume or container."""
    return _NAME.fullmatch(text) is not None and len(text) <= _LONGEST


def check_name(text: str, kind: str = "volume") -> str:
    """Return the name itself. Raises UserError if it is not a valid name for `kind`."""
    if is_name(text):
        return text
    if len(text) > _LONGEST:
        raise UserError(
            f"the {kind} name {quoted(text[:32])}... has {len(text)} characters; at most {_LONGEST} fit."
        )
    cure = ""
    if kind == "volume" and "/" in text:
        cure = "; to use a host directory, write its absolute path or ./NAME"
    raise UserError(
        f"invalid {kind} name {text!r}: a name has at least two characters, a letter or "
        f"digit first and then letters, digits, `_`, `.` and `-`{cure}."
    )


def anonymous_name() -> str:
    """Return a new name for an anonymous volume: 64 hexadecimal digits, as in Docker."""
    return os.urandom(32).hex()
