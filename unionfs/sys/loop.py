"""Loop devices: files as block devices.

Source: include/uapi/linux/loop.h. Needs root in the initial user namespace, and Linux 5.8 (LOOP_CONFIGURE).
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import struct
from typing import Final, NamedTuple

from unionfs.sys.fds import Owned

_CONTROL: Final = "/dev/loop-control"
_CTL_GET_FREE: Final = 0x4C82
_CONFIGURE: Final = 0x4C0A
_READ_ONLY: Final = 1
_AUTOCLEAR: Final = 4
#: struct loop_config: fd, block_size, struct loop_info64 (with lo_flags at its offset 52), reserved.
_CONFIG: Final = struct.Struct("=II52xI176x64x")
_TRIES: Final = 32


class Attached(NamedTuple):
    """A loop device in use."""

    path: str
    read_only: bool


def attach(file_fd: int, *, read_only: bool) -> tuple[int, str]:
    """Attach a file to a free loop device. Returns an fd and the path of the device.

    The device is released by the kernel as soon as neither an fd nor a mount uses it. Raises ``OSError``.
    """
    with Owned(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)) as control:
        for _ in range(_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
            device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            flags = _AUTOCLEAR | (_READ_ONLY if read_only else 0)
            try:
                fcntl.ioctl(device, _CONFIGURE, _CONFIG.pack(file_fd, 0, flags))
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # else another process took it
                    raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def attached(file_fd: int) -> tuple[int, str] | None:
    """An fd and the path of a loop device that has the file already, or None. Raises ``OSError``.

    Two devices on one file do not see each other's writes.
    """
    path = os.readlink(f"/proc/self/fd/{file_fd}")
    for device in devices_of(path):
        fd = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
        if device in devices_of(path):  # and is not released any more
            return fd, device.path
        os.close(fd)
    return None


def devices_of(path: str) -> list[Attached]:
    """The loop devices with the file of this absolute path, without symlinks."""
    found = []
    for device in glob.glob("/sys/block/loop*"):
        if _read(f"{device}/loop/backing_file") == os.fsencode(path):
            found.append(Attached(f"/dev/{os.path.basename(device)}", _read(f"{device}/ro") == b"1"))
    return found


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read().rstrip(b"\n")
    except OSError:
        return b""
