"""Listing real directories."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Final

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
        self._fds: list[int] = []
        self.large = False
        try:
            for part in parts:
                fd = gate.open_for_listing(part)
                self._fds.append(fd)
                self.large = self.large or os.fstat(fd).st_size > LARGE
        except BaseException:
            self.close()
            raise

    def names(self) -> list[bytes]:
        """Every visible name once, topmost directory first; closes the fds. Raises ``OSError``."""
        return list(self.candidates())

    def candidates(self) -> dict[bytes, int]:
        """Every possibly visible name, with the index of the topmost directory that has it; closes the fds.

        For callers that look each name up anyway: names are not examined here. Raises ``OSError``.
        """
        try:
            found: dict[bytes, int] = {}
            for index, fd in enumerate(self._fds):
                for name in self._listed(index, fd):
                    found.setdefault(name, index)
            return found
        finally:
            self.close()

    def _listed(self, index: int, fd: int) -> list[bytes]:
        return real_names(fd)

    def close(self) -> None:
        """Close the fds."""
        while self._fds:
            os.close(self._fds.pop())


def real_names(fd: int) -> list[bytes]:
    """All names in a real directory."""
    return [name.encode(*_ENCODING) for name in os.listdir(fd)]
