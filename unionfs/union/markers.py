"""The disk format: whiteouts, opaque directories, redirects and the overlay's own xattrs.

The format is kernel overlayfs's (Documentation/filesystems/overlayfs.rst): a whiteout is a character device
0/0, or an empty regular file with the xattr ``whiteout``; a directory with ``opaque`` = ``y`` hides the
layers below it, ``x`` says that it may contain xattr whiteouts. A user's own xattr with the overlay's prefix
is stored with a second ``overlay.`` inserted (fs/overlayfs/xattrs.c), and shown without it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import Final, NamedTuple

ABSENT: Final = (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
_ESCAPE: Final = b"overlay."
_XATTR_NAME_MAX: Final = 255


class Marks(NamedTuple):
    """The markers of a directory."""

    opaque: bool = False
    redirect: bytes | None = None
    impure: bool = False
    """It may contain copies, which have an origin."""
    copied: bool = False
    """It is a copy itself; see `origin`."""


class Markers:
    """Reads and writes the markers under one xattr prefix (``trusted.overlay.`` or ``user.overlay.``)."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        #: A redirect bypasses the permission checks on the way to its target in a layer. Any user can set a
        #: `user.*` one, so these are refused, as by overlayfs with `userxattr` (params.c).
        self.follows_redirects = not prefix.startswith(b"user.")
        self.opaque = prefix + b"opaque"
        self.redirect = prefix + b"redirect"
        self.metacopy = prefix + b"metacopy"
        self.whiteout = prefix + b"whiteout"
        self.origin = prefix + b"origin"
        self.impure = prefix + b"impure"
        self.nlink = prefix + b"nlink"
        self.upper = prefix + b"upper"
        #: Whether setting a marker requires write permission for the object (xattr(7)).
        self.requires_write = prefix.startswith(b"user.")
        self._escaped = prefix + _ESCAPE

    # -- the overlay's own names ----------------------------------------------------------------------

    def is_private(self, name: bytes) -> bool:
        """Whether the xattr is internal to the overlay: never shown, never copied."""
        return name.startswith(self.prefix) and not name.startswith(self._escaped)

    def stored_name(self, name: bytes) -> bytes:
        """The name on disk of the user's xattr ``name``.

        EOPNOTSUPP if the escaped name is too long (xattrs.c, ovl_xattr_escape_name).
        """
        if not name.startswith(self.prefix):
            return name
        stored = self._escaped + name[len(self.prefix) :]
        if name == self.prefix:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if len(stored) > _XATTR_NAME_MAX:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return stored

    def shown_names(self, stored: list[bytes]) -> list[bytes]:
        """Convert names on disk to the names that users see."""
        shown = []
        for name in stored:
            if name.startswith(self._escaped):
                shown.append(self.prefix + name[len(self._escaped) :])
            elif not name.startswith(self.prefix):
                shown.append(name)
        return shown

    # -- reading --------------------------------------------------------------------------------------

    def is_whiteout(self, st: os.stat_result, dir_fd: int, name: bytes) -> bool:
        """Whether the entry ``name`` of ``dir_fd``, with attributes ``st``, is a whiteout.

        Raises ``OSError`` if its xattr cannot be read, as a lookup does on overlayfs.
        """
        if stat.S_ISCHR(st.st_mode):
            return st.st_rdev == 0
        if st.st_size == 0 and stat.S_ISREG(st.st_mode):
            return _get(b"/proc/self/fd/%d/%b" % (dir_fd, name), self.whiteout) is not None
        return False

    def directory(self, fd: int) -> Marks:
        """The markers of the directory ``fd``."""
        path = b"/proc/self/fd/%d" % fd
        try:
            names = os.listxattr(path)
        except OSError as error:
            if error.errno in ABSENT:
                return Marks()
            names = [os.fsdecode(self.opaque), os.fsdecode(self.redirect)]  # for example too many to list
        if not names:
            return Marks()
        opaque = os.fsdecode(self.opaque) in names and self.opaque_value(fd) == b"y"
        redirect = None
        if os.fsdecode(self.redirect) in names:
            redirect = _get(path, self.redirect, follow=True)
        return Marks(opaque, redirect, os.fsdecode(self.impure) in names, os.fsdecode(self.origin) in names)

    def opaque_value(self, fd: int) -> bytes | None:
        """The value of ``opaque`` on the directory ``fd``; None also if it cannot be read (as util.c,
        ovl_get_dir_xattr_val)."""
        try:
            return _get(b"/proc/self/fd/%d" % fd, self.opaque, follow=True)
        except OSError:
            return None

    def refuse_metacopy(self, where: bytes | int, *, follow: bool = True) -> None:
        """Raise EPERM for a regular file with only its metadata in this layer, rather than return zeros."""
        try:
            os.getxattr(where, self.metacopy, follow_symlinks=follow)
        except OSError:
            return
        raise PermissionError(errno.EPERM, "a metacopy file needs kernel overlayfs")

    # -- writing --------------------------------------------------------------------------------------

    def set_opaque(self, fd: int) -> None:
        """Make the directory ``fd`` hide the layers below it."""
        os.setxattr(b"/proc/self/fd/%d" % fd, self.opaque, b"y")

    def make_whiteout(self, dir_fd: int, name: bytes, announced: Iterable[int]) -> None:
        """Make a whiteout, by xattr where mknod(2) is refused. Raises FileExistsError.

        ``announced``: directories to mark for an xattr whiteout, because the kernel looks for these only if
        both their directory and the layer's root are marked.
        """
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=dir_fd)
            return
        except PermissionError:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0, dir_fd=dir_fd))
        try:
            path = b"/proc/self/fd/%d/%b" % (dir_fd, name)
            os.setxattr(path, self.whiteout, b"y", follow_symlinks=False)
            for fd in announced:
                self.allow_xattr_whiteouts(fd)
        except OSError:
            os.unlink(name, dir_fd=dir_fd)
            raise

    def allow_xattr_whiteouts(self, fd: int) -> None:
        """Mark the directory ``fd`` as one that may contain xattr whiteouts, unless it is opaque."""
        path = b"/proc/self/fd/%d" % fd
        if _get(path, self.opaque, follow=True) is None:
            os.setxattr(path, self.opaque, b"x")


def _get(path: bytes, name: bytes, *, follow: bool = False) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=follow)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
