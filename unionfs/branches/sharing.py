"""Moves files of a branch's layer to the base, instead of copying them.

A file is exchanged with the one that it replaces. In a directory that is put in place as a whole it is hard
linked; its name in the layer is removed when all is in place. `undo` or an error restores both. Only for a
layer on the base's filesystem, and files with one name, all of their data and no marker but `origin`, which
is removed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.branches.beneath import Beneath
from unionfs.branches.journal import Journal, Move
from unionfs.branches.view import View
from unionfs.branches.writers import is_written
from unionfs.sys.fds import Owned
from unionfs.union.diff import Object

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHANGEABLE = stat.S_IWUSR | stat.S_IXUSR
_GONE = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_NOT_POSSIBLE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)


class Sharing:
    """The files of the layer of one branch."""

    def __init__(self, view: View, entry: Journal) -> None:
        self._view = view
        self._entry = entry
        self._above = b""
        self._directory: os.stat_result | None = None

    def inode(self, path: bytes, found: Object) -> int | None:
        """Prepare a file for its move. Returns its inode number; None if it must be copied.

        `path` begins with a slash. Raises OSError.
        """
        st, place = found.st, found.parts[0]
        if st is None or not stat.S_ISREG(st.st_mode) or st.st_nlink != 1 or not place.layer.is_upper:
            return None
        if not self._view.has_shown_owner(st):
            return None
        above, _, name = path.rpartition(b"/")
        directory = self._view.merge.gate.fd(place)
        if above != self._above or self._directory is None:
            self._above, self._directory = above, os.stat(directory)
        if os.geteuid() != 0 and self._directory.st_mode & _CHANGEABLE != _CHANGEABLE:
            return None
        # One open file serves all calls, of which each would look up a path in /proc.
        try:
            fd = os.open(name, _READ, dir_fd=directory)
        except OSError:
            return None
        with Owned(fd):
            if is_written(fd) is not False or not self._without_markers(fd):
                return None
        self._entry.times[os.fsdecode(above)] = [self._directory.st_atime_ns, self._directory.st_mtime_ns]
        return st.st_ino

    def _without_markers(self, fd: int) -> bool:
        """Remove the `origin` of an open file. Returns False if it has other markers, or is not permitted.
        Raises OSError."""
        private = [name for name in map(os.fsencode, os.listxattr(fd)) if b".overlay." in name]
        if any(name != self._view.merge.markers.origin for name in private):
            return False
        try:
            for name in private:
                os.removexattr(fd, name)
        except PermissionError:
            return False
        return True

    def link(self, path: bytes, found: Object, at: int, name: bytes) -> bool:
        """Hard link the file at `path` to `name`. Returns False if it must be copied. Raises OSError."""
        directory = self._view.merge.gate.fd(found.parts[0])
        try:
            os.link(
                path.rpartition(b"/")[2], name, src_dir_fd=directory, dst_dir_fd=at, follow_symlinks=False
            )
        except OSError as error:
            if error.errno in _NOT_POSSIBLE:
                return False
            raise
        return True


@contextmanager
def opened(layer: str | None) -> Iterator[Beneath | None]:
    """A layer, None if it is gone. Raises OSError."""
    if layer is None:
        yield None
        return
    with Owned(os.open(layer, _DIRECTORY)) as fd:
        found = Beneath(fd)
        try:
            yield found
        finally:
            found.close()


def let_go(entry: Journal, layer: Beneath | None) -> None:
    """Remove the layer's names of files that are in the base now. Raises OSError."""
    if layer is None:
        return
    for path in (path for move in entry.moves for path in _shared(move)):
        # A user may lack rights on a directory of the layer; then the file has that name, too.
        with suppress(FileNotFoundError, PermissionError):
            at, name = layer.parent(path)
            os.unlink(name, dir_fd=at)


def give_back(entry: Journal, layer: Beneath | None, new: int) -> None:
    """Restore these names in the layer, and the times of its directories; `new`: an fd of their directory.

    Raises OSError.
    """
    if layer is None:
        return
    prepared = Beneath(new)
    try:
        for move in entry.moves:
            for path in _shared(move):
                staged = b"/%d" % move.number + path[len(os.fsencode(move.path)) :]
                _link_back(prepared, staged, layer, path)
    finally:
        prepared.close()
    for directory, (atime, mtime) in entry.times.items():
        with Owned(layer.directory(os.fsencode(directory))) as fd:
            os.utime(b"/proc/self/fd/%d" % fd, ns=(atime, mtime))


def _link_back(prepared: Beneath, staged: bytes, layer: Beneath, path: bytes) -> None:
    at, name = layer.parent(path)
    try:
        where, last = prepared.parent(staged)
        os.link(last, name, src_dir_fd=where, dst_dir_fd=at, follow_symlinks=False)
    except OSError as error:
        # It is there already, or somebody has removed or replaced it in the base meanwhile.
        if error.errno not in _GONE:
            raise


def _shared(move: Move) -> list[bytes]:
    """The paths of a move's shared files, each with a slash before it."""
    return [os.fsencode(f"{move.path}/{below}") for below in move.shared]
