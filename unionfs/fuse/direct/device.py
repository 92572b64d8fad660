"""/dev/fuse of one mount: answers and notices.

Source: fs/fuse/dev.c of Linux 6.18.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from typing import Final

from unionfs.fuse.protocol import Reply, encode

log = logging.getLogger(__name__)

GONE: Final = (errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)
"""Errors of an answer whose request is gone: its caller was killed, or the mount is gone."""


class Device:
    """The open device of a mount."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        #: Notices to be sent from a thread; see :meth:`take_later`.
        self.later: list[Reply] = []
        self._cut_off = False

    def has_ended(self, error: OSError) -> bool:
        """Whether an error of a read means that the mount is gone. Raises it if the connection was aborted,
        or it has another cause.

        An ordinary umount causes ECONNABORTED, too, during the read of a request (fs/fuse/dev.c,
        fuse_dev_do_read). The next read distinguishes the two.
        """
        if error.errno == errno.ENODEV:
            return True
        if error.errno != errno.ECONNABORTED or self._cut_off:
            raise error
        self._cut_off = True
        return False

    def answer(self, reply: Reply) -> None:
        """Send an answer; drops it if the caller is gone."""
        try:
            os.writev(self.fd, reply)
        except OSError as error:
            if error.errno not in GONE:
                self.answer_refused(b"".join(reply), error.errno or errno.EIO)

    def answer_refused(self, answer: bytes, code: int) -> None:
        """The kernel refused an answer: a bug of ours, which must neither end the mount nor leave the caller
        waiting."""
        log.error("the kernel refused an answer of %d bytes: %s", len(answer), os.strerror(code))
        unique = int.from_bytes(answer[8:16], sys.byteorder)
        with contextlib.suppress(OSError):
            os.writev(self.fd, encode.error(unique, errno.EIO))

    def notify(self, notice: Reply) -> bool:
        """Send a notice; returns False for an object that the kernel does not know (any more).

        A notice about cached data may have to wait for requests that this daemon serves, so it is sent from a
        thread. One about attributes alone does not wait when a request holds the object (fs/fuse/inode.c,
        fuse_reverse_inval_inode).
        """
        try:
            os.writev(self.fd, notice)
        except OSError as error:
            if error.errno not in GONE:
                log.warning("the kernel refused a notice: %s", error.strerror)
            return False
        return True

    def notify_later(self, notice: Reply) -> None:
        """Queue a notice for the loop, to be sent from a thread after the answer to the current request."""
        self.later.append(notice)

    def take_later(self) -> list[Reply]:
        """Take the queued notices."""
        notices, self.later = self.later, []
        return notices

    def close(self) -> None:
        """Close the device, which disconnects a mount that still exists."""
        os.close(self.fd)
