"""Small JSON files below the storage root, writable only by its owner."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from unionfs.sys import fds


def read(path: str, at: int | None = None) -> Any:
    """Returns the values in a file. `path` is relative to the directory fd `at`, if set.

    Raises OSError (ELOOP for a symlink), and ValueError for invalid JSON.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with fds.Owned(os.open(path, flags, dir_fd=at)) as fd:
        content = bytearray()
        while chunk := os.read(fd, 1 << 16):
            content += chunk
    return json.loads(content.decode())


def write(path: str, values: object, *, sync: bool = True) -> None:
    """Replace a file atomically; see `fds.replacing`. Raises OSError."""
    with fds.replacing(path, sync=sync) as out:
        # Not `dump`, which is not the compiled encoder.
        out.write(json.dumps(values).encode("ascii"))


def write_into(spare: str, path: str, values: object) -> bool:
    """Write into the blocks of the file `spare` and rename it. Returns False if they are too few."""
    content = json.dumps(values).encode("ascii")
    with suppress(OSError), fds.Owned(os.open(spare, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
        if len(content) <= os.fstat(fd).st_size:
            os.pwrite(fd, content, 0)
            os.rename(spare, path)
            return True
    return False
