"""The note of a store's last commit, which is the only one that `undo` undoes, and only once.

    ROOT/commits/last.json
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass

from unionfs.branches.journal import Journal
from unionfs.branches.store import LAST_FILE, Store
from unionfs.errors import UserError, quoted
from unionfs.storage import jsonfiles


@dataclass(frozen=True, slots=True)
class Last:
    """The last commit."""

    id: str
    ended: int
    """When all was in place: one that went on after a kill may have begun before others."""
    branch: str
    target: str
    """The base, or `branch NAME`."""
    can_undo: bool
    is_undone: bool = False


def note(store: Store, entry: Journal, *, undone: bool = False) -> None:
    """Write that a commit is the last, or that it is undone, unless there was a later one. Raises OSError."""
    with suppress(UserError):
        found = read(store)
        if found is not None and found.ended > entry.ended:
            return
    values = Last(entry.id, entry.ended, entry.branch, entry.target, entry.can_undo, undone)
    jsonfiles.write(_path(store), asdict(values))


def ended(store: Store) -> int:
    """When the last commit ended; 0 if that is not known."""
    with suppress(UserError):
        if (found := read(store)) is not None:
            return found.ended
    return 0


def read(store: Store) -> Last | None:
    """The note; None if there is none. Raises UserError if it is damaged."""
    try:
        return Last(**jsonfiles.read(_path(store)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the last commit is unknown, since {quoted(_path(store))} cannot be read ({error}); remove that "
            "file to undo the last one that is kept."
        ) from error


def _path(store: Store) -> str:
    return f"{store.commits}/{LAST_FILE}"
