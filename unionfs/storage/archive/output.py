"""The file an archive is written to: it gets its name when it is whole and on disk."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.storage.drivers.replacing import fsync_directory


@contextmanager
def whole_file(path: str) -> Iterator[IO[bytes]]:
    """An unbuffered file that takes the place of `path` when the context ends well, and else was never there.

    On most filesystems it has no name until then, so that even SIGKILL leaves nothing. What is no regular
    file (a FIFO, /dev/null) is written as it is. Raises UserError.
    """
    if not os.path.basename(path):
        raise UserError(f"{quoted(path)} is no file's name; name the file that the backup shall be.")
    try:
        path, special = _place(path)
        if special is not None:
            with open(special, "wb", buffering=0) as out:
                yield out
            return
        directory = os.path.dirname(path)
        fd, name = _open_nameless(directory, path)
    except OSError as error:
        raise UserError(
            f"the backup {quoted(path)} cannot be made: {reason(error)}; name a file in a directory that is "
            "there and can be written."
        ) from error
    try:
        with open(fd, "wb", buffering=0) as out:
            yield out
            os.fsync(fd)
            if name is None:
                name = f"{directory}/.{os.path.basename(path)[:200]}.{secrets.token_hex(4)}"
                # linkat(2) with AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH; this way doesn't. Without a
                # directory's fd Python calls link(2), which does not follow.
                os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
            os.rename(name, path)
            name = None
            fsync_directory(directory)
    finally:
        if name is not None:
            with suppress(OSError):
                os.unlink(name)


def _place(path: str) -> tuple[str, int | None]:
    """The path of the file to replace: that which a symlink leads to. What is no regular file is opened.

    No symlink is followed that another user has put into a directory as /tmp. Such is the kernel's rule, too,
    where fs.protected_symlinks is set (proc_sys_fs(5)), which is why the kernel follows, and not realpath(3).
    """
    try:
        link = os.lstat(path)
        if stat.S_ISLNK(link.st_mode) and link.st_uid != os.geteuid():
            above = os.stat(os.path.dirname(path) or ".")
            if above.st_mode & 0o1002 == 0o1002 and above.st_uid != link.st_uid:
                raise PermissionError(errno.EACCES, "it is a symlink of another user's in a shared directory")
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), None
    try:
        kind = os.fstat(fd).st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"{quoted(path)} is a directory; name a file in it.")
        if stat.S_ISREG(kind):
            return os.readlink(f"/proc/self/fd/{fd}"), None
        return path, os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _open_nameless(directory: str, path: str) -> tuple[int, str | None]:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        name = f"{directory}/.{os.path.basename(path)[:200]}.{secrets.token_hex(4)}"
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), name
