"""The entries of a directory tree, depth first and sorted by name, so that two walks are comparable."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from unionfs.errors import UserError, quoted, reason
from unionfs.storage import symlinks
from unionfs.storage.archive import acl
from unionfs.storage.archive.entry import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    MOST_SEGMENTS,
    NO_XATTRS,
    SPARSE,
    SYMLINK,
    Entry,
)
from unionfs.sys import attributes
from unionfs.sys.calls import FUSE_MAGIC, filesystem_magic
from unionfs.sys.fds import Owned, Returned, close_quietly
from unionfs.sys.mountinfo import mount_id_of_fd

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_OPEN = 256
_KINDS = {stat.S_IFIFO: FIFO, stat.S_IFCHR: CHARACTER, stat.S_IFBLK: BLOCK, stat.S_IFLNK: SYMLINK}
_KEPT = (b"user.", b"trusted.", b"security.")
_NO_XATTRS = (errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.ENODATA)
_VANISHED = (errno.ENOTSUP, errno.ENOSYS)

Take = Callable[[int, bytes, os.stat_result], bool]
"""Called with a file's fd, path and status; returns whether it handled the file."""


def read_xattrs(place: int | bytes, complain: Callable[[str], None]) -> dict[bytes, bytes]:
    """The xattrs stored in the volume, of an open file or of a path; a final symlink is not followed.

    Skips unreadable xattrs; `complain` receives a sentence fragment about each. Raises FileNotFoundError.
    """

    def failed(name: bytes, error: OSError) -> None:
        if error.errno == errno.ENOENT:
            raise error
        if name == attributes.ALL:
            if error.errno not in _NO_XATTRS:
                complain(f"its xattrs cannot be read ({reason(error)})")
        # EINVAL: an empty security.capability, which the file's owner may set, is listed but cannot be read
        # (security/commoncap.c).
        elif error.errno not in _VANISHED:
            complain(f"its xattr {quoted(name)} cannot be read ({reason(error)})")

    def is_kept(name: bytes) -> bool:
        return name in acl.RECORDS or name.startswith(_KEPT)

    return attributes.read_xattrs(place, is_kept, failed, follow=isinstance(place, int))


def _has_xattrs(fd: int) -> bool:
    try:
        os.listxattr(fd)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return False
        # rclone's error for every xattr call
        if error.errno == errno.EIO and filesystem_magic(fd) == FUSE_MAGIC:
            return False
        raise
    return True


class Walker:
    """Walks a tree. `note` receives a sentence about each omission.

    Stays on the filesystem of the root, follows no symlink. Raises UserError for an unreadable entry: without
    it the archive would be incomplete. Unreadable xattrs are only skipped: any writer of the volume can
    create one that no user can read.
    """

    def __init__(self, root: str, note: Callable[[str], None], leave_out: Collection[bytes] = ()) -> None:
        self._root = root
        self._note = note
        self._leave_out = leave_out  # names in the root
        self._links: dict[tuple[int, int], bytes] = {}
        self._noatime = os.O_NOATIME
        self._device = 0
        self._has_xattrs = True

    def entries(self, take: Take | None = None) -> Iterator[tuple[Entry, int]]:
        """Each entry, with an open fd of a file's content, or -1. The fd is valid until the next entry is
        requested.

        `take` is called first for every regular file with one link. Files for which it returns True are not
        among the entries.
        """
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack = [_Level(b"", fd, os.fstat(fd))]
        try:
            self._device = stack[0].status.st_dev
            self._has_xattrs = _has_xattrs(fd)
            self._fill(stack[0])
            yield self._directory(stack[0]), -1
            while stack:
                level = stack[-1]
                if not level.names:
                    stack.pop()
                    self._reopen_parent(stack, level)
                    level.close()
                    continue
                name, is_file = level.names.pop()
                path = level.prefix + name
                try:
                    if not is_file:
                        yield from self._other(stack, name, path)
                        continue
                    # There may be millions of files: take as few steps as possible.
                    fd = self._open(name, _FILE_FLAGS, level.fd)
                except OSError as error:
                    self.failed(path, error)
                    continue
                try:
                    try:
                        status = os.fstat(fd)
                    except OSError as error:
                        self.failed(path, error)
                        continue
                    # 0o100000: S_IFREG. The errors of `take` are not the file's.
                    if (
                        take is not None
                        and status.st_nlink == 1
                        and status.st_mode & 0o170000 == 0o100000
                        and take(fd, path, status)
                    ):
                        continue
                    try:
                        entry = self.file_entry(fd, path, status)
                    except OSError as error:
                        self.failed(path, error)
                    else:
                        yield entry, fd
                finally:
                    os.close(fd)  # cheaper than Owned
        finally:
            for level in stack:
                level.close()

    def failed(self, path: bytes, error: OSError) -> None:
        """Note that a file has vanished; raise UserError for one that cannot be read."""
        if isinstance(error, FileNotFoundError):
            self._note(f"{quoted(path)} vanished while it was read; it was left out.")
            return
        raise UserError(
            f"{quoted(path)} in {quoted(self._root)} cannot be read: {reason(error)}; nothing is left out of "
            "a backup, so make it readable, or run as root."
        ) from error

    def _other(self, stack: list[_Level], name: bytes, path: bytes) -> Iterator[tuple[Entry, int]]:
        """The entry of a name that was not a regular file when the directory was listed."""
        at = stack[-1].fd
        status = os.stat(name, dir_fd=at, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            below = self._enter(at, name, path)
            if below is not None:
                if len(stack) >= _MOST_OPEN:
                    stack[-_MOST_OPEN].close()
                stack.append(below)
                yield self._directory(below), -1
        elif kind == stat.S_IFREG:
            with Owned(self._open(name, _FILE_FLAGS, at)) as fd:
                yield self.file_entry(fd, path, os.fstat(fd)), fd
        elif kind == stat.S_IFSOCK:
            self._note(f"{quoted(path)} is a socket, which no archive can hold; it was left out.")
        else:
            yield self._special(at, name, path, kind, status), -1

    def _reopen_parent(self, stack: list[_Level], child: _Level) -> None:
        if stack and stack[-1].fd < 0:
            parent = stack[-1]
            fd = os.open("..", _DIRECTORY_FLAGS, dir_fd=child.fd)
            if not os.path.samestat(os.fstat(fd), parent.status):
                os.close(fd)
                raise UserError(
                    f"{quoted(child.path)} in {quoted(self._root)} was moved while it was read; try again."
                )
            parent.fd = fd

    def _fill(self, level: _Level) -> None:
        with os.scandir(level.fd) as found:
            level.names = [(os.fsencode(entry.name), entry.is_file(follow_symlinks=False)) for entry in found]
        level.names.sort(reverse=True)
        if self._leave_out and not level.path:
            level.names = [item for item in level.names if item[0] not in self._leave_out]

    def _enter(self, at: int, name: bytes, path: bytes) -> _Level | None:
        with Returned(self._open(name, _DIRECTORY_FLAGS, at)) as fd:
            status = os.fstat(fd)
            if status.st_dev == self._device or mount_id_of_fd(fd) == mount_id_of_fd(at):
                level = _Level(path, fd, status)
                self._fill(level)
                return level
        self._note(f"{quoted(path)} is a mountpoint; what is mounted there was left out.")
        os.close(fd)
        return None

    def _open(self, name: bytes, flags: int, at: int) -> int:
        try:
            return os.open(name, flags | self._noatime, dir_fd=at)
        except PermissionError:
            # O_NOATIME is allowed for the owner only (open(2)).
            return os.open(name, flags, dir_fd=at)

    def _xattrs(self, place: int | bytes, path: bytes) -> dict[bytes, bytes]:
        def complain(what: str) -> None:
            self._note(f"{quoted(path)}: {what}; left out.")

        return read_xattrs(place, complain) if self._has_xattrs else {}

    def _directory(self, level: _Level) -> Entry:
        return _entry(level.path, DIRECTORY, level.status, xattrs=self._xattrs(level.fd, level.path))

    def file_entry(self, fd: int, path: bytes, status: os.stat_result) -> Entry:
        """The entry of an open file. Raises FileNotFoundError if it is not a regular file."""
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is no longer a file")
        if status.st_nlink > 1 and (first := self._first_name(status, path)) != path:
            return _entry(path, HARDLINK, status, link=first)
        size = status.st_size
        segments: Sequence[tuple[int, int]] = ()
        if status.st_blocks * 512 < size and size > 4096:
            segments = sparse_segments(fd, size)
        return _entry(
            path, SPARSE if segments else FILE, status,
            size=size, xattrs=self._xattrs(fd, path), segments=segments,
        )  # fmt: skip

    def _first_name(self, status: os.stat_result, path: bytes) -> bytes:
        """The first path at which the walk saw a file with several names; later names are links to it."""
        return self._links.setdefault((status.st_dev, status.st_ino), path)

    def _special(self, at: int, name: bytes, path: bytes, kind: int, status: os.stat_result) -> Entry:
        if status.st_nlink > 1 and (first := self._first_name(status, path)) != path:
            return _entry(path, HARDLINK, status, link=first)
        link, rdev = b"", (0, 0)
        if kind == stat.S_IFLNK:
            link = self._readlink(at, name, path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = (os.major(status.st_rdev), os.minor(status.st_rdev))
        xattrs = self._xattrs(b"/proc/self/fd/%d/%s" % (at, name), path)
        return _entry(path, _KINDS[kind], status, rdev=rdev, link=link, xattrs=xattrs)

    def _readlink(self, at: int, name: bytes, path: bytes) -> bytes:
        try:
            return os.readlink(name, dir_fd=at)
        except PermissionError as error:
            if symlinks.are_sshfs(at):
                raise UserError(
                    f"the symlink {quoted(path)} cannot be read, because sshfs hides symlinks that are "
                    "absolute or lead upwards; make the volume with -o o=no_contain_symlinks."
                ) from error
            raise


class _Level:
    __slots__ = ("fd", "names", "path", "prefix", "status")

    def __init__(self, path: bytes, fd: int, status: os.stat_result) -> None:
        self.path = path
        self.prefix = path + b"/" if path else b""
        self.fd = fd
        self.status = status
        self.names: list[tuple[bytes, bool]] = []  # the next one last

    def close(self) -> None:
        if self.fd >= 0:
            close_quietly(self.fd)
            self.fd = -1


def _entry(
    path: bytes,
    kind: str,
    status: os.stat_result,
    *,
    size: int = 0,
    rdev: tuple[int, int] = (0, 0),
    link: bytes = b"",
    xattrs: Mapping[bytes, bytes] = NO_XATTRS,
    segments: Sequence[tuple[int, int]] = (),
) -> Entry:
    return Entry(
        path, kind, status.st_mode & 0o7777, status.st_uid, status.st_gid, size, status.st_mtime_ns,
        status.st_ctime_ns, status.st_ino, rdev, link, xattrs, segments,
    )  # fmt: skip


def sparse_segments(fd: int, size: int) -> Sequence[tuple[int, int]]:
    """Like `data_segments`; empty for a file without holes."""
    segments = data_segments(fd, size)
    return () if segments == [(0, size)] else segments


def data_segments(fd: int, size: int) -> list[tuple[int, int]]:
    """The data segments of a file, by SEEK_DATA and SEEK_HOLE; a final hole is an empty last segment."""
    segments, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # no more data, or the file has been truncated
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                segments = [(0, size)]
                break
            raise
        if start >= size:
            break
        segments.append((start, end - start))
        at = end
        if len(segments) >= MOST_SEGMENTS:
            segments = [(0, size)]
            break
    if not segments or sum(segments[-1]) < size:
        segments.append((size, 0))
    return segments
