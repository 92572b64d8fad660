"""The copies that an index keeps for hard links: all names of the original in the lowers show them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from unionfs.settings.features import DEFAULTS
from unionfs.sys.fds import Owned, names_in
from unionfs.union.merge import Found, Merge
from unionfs.union.origin import Origins


class Copy(NamedTuple):
    """A copy in the index."""

    entry: bytes
    st: os.stat_result


class Index:
    """The index in the work directory of an upper, `fd`, which stays the caller's."""

    def __init__(self, fd: int, merge: Merge) -> None:
        self.fd = fd
        self._merge = merge
        layers = [root.layer for root in merge.roots]
        self._origins = Origins(layers, merge.markers, DEFAULTS, merge.gate)

    def is_empty(self) -> bool:
        return not names_in(self.fd)

    def find(self, name: bytes, found: Found) -> Copy | None:
        """The copy of a lower's object, also if that has lost its other names since; None if the lower's own
        is shown.
        """
        st, (place,) = found
        try:
            origin = self._origins.encoded(self._merge.gate.fd(place), name, st.st_dev)
            entry = origin.hex().encode()
            copy = os.stat(entry, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return None  # also on a filesystem without file handles, which has no index
        return Copy(entry, copy) if stat.S_IFMT(copy.st_mode) == stat.S_IFMT(st.st_mode) else None


@contextmanager
def opened_index(work: str | int, merge: Merge) -> Iterator[Index | None]:
    """The index in a work directory, None if it has none. Raises OSError."""
    above = Owned(os.open(work, os.O_PATH | os.O_DIRECTORY)) if isinstance(work, str) else Owned(os.dup(work))
    with above as at:
        try:
            found = Owned(os.open("index", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at))
        except FileNotFoundError:
            yield None
            return
    with found as fd:
        yield Index(fd, merge)
