"""Extracts entries into a directory, never outside it: every name is opened relative to its parent directory,
without following symlinks."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Self, TypeVar

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.storage import symlinks
from unionfs.storage.archive import acl
from unionfs.storage.archive.entry import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    SPARSE,
    SYMLINK,
    Entry,
)
from unionfs.storage.archive.headers import Malformed
from unionfs.sys import attributes
from unionfs.sys.fds import Owned, close_quietly
from unionfs.sys.trees import remove

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_OPEN = 128
_NO_DIRECTORY = (errno.ENOTDIR, errno.ELOOP, errno.ENOENT)
_PRIVILEGED = (b"trusted.", b"security.")
T = TypeVar("T")


class Extractor:
    """Makes entries below `root`, an empty directory. `finish` sets the attributes of directories.

    Raises UserError for entries that this user or filesystem cannot make, OSError for a full disk and similar
    errors, Malformed for an entry outside `root`. `note` receives a sentence about each loss for an ordinary
    user.
    """

    filesystem = "this volume's filesystem"
    elsewhere = "into a volume on another filesystem"
    """Where else entries could be made that this filesystem refuses."""

    def __init__(self, root: str, note: Callable[[str], None]) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):
            # New entries must not inherit a default ACL that the root itself inherited.
            os.removexattr(self._root, attributes.ACL_DEFAULT)
        self._note = note
        self._is_root = os.geteuid() == 0
        self._changes_symlinks = not symlinks.are_sshfs(self._root)
        self._parts: list[bytes] = []
        self._fds: list[int] = []  # of `_parts`; -1 where it was closed
        self._prefix = b""
        self._parent = self._root
        self._now = time.time_ns()
        self._directories: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self._said: set[str] = set()
        self._layers = 0  # how many archives have been extracted

    def close(self) -> None:
        self._leave(0)
        if self._root >= 0:
            close_quietly(self._root)
            self._root = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- names --------------------------------------------------------------------------------------------

    def _leave(self, depth: int) -> None:
        for fd in self._fds[depth:]:
            if fd >= 0:
                close_quietly(fd)
        del self._fds[depth:], self._parts[depth:]

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The fd of the parent directory of `path`, and the last name."""
        prefix, slash, name = path.rpartition(b"/")
        if prefix == self._prefix:
            return self._parent, name
        parts = prefix.split(b"/") if slash else []
        common = 0
        while common < min(len(parts), len(self._parts)) and self._parts[common] == parts[common]:
            common += 1
        while common and self._fds[common - 1] < 0:
            common -= 1
        self._leave(common)
        fd = self._fds[-1] if self._fds else self._root
        # Until every part is open, the place is undefined.
        self._prefix = b"\0"
        for part in parts[common:]:
            fd = self._enter(fd, part, path)
            self._parts.append(part)
            self._fds.append(fd)
            if len(self._fds) > _MOST_OPEN and self._fds[-_MOST_OPEN] >= 0:
                close_quietly(self._fds[-_MOST_OPEN])
                self._fds[-_MOST_OPEN] = -1
        self._prefix, self._parent = prefix, fd
        return fd, name

    def _enter(self, at: int, name: bytes, path: bytes) -> int:
        """Open a directory on the way to `path`; `_parts` are those above it."""
        return self._open_directory(at, name, path)

    def _open_directory(self, at: int, name: bytes, path: bytes) -> int:
        try:
            return os.open(name, _DIRECTORY_FLAGS, dir_fd=at)
        except OSError as error:
            if error.errno in _NO_DIRECTORY:
                raise Malformed(
                    f"its entry {quoted(path)} lies below {quoted(name)}, which is not a directory"
                ) from None
            raise

    def _open_once(self, path: bytes) -> tuple[int, bytes]:
        """Like `_place`, but returns an fd that the caller owns, for a second path at the same time."""
        *parts, name = path.split(b"/")
        fd = os.dup(self._root)
        for part in parts:
            with Owned(fd):
                fd = self._open_directory(fd, part, path)
        return fd, name

    def _clear(self, at: int, name: bytes) -> None:
        """Make room for an entry."""
        status = os.stat(name, dir_fd=at, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            remove(at, name)
        else:
            os.unlink(name, dir_fd=at)

    def remove(self, path: bytes) -> None:
        """Remove an entry and everything below it; ignores a missing entry."""
        if not path:
            raise Malformed("it deletes the root of the volume")
        try:
            at, name = self._place(path)
        except Malformed:
            return
        with suppress(FileNotFoundError):
            self._clear(at, name)

    # -- entries ------------------------------------------------------------------------------------------

    def add(self, entry: Entry, content: Iterable[tuple[int, bytes]] = ()) -> None:
        kind = entry.kind
        if not entry.path:
            if kind != DIRECTORY:
                raise Malformed("its root is not a directory")
            self._remember(entry)
            return
        at, name = self._place(entry.path)
        try:
            if kind in (FILE, SPARSE):
                with Owned(self._create(at, name)) as fd:
                    self._fill(fd, entry, content)
                    self._attributes(fd, entry)
            elif kind == DIRECTORY:
                self._mkdir(at, name)
                self._remember(entry)
            else:
                self._make(at, name, entry)
        except OSError as error:
            if error.errno == errno.ENOTSUP and entry.xattrs:
                raise UserError(
                    f"{quoted(entry.path)} has extended attributes or ACLs "
                    f"({', '.join(map(quoted, entry.xattrs))}) "
                    f"that {self.filesystem} cannot hold; restore {self.elsewhere}."
                ) from error
            # EIO: rclone's error for unsupported operations
            refusals = [errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.ENAMETOOLONG, errno.EINVAL]
            if error.errno in refusals or (
                error.errno == errno.EIO and kind not in (FILE, SPARSE, DIRECTORY)
            ):
                raise UserError(
                    f"{quoted(entry.path)} cannot be made here: {reason(error)}; restore as root, or "
                    f"{self.elsewhere}."
                ) from error
            raise

    @contextmanager
    def new_file(self, entry: Entry) -> Iterator[int]:
        """The fd of a new file for its content; the file gets its attributes when the context ends."""
        at, name = self._place(entry.path)
        with Owned(self._create(at, name)) as fd:
            yield fd
            self._attributes(fd, entry)

    def _create(self, at: int, name: bytes) -> int:
        return self._in_place_of(at, name, lambda: os.open(name, _NEW_FILE, 0o600, dir_fd=at))

    def _in_place_of(self, at: int, name: bytes, make: Callable[[], T]) -> T:
        """Make something under a name that an earlier state of the entry may occupy."""
        try:
            return make()
        except FileExistsError:
            self._clear(at, name)
            return make()

    def _fill(self, fd: int, entry: Entry, content: Iterable[tuple[int, bytes]]) -> None:
        if entry.kind == SPARSE:
            os.ftruncate(fd, entry.size)
        for offset, data in content:
            written = os.pwrite(fd, data, offset)
            while written < len(data):
                written += os.pwrite(fd, memoryview(data)[written:], offset + written)

    def _attributes(self, fd: int, entry: Entry) -> None:
        mode = entry.mode
        if not self._is_root:
            if entry.uid != os.geteuid():
                self._say_once("only root can restore owners; files of other users now belong to you.")
            mode = self._without_set_id(fd, entry)
        attributes.write(fd, None, self._wanted(entry, mode), _refuse, owner=self._is_root)

    def _wanted(self, entry: Entry, mode: int) -> attributes.FileAttributes:
        xattrs = entry.xattrs
        if not self._is_root:
            for name in filter(_is_privileged, xattrs):
                self._say_once(
                    f"only root can restore {os.fsdecode(name)} and similar xattrs (of "
                    f"{quoted(entry.path)}); they were left out."
                )
            xattrs = {name: value for name, value in xattrs.items() if not _is_privileged(name)}
        return attributes.FileAttributes(mode, entry.uid, entry.gid, self._now, entry.mtime, xattrs)

    def _without_set_id(self, fd: int, entry: Entry) -> int:
        """The mode without set-id bits that would apply to this user instead of the file's original owner.

        libarchive does the same (archive_write_disk_posix.c, TODO_SUID_CHECK).
        """
        lost = 0
        if entry.mode & (stat.S_ISUID | stat.S_ISGID):
            status = os.fstat(fd)
            lost |= stat.S_ISUID if status.st_uid != entry.uid else 0
            lost |= stat.S_ISGID if status.st_gid != entry.gid else 0
        if entry.mode & lost:
            self._say_once(f"set-id bits of others' files were left out, as of {quoted(entry.path)}.")
        return entry.mode & ~lost

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._note(sentence)

    def _mkdir(self, at: int, name: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=at)
        except FileExistsError:
            status = os.stat(name, dir_fd=at, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=at)
                os.mkdir(name, 0o700, dir_fd=at)

    def _make(self, at: int, name: bytes, entry: Entry) -> None:
        kind = entry.kind
        if kind == HARDLINK:
            self._link(at, name, entry)
            return
        make = {
            SYMLINK: lambda: os.symlink(entry.link, name, dir_fd=at),
            FIFO: lambda: os.mkfifo(name, 0o600, dir_fd=at),
        }.get(kind, lambda: self._mknod(at, name, entry))
        self._in_place_of(at, name, make)
        changeable = kind != SYMLINK or self._changes_symlinks
        wanted = self._wanted(entry, entry.mode | (stat.S_IFLNK if kind == SYMLINK else 0))
        attributes.write(at, name, wanted, _refuse, owner=self._is_root and changeable, times=changeable)

    def _mknod(self, at: int, name: bytes, entry: Entry) -> None:
        assert entry.kind in (CHARACTER, BLOCK)
        kind = stat.S_IFCHR if entry.kind == CHARACTER else stat.S_IFBLK
        try:
            os.mknod(name, kind | 0o600, os.makedev(*entry.rdev), dir_fd=at)
        except PermissionError as error:
            raise UserError(
                f"{quoted(entry.path)} is a device file, which only root can make; restore as root."
            ) from error

    def _link(self, at: int, name: bytes, entry: Entry) -> None:
        above, first = self._open_once(entry.link)
        with Owned(above) as source:
            try:
                self._in_place_of(
                    at, name,
                    lambda: os.link(first, name, src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False),
                )  # fmt: skip
            except FileNotFoundError:
                raise Malformed(
                    f"the hard link {quoted(entry.path)} leads to {quoted(entry.link)}, which is not there"
                ) from None
            except PermissionError as error:
                if stat.S_ISDIR(os.stat(first, dir_fd=source, follow_symlinks=False).st_mode):
                    raise Malformed(f"the hard link {quoted(entry.path)} leads to a directory") from None
                raise error

    def end_archive(self) -> None:
        """End an archive; another archive based on it may follow."""
        self._layers += 1

    # -- directories --------------------------------------------------------------------------------------

    def _remember(self, entry: Entry) -> None:
        pickle.dump(entry, self._directories)

    def finish(self) -> None:
        """Set the attributes of all directories, and wait until everything is on disk."""
        self._directories.seek(0)
        closed: dict[bytes, int] = {}
        while True:
            try:
                entry: Entry = pickle.load(self._directories)
            except EOFError:
                break
            closed.pop(entry.path, None)
            if not self._is_root and entry.mode & 0o700 != 0o700:
                # Its entries are still to be opened.
                closed[entry.path] = entry.mode
                entry = entry._replace(mode=entry.mode | 0o700)
            if (made := self._open_made(entry.path)) is not None:
                with made as fd:
                    self._finish_directory(fd, entry)
        for path in sorted(closed, key=lambda path: -path.count(b"/")):
            if (made := self._open_made(path)) is not None:
                with made as fd:
                    os.fchmod(fd, closed[path])

    def _finish_directory(self, fd: int, entry: Entry) -> None:
        with on_failure(
            f"the attributes of {quoted(entry.path)} cannot be set here",
            f"restore as root, or {self.elsewhere}",
        ):
            if self._layers > 1:
                self._drop_xattrs(fd, entry.xattrs)
            self._attributes(fd, entry)

    def _open_made(self, path: bytes) -> Owned | None:
        """Open a directory made earlier; None if a later archive removed or replaced it."""
        if not path:
            return Owned(os.dup(self._root))
        try:
            at, name = self._place(path)
            return Owned(os.open(name, _DIRECTORY_FLAGS, dir_fd=at))
        except (Malformed, OSError) as error:
            gone = isinstance(error, Malformed) or error.errno in _NO_DIRECTORY
            if self._layers > 1 and gone:
                return None
            raise

    def _drop_xattrs(self, fd: int, wanted: Mapping[bytes, bytes]) -> None:
        try:
            names = os.listxattr(fd)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EIO):
                raise
            return
        for name in names:
            key = os.fsencode(name)
            if key not in wanted and (key in acl.RECORDS or key.startswith((b"user.", b"trusted."))):
                os.removexattr(fd, name)


def _is_privileged(name: bytes) -> bool:
    return name.startswith(_PRIVILEGED)


def _refuse(name: bytes, error: OSError) -> None:
    raise error
