"""Opens the directories of a union's layers, and empties its work directory.

Another user may own a directory above a layer and replace its content at any time. So a layer is opened once,
without following symlinks, and a directory is checked and emptied through the same fd.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from typing import Final

from unionfs.errors import LayerError, path_in, quoted, reason
from unionfs.sys import calls, detached
from unionfs.sys.attributes import drop_acls
from unionfs.sys.fds import Files, Owned, close_quietly
from unionfs.sys.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from unionfs.sys.trees import empty_directory
from unionfs.union.images import is_image, open_image
from unionfs.union.leftovers import check_leftovers, check_work
from unionfs.union.mending import mend

_NO_CLONES: Final = (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY


def open_lower(path: str, privileged: bool) -> int:
    """An O_PATH fd, of a read-only clone if ``privileged``, or of a mounted image if it is a file.

    Raises LayerError, OSError.
    """
    if is_image(path):
        return open_image(path)
    with Owned(_open(calls.AT_FDCWD, path, path)) as fd:
        if privileged:
            clone = _clone(fd, path, readonly=True)
            if clone is not None:
                return clone
        return os.dup(fd)


def open_upper_and_work(
    upper: str, work: str, privileged: bool, resources: Files, atime: Sequence[str] = ()
) -> tuple[int, int]:
    """O_PATH fds of both on one mount: in a clone of their common parent if ``privileged``.

    ``atime``: see :func:`set_atime`.
    Raises LayerError, OSError.
    """
    above, fds = os.path.commonpath([upper, work]), []
    clone = None
    if privileged:
        with Owned(_open(calls.AT_FDCWD, above, above)) as fd:
            clone = _clone(fd, above, readonly=False)
        if clone is not None:
            set_atime(clone, atime)
    try:
        for path in (upper, work):
            if clone is None:
                fd = _open(calls.AT_FDCWD, path, path)
            else:
                fd = _open(clone, os.path.relpath(path, above), path, RESOLVE_BENEATH)
            resources.own(fd)
            fds.append(fd)
    finally:
        if clone is not None:
            close_quietly(clone)
    if os.path.samestat(os.fstat(fds[0]), os.fstat(fds[1])):
        raise LayerError(f"work {work} is the same directory as upper {upper}; put work beside upper.")
    return fds[0], fds[1]


def set_atime(mount_fd: int, words: Sequence[str]) -> None:
    """Set when a private mount changes access times, by words of mount(8), and not as the mount that it is a
    clone of; as overlayfs (fs/overlayfs/super.c, ovl_get_upper). Not where a user namespace locks them.
    """
    attributes = sum(detached.ATTRIBUTES[word] for word in words)
    with contextlib.suppress(PermissionError):
        detached.change(mount_fd, add=attributes, clear=detached.ATIME)


def make_upper_and_work(scratch: int, lowers: Sequence[str], resources: Files) -> tuple[int, int, int]:
    """O_PATH fds of a new upper, with the owner and mode of the topmost lower, and of a new work directory,
    WORKDIR and WORKDIR/work."""
    os.mkdir(b"upper", 0o755, dir_fd=scratch)
    os.mkdir(b"work", 0o700, dir_fd=scratch)
    upper_fd = _open(scratch, "upper", "upper")
    resources.own(upper_fd)
    if lowers:
        with Owned(open_lower(lowers[0], False)) as lower:
            st = os.fstat(lower)
        with contextlib.suppress(PermissionError):  # an ordinary user's upper belongs to that user
            calls.chown_fd(upper_fd, st.st_uid, st.st_gid)
        os.chmod(b"/proc/self/fd/%d" % upper_fd, stat.S_IMODE(st.st_mode))
    work_root = _open(scratch, "work", "work")
    resources.own(work_root)
    return upper_fd, work_root, prepare_work(work_root, "on the tmpfs", upper_fd, resources)


def prepare_work(fd: int, path: str, upper_fd: int, resources: Files) -> int:
    """An O_PATH fd of WORKDIR/work, emptied and private (the kernel's layout: fs/overlayfs/super.c,
    ovl_workdir_create).

    Restores what a crashed daemon has noted there. Refuses a directory with files that no union filesystem
    made, or of a user other than the upper's; then nothing is changed. Raises LayerError, OSError.
    """
    owner = os.fstat(fd).st_uid
    _check_owner(path, owner, os.fstat(upper_fd).st_uid)
    try:
        check_work(fd, path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(b"work", 0o700, dir_fd=fd)
        inner = openat2(fd, b"work", _DIRECTORY, RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV)
        resources.own(inner)
        _check_owner(f"{path}/work", os.fstat(inner).st_uid, owner)
        _make_private(inner)
        # From here on no other user can add files.
        check_leftovers(inner, path)
    except OSError as error:
        raise LayerError(
            f"work {path} cannot be written: {error.strerror}; give a writable directory."
        ) from error
    mend(upper_fd, inner)
    try:
        empty_directory(inner)
    except OSError as error:
        left = quoted(os.path.join(path, "work", path_in(error)))
        raise LayerError(
            f"work {quoted(path)} cannot be emptied of what an earlier mount left: {left}: {reason(error)}; "
            "remove it, or choose an empty directory."
        ) from error
    return inner


def mark_volatile(work_fd: int) -> None:
    """Mark upper and work as those of a volatile mount, until its end. A crash leaves it: they cannot
    be trusted, so every mount refuses them (super.c, ovl_create_volatile_dirty).
    """
    os.mkdir(b"incompat", 0o700, dir_fd=work_fd)
    with Owned(os.open(b"incompat", _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work_fd)) as fd:
        os.mkdir(b"volatile", 0o700, dir_fd=fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        close_quietly(os.open(b"volatile/dirty", flags, 0o600, dir_fd=fd))


def index_directory(work_root: int, resources: Files, *, make: bool) -> int:
    """An O_PATH fd of WORKDIR/index, made private like work; -1 if it is missing, and not made.

    Raises LayerError, OSError.
    """
    try:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(b"index", 0o700, dir_fd=work_root)
        fd = openat2(work_root, b"index", _DIRECTORY, RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise LayerError(
            f"`index` in the work directory cannot be opened: {reason(error)}; remove it, or choose an empty "
            "directory."
        ) from error
    resources.own(fd)
    _check_owner("directory index", os.fstat(fd).st_uid, os.fstat(work_root).st_uid)
    _make_private(fd)
    return fd


def _check_owner(path: str, owner: int, other: int) -> None:
    if owner not in (os.geteuid(), 0, other):
        raise LayerError(
            f"work {path} belongs to uid {owner}, another user than its upper's; choose another directory."
        )


def _make_private(fd: int) -> None:
    """Prevent inheritance of a group or an ACL by new files in work. (The kernel gives it mode 0.)

    One that is private already is not written to: its filesystem may have become read-only.
    """
    path, st = b"/proc/self/fd/%d" % fd, os.fstat(fd)
    drop_acls(path)
    if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(path, os.geteuid(), os.getegid())
    if stat.S_IMODE(st.st_mode) != 0o700:
        os.chmod(path, 0o700)


def _open(at: int, name: str, path: str, resolve: int = 0) -> int:
    """An O_PATH fd of a directory; `path` is for error messages."""
    try:
        return openat2(at, os.fsencode(name), _DIRECTORY, resolve | RESOLVE_NO_SYMLINKS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LayerError(
                f"{path} was replaced by a symlink while it was mounted; choose a directory that nobody else "
                "may move."
            ) from error
        raise OSError(error.errno, error.strerror, path) from error


def _clone(fd: int, path: str, *, readonly: bool) -> int | None:
    """A private bind mount of the directory `fd`; None if the kernel does not support it."""
    try:
        return detached.clone(fd, read_only=readonly)
    except OSError as error:
        if error.errno not in _NO_CLONES:
            raise OSError(error.errno, error.strerror, path) from error
        return None
