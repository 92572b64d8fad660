"""Open files: backing fds, and reading and writing through them. `openfiles` tracks their users.

A session's state about a node in use is the node's `Use`, and ends with the node.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from unionfs.core import layercalls
from unionfs.core.files import OpenFile
from unionfs.sys.fds import close_quietly, open_quietly
from unionfs.union.rights import Rights

_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
#: Errors of opening a file that a layer has lost; read(2) does not report them.
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


def open_backing(
    dir_fd: int, name: bytes, *, write: bool, waits: bool, rights: Rights, upper: bool, quiet: bool = False
) -> OpenFile:
    """Open the regular file ``name`` of ``dir_fd``; with ``write`` for reading and writing. ``quiet``: as
    `open_quietly`.

    ``rights`` open a file of the user's own in spite of its mode, which may have changed since the kernel
    checked it. Raises ``OSError``; EIO if it is not a regular file (a layer changed under the union).
    """
    flags, readable = (os.O_RDWR if write else os.O_RDONLY) | _FLAGS, True
    try:
        if quiet:
            fd = open_quietly(name, flags, dir_fd)
        else:
            fd = layercalls.call(os.open, name, flags, dir_fd=dir_fd)
    except PermissionError as error:
        if not write:
            fd = rights.open(dir_fd, name, flags, error, upper=upper)
        else:
            try:  # an ordinary user's own file that is writable but not readable
                fd = os.open(name, os.O_WRONLY | _FLAGS, dir_fd=dir_fd)
                readable = False
            except PermissionError:
                fd = rights.open(dir_fd, name, flags, error, upper=upper)
    return _checked(fd, readable=readable, writable=write, waits=waits)


def open_held(
    held: int,
    *,
    write: bool,
    waits: bool,
    rights: Rights | None = None,
    upper: bool = False,
    quiet: bool = False,
) -> OpenFile:
    """Reopen the file of the O_PATH fd ``held``; see :func:`open_backing`."""
    name = b"/proc/self/fd/%d" % held
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = open_quietly(name, flags) if quiet else layercalls.call(os.open, name, flags)
    except PermissionError as error:
        if rights is None:
            raise
        fd = rights.reopen(held, flags, error, upper=upper)
    return _checked(fd, readable=True, writable=write, waits=waits)


def _checked(fd: int, *, readable: bool, writable: bool, waits: bool) -> OpenFile:
    try:
        st = layercalls.call(os.fstat, fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EIO, "the layer no longer holds a regular file there")
    except BaseException:
        close_quietly(fd)
        raise
    return OpenFile(fd, readable=readable, writable=writable, waits=waits, st=st)
