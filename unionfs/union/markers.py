"""The disk format: whiteouts, opaque directories, redirects and the overlay's own xattrs.

The format is kernel overlayfs's (Documentation/filesystems/overlayfs.rst): a whiteout is a character device
0/0, or an empty regular file with the xattr ``whiteout``; a directory with ``opaque`` = ``y`` hides the
layers below it, ``x`` says that it may contain xattr whiteouts. A user's own xattr with the overlay's prefix
is stored with a second ``overlay.`` inserted (fs/overlayfs/xattrs.c), and shown without it.

fuse-overlayfs without root sets ``user.fuseoverlayfs.opaque`` (main.c, set_fd_opaque); that prefix is treated
likewise. Its whiteouts are names, see `named`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, NamedTuple

from unionfs.core import layercalls

ABSENT: Final = (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
FUSE_OVERLAYFS: Final = b"user.fuseoverlayfs."
_ESCAPE: Final = b"overlay."
_OTHER_OPAQUE: Final = FUSE_OVERLAYFS + b"opaque"
_XATTR_NAME_MAX: Final = 255
_METACOPY_HEADER: Final = 4


class Marks(NamedTuple):
    """The markers of a directory."""

    opaque: bool = False
    redirect: bytes | None = None
    impure: bool = False
    """It may contain copies, which have an origin."""
    copied: bool = False
    """It is a copy itself; see `origin`."""


Read = Callable[[bytes], bytes]


class Markers:
    """Reads and writes the markers under one xattr prefix (``trusted.overlay.`` or ``user.overlay.``)."""

    def __init__(self, prefix: bytes, *, follows_redirects: bool | None = None) -> None:
        """``follows_redirects``: None for the default, which is overlayfs's."""
        self.prefix = prefix
        #: A redirect bypasses the permission checks on the way to its target in a layer. Any user can set a
        #: `user.*` one, so by default these are refused, as by overlayfs with `userxattr` (params.c).
        anyone = prefix.startswith(b"user.")
        self.follows_redirects = not anyone if follows_redirects is None else follows_redirects
        #: Only redirects in directories of this user are followed; None: in all.
        self.redirects_of = os.geteuid() if anyone else None
        #: The data of a metacopy file is found like that, too.
        self.follows_metacopy = not anyone
        self.opaque = prefix + b"opaque"
        self.redirect = prefix + b"redirect"
        self.metacopy = prefix + b"metacopy"
        self.protattr = prefix + b"protattr"
        self.whiteout = prefix + b"whiteout"
        self.origin = prefix + b"origin"
        self.impure = prefix + b"impure"
        self.nlink = prefix + b"nlink"
        self.upper = prefix + b"upper"
        self.uuid = prefix + b"uuid"
        #: Whether setting a marker requires write permission for the object (xattr(7)).
        self.requires_write = prefix.startswith(b"user.")

    # -- the overlay's own names ----------------------------------------------------------------------

    def is_private(self, name: bytes) -> bool:
        """Whether the xattr is internal to the overlay: never shown, never copied."""
        prefix = self._prefix_of(name)
        return prefix is not None and not name.startswith(prefix + _ESCAPE)

    def is_internal(self, name: bytes) -> bool:
        """Whether the xattr has a prefix of the overlay's own; if it is a user's, it is stored escaped."""
        return self._prefix_of(name) is not None

    def stored_name(self, name: bytes) -> bytes:
        """The name on disk of the user's xattr ``name``.

        EOPNOTSUPP if the escaped name is too long (xattrs.c, ovl_xattr_escape_name).
        """
        prefix = self._prefix_of(name)
        if prefix is None:
            return name
        stored = prefix + _ESCAPE + name[len(prefix) :]
        if name == prefix:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if len(stored) > _XATTR_NAME_MAX:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return stored

    def shown_names(self, stored: list[bytes]) -> list[bytes]:
        """Convert names on disk to the names that users see."""
        shown = []
        for name in stored:
            prefix = self._prefix_of(name)
            if prefix is None:
                shown.append(name)
            elif name.startswith(prefix + _ESCAPE):
                shown.append(prefix + name[len(prefix) + len(_ESCAPE) :])
        return shown

    def _prefix_of(self, name: bytes) -> bytes | None:
        """The prefix of internal xattrs that ``name`` has, if any."""
        if name.startswith(self.prefix):
            return self.prefix
        return FUSE_OVERLAYFS if name.startswith(FUSE_OVERLAYFS) else None

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

    def directory(self, fd: int, read: Read | None = None) -> Marks:
        """The markers of the directory ``fd``.

        ``read`` reads an xattr by name where the mode may deny that; without it, PermissionError is raised.
        """
        path = b"/proc/self/fd/%d" % fd
        try:
            names = layercalls.call(os.listxattr, path)
        except OSError as error:
            if error.errno in ABSENT:
                return Marks()
            names = [os.fsdecode(name) for name in (self.opaque, self.redirect, _OTHER_OPAQUE)]  # too many
        if not names:
            return Marks()
        if read is None:
            read = partial(_value_of, path)
        opaque = os.fsdecode(self.opaque) in names and _value(read, self.opaque) == b"y"
        if not opaque and os.fsdecode(_OTHER_OPAQUE) in names:
            opaque = _value(read, _OTHER_OPAQUE) == b"y"
        redirect = None
        if os.fsdecode(self.redirect) in names:
            redirect = _value(read, self.redirect)
        return Marks(opaque, redirect, os.fsdecode(self.impure) in names, os.fsdecode(self.origin) in names)

    def opaque_value(self, fd: int) -> bytes | None:
        """The value of ``opaque`` on the directory ``fd``; None also if it cannot be read (as util.c,
        ovl_get_dir_xattr_val)."""
        return self._value(fd, self.opaque)

    def _value(self, fd: int, name: bytes) -> bytes | None:
        try:
            return _get(b"/proc/self/fd/%d" % fd, name, follow=True)
        except OSError:
            return None

    def metacopy_value(self, where: bytes | int, *, follow: bool = False) -> bytes | None:
        """The value of ``metacopy`` of a path or fd; None: a regular file has its data itself.

        Empty, or a header of four bytes and a digest of fs-verity (overlayfs.h, struct ovl_metacopy). A
        shorter one is EIO (util.c, ovl_check_metacopy_xattr).
        """
        value = _get(where, self.metacopy, follow=follow)
        if value and len(value) < _METACOPY_HEADER:
            raise OSError(errno.EIO, "a layer holds an invalid metacopy xattr")
        return value

    def protattr_value(self, where: bytes | int, *, follow: bool = False) -> bytes | None:
        """The value of ``protattr`` of a path or fd, None without one."""
        return _get(where, self.protattr, follow=follow)

    def redirect_value(self, where: bytes | int, *, follow: bool = False) -> bytes | None:
        """The value of ``redirect`` of a path or fd, None without one."""
        return _get(where, self.redirect, follow=follow)

    # -- writing --------------------------------------------------------------------------------------

    def set_redirect(self, fd: int, redirect: bytes) -> None:
        """Make the directory ``fd`` merge with the lowers' directory at a path or, without a slash, of that
        name in the same parent."""
        os.setxattr(b"/proc/self/fd/%d" % fd, self.redirect, redirect)

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
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dir_fd))
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


def _value_of(path: bytes, name: bytes) -> bytes:
    return layercalls.call(os.getxattr, path, name)


def _value(read: Read, name: bytes) -> bytes | None:
    try:
        return read(name)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise


def _get(path: bytes | int, name: bytes, *, follow: bool = False) -> bytes | None:
    try:
        return layercalls.call(os.getxattr, path, name, follow_symlinks=follow or type(path) is int)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
