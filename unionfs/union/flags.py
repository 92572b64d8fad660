"""Flags of files and directories (chattr(1)): immutable, append-only, and those that a copy-up keeps.

The kernel does not know the flags of a FUSE object, so the union refuses what they forbid (fs/namei.c,
may_delete, may_open and vfs_link; fs/attr.c, may_setattr; fs/xattr.c, xattr_permission). As in overlayfs, a
copy in the upper is immutable or append-only by the xattr ``protattr``, since the copy itself must stay
changeable (fs/overlayfs/util.c, ovl_check_protattr and ovl_set_protattr; copy_up.c, ovl_copy_fileattr).

Nobody else changes the layers, so a node remembers its flags: they cost one system call a node, and none for
one that was opened in the upper, or made.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from unionfs.core import layercalls
from unionfs.core.flags import NodeFlags
from unionfs.core.node import Node
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned
from unionfs.union.markers import ABSENT, Markers
from unionfs.union.objects import Objects

IMMUTABLE: Final = calls.FS_IMMUTABLE
APPEND: Final = calls.FS_APPEND
PROTECTED: Final = IMMUTABLE | APPEND
#: As OVL_COPY_FS_FLAGS_MASK.
_COPIED: Final = calls.FS_SYNC | calls.FS_NOATIME
_LETTERS: Final = ((b"a", APPEND), (b"i", IMMUTABLE))
_LONGEST: Final = 32
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_SOON: Final = 2_000_000_000
"""Nanoseconds; a session may not report that a time is to be the present one."""


class Flags(NodeFlags):
    """The flags of one union's objects."""

    def __init__(self, objects: Objects, markers: Markers) -> None:
        super().__init__(objects.gate, markers.protattr)
        self._objects = objects
        self._markers = markers

    def read(self, node: Node) -> int:
        if node.in_place:
            path, follow = self._objects.path(node)
            return self.stored(path, follow=follow)
        if node.is_dir:
            with Owned(self._objects.gate.open_for_listing(node.parts[0])) as fd:
                return read_flags(fd)
        if not self._statx(node) & PROTECTED:
            return 0
        # A read-only filesystem may report all its files as immutable (fs/erofs/inode.c, erofs_getattr); for
        # overlayfs these are not.
        with (
            Owned(self._objects.open_path(node)) as path_fd,
            Owned(self._objects.gate.reopen(node.layer, path_fd, _READ)) as file,
        ):
            return read_flags(file)

    def _statx(self, node: Node) -> int:
        """What statx(2) says of the flags of a lower's file."""
        assert node.place is not None
        if node.held >= 0:
            return layercalls.call(calls.statx_flags, node.held, b"", calls.AT_EMPTY_PATH)
        try:
            dir_fd = self._objects.gate.fd(node.place)
            return layercalls.call(calls.statx_flags, dir_fd, node.name, calls.AT_SYMLINK_NOFOLLOW)
        except PermissionError:
            with Owned(self._objects.open_path(node)) as fd:
                return layercalls.call(calls.statx_flags, fd, b"", calls.AT_EMPTY_PATH)

    # -- what they forbid -----------------------------------------------------------------------------

    def may_make(self, directory: Node) -> None:
        """Raise EPERM if nothing can be created in a directory."""
        if self.of(directory) & IMMUTABLE:
            raise os_error(errno.EPERM)

    def may_remove(self, directory: Node, node: Node) -> None:
        """Raise EPERM if a name of a directory cannot be removed, replaced or renamed."""
        if self.of(directory) | self.of(node):
            raise os_error(errno.EPERM)

    def may_link(self, node: Node, directory: Node) -> None:
        """Raise EPERM if a node cannot get another name, or not in that directory."""
        if self.of(node):
            raise os_error(errno.EPERM)
        self.may_make(directory)

    def may_change(self, node: Node) -> None:
        """Raise EPERM if owner, mode, times or xattrs of a node cannot be changed."""
        if self.of(node):
            raise os_error(errno.EPERM)

    def may_set_times(self, node: Node, times: list[int]) -> None:
        """The same for times, which an append-only object can have set to the present."""
        flags = self.of(node)
        now = time.time_ns() if flags else 0
        if flags & IMMUTABLE or (flags and any(abs(now - one) > _SOON for one in times)):
            raise os_error(errno.EPERM)

    def may_write(self, node: Node, *, appends: bool) -> None:
        """Raise EPERM if the data of a file cannot be changed, or only by appending."""
        flags = self.of(node)
        if flags & IMMUTABLE or (flags and not appends):
            raise os_error(errno.EPERM)

    # -- where they are stored ------------------------------------------------------------------------

    def stored(self, where: bytes | int, *, follow: bool = True) -> int:
        """IMMUTABLE and APPEND in the xattr ``protattr`` of an object of the upper; none if it has others."""
        flags, value = 0, self._markers.protattr_value(where, follow=follow) or b""
        for letter in value if len(value) <= _LONGEST else b"":
            known = dict(_LETTERS).get(bytes([letter]))
            if known is None:
                return 0
            flags |= known
        return flags

    def store(self, where: bytes | int, flags: int) -> None:
        """Write them to an object of the upper. Raises EPERM where it can have no xattrs."""
        value = b"".join(letter for letter, flag in _LETTERS if flags & flag)
        try:
            if value:
                os.setxattr(where, self._markers.protattr, value)
            elif self._markers.protattr_value(where, follow=True) is not None:
                os.removexattr(where, self._markers.protattr)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise os_error(errno.EPERM) from None
            raise

    def copy_directory(self, node: Node, target: int) -> None:
        """Give the copy of a lower's directory (an fd) its flags."""
        self.of(node)
        assert node.flags is not None
        self.copy(node.flags, target)

    def copy(self, flags: int, target: int) -> None:
        """Give a copy (an fd) the flags of its source, those that its filesystem can keep."""
        if flags & PROTECTED:
            try:
                self.store(target, flags)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
        if flags & _COPIED:
            try:
                calls.set_flags(target, calls.get_flags(target) & ~_COPIED | flags & _COPIED)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise


_UNSUPPORTED: Final = (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES)


def read_flags(fd: int) -> int:
    """The flags of a lower's object that apply in the union: an fd, not O_PATH; none where there are none."""
    try:
        return layercalls.call(calls.get_flags, fd) & (PROTECTED | _COPIED)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise
