"""Records of workspaces, ROOT/volumes/NAME/.unionfs-XXXXXXXXXXXXXXXX.json: only this user can write there."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass

from unionfs.storage import jsonfiles
from unionfs.sys.fds import sync_directory

_RECORD = re.compile(r"(\.unionfs-[0-9a-f]{16})\.json")


@dataclass(frozen=True, slots=True)
class Journal:
    """One exchange of the volume's entries, and the attributes that its root gets."""

    old: list[str]
    new: list[str]
    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: dict[str, str]
    """Values in hexadecimal digits."""
    done: bool = False
    """From then on its names mean other files, and only the workspace is to be removed."""


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    user: str
    """The process that works in it, as in `model.User`."""
    uid: int = -1
    """The directory's owner; -1 until it is made, which leaves it empty."""
    ino: int = 0
    """Its inode number; 0 where that changes with each mount (FUSE)."""
    journal: Journal | None = None


def names(home: str) -> frozenset[bytes]:
    """The names of all workspaces in the root of the volume that `home` (ROOT/volumes/NAME) is of."""
    with suppress(FileNotFoundError):
        found = (_RECORD.fullmatch(name) for name in os.listdir(home))
        return frozenset(os.fsencode(match[1]) for match in found if match is not None)
    return frozenset()


def write(home: str, record: Record) -> None:
    """Put a record on disk in one step. Raises OSError."""
    jsonfiles.write(f"{home}/{record.name}.json", asdict(record))
    sync_directory(home)


def read(path: str) -> Record:
    """Raises OSError; ValueError, KeyError or TypeError for what is no record."""
    values = jsonfiles.read(path)
    journal = values.pop("journal")
    record = Record(**values, journal=None if journal is None else Journal(**journal))
    if not path.endswith(f"/{record.name}.json"):
        raise ValueError(f"{path} is the record of another directory")
    return record


def forget(home: str, record: Record) -> None:
    """Remove a record. Raises OSError."""
    path = f"{home}/{record.name}.json"
    for name in (path, f"{path}.new"):
        with suppress(FileNotFoundError):
            os.unlink(name)
    sync_directory(home)
