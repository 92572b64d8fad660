"""Tickets: positions in a directory that its names' hashes do not tell apart; see `fuse/directories.py`."""

from __future__ import annotations

import errno
from typing import Final

from unionfs.core.entries import FIRST_TICKET as FIRST_TICKET
from unionfs.sys.calls import os_error

_LAST_TICKET: Final = (1 << 31) - 1
_KEPT: Final = 1 << 17
"""For each directory. Only names made to have the same hashes can need as many."""


class Tickets:
    """The tickets of one directory, each of which stands for a name and its hash."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._names: dict[int, tuple[int, bytes]] = {}
        self._last = FIRST_TICKET - 1

    def of(self, name: bytes, hash_: int) -> int:
        """The ticket of a name."""
        number = self._numbers.get(name)
        if number is None:
            self._last = number = self._last + 1 if self._last < _LAST_TICKET else FIRST_TICKET
            self._numbers[name] = number
            self._names[number] = hash_, name
            if len(self._numbers) > _KEPT:
                oldest = next(iter(self._numbers))
                del self._names[self._numbers.pop(oldest)]
        return number

    def position(self, number: int) -> tuple[int, bytes]:
        """The hash and the name of a ticket. Raises EINVAL for a ticket that is not of this directory."""
        found = self._names.get(number)
        if found is None:
            raise os_error(errno.EINVAL)
        return found
