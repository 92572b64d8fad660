"""The tree that a commit changes, reached from one directory fd: no symlink, no mount and no `..` is
followed.

So whatever others put into the base meanwhile, or in its place, nothing outside it is touched.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from unionfs.errors import UserError, on_failure, quoted
from unionfs.sys.calls import renameat2
from unionfs.sys.fds import Owned, close_quietly
from unionfs.sys.handles import filesystem_identity
from unionfs.sys.openat2 import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    openat2,
)

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_WITHIN = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
_LONGEST = 3000
_OWNERS = stat.S_IRWXU


class Beneath:
    """The base, by an fd of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._last: tuple[bytes, int] | None = None

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """An fd of the directory of a path that begins with a slash, valid until the next call, and the name.

        Raises OSError: ELOOP or ENOTDIR if a symlink is on the way, EXDEV for a mount.
        """
        above, _, name = path.rpartition(b"/")
        if not above:
            return self.fd, name
        if self._last is None or self._last[0] != above:
            self.close()
            self._last = above, self._open(above)
        return self._last[1], name

    def directory(self, path: bytes) -> int:
        """A new O_PATH fd of a directory; the root for an empty path. Raises OSError."""
        return self._open(path) if path else os.open(b".", _PATH | os.O_CLOEXEC, dir_fd=self.fd)

    def _open(self, path: bytes) -> int:
        names, here = path.strip(b"/").split(b"/"), os.dup(self.fd)
        while names:
            count = len(names)
            while count > 1 and len(b"/".join(names[:count])) > _LONGEST:
                count = count // 2
            with Owned(here) as fd:
                here = openat2(fd, b"/".join(names[:count]), _PATH, _WITHIN)
            names = names[count:]
        return here

    def close(self) -> None:
        """Close all but the base's fd."""
        if self._last is not None:
            close_quietly(self._last[1])
            self._last = None


@contextmanager
def opened(base: str, inode: int, filesystem: str | None = None) -> Iterator[Beneath]:
    """The base, if it is still the directory with that inode number, and on that filesystem if one is given.

    Raises UserError.
    """
    cure = "it must be the directory that it was when the branch was made, not a symlink"
    with on_failure(f"the base {quoted(base)} cannot be opened", cure):
        way = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
        with Owned(os.open("/", os.O_PATH | os.O_CLOEXEC)) as root:
            fd = openat2(root, os.fsencode(base), os.O_RDONLY | os.O_DIRECTORY, way)
    with Owned(fd):
        is_same = os.fstat(fd).st_ino == inode
        if filesystem is not None and not (is_same and filesystem_identity(fd) == filesystem):
            raise UserError(
                f"{quoted(base)} is not on the filesystem that was mounted there when the branch was used; "
                "mount that again, or discard the branch."
            )
        if not is_same:
            raise UserError(
                f"the base {quoted(base)} is another directory than the one the branch was made of; move "
                "that back, or discard the branch."
            )
        with closing(Beneath(fd)) as tree:
            yield tree


def status(at: int, name: bytes) -> os.stat_result | None:
    """The attributes of a name, None if there is none. Raises OSError."""
    try:
        return os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return None


def inode(at: int, name: bytes) -> int | None:
    """The inode number of a name, None if there is none. Raises OSError."""
    found = status(at, name)
    return None if found is None else found.st_ino


def rename(old_at: int, old: bytes, new_at: int, new: bytes, flags: int = 0) -> None:
    """renameat2(2), if need be with the rights that the owner of the directories lacks by their modes, for
    the moment. Raises OSError.
    """
    try:
        renameat2(old_at, old, new_at, new, flags)
        return
    except PermissionError as error:
        if error.errno != errno.EACCES:
            raise
    with ExitStack() as restored:
        for at, name in ((old_at, old), (new_at, new)):
            restored.enter_context(_widened(at))
            try:
                fd = restored.enter_context(Owned(os.open(name, _PATH | os.O_CLOEXEC, dir_fd=at)))
            except OSError:
                continue  # no directory
            restored.enter_context(_widened(fd))
        renameat2(old_at, old, new_at, new, flags)


@contextmanager
def _widened(fd: int) -> Iterator[None]:
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    path = b"/proc/self/fd/%d/." % fd
    if mode & _OWNERS == _OWNERS or os.fstat(fd).st_uid != os.geteuid():
        yield
        return
    os.chmod(path, mode | _OWNERS)
    try:
        yield
    finally:
        os.chmod(path, mode)
