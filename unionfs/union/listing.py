"""Listing merged directories."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfs.union.markers import Markers
    from unionfs.union.nodes import Node
    from unionfs.union.places import Place
    from unionfs.union.tree import Union

#: What an NFS client calls a file that was removed while an fd of it is held: its number in 16 digits and a
#: count in 8 (fs/nfs/unlink.c, nfs_sillyrename).
NFS_REMOVED: Final = re.compile(r"\.nfs[0-9a-f]{24}")
#: A directory that takes more bytes than this on its filesystem is listed in a thread.
LARGE: Final = 64 * 1024
#: As `os.fsencode`, which looks at each name's type first.
_ENCODING: Final = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class Listing:
    """The names of a merged directory, read from fds of its own, so that a thread may do it."""

    def __init__(self, union: Union, node: Node) -> None:
        #: None: what is bound has no markers.
        self._markers: Markers | None = union.markers if node.identity is None else None
        self._hides: Callable[[int, int], bool] = partial(_hides_at, union, node)
        self._fds: list[int] = []
        upper = node.is_upper and node.identity is None
        self._hides_removed = upper and node.parts[0].layer.links_of_removed > 0
        self.large = False
        try:
            if not node.unlinked:
                for part in node.parts:
                    fd = union.gate.open_for_listing(part)
                    self._fds.append(fd)
                    self.large = self.large or os.fstat(fd).st_size > LARGE
        except BaseException:
            self.close()
            raise

    def names(self) -> list[bytes]:
        """Every visible name once, in the order of the layers; closes the fds. Raises ``OSError``."""
        hidden: set[bytes] = set()
        shown: dict[bytes, None] = {}
        try:
            for index, fd in enumerate(self._fds):
                whiteouts: set[bytes] = set()
                for name in self._in_use(fd, self._entries(index, fd, whiteouts)):
                    if name not in hidden:
                        shown[name] = None
                hidden |= whiteouts
            return list(shown)
        finally:
            self.close()

    def candidates(self) -> dict[bytes, int]:
        """As :meth:`names`, with the index of the topmost of the directory's parts that has the name.

        For who asks the union for each name anyway, which saves looking for whiteouts: they are among them.
        """
        try:
            found: dict[bytes, int] = {}
            for index, fd in enumerate(self._fds):
                for name in self._in_use(fd, real_names(fd)):
                    found.setdefault(name, index)
            return found
        finally:
            self.close()

    def _in_use(self, fd: int, names: list[bytes]) -> list[bytes]:
        """Of the upper, which comes first, without what is removed and still in use."""
        if self._hides_removed and fd == self._fds[0]:
            return [name for name in names if not NFS_REMOVED.fullmatch(os.fsdecode(name))]
        return names

    def _entries(self, index: int, fd: int, whiteouts: set[bytes]) -> list[bytes]:
        """The names in one real directory, without its whiteouts, which go into ``whiteouts``."""
        if self._markers is None:
            return real_names(fd)
        shown = []
        hides = self._hides(index, fd)
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name.encode(*_ENCODING)
                try:
                    hidden = _may_be_whiteout(entry, hides) and self._markers.is_whiteout(
                        os.stat(name, dir_fd=fd, follow_symlinks=False), fd, name
                    )
                except FileNotFoundError:
                    continue
                except OSError:  # a name that cannot be examined is there all the same
                    hidden = False
                if hidden:
                    whiteouts.add(name)
                else:
                    shown.append(name)
        return shown

    def close(self) -> None:
        """Close the fds."""
        while self._fds:
            os.close(self._fds.pop())


def real_names(fd: int) -> list[bytes]:
    """All names in a real directory."""
    return [name.encode(*_ENCODING) for name in os.listdir(fd)]


def _may_be_whiteout(entry: os.DirEntry[str], files: bool) -> bool:
    """Whether an entry may be a whiteout, as regular files may that are `files`. Raises OSError."""
    if entry.is_file(follow_symlinks=False):
        return files
    if entry.is_dir(follow_symlinks=False) or entry.is_symlink():
        return False
    return stat.S_ISCHR(entry.stat(follow_symlinks=False).st_mode)


def hides_xattr_whiteouts(union: Union, node: Node, part: Place, fd: int) -> bool:
    """Whether listings leave out xattr whiteouts in one part of a directory, of which ``fd`` is an fd.

    Only where ``opaque`` is ``x``, only in merged directories, and not in the lowest layer, as overlayfs
    (namei.c, ovl_lookup_single; readdir.c, ovl_dir_read_merged). Elsewhere they are listed, though a lookup
    finds nothing. Our own uppers have them where device nodes are refused; there overlayfs would list them.
    """
    if union.markers.opaque_value(fd) != b"x":
        return False
    return part.layer.is_upper or (len(node.parts) > 1 and part.layer.index < len(union.stack.layers) - 1)


def _hides_at(union: Union, node: Node, index: int, fd: int) -> bool:
    return hides_xattr_whiteouts(union, node, node.parts[index], fd)


def is_empty(union: Union, node: Node) -> bool:
    """Whether the merged directory has no visible name."""
    return not Listing(union, node).names()


def is_unchanged(union: Union, node: Node) -> bool:
    """Whether a directory shows just what the lowers have, and as they have it."""
    if not node.is_upper:
        return True
    if node.is_pure_upper:
        return False
    if node.parts[0].empty:
        return True
    upper = union.gate.open_for_listing(node.parts[0])
    try:
        with os.scandir(upper) as entries:
            return next(entries, None) is None
    finally:
        os.close(upper)
