"""Removes trees of any depth with few fds, even while others change them, and nothing outside them.

Every directory is opened by name in its parent, never through a symlink or into another mount
(RESOLVE_NO_XDEV), so an object swapped for a directory is not followed. Nothing is changed by path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from unionfs.sys import calls
from unionfs.sys.capabilities import is_host_root
from unionfs.sys.fds import Owned, Returned, close_quietly, names_in, open_for_listing
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PATH: Final = os.O_PATH | os.O_NOFOLLOW
_WITHIN: Final = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
_NO_DIRECTORY: Final = (errno.ENOTDIR, errno.ELOOP)
_MOST_OPEN: Final = 64
_TRIES: Final = 5

# include/uapi/linux/stat.h: STATX_TYPE, STATX_ATTR_IMMUTABLE, STATX_ATTR_APPEND, STATX_ATTR_MOUNT_ROOT
_STATX_TYPE: Final = 0x1
_STATX_LOCKED: Final = 0x10 | 0x20
_STATX_MOUNT_ROOT: Final = 0x2000
_STATX: Final = struct.Struct("=8xQ12xH")  # stx_attributes, stx_mode
# include/uapi/linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL, FS_APPEND_FL
_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_LOCKS: Final = 0x10 | 0x20


def remove(at: int, name: bytes, *, unlock: bool = False) -> None:
    """Remove `name` and everything below it from the directory `at`. A missing name is not an error.

    An ordinary user's own directories are made accessible first. With `unlock`, so are objects that chattr(1)
    made immutable or append-only (CAP_LINUX_IMMUTABLE); a file with other names gets its flag back. If an
    object cannot be removed, the rest is: the first OSError is raised at the end, with the path below `at` as
    its `filename`. Mounts are not removed (EXDEV or EBUSY).
    """
    with _Descent(at) as descent:
        problem = _remove(descent, name, unlock)
        while descent.levels:
            level = descent.levels[-1]
            found = _remove(descent, level.names.pop(), unlock) if level.names else _leave(descent, unlock)
            problem = problem or found
    if problem is not None:
        raise problem


def remove_path(path: str, *, unlock: bool = False) -> None:
    """Like `remove`, by a path whose directory no other user may change."""
    directory, name = os.path.split(path)
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with Owned(fd) as at:
        remove(at, os.fsencode(name), unlock=unlock)


def empty_directory(fd: int) -> None:
    """Remove everything in the directory `fd`. Raises OSError like `remove`."""
    problem: OSError | None = None
    for name in _names(fd):
        try:
            remove(fd, name)
        except OSError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def find_locked(at: int, name: bytes) -> bytes | None:
    """Return the path below `at` of an immutable or append-only object (chattr(1)) in the tree `name`.

    None if this user sees none. Raises OSError.
    """
    with _Descent(at) as descent:
        waiting: list[list[bytes]] = [[name]]
        while waiting:
            if not waiting[-1]:
                waiting.pop()
                if descent.levels:
                    descent.leave().close()
                continue
            child = waiting[-1].pop()
            try:
                attributes, mode = _STATX.unpack_from(
                    calls.statx(descent.fd, child, calls.AT_SYMLINK_NOFOLLOW, _STATX_TYPE)
                )
                if attributes & _STATX_MOUNT_ROOT and descent.levels:
                    continue
                if attributes & _STATX_LOCKED:
                    return descent.path(child)
                if stat.S_ISDIR(mode):
                    waiting.append(descent.enter(child, accessible=False).names)
            except (FileNotFoundError, PermissionError):
                continue
            except OSError as error:
                if error.errno not in (*_NO_DIRECTORY, errno.EXDEV):
                    raise
    return None


class _Level:
    __slots__ = ("failed", "fd", "name", "names", "status", "tries")

    def __init__(self, fd: int, name: bytes) -> None:
        self.fd = fd  # -1 if closed
        self.name = name
        self.status = os.fstat(fd)
        self.names = _names(fd)
        self.failed = False
        self.tries = _TRIES

    def close(self) -> None:
        if self.fd >= 0:
            close_quietly(self.fd)
            self.fd = -1


class _Descent:
    """The directories from `at` down to the current one; only the deepest fds stay open."""

    def __init__(self, at: int) -> None:
        self.levels: list[_Level] = []
        self._at = at

    def __enter__(self) -> _Descent:
        return self

    def __exit__(self, *exc: object) -> None:
        for level in self.levels:
            level.close()

    @property
    def fd(self) -> int:
        return self.levels[-1].fd if self.levels else self._at

    def path(self, name: bytes = b"") -> bytes:
        """Return the path, below `at`, of a name in the current directory."""
        return b"/".join([*(level.name for level in self.levels), *([name] if name else [])])

    def enter(self, name: bytes, *, accessible: bool) -> _Level:
        """Enter a directory. Raises OSError: ENOTDIR or ELOOP for a non-directory, EXDEV for a mount."""
        with Returned(_open_directory(self.fd, name, accessible)) as fd:
            level = _Level(fd, name)
        self.levels.append(level)
        if len(self.levels) > _MOST_OPEN:
            self.levels[-_MOST_OPEN - 1].close()
        return level

    def leave(self) -> _Level:
        """Return to the parent. Raises OSError if the directory was moved."""
        level = self.levels[-1]
        if len(self.levels) > 1 and self.levels[-2].fd < 0:
            above = self.levels[-2]
            fd = os.open("..", _DIRECTORY | os.O_CLOEXEC, dir_fd=level.fd)
            if not os.path.samestat(os.fstat(fd), above.status):
                close_quietly(fd)
                raise OSError(errno.EBUSY, "it was moved while it was being removed", self.path())
            above.fd = fd
        return self.levels.pop()


def _remove(descent: _Descent, name: bytes, unlock: bool) -> OSError | None:
    """Remove a non-directory, or enter a directory. Returns the error, if any."""
    try:
        status = os.stat(name, dir_fd=descent.fd, follow_symlinks=False)
        # It may have been replaced by an object of the other kind in between.
        if not stat.S_ISDIR(status.st_mode):
            with suppress(IsADirectoryError):
                _remove_by(os.unlink, descent, name, unlock)
                return None
        try:
            descent.enter(name, accessible=True)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            _remove_by(os.unlink, descent, name, unlock)
    except FileNotFoundError:
        pass
    except OSError as error:
        return _failed(descent, name, error)
    return None


def _remove_by(call: Callable[..., None], descent: _Descent, name: bytes, unlock: bool) -> None:
    try:
        call(name, dir_fd=descent.fd)
    except PermissionError as error:
        if not unlock or error.errno != errno.EPERM:
            raise
        with _unlocked(descent, name):
            call(name, dir_fd=descent.fd)


def _leave(descent: _Descent, unlock: bool) -> OSError | None:
    """Remove the current directory, which was emptied. Returns the error, if any."""
    try:
        level = descent.leave()
    except OSError as error:
        # The parent is lost.
        descent.levels, lost = [], descent.levels
        for level in lost:
            level.close()
        return error
    try:
        if level.failed:
            level.close()
            _mark(descent)
            return None
        _remove_by(os.rmdir, descent, level.name, unlock)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and level.tries:
            # Files are still being created in it.
            level.tries -= 1
            level.names = _names(level.fd)
            descent.levels.append(level)
            return None
        level.close()
        return _failed(descent, level.name, error)
    level.close()
    return None


def _failed(descent: _Descent, name: bytes, error: OSError) -> OSError:
    _mark(descent)
    code = error.errno or errno.EIO
    if code == errno.EXDEV:
        return OSError(code, "a filesystem is mounted there", descent.path(name))
    return OSError(code, os.strerror(code), descent.path(name))


def _mark(descent: _Descent) -> None:
    if descent.levels:
        descent.levels[-1].failed = True


def _names(fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in names_in(fd)]


def _open_directory(at: int, name: bytes, accessible: bool) -> int:
    """Open a directory. With `accessible`, chmod it to u+rwx first if this user owns it."""
    try:
        fd = openat2(at, name, _DIRECTORY, _WITHIN)
    except PermissionError as error:
        if error.errno != errno.EACCES or not accessible:
            raise
        with Owned(openat2(at, name, _PATH | os.O_DIRECTORY, _WITHIN)) as path:
            if os.fstat(path).st_uid != os.geteuid():
                raise
            os.chmod(f"/proc/self/fd/{path}", 0o700)
        return openat2(at, name, _DIRECTORY, _WITHIN)
    if accessible:
        status = os.fstat(fd)
        if status.st_mode & 0o700 != 0o700 and status.st_uid == os.geteuid() and not is_host_root():
            os.fchmod(fd, 0o700)
    return fd


@contextmanager
def _unlocked(descent: _Descent, name: bytes) -> Iterator[None]:
    """Clear the flags of chattr(1) for a removal; restore them if the file has other links."""
    if descent.levels:
        with Owned(open_for_listing(descent.fd)) as fd:
            _change_flags(fd, 0)
    with Owned(openat2(descent.fd, name, _PATH, _WITHIN)) as path:
        mode = os.fstat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            yield  # it has no flags, and opening it may have side effects
            return
        file = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with Owned(file) as fd:
        before = _change_flags(fd, 0)
        try:
            yield
        finally:
            if before and os.fstat(fd).st_nlink and stat.S_ISREG(mode):
                _change_flags(fd, before)


def _change_flags(fd: int, locks: int) -> int:
    """Set the locking flags of an open file. Returns its previous ones."""
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, _GETFLAGS, bytes(4)), sys.byteorder)
    except OSError:
        return 0  # the filesystem has no flags
    if flags & _LOCKS != locks:
        fcntl.ioctl(fd, _SETFLAGS, (flags & ~_LOCKS | locks).to_bytes(4, sys.byteorder))
    return flags & _LOCKS
