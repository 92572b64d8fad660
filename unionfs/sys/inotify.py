"""inotify(7): reports changes of directories and of the objects in them.

Constants and structures are those of include/uapi/linux/inotify.h. Every function raises ``OSError``.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final, NamedTuple

from unionfs.sys.calls import fail, libc

MODIFY: Final = 0x2
ATTRIB: Final = 0x4
MOVED_FROM: Final = 0x40
MOVED_TO: Final = 0x80
CREATE: Final = 0x100
DELETE: Final = 0x200
DELETE_SELF: Final = 0x400
MOVE_SELF: Final = 0x800
Q_OVERFLOW: Final = 0x4000
IGNORED: Final = 0x8000
ONLYDIR: Final = 0x01000000
DONT_FOLLOW: Final = 0x02000000
EXCL_UNLINK: Final = 0x04000000

_EVENT: Final = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, len
_BUFFER: Final = 1 << 16


class Event(NamedTuple):
    """One event."""

    number: int
    """The number of the watch; -1 for Q_OVERFLOW."""
    mask: int
    name: bytes
    """The entry of the directory; empty for the directory itself."""


class Inotify:
    """An inotify instance."""

    def __init__(self) -> None:
        """Raises EMFILE if the user has fs.inotify.max_user_instances already."""
        self.fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise fail()

    def watch(self, path: bytes, mask: int) -> int:
        """Watch an object; returns the number of the watch, which is that of an existing one if the object
        has one.

        Raises ENOSPC beyond fs.inotify.max_user_watches, EACCES for an object that may not be read.
        """
        number: int = libc.inotify_add_watch(self.fd, path, mask)
        if number < 0:
            raise fail()
        return number

    def unwatch(self, number: int) -> None:
        """End a watch. The kernel may have ended it already."""
        if libc.inotify_rm_watch(self.fd, number) != 0:
            error = fail()
            if error.errno != errno.EINVAL:
                raise error

    def read(self) -> list[Event]:
        """The next events in the queue, at most about 2,000; empty if there are none."""
        try:
            data = os.read(self.fd, _BUFFER)
        except BlockingIOError:
            return []
        events, position = [], 0
        while position < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, position)
            position += _EVENT.size
            events.append(Event(number, mask, data[position : position + length].rstrip(b"\0")))
            position += length
        return events

    def close(self) -> None:
        """End all watches."""
        os.close(self.fd)
