"""Freezes a filesystem while it is read: ioctl FIFREEZE and FITHAW (include/uapi/linux/fs.h)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.sys import guardian
from unionfs.sys.fds import directory
from unionfs.sys.mountinfo import mount_id_of_fd, mount_of_id, read_mountinfo

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_FREEZABLE = frozenset({"ext4", "ext3", "xfs", "btrfs", "f2fs"})


def own_filesystem(path: str) -> bool:
    """Whether `path` is the root of a local filesystem on a device that is mounted nowhere else.

    Freeze only such a filesystem: every write to a frozen one blocks, including those of this process.
    """
    try:
        with directory(path) as fd:
            mount_id = mount_id_of_fd(fd)
        table = read_mountinfo()
    except OSError:
        return False
    found = mount_of_id(mount_id, table)
    if found is None or found.fstype not in _FREEZABLE or found.root != "/":
        return False
    if found.mountpoint != os.path.realpath(path) or not found.source.startswith("/dev/loop"):
        return False
    return sum(entry.device == found.device for entry in table) == 1


@contextmanager
def frozen(path: str) -> Iterator[bool]:
    """Freeze the filesystem within the context; yields False if that is not possible.

    A guardian thaws it if this process is killed: a filesystem that stays frozen blocks every writer.
    """
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(directory(path))
            watcher = guardian.start(lambda _: _thaw(5), keep=fd)
            stack.callback(watcher.dismiss)
            fcntl.ioctl(fd, _FIFREEZE, 0)
            stack.callback(_thaw, fd)
        except OSError:
            stack.close()
            yield False
            return
        yield True


def _thaw(fd: int) -> None:
    with suppress(OSError):
        fcntl.ioctl(fd, _FITHAW, 0)
