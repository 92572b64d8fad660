"""The operations of the oracle, run in a worker whose current directory is the tree's root.

An operation is data (``Op``), so a failing sequence can be printed, replayed and shortened. Paths are bytes
relative to the root. Every function returns only values that must be equal on both sides; permitted
differences are left to ``normalise``.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support import acl, snapshot, syscalls

HANDLES: dict[int, int] = {}
"""Open file descriptors of this worker by handle number."""


@dataclass(frozen=True)
class Op:
    """One step: the operation's name, its user (a key of ``IDENTITIES``), the umask, and its arguments."""

    name: str
    who: str
    umask: int
    args: tuple[Any, ...]

    def __str__(self) -> str:
        mask = "" if self.umask == 0o022 else f", umask={self.umask:#05o}"
        return f"op({self.name!r}, {self.who!r}{''.join(f', {item!r}' for item in self.args)}{mask})"


def op(name: str, who: str, *args: Any, umask: int = 0o022) -> Op:
    """The printed form of a step."""
    return Op(name, who, umask, args)


IDENTITIES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "root": (0, 0, ()),
    "user": (1000, 1000, (1001,)),
    "other": (1002, 1002, ()),
}
"""uid, gid and supplementary groups of the workers."""

CREATING = frozenset({"create", "open", "mkdir", "mknod"})
"""Operations whose mode depends on the umask (or a default ACL)."""


@dataclass(frozen=True)
class Attributes:
    """The result of stat(2) for a handle or a path, without inode values and times."""

    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    nlink: int
    deleted: bool = False


def _attributes(found: os.stat_result, *, deleted: bool = False) -> Attributes:
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return Attributes(found.st_mode, found.st_uid, found.st_gid, size, found.st_rdev, found.st_nlink, deleted)


def begin(root: bytes) -> None:
    """Enter the tree of the next example."""
    end()
    os.chdir(root)


def end() -> None:
    """Close every handle and leave the tree, so that it can be unmounted."""
    for fd in HANDLES.values():
        os.close(fd)
    HANDLES.clear()
    os.umask(0o022)
    os.chdir("/")


def take() -> snapshot.Tree:
    """The whole current tree."""
    return snapshot.take(b".")


def touch_up(path: bytes) -> None:
    """Copy up a file by a name, without a visible change."""
    found = os.lstat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def handle_names() -> dict[int, bytes]:
    """The kernel's current path of each open handle ("... (deleted)" without a name)."""
    return {number: os.fsencode(os.readlink(f"/proc/self/fd/{fd}")) for number, fd in HANDLES.items()}


def has_default_acl(path: bytes) -> bool:
    """Whether the parent directory of ``path`` has a default ACL."""
    parent = os.path.dirname(path) or b"."
    try:
        return bool(os.getxattr(parent, acl.DEFAULT))
    except OSError:
        return False


def run(name: str, umask: int, args: tuple[Any, ...]) -> tuple[str, Any]:
    """Do one operation: ("ok", value) or ("errno", number). Any other exception is a mistake of the test."""
    os.umask(umask)
    try:
        return "ok", TABLE[name](*args)
    except OSError as error:
        return "errno", error.errno


def _create(path: bytes, flags: int, mode: int, data: bytes) -> int:
    fd = os.open(path, os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | flags, mode)
    try:
        return os.write(fd, data) if data else 0
    finally:
        os.close(fd)


def _write(path: bytes, flags: int, offset: int, data: bytes) -> int:
    fd = os.open(path, os.O_NONBLOCK | flags)
    try:
        return os.write(fd, data) if flags & os.O_APPEND else os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def _read(path: bytes, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b"not a regular file"
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def _open(number: int, path: bytes, flags: int, mode: int) -> Attributes:
    fd = os.open(path, flags | os.O_NONBLOCK, mode)
    if number in HANDLES:
        os.close(HANDLES.pop(number))
    HANDLES[number] = fd
    return _attributes(os.fstat(fd))


def _close(number: int) -> None:
    os.close(HANDLES.pop(number))


def _deleted(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").endswith(" (deleted)")


def _h_stat(number: int) -> Attributes:
    fd = HANDLES[number]
    return _attributes(os.fstat(fd), deleted=_deleted(fd))


def _h_reopen(number: int, other: int, flags: int) -> Attributes:
    return _open(other, b"/proc/self/fd/%d" % HANDLES[number], flags, 0)


def _h_list(number: int) -> list[tuple[bytes, int]]:
    found = syscalls.list_directory(HANDLES[number])
    return sorted((item.name, item.type) for item in found)


def _h_xattrs(number: int) -> dict[str, bytes]:
    return snapshot.read_xattrs(b"/proc/self/fd/%d" % HANDLES[number], follow=True)


def _h_write(number: int, offset: int, data: bytes) -> int:
    return os.pwrite(HANDLES[number], data, offset)


def _h_append(number: int, data: bytes) -> tuple[int, int]:
    fd = HANDLES[number]
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
    try:
        return os.write(fd, data), os.lseek(fd, 0, os.SEEK_CUR)
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _h_read(number: int, offset: int, size: int) -> bytes:
    return os.pread(HANDLES[number], size, offset)


def _rename(old: bytes, new: bytes, flags: int) -> None:
    syscalls.renameat2(old, new, flags)


def _link(old: bytes, new: bytes) -> None:
    os.link(old, new, follow_symlinks=False)


def _mknod(path: bytes, mode: int, device: tuple[int, int]) -> None:
    os.mknod(path, mode, os.makedev(*device))


def _set_xattr(path: bytes, name: str, value: bytes, flags: int) -> None:
    os.setxattr(path, name, value, flags, follow_symlinks=False)


def _times(path: bytes, atime: tuple[int, int], mtime: tuple[int, int], follow: bool) -> tuple[Any, ...]:
    syscalls.utimensat(path, atime, mtime, follow=follow)
    found = os.stat(path, follow_symlinks=follow)
    fixed = (syscalls.UTIME_NOW, syscalls.UTIME_OMIT)
    return (
        None if atime[1] in fixed else found.st_atime_ns,
        None if mtime[1] in fixed else found.st_mtime_ns,
    )


def _list(path: bytes) -> list[tuple[bytes, int]]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return sorted((item.name, item.type) for item in syscalls.list_directory(fd))
    finally:
        os.close(fd)


def _fsync(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


TABLE: dict[str, Callable[..., Any]] = {
    # by path
    "create": _create,
    "write": _write,
    "read": _read,
    "truncate": lambda path, size: os.truncate(path, size),
    "chmod": lambda path, mode: os.chmod(path, mode),
    "chown": lambda path, uid, gid: os.chown(path, uid, gid, follow_symlinks=False),
    "link": _link,
    "symlink": lambda target, path: os.symlink(target, path),
    "rename": _rename,
    "unlink": lambda path: os.unlink(path),
    "mkdir": lambda path, mode: os.mkdir(path, mode),
    "rmdir": lambda path: os.rmdir(path),
    "mknod": _mknod,
    "setxattr": _set_xattr,
    "getxattr": lambda path, name: os.getxattr(path, name, follow_symlinks=False),
    "listxattr": lambda path: sorted(os.listxattr(path, follow_symlinks=False)),
    "removexattr": lambda path, name: os.removexattr(path, name, follow_symlinks=False),
    "utimens": _times,
    "readdir": _list,
    "readlink": lambda path: os.readlink(path),
    "stat": lambda path: _attributes(os.stat(path)),
    "lstat": lambda path: _attributes(os.lstat(path)),
    "access": lambda path, mode: os.access(path, mode),
    "namemax": lambda path: os.statvfs(path).f_namemax,
    "fsync": _fsync,
    "drop_caches": lambda: syscalls.drop_caches("."),
    # by open file
    "open": _open,
    "h_close": _close,
    "h_forget": lambda number: _close(number) if number in HANDLES else None,
    "h_read": _h_read,
    "h_write": _h_write,
    "h_append": _h_append,
    "h_stat": _h_stat,
    "h_chmod": lambda number, mode: os.fchmod(HANDLES[number], mode),
    "h_chown": lambda number, uid, gid: os.fchown(HANDLES[number], uid, gid),
    "h_truncate": lambda number, size: os.ftruncate(HANDLES[number], size),
    "h_reopen": _h_reopen,
    "h_list": _h_list,
    "h_fsync": lambda number: os.fsync(HANDLES[number]),
    "h_setxattr": lambda number, name, value: os.setxattr(HANDLES[number], name, value),
    "h_xattrs": _h_xattrs,
}
"""Every operation by name."""
