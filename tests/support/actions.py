"""Small functions that tests run in a worker, which imports them before it becomes another user."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable


def try_lock(path: str) -> None:
    """Take an exclusive POSIX lock or fail at once."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def append_lines(path: str, tag: int, count: int) -> None:
    """Append lines of 19 characters, one write(2) each."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for number in range(count):
            os.write(fd, b"%09d-%09d\n" % (tag, number))
    finally:
        os.close(fd)


def open_new(top: str, name: str, count: int) -> int:
    """Create files and keep them open, until there are no more fds (EMFILE). Returns how many."""
    for index in range(count):
        try:
            os.open(f"{top}/{name}{index}", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return index
    return count


def open_removed(top: str, kind: str, count: int) -> int:
    """Create files or directories, open and remove them, until there are no more fds. Returns how many."""
    for index in range(count):
        path = f"{top}/{kind}{index}"
        try:
            match kind:
                case "file":
                    os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
                    os.unlink(path)
                case "directory":
                    os.mkdir(path)
                    os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                    os.rmdir(path)
                case "temporary":
                    os.open(top, os.O_TMPFILE | os.O_RDWR)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return index
    return count


def open_all(top: str, count: int) -> int:
    """Open files to read, and keep them open. Returns how many."""
    for index in range(count):
        os.open(f"{top}/f{index:04d}", os.O_RDONLY)
    return count


def change_all(top: str, count: int) -> int:
    """Change the modes of files, until that is refused for lack of fds (EMFILE). Returns of how many."""
    for index in range(count):
        try:
            os.chmod(f"{top}/f{index:04d}", 0o600)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return index
    return count


def change_owner(path: str) -> None:
    os.chown(path, -1, os.getgid())


def change_time(path: str) -> None:
    os.utime(path)


def change_xattr(path: str) -> None:
    os.setxattr(path, "user.b", b"1")


def change_size(path: str) -> None:
    os.truncate(path, 5)


def open_to_write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def give_another_name(path: str) -> None:
    os.link(path, path + ".linked")


def rename(path: str) -> None:
    os.rename(path, path + ".renamed")


CHANGES: list[Callable[[str], None]] = [
    change_owner, change_time, change_xattr, change_size, open_to_write, give_another_name, rename,
]  # fmt: skip
"""Changes of a file, each of which copies it up."""


def make_file(path: str, mode: int, mask: int, data: bytes = b"") -> None:
    """Create a file under a umask."""
    os.umask(mask)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def make_directory(path: str, mode: int, mask: int) -> None:
    """Create a directory under a umask."""
    os.umask(mask)
    os.mkdir(path, mode)


def make_node(path: str, mode: int, mask: int) -> None:
    """Create a fifo or socket under a umask."""
    os.umask(mask)
    os.mknod(path, mode)


def write_at(path: str, data: bytes, offset: int) -> None:
    """Open for writing, write, close."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def open_truncating(path: str) -> None:
    """Open with O_TRUNC, close."""
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def without_following(function: Callable[..., object], path: str, args: tuple[object, ...]) -> None:
    """An xattr call that never follows a symlink."""
    function(path, *args, follow_symlinks=False)


def list_xattrs(path: str) -> list[str]:
    """listxattr of the object itself."""
    return os.listxattr(path, follow_symlinks=False)


def run(arguments: list[str]) -> str:
    """A program's output."""
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def allocate(path: str) -> None:
    """Open for writing, fallocate(2), close."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 4, 3)
    finally:
        os.close(fd)
