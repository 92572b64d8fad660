"""The state of the base after a commit, to detect later changes.

A branch's ctime tells nothing: the kernel has one of its own for what it writes back by itself, and another
mount shows the one on disk. So there xattrs are compared.
"""

from __future__ import annotations

import os
import stat
import zlib
from contextlib import suppress

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
            found[move.source] = _numbers(status(*tree.parent(os.fsencode(move.source))))
            found[move.path] = _numbers(status(*tree.parent(os.fsencode(move.path))))
            continue
        with suppress(FileNotFoundError):
            at, name = tree.parent(os.fsencode(move.path))
            _look(found, move.path, at, name, in_branch=entry.parent is not None)
    for setting in entry.settings:
        if setting.path not in found:
            with suppress(FileNotFoundError), Owned(tree.directory(os.fsencode(setting.path))) as fd:
                found[setting.path] = _numbers(os.fstat(fd))
    return found


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


def _look(found: dict[str, list[int]], path: str, at: int, name: bytes, *, in_branch: bool) -> None:
    st = os.stat(name, dir_fd=at, follow_symlinks=False)
    if not stat.S_ISDIR(st.st_mode):
        numbers = [st.st_ino, st.st_mode, st.st_uid, st.st_gid]
        last = _xattrs(at, name) if in_branch else st.st_ctime_ns
        found[path] = [*numbers, st.st_size, st.st_mtime_ns, last]
        return
    found[path] = _numbers(st)
    with Owned(os.open(name, os.O_PATH | _DIRECTORY, dir_fd=at)) as fd:
        with Owned(open_for_listing(fd)) as listing:
            names = sorted(os.listdir(listing))
        for below in names:
            _look(found, f"{path}/{below}", fd, os.fsencode(below), in_branch=in_branch)


def _xattrs(at: int, name: bytes) -> int:
    """A checksum."""
    where = b"/proc/self/fd/%d/%b" % (at, name)
    found = 0
    for one in sorted(os.listxattr(where, follow_symlinks=False)):
        value = os.getxattr(where, one, follow_symlinks=False)
        found = zlib.crc32(b"%b\0%d\0%b" % (os.fsencode(one), len(value), value), found)
    return found
