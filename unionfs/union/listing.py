"""Listing real directories."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Final

from unionfs.core.entries import Entries
from unionfs.core.places import Gate, Place

#: An NFS client's name for a removed file with an open fd: its number in 16 digits and a count in 8
#: (fs/nfs/unlink.c, nfs_sillyrename).
NFS_REMOVED: Final = re.compile(r"\.nfs[0-9a-f]{24}")
#: A directory larger than this (bytes on its filesystem) is listed in a thread.
LARGE: Final = 64 * 1024
#: Like `os.fsencode`, which checks each name's type first.
_ENCODING: Final = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class Listing:
    """The names in some real directories. It owns its fds, so any thread may read it, once."""

    def __init__(self, gate: Gate, parts: Iterable[Place]) -> None:
        self._parts = list(parts)
        self._fds: list[int] = []
        self.large = False
        try:
            for part in self._parts:
                fd = gate.open_for_listing(part)
                self._fds.append(fd)
                self.large = self.large or os.fstat(fd).st_size > LARGE
        except BaseException:
            self.close()
            raise

    def names(self) -> list[bytes]:
        """Every visible name once; closes the fds. Raises ``OSError``."""
        return self.entries().names()

    def entries(self, hashed: Callable[[bytes], int] | None = None) -> Entries:
        """Every possibly visible name in the order of its hash; closes the fds.

        For callers that look each name up anyway: names are not examined here. ``hashed``: see
        `Entries.order`. Raises ``OSError``.
        """
        try:
            found = Entries(self._parts)
            for index, fd in enumerate(self._fds):
                self._read(found, index, fd)
            return found.order(hashed)
        finally:
            self.close()

    def _read(self, found: Entries, index: int, fd: int) -> None:
        found.read(index, fd)

    def close(self) -> None:
        """Close the fds."""
        while self._fds:
            os.close(self._fds.pop())


def real_names(fd: int) -> list[bytes]:
    """All names in a real directory."""
    return [name.encode(*_ENCODING) for name in os.listdir(fd)]
