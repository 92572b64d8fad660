"""Records of workspaces, ROOT/volumes/NAME/.unionfs-XXXXXXXXXXXXXXXX.json, writable only by this user."""

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
    """One exchange of the volume's entries, and the new attributes of its root."""

    old: list[str]
    new: list[str]
    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: dict[str, str]
    """Hexadecimal values."""
    done: bool = False
    """If set, the journal's names mean other files, and only the removal of the workspace remains."""


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    user: str
    """The process that uses it, as in `model.VolumeUser`."""
    uid: int = -1
    """The directory's owner; -1 until it is claimed: a crash before that leaves an empty directory."""
    ino: int = 0
    """Its inode number; 0 where it changes with each mount (FUSE)."""
    journal: Journal | None = None


def names(home: str) -> frozenset[bytes]:
    """The names of all workspaces in the root of the volume whose `home` is ROOT/volumes/NAME."""
    with suppress(FileNotFoundError):
        found = (_RECORD.fullmatch(name) for name in os.listdir(home))
        return frozenset(os.fsencode(match[1]) for match in found if match is not None)
    return frozenset()


def write(home: str, record: Record) -> None:
    """Put a record on disk atomically. Raises OSError."""
    jsonfiles.write(f"{home}/{record.name}.json", asdict(record))
    sync_directory(home)


def read(path: str) -> Record:
    """Read a record. Raises OSError; ValueError, KeyError or TypeError for an invalid one."""
    values = jsonfiles.read(path)
    journal = values.pop("journal")
    record = Record(**values, journal=None if journal is None else Journal(**journal))
    if not path.endswith(f"/{record.name}.json"):
        raise ValueError(f"{path} is the record of another directory")
    return record


def forget(home: str, record: Record) -> None:
    path = f"{home}/{record.name}.json"
    for name in (path, f"{path}.new"):
        with suppress(FileNotFoundError):
            os.unlink(name)
    sync_directory(home)
