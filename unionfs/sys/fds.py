"""File descriptors that are closed at the end of a block."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import IO, Final

from unionfs.core import layercalls, marks

_MANY: Final = 1 << 20


def close_quietly(fd: int) -> None:
    """close(2), which releases the fd whatever it reports. An error tells something only of data that was
    written and not synced."""
    with suppress(OSError):
        marks.close_fd(fd)


def close_connections() -> None:
    """Close this process's fds of /dev/fuse, which ends their mounts if no other process has them."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse":
                os.close(int(fd))


class Files(ExitStack):
    """Closes fds at its end, the last first, and knows which it has."""

    def __init__(self) -> None:
        super().__init__()
        self._fds: list[int] = []

    def own(self, fd: int) -> int:
        """Close this one, too, at the end; returns it."""
        self.callback(close_quietly, fd)
        self._fds.append(fd)
        return fd

    def fds(self) -> list[int]:
        """In the order in which they were taken."""
        return self._fds

    def pop_all(self) -> Files:
        """Move all to a new one."""
        moved = super().pop_all()
        moved._fds, self._fds = self._fds, []
        return moved


class Owned:
    """Closes `fd` at the end of a `with` block; `as` binds the number.

    An error of close(2) is ignored: what the block did is done.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        close_quietly(self.fd)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_quietly(self.fd)


class Returned(Owned):
    """Closes `fd` only if the `with` block fails; afterwards it belongs to the caller."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            close_quietly(self.fd)


def fd_limit() -> int:
    """How many fds this process may have (getrlimit(2)); at most a million."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MANY if soft == resource.RLIM_INFINITY else min(soft, _MANY)


def is_directory(path: str) -> bool:
    """Whether there is a directory. Unlike os.path.isdir raises OSError if that is not known: what is taken
    for missing is made anew, or forgotten.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def exists(path: str) -> bool:
    """Whether there is anything, also a symlink. Unlike os.path.lexists raises OSError if that is unknown."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise
    return True


def directory(path: str) -> Owned:
    """Open a directory for reading. Raises OSError."""
    return Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def sync_directory(path: str) -> None:
    """fsync(2) a directory, so that its entries are durable. Raises OSError."""
    with directory(path) as fd:
        os.fsync(fd)


@contextmanager
def replacing(path: str, *, sync: bool) -> Iterator[IO[bytes]]:
    """A file of mode 0600 that takes the place of another one at the end of the block, if that succeeds.

    Until then its name has the suffix `.new`, so there may be one writer at a time. With `sync`, a power cut
    leaves either the old or the new content, never an empty file. Raises OSError.
    """
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as out:
            yield out
            if sync:
                out.flush()
                os.fsync(fd)
        os.rename(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def open_for_listing(fd: int) -> int:
    """Reopen a directory fd for reading (getdents, fsync)."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)


def names_in(fd: int) -> list[str]:
    """The names in a directory, by any fd of it. Raises OSError."""
    with Owned(open_for_listing(fd)) as listing:
        return os.listdir(listing)


def open_quietly(name: bytes, flags: int, dir_fd: int | None = None) -> int:
    """open(2) so that reading does not change the access time, if the file is the user's. Raises OSError."""
    try:
        return layercalls.call(os.open, name, flags | os.O_NOATIME, dir_fd=dir_fd)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        return layercalls.call(os.open, name, flags, dir_fd=dir_fd)
