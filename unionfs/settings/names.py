"""Names of volumes and containers: Docker's rule for them, and names for what was given none."""

from __future__ import annotations

import os
import re

from unionfs.errors import UserError, quoted

# Docker's RestrictedNamePattern (daemon/names): at least two characters.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_LONGEST = 255  # NAME_MAX: it becomes a directory's name


def is_name(text: str) -> bool:
    """Whether a volume or container may be called so."""
    return _NAME.fullmatch(text) is not None and len(text) <= _LONGEST


def check_name(text: str, kind: str = "volume") -> str:
    """The name itself. Raises UserError for one that a `kind` can't have."""
    if is_name(text):
        return text
    if len(text) > _LONGEST:
        raise UserError(
            f"the {kind} name {quoted(text[:32])}... has {len(text)} characters; at most {_LONGEST} fit."
        )
    cure = ""
    if kind == "volume" and "/" in text:
        cure = "; a host directory is given by its absolute path, or as ./NAME"
    raise UserError(
        f"{quoted(text)} is no {kind} name: it takes at least two characters, a letter or digit first and "
        f"then letters, digits, `_`, `.` and `-`{cure}."
    )


def anonymous_name() -> str:
    """A new name for an anonymous volume: 64 hexadecimal digits, as Docker's."""
    return os.urandom(32).hex()
