"""Freezes a filesystem while it is read: ioctl FIFREEZE and FITHAW (include/uapi/linux/fs.h)."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.sys.fds import directory
from unionfs.sys.mountinfo import mount_id_of_fd, read_mountinfo

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
    found = next((entry for entry in table if entry.mount_id == mount_id), None)
    if found is None or found.fstype not in _FREEZABLE or found.root != "/":
        return False
    if found.mountpoint != os.path.realpath(path) or not found.source.startswith("/dev/loop"):
        return False
    return sum(entry.device == found.device for entry in table) == 1


@contextmanager
def frozen(path: str) -> Iterator[bool]:
    """Freeze the filesystem within the context; yields False if that is not possible.

    A helper process thaws it whenever this process ends: a filesystem that stays frozen blocks every writer.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _guard(fd, reader, writer)
    os.close(reader)
    try:
        try:
            fcntl.ioctl(fd, _FIFREEZE, 0)
            done = True
        except OSError:
            done = False
        yield done
    finally:
        if done:
            with suppress(OSError):
                fcntl.ioctl(fd, _FITHAW, 0)
        # Tell the guard not to thaw.
        with suppress(OSError):
            os.write(writer, b"x")
        os.close(writer)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        os.close(fd)


def _guard(fd: int, reader: int, writer: int) -> None:
    """The helper process: wait for the end of the pipe, and thaw unless a byte arrives first."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.close(writer)
        keep = {fd, reader}
        for other in range(256):
            if other not in keep:
                with suppress(OSError):
                    os.close(other)
        if os.read(reader, 1) == b"":
            fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os._exit(0)
