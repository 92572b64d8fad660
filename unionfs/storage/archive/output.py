"""The output file of an archive: it gets its name when it is complete and on disk."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import IO

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.sys.calls import AT_FDCWD
from unionfs.sys.fds import Owned, close_quietly
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2
from unionfs.sys.walking import follow


@contextmanager
def output_to(target: str, what: str = "backup") -> Iterator[IO[bytes]]:
    """Standard output if `target` is `-`; else as `whole_file`. Raises UserError."""
    if target != "-":
        with whole_file(target, what) as out:
            yield out
        return
    sys.stdout.flush()
    with open(os.dup(1), "wb", buffering=0) as out:
        yield out


@contextmanager
def written(what: str, target: str) -> Iterator[None]:
    """Turn an OSError of the block, which writes `what` to `target`, into a UserError, but for a reader that
    has ended.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where, then = quoted(target), "the incomplete file was removed. Free space"
        if target == "-":
            where, then = "standard output", "free space"
        raise UserError(
            f"the {what} cannot be written to {where}: {reason(error)}; {then}, or write it elsewhere."
        ) from error


@contextmanager
def whole_file(path: str, what: str = "backup") -> Iterator[IO[bytes]]:
    """An unbuffered file that replaces `path` if the context ends without an error, and else is discarded.

    On most filesystems it has no name until then, so even SIGKILL leaves nothing behind, but for one moment
    if `path` exists. Its directory stays open, so that a rename cannot redirect it. Anything but a regular
    file (a FIFO, /dev/null) is written directly. `what`: what is written, for messages. Raises UserError.
    """
    if not os.path.basename(path):
        raise UserError(f"{quoted(path)} is not a file name; name the file to write the {what} to.")
    with ExitStack() as opened:
        with on_failure(
            f"the {what} {quoted(path)} cannot be made",
            "name a file in a directory that is there and can be written",
        ):
            directory, name, special = _place(path, opened)
            if special is not None:
                with open(special, "wb", buffering=0) as out:
                    yield out
                return
            fd, temporary = _open_nameless(directory, name)
        try:
            # Its data is on disk before close(2), whose error then says nothing.
            with Owned(fd), open(fd, "wb", buffering=0, closefd=False) as out:
                yield out
                os.fsync(fd)
                if temporary is None:
                    temporary = _link(fd, directory, name)
                if temporary is not None:
                    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                    temporary = None
                with on_failure(
                    f"the {what} {quoted(path)} is in place, but may not be after a power cut",
                    "check its disk, and write it again",
                ):
                    _fsync(directory)
        finally:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)


def _place(path: str, opened: ExitStack) -> tuple[int, str, int | None]:
    """The directory (O_PATH) and the name of the file to replace, after following symlinks.

    Anything but a regular file is opened and returned too. A symlink that another user put into a directory
    such as /tmp is not followed, which is the kernel's rule if fs.protected_symlinks is set (proc_sys_fs(5)).
    """
    try:
        link = os.lstat(path)
        if stat.S_ISLNK(link.st_mode) and link.st_uid != os.geteuid():
            above = os.stat(os.path.dirname(path) or ".")
            if above.st_mode & 0o1002 == 0o1002 and above.st_uid != link.st_uid:
                raise PermissionError(errno.EACCES, "it is a symlink of another user's in a shared directory")
        fd = follow(path)
    except FileNotFoundError:
        directory = follow(os.path.dirname(path) or ".")
        opened.callback(close_quietly, directory)
        return directory, os.path.basename(path), None
    opened.callback(close_quietly, fd)
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{quoted(path)} is a directory; name a file in it.")
    if not stat.S_ISREG(status.st_mode):
        return -1, "", os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    above_path, name = os.path.split(os.readlink(f"/proc/self/fd/{fd}"))
    directory = openat2(AT_FDCWD, os.fsencode(above_path), os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS)
    opened.callback(close_quietly, directory)
    if not os.path.samestat(os.stat(name, dir_fd=directory, follow_symlinks=False), status):
        raise OSError(errno.ESTALE, "it was moved meanwhile")
    return directory, name, None


def _temporary(name: str) -> str:
    return f".{name[:200]}.{secrets.token_hex(4)}"


def _open_nameless(directory: int, name: str) -> tuple[int, str | None]:
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory), None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        temporary = _temporary(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(temporary, flags, 0o600, dir_fd=directory), temporary


def _link(fd: int, directory: int, name: str) -> str | None:
    """Give a nameless file its name; if that exists, another one, which is returned."""
    # linkat(2) with AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH; the /proc path does not.
    link = partial(os.link, f"/proc/self/fd/{fd}", dst_dir_fd=directory, follow_symlinks=True)
    try:
        link(name)
    except FileExistsError:
        link(temporary := _temporary(name))
        return temporary
    return None


def _fsync(directory: int) -> None:
    with Owned(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)) as fd:
        os.fsync(fd)
