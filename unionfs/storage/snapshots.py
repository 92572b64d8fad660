"""The snapshots of an upper, in a directory beside it.

    UPPER.snapshots/record.json    names, parents, and which of them the upper lies on
    UPPER.snapshots/0001/          a layer: what was the upper
    UPPER.snapshots/pending.json   while the layers change

A snapshot is taken, and another one restored, by one exchange of UPPER with a new directory in
UPPER.snapshots. Before that `pending.json` has the record that is valid afterwards, and the new directory's
inode number: so whoever reads it later knows whether the exchange was made. Directories that the record does
not name are waste.

The layers lie in the order of their parents over the lowers given at the mount: any overlayfs can mount them.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

from unionfs.errors import UserError, quoted, reason
from unionfs.storage import jsonfiles
from unionfs.storage.snapshot_record import Record, joined
from unionfs.sys import calls
from unionfs.sys.fds import Owned, Returned, close_quietly, open_for_listing
from unionfs.sys.trees import remove

SUFFIX: Final = ".snapshots"
_RECORD: Final = "record.json"
_PENDING: Final = "pending.json"
_JOINING: Final = ".joining"
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_SECONDS: Final = 2.0


def path_of(upper: str, id_: str) -> str:
    """The path of a layer."""
    return f"{upper}{SUFFIX}/{id_}"


def is_beside(upper_fd: int, name: str) -> bool:
    """Whether the directory of an upper has that name. Its path may lead to the mount, which would wait for
    itself."""
    with Owned(os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper_fd)) as above:
        try:
            os.stat(name, dir_fd=above, follow_symlinks=False)
        except OSError:
            return False
        return True


def has_some(upper_fd: int, upper: str) -> bool:
    """Whether an upper may have snapshots."""
    return is_beside(upper_fd, os.path.basename(upper) + SUFFIX)


def read(upper: str) -> Record:
    """The snapshots of an upper, without a change on disk. Raises UserError."""
    try:
        with Owned(os.open(upper + SUFFIX, _DIRECTORY)) as fd, Owned(os.open(upper, _DIRECTORY)) as top:
            _check_owner(fd, os.fstat(top).st_uid, upper)
            return _read(fd, os.fstat(top).st_ino)[0]
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(upper, error) from error


def with_snapshots(upper: str, lowers: Sequence[str]) -> tuple[str, ...]:
    """The lowers of a mount of `upper`, of which `lowers` are given: its snapshots come first. Raises
    UserError."""
    record = read(upper)
    layers = [path_of(upper, id_) for id_ in record.chain(record.head)]
    given = [path for path in lowers if os.path.dirname(path) == upper + SUFFIX]
    if not given:
        return (*layers, *lowers)
    if list(lowers[: len(layers)]) == layers and len(given) == len(layers):
        return tuple(lowers)
    raise UserError(
        f"upper {quoted(upper)} lies on other snapshots than those among the lowers; leave them out, since a "
        "mount of "
        "the upper has them by itself."
    )


def base(upper: str, lowers: Sequence[str]) -> list[str]:
    """The lowers of a mount without the snapshots of its upper."""
    return [path for path in lowers if os.path.dirname(path) != upper + SUFFIX]


class Store:
    """The snapshots of one upper, which this process has open."""

    def __init__(self, upper_fd: int, upper: str) -> None:
        """`upper_fd`: an O_PATH fd of the upper. Raises UserError, OSError."""
        self.upper = upper
        self._name = os.fsencode(os.path.basename(upper))
        self._upper_fd = upper_fd
        self._above = os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper_fd)
        self.fd = -1
        with Returned(self._above):
            try:
                here = os.stat(self._name, dir_fd=self._above, follow_symlinks=False)
                is_there = os.path.samestat(here, os.fstat(upper_fd))
            except FileNotFoundError:
                is_there = False
            if not is_there:
                raise UserError(f"upper {quoted(upper)} was renamed while it is mounted; rename it back.")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in (self._above, self.fd):
            close_quietly(fd)

    def open(self, *, make: bool) -> bool:
        """Open the directory; whether it exists. Raises UserError, OSError."""
        name = self._name + SUFFIX.encode()
        if make:
            try:
                os.mkdir(name, 0o700, dir_fd=self._above)
            except FileExistsError:
                pass
            except OSError as error:
                where = quoted(os.path.dirname(self.upper))
                raise UserError(
                    f"{quoted(self.upper + SUFFIX)} cannot be made: {reason(error)}; make {where} writable "
                    "for the "
                    "user who mounts."
                ) from error
        try:
            self.fd = os.open(name, _DIRECTORY, dir_fd=self._above)
        except FileNotFoundError:
            return False
        _check_owner(self.fd, os.fstat(self._upper_fd).st_uid, self.upper)
        return True

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """No other process changes the record within the context; a change of one that was killed is finished
        or forgotten before. Yields whether one was forgotten. Raises UserError, OSError."""
        deadline = time.monotonic() + _LOCK_SECONDS
        with Owned(open_for_listing(self.fd)) as fd:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        upper = quoted(self.upper)
                        raise UserError(
                            f"the snapshots of upper {upper} are in use by another process; try again."
                        ) from None
                time.sleep(_LOCK_SECONDS / 100)
            yield self._settle()

    def record(self) -> Record:
        """The record as it is after the last change that was begun. It gives no layer the id of a directory
        that is there: another process may be removing what was left. Raises UserError."""
        try:
            record = _read(self.fd, os.fstat(self._upper_fd).st_ino)[0]
            with Owned(open_for_listing(self.fd)) as fd:
                ids = [int(name) for name in os.listdir(fd) if name.isdecimal()]
            return replace(record, last=max([record.last, *ids]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(self.upper, error) from error

    def _settle(self) -> bool:
        try:
            record, pending = _read(self.fd, os.fstat(self._upper_fd).st_ino)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(self.upper, error) from error
        if pending is None:
            return False
        if pending:
            self.save(record)
        self._forget_pending()
        return not pending

    def save(self, record: Record) -> None:
        """Store a record, under :meth:`locked`. Raises OSError."""
        self._write(_RECORD, record.to_json())

    # -- changes --------------------------------------------------------------------------------------------

    @contextmanager
    def staged(self, id_: str) -> Iterator[int]:
        """A new, empty directory that is to become the upper within the context, as an O_PATH fd, which the
        caller closes. The upper will be the layer `id_`. After an error before :meth:`exchange` the directory
        is removed, and what was announced is forgotten. Raises OSError."""
        remove(self.fd, id_.encode())
        os.mkdir(id_, 0o700, dir_fd=self.fd)
        fd = os.open(id_, _DIRECTORY, dir_fd=self.fd)
        new = os.fstat(fd)
        try:
            yield fd
        except BaseException:
            # After the exchange the former upper has this name, and the record that was announced is valid.
            if os.path.samestat(os.stat(id_, dir_fd=self.fd, follow_symlinks=False), new):
                self._forget_pending()
                remove(self.fd, id_.encode())
            raise

    def announce(self, record: Record, fd: int) -> None:
        """Store the record that is valid after :meth:`exchange`. Raises OSError."""
        self._write(_PENDING, {"new": os.fstat(fd).st_ino, "record": record.to_json()})

    def exchange(self, id_: str) -> None:
        """Exchange the upper with the new directory: from now on the record that was announced is valid.
        Raises OSError."""
        calls.renameat2(self.fd, id_.encode(), self._above, self._name, calls.RENAME_EXCHANGE)

    def finish(self, record: Record) -> None:
        """Store the record after the exchange. Raises OSError."""
        _sync_directory(self._above)
        self.save(record)
        self._forget_pending()

    def waste(self) -> list[str]:
        """The directories that the record does not name, and that no process fills. Call it under
        :meth:`locked`. Raises UserError, OSError."""
        known = self.record().layers
        with Owned(open_for_listing(self.fd)) as fd, os.scandir(fd) as entries:
            names = [
                one.name for one in entries if one.is_dir(follow_symlinks=False) and one.name not in known
            ]
        with self.joining() as free:
            return [name for name in names if free or name != _JOINING]

    @contextmanager
    def joining(self) -> Iterator[bool]:
        """No other process joins layers within the context; yields False if one does. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with Owned(os.open("joining.lock", flags, 0o600, dir_fd=self.fd)) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def make_joint(self) -> int:
        """A new, empty directory to join layers in, under :meth:`joining`: an O_PATH fd. Raises OSError."""
        remove(self.fd, _JOINING.encode())
        os.mkdir(_JOINING, 0o700, dir_fd=self.fd)
        return os.open(_JOINING, _DIRECTORY, dir_fd=self.fd)

    def put_joint(self, below: str, above: str) -> None:
        """Write it to disk, and let it take the place of two layers, if these still are what they were.
        Raises UserError, OSError."""
        with Owned(open_for_listing(self.fd)) as fd:
            calls.syncfs(fd)
        with self.locked():
            record = self.record()
            one = record.layers.get(above)
            if (
                one is None
                or one.parent != below
                or record.children(below) != [above]
                or above == record.head
            ):
                return
            id_ = record.next_id()
            remove(self.fd, id_.encode())
            os.rename(_JOINING, id_, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            self.save(joined(record, below, above, id_))

    def discard(self, name: str) -> None:
        """Remove a directory with all below it. Raises OSError."""
        remove(self.fd, os.fsencode(name), unlock=True)

    def discard_waste(self, lowers: Iterable[str]) -> None:
        """Discard all `waste` but the directories of these lowers, which are in use. Raises UserError,
        OSError."""
        used = {os.path.basename(path) for path in lowers}
        with self.locked():
            waste = [name for name in self.waste() if name not in used]
        for name in waste:
            self.discard(name)

    def open_layer(self, id_: str) -> int:
        """An O_PATH fd of a layer. Raises OSError."""
        return os.open(id_, _DIRECTORY, dir_fd=self.fd)

    def _forget_pending(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(_PENDING, dir_fd=self.fd)

    def _write(self, name: str, values: object) -> None:
        jsonfiles.write(f"/proc/self/fd/{self.fd}/{name}", values)
        _sync_directory(self.fd)


@contextmanager
def opened(upper: str) -> Iterator[Store]:
    """The snapshots of an upper. Raises UserError, OSError."""
    with Owned(os.open(upper, _DIRECTORY)) as fd, Store(fd, upper) as store:
        if not store.open(make=False):
            raise UserError(f"upper {quoted(upper)} has no snapshots; `unionfs snapshot create` takes one.")
        yield store


def _sync_directory(fd: int) -> None:
    with Owned(open_for_listing(fd)) as directory:
        os.fsync(directory)


def _read(fd: int, inode: int) -> tuple[Record, bool | None]:
    """The valid record, and whether a pending change was made (None: there is none)."""
    path = f"/proc/self/fd/{fd}/"
    with suppress(FileNotFoundError):
        pending = jsonfiles.read(path + _PENDING)
        if pending["new"] == inode:
            return Record.from_json(pending["record"]), True
        return _stored(path), False
    return _stored(path), None


def _stored(path: str) -> Record:
    try:
        return Record.from_json(jsonfiles.read(path + _RECORD))
    except FileNotFoundError:
        return Record()


def _check_owner(fd: int, owner: int, upper: str) -> None:
    st = os.fstat(fd)
    if st.st_uid not in (os.geteuid(), 0, owner) or stat.S_IMODE(st.st_mode) & 0o022:
        raise UserError(
            f"{quoted(upper + SUFFIX)} may be written by others than the owner of the upper, so the "
            "snapshots in it "
            "cannot be trusted; change its owner and mode."
        )


def _unreadable(upper: str, error: Exception) -> UserError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(
        f"the snapshots of upper {quoted(upper)} cannot be read: {why}; restore {quoted(upper + SUFFIX)} "
        "from a backup, "
        "or move it away."
    )
