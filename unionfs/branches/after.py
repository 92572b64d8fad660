"""The state of the base after a commit, to detect later changes.

A branch's ctime tells nothing: the kernel has one of its own for what it writes back by itself, and another
mount shows the one on disk. So there xattrs are compared.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from unionfs.branches.beneath import Beneath, status
from unionfs.branches.journal import Journal
from unionfs.sys.fds import Owned, open_for_listing

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def states(entry: Journal, tree: Beneath) -> dict[str, list[int]]:
    """The present state of each path of a journal and of everything below it, as numbers that differ after a
    change; an empty list for a missing path.

    Raises OSError.
    """
    found: dict[str, list[int]] = {}
    for move in entry.moves:
        found[move.path] = []
        if move.source is not None:
            # Its content is renamed with it; changes in it have moves of their own.
            for path in (move.source, move.path):
                found[path] = []
                with _may_be_gone():
                    found[path] = _numbers(status(*tree.parent(os.fsencode(path))))
            continue
        with _may_be_gone():
            _look(found, tree, move.path, in_branch=entry.parent is not None)
    for setting in entry.settings:
        if setting.path not in found:
            with _may_be_gone(), Owned(tree.directory(os.fsencode(setting.path))) as fd:
                found[setting.path] = _numbers(os.fstat(fd))
    return found


@contextmanager
def _may_be_gone() -> Iterator[None]:
    """A path that is missing, or in which something is not a directory any more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise


def reached(entry: Journal, tree: Beneath) -> dict[str, list[int]]:
    """`states` at the end of a commit. A path at which others have replaced or removed the new object gets a
    state that no undo accepts. Raises OSError.
    """
    found = states(entry, tree)
    for move in entry.moves:
        if move.new is not None and found[move.path][:1] != [move.new]:
            found[move.path] = [move.new]
    return found


def _numbers(st: os.stat_result | None) -> list[int]:
    return [] if st is None else [st.st_ino, st.st_mode, st.st_uid, st.st_gid]


def _look(found: dict[str, list[int]], tree: Beneath, path: str, *, in_branch: bool) -> None:
    at, name = tree.parent(os.fsencode(path))
    st = os.stat(name, dir_fd=at, follow_symlinks=False)
    found[path] = _state(st, at, name, in_branch=in_branch)
    # Trees may be deeper than Python's stack, and than the limit of open files.
    waiting = [path] if stat.S_ISDIR(st.st_mode) else []
    while waiting:
        above = waiting.pop()
        try:
            fd = tree.directory(os.fsencode(above))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            found[above] = []  # a mount, which is not a state of a commit
            continue
        with Owned(fd), Owned(open_for_listing(fd)) as listing:
            for name in map(os.fsencode, os.listdir(listing)):
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                below = f"{above}/{os.fsdecode(name)}"
                found[below] = _state(st, fd, name, in_branch=in_branch)
                if stat.S_ISDIR(st.st_mode):
                    waiting.append(below)


def _state(st: os.stat_result, at: int, name: bytes, *, in_branch: bool) -> list[int]:
    if stat.S_ISDIR(st.st_mode):
        return _numbers(st)
    last = _xattrs(at, name) if in_branch else st.st_ctime_ns
    return [st.st_ino, st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, last]


def _xattrs(at: int, name: bytes) -> int:
    """A checksum."""
    where = b"/proc/self/fd/%d/%b" % (at, name)
    found = 0
    for one in sorted(os.listxattr(where, follow_symlinks=False)):
        value = os.getxattr(where, one, follow_symlinks=False)
        found = zlib.crc32(b"%b\0%d\0%b" % (os.fsencode(one), len(value), value), found)
    return found
