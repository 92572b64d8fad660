"""Where an archive may be written: not into the volume itself, not over one that later ones need."""

from __future__ import annotations

import os

from unionfs.errors import UserError, quoted
from unionfs.storage.archive.compress import decompressor
from unionfs.storage.archive.headers import Malformed
from unionfs.storage.archive.read import ArchiveReader


def check_target(target: str, data: str) -> None:
    """Refuse a place for an archive of the volume whose files are in `data`. Raises UserError."""
    refuse_inside(target, data)
    if os.path.isfile(target):
        _refuse_base(target, os.path.dirname(os.path.realpath(target)))


def refuse_inside(target: str, data: str) -> None:
    """Refuse a place inside the volume whose files are in `data`. Raises UserError."""
    if _is_inside(os.path.dirname(os.path.realpath(target)), data):
        raise UserError(
            f"{quoted(target)} would be written into the volume itself, and be part of the next backup; name "
            "a file elsewhere."
        )


def _is_inside(path: str, above: str) -> bool:
    try:
        wanted = os.stat(above)
        while not os.path.samestat(os.stat(path), wanted):
            if path == "/":
                return False
            path = os.path.dirname(path)
    except OSError:
        return False
    return True


def _refuse_base(target: str, directory: str) -> None:
    """Refuse to replace an archive that is the base of another one beside it."""
    own = _identity(target)
    if own is None:
        return
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if ".tar" in name and os.path.isfile(path) and (found := _identity(path)) and found[1] == own[0]:
            raise UserError(
                f"{quoted(target)} is the base of the incremental backup {quoted(path)}, which could not be "
                "restored without it; give the new backup another name, or remove that one first."
            )


def _identity(path: str) -> tuple[str, str | None] | None:
    """Return the id of an archive and that of its base; None if it is not an archive of a volume."""
    try:
        with open(path, "rb", buffering=0) as raw:
            info = ArchiveReader(decompressor(raw)).info
            base = info.get("base")
            return str(info["id"]), str(base["id"]) if base else None
    except (OSError, Malformed, ValueError, KeyError, TypeError):
        return None
