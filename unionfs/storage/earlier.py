"""Takes over a storage root of an earlier version, where an SQLite database was the truth about the volumes.

It wrote the records without fsync(2), so a power cut may have left an empty one. The users that they name
stay in them (`unionfs.storage.records`).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from glob import escape, glob
from urllib.parse import quote

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage import locks, records
from unionfs.storage.model import Volume, VolumeUser

_UNREADABLE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def take_over(root: str, directories: Iterable[str], tell: Callable[[str], object]) -> None:
    """Write the records that only the database has, and remove it. Raises UserError, with it still there."""
    registry = f"{root}/registry.db"
    with on_failure(
        f"{quoted(registry)} of an earlier version cannot be taken over",
        "free space or check the permissions",
    ):
        _remove(f"{root}/locks/.reserve")  # first: its space may be needed
        for directory in filter(records.is_lost, directories):
            _write_record(registry, directory, tell)
        for path in glob(f"{escape(registry)}.damaged-*"):
            _remove(path)
        for path in (f"{root}/locks/.registry.state", f"{registry}-wal", f"{registry}-shm", registry):
            _remove(path)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _write_record(registry: str, directory: str, tell: Callable[[str], object]) -> None:
    name = os.path.basename(directory)
    with locks.state(os.path.dirname(registry), name):
        if not records.is_lost(directory):
            return  # another process was faster
        try:
            found = _find(registry, directory)
        except (sqlite3.Error, ValueError) as error:
            if not os.path.lexists(registry):
                return
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) not in _UNREADABLE:
                raise UserError(
                    f"the record of volume {quoted(name)} is lost, and {quoted(registry)} cannot be read: "
                    f"{error}; try again."
                ) from error
            os.rename(registry, f"{registry}.old")
            tell(f"{quoted(registry)} is damaged ({error}); it is kept as {quoted(f'{registry}.old')}.")
            return
        if found is not None:
            records.write(*found)
            tell(f"the record of volume {quoted(name)} was lost; {quoted(registry)} still had it.")


def _find(registry: str, directory: str) -> tuple[Volume, list[VolumeUser]] | None:
    """What the database says of a volume."""
    # SQLite follows symlinks, and waits for the writer of a pipe.
    if os.path.islink(registry) or not os.path.isfile(registry):
        return None
    name = os.path.basename(directory)
    with closing(sqlite3.connect(f"file:{quote(registry)}?mode=ro", uri=True)) as db:
        row = db.execute(
            "SELECT driver, mountpoint, anonymous, options, labels, created, scope FROM volumes "
            "WHERE name = ?", (name,),
        ).fetchone()  # fmt: skip
        users = db.execute("SELECT user, path FROM users WHERE volume = ?", (name,)).fetchall()
    if row is None:
        return None
    driver, mountpoint, anonymous, options, labels, created, scope = row
    volume = Volume(
        name, driver, mountpoint, bool(anonymous), json.loads(options), json.loads(labels), created, scope,
        directory,
    )  # fmt: skip
    return volume, [VolumeUser(*user) for user in users]
