"""Removing what the storage root keeps, with a sentence for what cannot be removed."""

from __future__ import annotations

import os

from unionfs.errors import UserError, quoted, reason
from unionfs.union.removal import find_locked, remove_path


def refuse_locked(path: str, complaint: str) -> None:
    """Raise UserError (`complaint`, as "volume x cannot be removed", first) when a file below `path` is
    immutable or append-only; nothing is changed.
    """
    above, name = os.path.split(path)
    try:
        at = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = find_locked(at, os.fsencode(name))
        finally:
            os.close(at)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{complaint}: {quoted(path)} cannot be read: {reason(error)}; try again.") from error
    if found is not None:
        shown = quoted(f"{above}/{os.fsdecode(found)}")
        raise UserError(
            f"{complaint}: {shown} is immutable or append-only; run `chattr -i -a {shown}` first."
        )


def remove_all(path: str, complaint: str, *, unlock: bool = False) -> None:
    """Remove a tree of the storage root, with `unlock` also what is immutable. Raises UserError for what is
    left, `complaint` ("volume x is removed, but not all of its files") first.
    """
    try:
        remove_path(path, unlock=unlock)
    except OSError as error:
        left = f"{os.path.dirname(path)}/{os.fsdecode(error.filename or os.path.basename(path))}"
        raise UserError(
            f"{complaint}: {quoted(left)} cannot be removed: {reason(error)}; correct that and remove "
            f"{quoted(path)}."
        ) from error
