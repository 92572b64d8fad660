"""The registry of volumes and of who uses them: an SQLite database, ROOT/registry.db.

Beside each volume's data lies its record, a small JSON file. The record is made before the registry's row and
goes after it, and holds all that the row does; so a registry that is missing or damaged is made anew from the
records, and what a crash leaves half done is put right by the next call.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from unionfs.errors import UserError, quoted, reason
from unionfs.storage import locks, reserve
from unionfs.storage.model import ANONYMOUS_LABEL, User, Volume
from unionfs.storage.names import is_name
from unionfs.storage.root import check_directory, is_own_directory, open_root

RECORD = "volume.json"
_BUSY_SECONDS = 30.0

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE volumes (
        name TEXT PRIMARY KEY,
        driver TEXT NOT NULL,
        mountpoint TEXT NOT NULL,
        anonymous INTEGER NOT NULL CHECK (anonymous IN (0, 1)),
        options TEXT NOT NULL,
        labels TEXT NOT NULL,
        created REAL NOT NULL,
        scope TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE users (
        volume TEXT NOT NULL REFERENCES volumes (name) ON DELETE RESTRICT,
        user TEXT NOT NULL,
        path TEXT NOT NULL,
        PRIMARY KEY (volume, user)
    ) STRICT, WITHOUT ROWID;
    """,
)
"""Each step leads from one schema version (user_version) to the next; a step is never changed afterwards."""

# A name that no volume has, for the lock of the registry as a whole.
_WHOLE = ".registry"


class Damaged(Exception):
    """The database cannot be read; the text is SQLite's reason."""


class Registry:
    """The registry below one storage root. `tell` gets sentences about what had to be repaired."""

    def __init__(self, root: str, tell: Callable[[str], None]) -> None:
        self.root = root
        self.path = f"{root}/registry.db"
        self._tell = tell
        self._checked = False

    def directory(self, name: str) -> str:
        """Where a volume is kept."""
        return f"{self.root}/volumes/{name}"

    # -- volumes ------------------------------------------------------------------------------------------

    def volumes(self) -> list[Volume]:
        """All volumes, sorted by name."""
        with self._open() as db:
            return [self._volume(row) for row in db.execute("SELECT * FROM volumes ORDER BY name")]

    def find(self, name: str) -> Volume | None:
        """The volume of that name, or None."""
        with self._open() as db:
            row = db.execute("SELECT * FROM volumes WHERE name = ?", (name,)).fetchone()
            return None if row is None else self._volume(row)

    def enter(self, volume: Volume) -> None:
        """Enter a volume whose directory is there, and write its record."""
        write_record(volume, [])
        with self._open() as db:
            _insert(db, volume)

    def replace(self, volume: Volume) -> None:
        """Change what is known about a volume."""
        with self._open() as db:
            users = _users(db, volume.name)
            write_record(volume, users)
            db.execute(
                "UPDATE volumes SET mountpoint = ?, options = ?, labels = ? WHERE name = ?",
                (volume.mountpoint, json.dumps(dict(volume.options)), json.dumps(dict(volume.labels)),
                 volume.name),
            )  # fmt: skip

    def forget(self, name: str) -> None:
        """Take a volume out. Raises UserError when it still has users."""
        with self._open() as db:
            try:
                db.execute("DELETE FROM volumes WHERE name = ?", (name,))
            except sqlite3.IntegrityError:
                users = ", ".join(map(str, _users(db, name)))
                raise UserError(f"volume {quoted(name)} is in use by {users}; end that first.") from None

    # -- users --------------------------------------------------------------------------------------------

    def users(self, name: str) -> list[User]:
        """Who uses a volume, users that are gone among them."""
        with self._open() as db:
            return _users(db, name)

    def all_users(self) -> dict[str, list[User]]:
        """The users of every volume that has some."""
        found: dict[str, list[User]] = {}
        with self._open() as db:
            for name, user, path in db.execute("SELECT volume, user, path FROM users ORDER BY volume, user"):
                found.setdefault(name, []).append(User(user, path))
        return found

    def add_user(self, volume: Volume, user: User) -> None:
        """Count a user; once, however often it is added."""
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO users VALUES (?, ?, ?)", (volume.name, user.text, user.path))
            write_record(volume, _users(db, volume.name))

    def remove_user(self, volume: Volume, user: str) -> None:
        """A user uses the volume no more."""
        with self._open() as db:
            db.execute("DELETE FROM users WHERE volume = ? AND user = ?", (volume.name, user))
            write_record(volume, _users(db, volume.name))

    # -- the database -------------------------------------------------------------------------------------

    def _volume(self, row: tuple[Any, ...]) -> Volume:
        name, driver, mountpoint, anonymous, options, labels, created, scope = row
        return Volume(
            name=name, driver=driver, mountpoint=mountpoint, anonymous=bool(anonymous),
            options=json.loads(options), labels=json.loads(labels), created=created, scope=scope,
            directory=self.directory(name),
        )  # fmt: skip

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction. A damaged database is made anew first, then the transaction is begun."""
        try:
            db = self._connect()
        except Damaged as damage:
            self._rebuild(str(damage))
            db = self._connect()
        with closing(db):
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise UserError(
                    f"the registry {quoted(self.path)} cannot be used: {error}; check its permissions and "
                    "the free space of its filesystem."
                ) from error
            except sqlite3.DatabaseError as error:
                raise UserError(
                    f"the registry {quoted(self.path)} is damaged ({error}); run the command again, which "
                    "makes a new one from the volumes' own directories."
                ) from error
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _connect(self) -> sqlite3.Connection:
        if not self._checked:
            open_root(self.root)
            for name in ("volumes", "containers"):
                check_directory(f"{self.root}/{name}")
        try:
            known = os.lstat(self.path)
        except OSError:
            known = None
        if known is None or not self._checked:
            # Creating, migrating and repairing are done by one process at a time.
            with locks.state(self.root, _WHOLE):
                db = self._connect_once()
                try:
                    if known is None or not self._checked:
                        self._checked = True
                        self._reconcile(db)
                        reserve.keep(self.root)
                except BaseException:
                    db.close()
                    raise
                return db
        return self._connect_once()

    def _connect_once(self) -> sqlite3.Connection:
        for ending in ("", "-wal", "-shm", "-journal"):
            # SQLite follows symlinks, and waits for the writer of a pipe.
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(self.path + ending).st_mode):
                    raise UserError(
                        f"{quoted(self.path + ending)} is not a regular file; move it away: the registry is "
                        "made anew from the volumes' own directories."
                    )
        old = os.umask(0o077)
        try:
            db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"the registry {quoted(self.path)} cannot be opened: {error}; check the permissions of "
                f"{quoted(self.root)}, or give another storage root."
            ) from error
        finally:
            os.umask(old)
        try:
            self._prepare(db)
        except BaseException as error:
            db.close()
            if isinstance(error, sqlite3.OperationalError):
                if "disk I/O" in str(error) or "malformed" in str(error):
                    raise Damaged(str(error)) from error
                if "full" in str(error) and reserve.give_up(self.root):
                    return self._connect_once()
                raise UserError(
                    f"the registry {quoted(self.path)} cannot be used: {error}; check its permissions and "
                    "the free space of its filesystem."
                ) from error
            if isinstance(error, sqlite3.DatabaseError):
                raise Damaged(str(error)) from error
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA foreign_keys = ON")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            raise UserError(
                f"the registry {quoted(self.path)} has schema version {version}, and this unionfs knows "
                f"{len(_MIGRATIONS)}: a newer one wrote it; use that one, or another storage root."
            )
        if not self._checked:
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise Damaged(problem)
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if version < len(_MIGRATIONS):
            self._migrate(db)
        elif not self._checked:
            names = {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
            if not {"volumes", "users"} <= names:
                raise Damaged("its tables are missing")

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Bring the schema up to date in one transaction: a crash leaves the old version."""
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for step in _MIGRATIONS[version:]:
            for statement in step.split(";"):
                if statement.strip():
                    db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        db.execute("COMMIT")

    # -- repair -------------------------------------------------------------------------------------------

    def _rebuild(self, cause: str) -> None:
        with locks.state(self.root, _WHOLE):
            with suppress(Damaged):
                self._checked = False
                self._connect_once().close()
                return  # another process was faster
            aside = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
            for ending in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.rename(self.path + ending, aside + ending)
            with closing(self._connect_once()) as db:
                count = self._reconcile(db, say=False)
        self._checked = True
        self._tell(
            f"the registry {quoted(self.path)} was damaged ({cause}): it is kept as {quoted(aside)}, and a "
            f"new one was made from the directories of {count} volume{'' if count == 1 else 's'}."
        )

    def _reconcile(self, db: sqlite3.Connection, *, say: bool = True) -> int:
        """Enter the volumes that have a directory and no row, and drop rows without a directory.

        Returns how many were entered.
        """
        try:
            names = {entry for entry in os.listdir(f"{self.root}/volumes") if is_name(entry)}
        except FileNotFoundError:
            names = set()
        db.execute("BEGIN IMMEDIATE")
        rows = {row[0] for row in db.execute("SELECT name FROM volumes")}
        count = 0
        for name in sorted(names - rows):
            if not is_own_directory(self.directory(name)):
                continue
            found = read_record(self.directory(name))
            if found is None:
                continue
            volume, users, known = found
            _insert(db, volume)
            for user in users:
                db.execute("INSERT INTO users VALUES (?, ?, ?)", (name, user.text, user.path))
            if not known:
                write_record(volume, [])
                if say:
                    self._tell(
                        f"the directory of volume {quoted(name)} had no record; it was entered as local."
                    )
            count += 1
        for name in rows - names:
            if locks.is_taken(self.root, name) or os.path.lexists(self.directory(name)):
                continue  # it is just being removed or made
            locks.forget(self.root, name)
            db.execute("DELETE FROM users WHERE volume = ?", (name,))
            db.execute("DELETE FROM volumes WHERE name = ?", (name,))
            if say:
                self._tell(
                    f"the directory of volume {quoted(name)} is gone from {quoted(self.root)}/volumes; it "
                    "was taken out of the registry."
                )
        db.execute("COMMIT")
        return count


def _insert(db: sqlite3.Connection, volume: Volume) -> None:
    db.execute(
        "INSERT OR IGNORE INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            volume.name, volume.driver, volume.mountpoint, int(volume.anonymous),
            json.dumps(dict(volume.options)), json.dumps(dict(volume.labels)), volume.created, volume.scope,
        ),
    )  # fmt: skip


def _users(db: sqlite3.Connection, name: str) -> list[User]:
    rows = db.execute("SELECT user, path FROM users WHERE volume = ? ORDER BY user", (name,))
    return [User(user, path) for user, path in rows]


def write_record(volume: Volume, users: list[User]) -> None:
    """Write a volume's record in one step. Raises UserError."""
    path = f"{volume.directory}/{RECORD}"
    values = {**volume.to_json(), "users": [[user.text, user.path] for user in users]}
    try:
        fd = os.open(
            f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        with open(fd, "w", encoding="ascii") as out:
            json.dump(values, out)
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise UserError(
            f"volume {quoted(volume.name)} cannot be recorded in {quoted(path)}: {reason(error)}; free space "
            "or check the permissions."
        ) from error


def read_record(directory: str) -> tuple[Volume, list[User], bool] | None:
    """The volume of a directory, its users, and whether the record told them; None for no volume.

    A directory with `_data` and without a readable record is a local volume.
    """
    try:
        fd = os.open(f"{directory}/{RECORD}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="ascii") as source:
            values = json.load(source)
        users = [User(str(text), str(path)) for text, path in values["users"]]
        volume = Volume.from_json(values, directory)
        if volume.name == os.path.basename(directory):
            return volume, users, True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    data = f"{directory}/_data"
    try:
        status = os.lstat(data)
    except OSError:
        return None
    name = os.path.basename(directory)
    # Anonymous volumes have 64 hexadecimal digits for a name, as in Docker.
    anonymous = len(name) == 64 and set(name) <= set("0123456789abcdef")
    labels = {ANONYMOUS_LABEL: ""} if anonymous else {}
    return Volume(name, "local", data, anonymous, {}, labels, status.st_mtime, "local", directory), [], False
