"""Names of volumes and containers: Docker's rule; of branches; and names of anonymous volumes."""

from __future__ import annotations

import os
import re

from unionfs.errors import UserError, quoted

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
# Docker's RestrictedNamePattern (daemon/names) requires two characters; Docker has no branches.
_SHORTEST = {"branch": 1}
_SHORTEST_OF_DOCKER = 2
_LONGEST = 255  # NAME_MAX: the name becomes a directory name


def is_name(text: str, kind: str = "volume") -> bool:
    """Return whether this is a valid name of a volume, container or branch."""
    shortest = _SHORTEST.get(kind, _SHORTEST_OF_DOCKER)
    return _NAME.fullmatch(text) is not None and shortest <= len(text) <= _LONGEST


def check_name(text: str, kind: str = "volume") -> str:
    """Return the name itself. Raises UserError if it is not a valid name for `kind`."""
    if is_name(text, kind):
        return text
    if len(text) > _LONGEST:
        raise UserError(
            f"the {kind} name {quoted(text[:32])}... has {len(text)} characters; at most {_LONGEST} fit."
        )
    cure = ""
    if kind == "volume" and "/" in text:
        cure = "; to use a host directory, write its absolute path or ./NAME"
    least = "at least two characters, " if kind not in _SHORTEST else ""
    raise UserError(
        f"invalid {kind} name {text!r}: a name has {least}a letter or digit first and then letters, digits, "
        f"`_`, `.` and `-`{cure}."
    )


def anonymous_name() -> str:
    """Return a new name for an anonymous volume: 64 hexadecimal digits, as in Docker."""
    return os.urandom(32).hex()
