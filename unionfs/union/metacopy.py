"""Metacopy: regular files whose data lies in another layer than their metadata.

As in kernel overlayfs (Documentation/filesystems/overlayfs.rst, "Metadata only copy up";
fs/overlayfs/namei.c, ovl_lookup). An object with the xattr ``metacopy`` has owner, mode, times, xattrs and
size; its data is the next regular file below it without that xattr: of the same name, or where ``redirect``
leads. Other files with ``metacopy`` in between are skipped; anything else ends the search.

A file whose data is missing can be listed, examined and removed, and an open is EIO. (overlayfs does not even
look such a name up.)
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Sequence
from typing import Final

from unionfs.core import layercalls
from unionfs.core.places import Gate, Place
from unionfs.sys.fds import Returned
from unionfs.union.lowerdata import LowerData
from unionfs.union.markers import Markers
from unionfs.union.named import NamedWhiteouts
from unionfs.union.redirects import PartSearch, Searched, stat_step

log = logging.getLogger(__name__)

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
#: Log lines about missing data, of one mount.
_MOST_LINES: Final = 100


class DataSearch:
    """Finds the data of metacopy files."""

    def __init__(
        self, markers: Markers, named: NamedWhiteouts, gate: Gate, directories: PartSearch
    ) -> None:
        self._markers = markers
        self._named = named
        self._gate = gate
        self._directories = directories
        self._lines = 0

    def find(
        self, parts: Sequence[Place], index: int, name: bytes, where: bytes | int
    ) -> LowerData | None:
        """Where the data of the file ``name`` of layer ``index`` lies; None: in the file. See
        `Merge.lower_data`."""
        if self._markers.metacopy_value(where) is None:
            return None
        if not self._markers.follows_metacopy:
            raise PermissionError(errno.EPERM, "a layer holds a metacopy file that any user could have made")
        redirect = self._markers.redirect_value(where)
        remaining: Searched = iter([(part, name) for part in parts if part.layer.index > index])
        while True:
            if redirect is not None:
                if not self._markers.follows_redirects:
                    raise PermissionError(errno.EPERM, "the redirect of a metacopy file is not followed")
                remaining = self._directories.redirected(redirect, index, remaining)
            found = self._next_file(remaining)
            if found is None:
                self._tell(name)
                raise OSError(errno.EIO, "the data of a metacopy file is missing")
            part, here, st = found
            path = b"/proc/self/fd/%d/%b" % (self._gate.fd(part), here)
            if self._markers.metacopy_value(path) is None:
                return LowerData(part, here, part.layer.key(st), st.st_blocks)
            index, redirect = part.layer.index, self._markers.redirect_value(path)

    def _next_file(self, remaining: Searched) -> tuple[Place, bytes, os.stat_result] | None:
        """The topmost object; removes it and the places above it. None if there is no regular file."""
        for part, here in remaining:
            dir_fd = self._gate.fd(part)
            st = stat_step(dir_fd, here)
            if st is None:
                if self._named.hides(part, dir_fd, here):
                    return None
            else:
                if not stat.S_ISREG(st.st_mode) or self._markers.is_whiteout(st, dir_fd, here):
                    return None
                return part, here, st
        return None

    def _tell(self, name: bytes) -> None:
        self._lines += 1
        if self._lines <= _MOST_LINES:
            log.warning("metacopy file %r: no lower has its data", os.fsdecode(name))


def open_data(gate: Gate, data: LowerData) -> int:
    """See `Merge.open_data`."""
    dir_fd = gate.fd(data.place)
    try:
        fd = layercalls.call(os.open, data.name, _READ, dir_fd=dir_fd)
    except PermissionError as error:
        fd = gate.rights.open(dir_fd, data.name, _READ, error, upper=data.place.layer.is_upper)
    with Returned(fd):
        st = layercalls.call(os.fstat, fd)
        if not stat.S_ISREG(st.st_mode) or data.place.layer.key(st) != data.key:
            raise OSError(errno.EIO, "a layer holds another object in place of a metacopy file's data")
    return fd
