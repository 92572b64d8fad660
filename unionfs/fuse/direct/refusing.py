"""Refuses the requests of a mount whose upper must not be changed any more."""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

import trio

from unionfs.fuse.direct.device import Device
from unionfs.fuse.protocol import Opcode, encode

OPCODE_UNIQUE: Final = struct.Struct("=4xIQ")
"""Of struct fuse_in_header."""
NO_ANSWER: Final = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)


async def refuse_all(device: Device, buffer: memoryview) -> None:
    """Answer all requests with EIO until the mount is gone. Raises ConnectionAbortedError if disconnected."""
    while True:
        await trio.lowlevel.checkpoint()
        try:
            os.readv(device.fd, [buffer])
        except BlockingIOError:
            await trio.lowlevel.wait_readable(device.fd)
            continue
        except OSError as error:
            # ENOENT: the caller was interrupted before its request was read.
            if error.errno not in (errno.ENOENT, errno.EINTR) and device.has_ended(error):
                return
            continue
        number, unique = OPCODE_UNIQUE.unpack_from(buffer)
        if number not in NO_ANSWER:
            device.answer(encode.error(unique, errno.EIO))
