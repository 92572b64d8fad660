"""The journal of a commit, from which it goes on or back after its process was killed.

    ROOT/commits/ID/journal.json    what is done, and how far it is
    ROOT/commits/ID/new, old        what is put in place, and what had its place, if they can be here
    BASE/.unionfs-ID/new, old       else there, on the base's filesystem
    ROOT/commits/ID/branch          the branch, after its commit, for `undo`

Until the state is `on` nothing has changed in the base; then the commit goes on, or `back` after an error.
Each operation says by inode numbers what it is about, so it can be seen whether it was done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from unionfs.branches.store import Store
from unionfs.errors import UserError, quoted
from unionfs.storage import jsonfiles
from unionfs.sys.attributes import FileAttributes
from unionfs.sys.trees import remove_path

_FILE = "journal.json"
VERSION = 1
PREFIX = b".unionfs-"
NEW, ON, BACK, ENDING, DONE = "new", "on", "back", "ending", "done"


@dataclass(slots=True)
class Move:
    """A put or a drop. Numbers are inode numbers."""

    path: str
    number: int
    """The name in `new` and `old`."""
    new: int | None
    """What is put there; None for a drop."""
    old: int | None
    """What is there before; None if nothing is."""
    mode: int | None = None
    """The mode of a directory that is put there."""
    seen: list[int] | None = None
    """Size and times of a file that is there before, to see whether it was changed."""


@dataclass(slots=True)
class Setting:
    """A directory that gets other attributes."""

    path: str
    new: FileAttributes
    old: FileAttributes


@dataclass(slots=True)
class Journal:
    """What one commit does, and how far it is."""

    id: str
    branch: str
    made: int
    """When the branch was made: another one of that name is not it."""
    parent: str | None
    """The branch that is changed instead of the base; `base` is where it is mounted meanwhile."""
    base: str
    inode: int
    inside: bool
    """Whether its directory is in the base."""
    keep: bool
    """Whether the branch stays."""
    command: list[str] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    state: str = NEW
    ended: int = 0
    after: dict[str, list[int]] = field(default_factory=dict)
    """After it: what is at each path, to see whether that was changed since."""

    def turns(self, state: str) -> None:
        """It goes into another state."""
        self.state = state

    def is_applied(self, after: dict[str, list[int]]) -> None:
        """All is in place; `after` is what is there now, if it can be undone."""
        self.state, self.after, self.ended = ENDING, after, time.time_ns()

    @property
    def stage(self) -> bytes:
        """The name of its directory in the base."""
        return PREFIX + self.id.encode()


def new_id() -> str:
    """A new one; the latest is the greatest."""
    return f"{time.time_ns():020d}"


def directory(store: Store, id: str) -> str:
    """Where a commit's files are."""
    return f"{store.commits}/{id}"


def write(store: Store, journal: Journal) -> None:
    """Raises OSError."""
    values = asdict(journal)
    values["version"] = VERSION
    for setting, item in zip(journal.settings, values["settings"], strict=True):
        item["new"], item["old"] = _plain(setting.new), _plain(setting.old)
    jsonfiles.write(f"{directory(store, journal.id)}/{_FILE}", values)


def read(store: Store, id: str) -> Journal | None:
    """None if there is no journal yet. Raises UserError if it is damaged."""
    path = f"{directory(store, id)}/{_FILE}"
    try:
        values = jsonfiles.read(path)
        if values.pop("version") != VERSION:
            raise ValueError("it is of another version")
        values["moves"] = [Move(**item) for item in values["moves"]]
        values["settings"] = [
            Setting(item["path"], _attributes(item["new"]), _attributes(item["old"]))
            for item in values["settings"]
        ]
        return Journal(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the journal {quoted(path)} cannot be read ({error}), so its commit can neither go on nor back; "
            "what was replaced is beside it in `old`. Move its directory away."
        ) from error


def ids(store: Store) -> Iterator[str]:
    """The commits of a store, the oldest first."""
    with suppress(FileNotFoundError):
        yield from sorted(name for name in os.listdir(store.commits) if name.isdigit())


def forget(store: Store, id: str) -> None:
    """Remove a commit's files: first the journal, so that a partly removed one is not taken for one. Raises
    OSError."""
    with suppress(FileNotFoundError):
        os.unlink(f"{directory(store, id)}/{_FILE}")
    remove_path(directory(store, id), unlock=True)


def _plain(value: FileAttributes) -> dict[str, Any]:
    found = value._asdict()
    found["xattrs"] = {os.fsdecode(name): data.hex() for name, data in value.xattrs.items()}
    return found


def _attributes(values: dict[str, Any]) -> FileAttributes:
    xattrs = {os.fsencode(name): bytes.fromhex(data) for name, data in values["xattrs"].items()}
    return FileAttributes(**{**values, "xattrs": xattrs})
