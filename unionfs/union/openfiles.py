"""The table of open files: lends the backing file of a node and takes it back.

Rules:
- All opens of a node share one fd; taking back the last one closes it.
- A copy-up of data hands over: all opens of the node continue with the upper's file.
- The backing file of a metacopy file is the one with its data, so it is not open for writing.
- Where the kernel sends no OPEN, files stay open for requests without a file handle; the least recently used
  are closed.
- Only this table counts users. Work in a thread holds a file by ``with file``, since its caller may close it.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import Final

from unionfs.core import layercalls
from unionfs.core.files import OpenFile, RestingFiles
from unionfs.core.node import Node
from unionfs.core.opening import KeptFiles, Opener, take_back
from unionfs.core.places import Gate
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Returned, close_quietly, fd_limit
from unionfs.union.files import open_backing, open_held
from unionfs.union.lowerdata import LowerData
from unionfs.union.markers import Markers
from unionfs.union.metacopy import open_data
from unionfs.union.shortcuts import Capabilities, Shortcuts

log = logging.getLogger(__name__)

#: Which part of the fds that this process may have are of lower files.
_OF_LOWERS: Final = 8
#: How many files stay open for requests without a file handle, at most.
_MOST_KEPT: Final = 512


class OpenFiles:
    """The backing files that are open. Not thread-safe, like the union itself."""

    def __init__(
        self, gate: Gate, markers: Markers, capabilities: Capabilities, shortcuts: Shortcuts
    ) -> None:
        self._gate = gate
        self._capabilities = capabilities
        #: The fds of lower files that are open.
        self.resting = RestingFiles(fd_limit() // _OF_LOWERS)
        #: Opens lower files in the plain case.
        self.opener = Opener(
            gate, markers.metacopy, self._open_for_reading, self.resting, remembers=shortcuts.capabilities,
            unread=shortcuts.unread_files,
        )  # fmt: skip
        #: The files that stay open for requests without a file handle.
        self.kept = KeptFiles(min(_MOST_KEPT, fd_limit() // _OF_LOWERS))
        self._defers = False
        #: Lent files for :meth:`close_deferred` to take back.
        self.deferred: list[tuple[Node, OpenFile]] = []

    def lend(self, node: Node, *, write: bool) -> OpenFile:
        """The node's backing file, until :meth:`take_back`. With ``write`` its data must be in the upper."""
        file = self._lend(node, write=write)
        if file is None:
            raise os_error(errno.EIO)
        return file

    def lend_for_writing(self, node: Node) -> OpenFile | None:
        """The same for writing to a node in the upper; None if its data is not there (metacopy)."""
        return self._lend(node, write=True)

    def _lend(self, node: Node, *, write: bool) -> OpenFile | None:
        use = node.in_use()
        file = use.file
        # Without users it was closed by work in a thread that outlived the last open.
        if file is None or not file.users or not file.readable or (write and not file.writable):
            opened = self._open(node, write=write)
            if opened is not None:
                use.has(opened)
            return opened
        return file.take()

    def reopen(self, node: Node, *, write: bool) -> OpenFile:
        """The node's backing file for an open file of a former daemon: without its data in the upper, a
        write to it has failed. As :meth:`lend`."""
        file = self._lend(node, write=write)
        return self.lend(node, write=False) if file is None else file

    def open_again(self, node: Node) -> OpenFile:
        """A backing file of the node's own, to read, for open files of a former daemon."""
        while node.successor is not None:
            node = node.successor
        return self._open_for_reading(node)

    def is_open_for_writing(self, node: Node) -> bool:
        """Whether the backing file is open for writing, so the data is in place."""
        file = None if node.use is None else node.use.file
        return file is not None and file.users > 0 and file.writable

    def lend_new(self, node: Node, fd: int) -> OpenFile:
        """Lend the file of a new node; the table takes over its ``fd`` (O_RDWR)."""
        assert node.place is not None
        file = OpenFile(fd, readable=True, writable=True, waits=not node.place.layer.memory)
        node.in_use().has(file)
        return file

    def take_back(self, node: Node, file: OpenFile) -> None:
        """End one loan."""
        take_back(node, file)

    def keep_object(self, node: Node) -> None:
        """Hold the object of a node that lost its last name, if it is open.

        If no fd is free, the open file can still be read and written, but its attributes cannot be queried.
        """
        file = None if node.use is None else node.use.file
        if file is not None and file.users and file.is_open and node.lower_data is None and node.held < 0:
            with suppress(OSError):
                node.hold(layercalls.call(os.open, b"/proc/self/fd/%d" % file.fd, os.O_PATH | os.O_CLOEXEC))

    # -- files that stay open -------------------------------------------------------------------------

    def keep(self, node: Node, *, write: bool) -> OpenFile:
        """The node's backing file, which stays open for some time. Raises ``OSError``."""
        file = self.kept.find(node, write)
        if file is None:
            # With writeback a page may be read before it is written, so open the file for both if possible.
            file = self.lend(node, write=write)
            self.kept.keep(node, file)
        return file

    def gone(self, node: Node) -> None:
        """The node is forgotten: end its use."""
        if node.use is not None:
            self.kept.drop(node)
            node.end_use()

    # -- closing after the answer ---------------------------------------------------------------------

    def defer(self) -> None:
        """Enable deferred closing: :meth:`close_deferred` is called after every answer."""
        self._defers = True

    def take_back_later(self, node: Node, file: OpenFile) -> None:
        """Like :meth:`take_back`, but after the answer to the request if the session defers. An error of
        close(2) is logged: what the request did is done."""
        self.deferred.append((node, file))
        if not self._defers:
            self.close_deferred()

    def close_deferred(self) -> None:
        """Take back the deferred files."""
        for node, file in self.deferred:
            try:
                self.take_back(node, file)
            except Exception:
                log.exception("a file could not be closed")
        self.deferred.clear()

    # -- opening --------------------------------------------------------------------------------------

    def _open_for_reading(self, node: Node) -> OpenFile:
        file = self._open(node, write=False)
        assert file is not None
        return file

    def _open(self, node: Node, *, write: bool) -> OpenFile | None:
        """Open the backing file; None for writing if the data is not in the upper (metacopy)."""
        place = node.place
        assert place is not None
        if not write:
            plain = self.opener.open_plain(node)
            if plain is not None:
                return plain
        if write and not node.in_place:
            raise OSError(errno.EROFS, "a lower is never written")
        if write:
            node.territory.require_writable()
        if node.lower_data is not None:
            return None if write else self._open_lower_data(node, node.lower_data)
        layer, rights, waits = place.layer, self._gate.rights, not place.layer.memory
        if node.held >= 0:
            file = open_held(
                node.held, write=write, waits=waits, rights=rights, upper=layer.is_upper, quiet=layer.quiet
            )
        else:
            file = open_backing(
                self._gate.fd(place), node.real_name, write=write, waits=waits, rights=rights,
                upper=layer.is_upper, quiet=layer.quiet,
            )
        try:
            if node.held < 0:
                assert file.st is not None
                node.check(file.st)
            data = node.territory.opened(node, file)
        except BaseException:
            close_quietly(file.fd)
            raise
        if file.xattrs is not None:
            self._capabilities.seen(node, file.xattrs)
        if data is None:
            return file
        close_quietly(file.fd)
        node.data_lies_in(data)
        return None if write else self._open_lower_data(node, data)

    def _open_lower_data(self, node: Node, data: LowerData) -> OpenFile:
        with Returned(open_data(self._gate, data)) as fd:
            st = layercalls.call(os.fstat, fd)
        return OpenFile(fd, readable=True, writable=False, waits=_waits(node), st=st)


def _waits(node: Node) -> bool:
    """Whether reading the data of a node may wait for a disk."""
    place = node.place if node.lower_data is None else node.lower_data.place
    assert place is not None
    return not place.layer.memory
