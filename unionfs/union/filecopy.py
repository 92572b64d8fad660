"""The copy of one regular file: its data and metadata, or, for a metacopy file, its data that follows.

``copy`` copies the data; it may run in any thread and uses only the copy's own fds. All other code runs in
the union's thread.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from typing import Final

from unionfs.core import layercalls, marks
from unionfs.core.copyup import SmallCopyUps, hand_over
from unionfs.core.files import OpenFile
from unionfs.core.node import Node
from unionfs.core.nodes import Stored
from unionfs.sys import attributes, calls
from unionfs.sys.fds import Owned, close_quietly
from unionfs.union.attributes import SET_IDS, replaced
from unionfs.union.copyup import CopyUp, Effects
from unionfs.union.filedata import clone, copy_data
from unionfs.union.files import open_backing, open_held
from unionfs.union.flags import read_flags
from unionfs.union.lowerdata import LowerData
from unionfs.union.tree import Union
from unionfs.union.xattrs import CAPABILITY, copied_xattrs

#: Up to this size (bytes) a file is copied at once if no sync is needed, and its holes are searched only if
#: it has some.
SMALL: Final = 256 * 1024
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def small_copy_ups(copy_up: CopyUp) -> SmallCopyUps | None:
    """What copies small files up at once; None if the upper has owners or modes of its own."""
    union, stack = copy_up.union, copy_up.union.stack
    if stack.upper is None or stack.upper.permissions is not None or stack.owners is not None:
        return None
    return SmallCopyUps(
        union,
        union.work,
        told=lambda node, resized: copy_up.tell(Effects(node, resized)),
        directory=copy_up.directory,
        clones_never=stack.never_clones,
        limit=SMALL,
        remembers=union.shortcuts.capabilities,
    )


class _Copy:
    """A copy whose thread may go on after its request has ended: then its end closes everything."""

    node: Node
    size: int
    """Of the data to copy, in bytes."""
    copied = 0
    """How far that has come, in bytes."""
    moved = 0
    """When it came so far, in nanoseconds, of `perf_counter_ns`; 0: not yet."""
    _source: OpenFile
    _running = _left = False

    @property
    def waits_for_server(self) -> bool:
        """Whether reading the source may take for ever."""
        return marks.slow(self._source.fd)

    def begins(self) -> None:
        """A thread uses it from now on."""
        self._running = True

    def settle(self) -> None:
        """The request has ended before the thread, which has ended: record what is changed for good."""

    def ends(self) -> None:
        """The thread has ended."""
        self._running = False
        if self._left:
            self.close()

    def close(self, *exc: object) -> None:
        """Close everything, unless a thread uses it: then at its end."""
        self._left = self._running
        if not self._running:
            self._close()

    __exit__ = close

    def _close(self) -> None:
        raise NotImplementedError

    def _copy(
        self, union: Union, st: os.stat_result, target: int, goes_on: Callable[[], None]
    ) -> None:
        """Copy the data of the source, which has the attributes ``st``."""

        def told(position: int) -> None:
            self.copied, self.moved = position, time.perf_counter_ns()
            goes_on()

        size, source = self.size, self._source.fd
        dense = size <= SMALL and st.st_blocks * 512 >= st.st_size
        if size != st.st_size or not clone(source, target, st.st_dev, union.stack.never_clones):
            copy_data(source, target, size, told, dense=dense)
        self.copied = size


class FileCopy(_Copy):
    """The copy-up of one regular file. Leaving its context without :meth:`finish` discards the copy."""

    def __init__(
        self,
        copy_up: CopyUp,
        node: Node,
        limit: int | None = None,
        mode: int | None = None,
        *,
        data: bool = True,
    ) -> None:
        """Open the source and create the temporary file.

        ``limit``: copy only that many bytes (truncation). ``mode``: permission bits to set instead of the
        source's. ``data``: False for a metacopy file, unless it is empty, or a copy itself: then the origin
        names the object that it was first, and with an index overlayfs refuses a metacopy file whose origin
        is not the one below it (namei.c, ovl_lookup).
        """
        union = copy_up.union
        union.require_upper()
        self._union = union
        self._copy_up = copy_up
        self.node = node
        self._temporary = union.work.temporary()
        self._target = self._metadata = -1
        self._no_capability = False
        self._origin = Stored.UNKNOWN
        self._source = union.files.lend(node, write=False)
        self._open = True
        if node.entry is not None:  # the index shows it by its other names before the change is sure
            limit = mode = None
        try:
            self._st = self._attributes()
            #: See `flags`.
            self._flags = read_flags(self._object)
            node.know_flags(self._flags)
            #: Where the data stays; None: it is copied.
            data = data or not self._st.st_size or node.from_origin
            self._lower_data = None if data else _data_of(node, self._st)
            self.size = self._st.st_size if limit is None else min(limit, self._st.st_size)
            if self._lower_data is not None:
                self.size = 0
            if mode is None or self._lower_data is not None:
                mode = self._st.st_mode
            self._mode = stat.S_IMODE(mode)
            self._is_plain = self._source.xattrs == [] and self._mode & ~union.identity.sets == 0
            if union.markers.requires_write and not self._mode & stat.S_IWUSR:
                self._is_plain = False  # such a mode comes last
            self._permissions = union.require_upper().permissions
            if self._permissions is not None:
                self._is_plain = False
            self._target = os.open(
                self._temporary.name, _NEW, self._mode if self._is_plain else 0o600, dir_fd=union.work.fd
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FileCopy:
        return self

    def _attributes(self) -> os.stat_result:
        """Those of the node's object; opens it if its data lies elsewhere."""
        node, union = self.node, self._union
        if node.lower_data is not None:
            with Owned(union.open_path(node)) as path_fd:
                self._metadata = union.gate.reopen(node.layer, path_fd, _READ)
            st = layercalls.call(os.fstat, self._metadata)
        else:
            # with one user it was just opened and not read since, so its atime is unchanged
            known = self._source.st if self._source.users == 1 else None
            st = known or layercalls.call(os.fstat, self._source.fd)
        return union.shown(node, st, self._object)

    @property
    def _object(self) -> int:
        """An fd of the node's object, which `_source` is not if its data lies elsewhere."""
        return self._source.fd if self._metadata < 0 else self._metadata

    @property
    def is_quick(self) -> bool:
        """Whether :meth:`copy` is fast enough to run between two requests."""
        return self._lower_data is not None or (self.size <= SMALL and not self._union.stack.durable)

    def copy(self, goes_on: Callable[[], None] = lambda: None) -> None:
        """Copy data and metadata, and sync them. Raises ``OSError``.

        ``goes_on`` is called between pieces of data; an exception from it ends the copy.
        """
        if self.size:
            self._copy(self._union, self._st, self._target, goes_on)
        goes_on()
        self._origin = self._union.origins.store(self.node, self._object, self._st, self._target)
        self._union.flags.copy(self._flags, self._target)
        if self._lower_data is not None:
            self._leave_data()  # the xattr that goes last is the one to be removed
        self._copy_metadata()
        if self._lower_data is None and self.size < self._st.st_size:
            os.utime(self._target, ns=_times(self._st, self.size))
        if self._union.stack.durable and self._lower_data is None:
            os.fsync(self._target)

    def _leave_data(self) -> None:
        """Make the copy metacopy, of the same size, with the digest that the source has for its data."""
        markers, digest = self._union.markers, b""
        if self._metadata >= 0:
            digest = markers.metacopy_value(self._metadata) or b""
        os.setxattr(self._target, markers.metacopy, digest)
        os.ftruncate(self._target, self._st.st_size)

    def _copy_metadata(self) -> None:
        st, target, union = self._st, self._target, self._union
        xattrs, mode, owners = None, self._mode, union.stack.owners
        if self._permissions is not None:
            xattrs = copied_xattrs(union.markers, union.gate.rights, self._object)
            shown = replaced(st, {stat.ST_MODE: stat.S_IFREG | mode})
            new = self._permissions.of_copy(
                shown, stat.S_IFREG, xattrs, self.node.layer.permissions, union.markers
            )
            attributes.write(target, None, new, attributes.unsupported, owner=False)
            return
        if owners is not None:
            xattrs = copied_xattrs(union.markers, union.gate.rights, self._object)
            st, xattrs = owners.copied(st, xattrs, self.node.layer)
        owner = not union.identity.owns(st)
        if owner and owners is not None and owners.squashes:
            given, owner = owners.give(target, st), False
            mode &= ~(given.st_mode ^ st.st_mode)
        if owner:
            try:
                os.fchown(target, st.st_uid, st.st_gid)
            except PermissionError:
                union.owner_refused(self.node, st)
                raise
        if self._is_plain:
            os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))
            self._no_capability = True
            return
        if xattrs is None:
            xattrs = copied_xattrs(union.markers, union.gate.rights, self._object)
        new = attributes.attributes(st, xattrs)._replace(mode=mode)
        attributes.write(target, None, new, attributes.unsupported, owner=False)
        self._no_capability = CAPABILITY not in xattrs

    def finish(self, *, keep: bool = False) -> OpenFile | None:
        """Put the copy into the upper and switch all opens of the file to it, unless it is metacopy.

        ``keep``: lend it to the caller too. Its ``st`` is up to date.
        """
        union, node = self._union, self.node
        st = self._copy_up.put(node, self._temporary, self._target, self._origin)
        if self._no_capability:
            union.capabilities.none(node)
        else:
            union.capabilities.changed(node)
        node.data_lies_in(self._lower_data)
        if self._lower_data is not None:
            self._copy_up.link_up_known(node)
            return None
        file = hand_over(node, self._target, st, lend=keep)
        if file is not None:
            self._target = -1
        try:
            self._copy_up.link_up_known(node)
        except BaseException:
            if keep and file is not None:
                union.files.take_back(node, file)
            raise
        return file if keep else None

    def _close(self) -> None:
        """Close all fds, and discard an unfinished copy."""
        if self._temporary.taken:
            self._temporary.discard()
        for fd in (self._target, self._metadata):
            if fd >= 0:
                close_quietly(fd)
        self._target = self._metadata = -1
        if self._open:
            self._open = False
            self._union.files.take_back_later(self.node, self._source)


class DataCopy(_Copy):
    """The data of one metacopy file in the upper follows, into the same object, which may have several names.

    Readers use the lower's until the xattr `metacopy` is removed, after all data was copied; so a crash in
    between changes nothing (copy_up.c, ovl_copy_up_meta_inode_data).
    """

    def __init__(self, copy_up: CopyUp, node: Node, limit: int | None = None) -> None:
        """Open both files. ``limit``: copy only that many bytes, and truncate the file to them."""
        assert node.place is not None
        self._union = union = copy_up.union
        self._copy_up = copy_up
        self.node = node
        self._target: OpenFile | None = None
        #: Whether the file is an ordinary one by now.
        self._is_complete = False
        self._source = union.files.lend(node, write=False)
        self._open = True
        try:
            waits, rights = not node.place.layer.memory, union.gate.rights
            if node.held >= 0:
                self._target = open_held(node.held, write=True, waits=waits, rights=rights, upper=True)
            else:
                self._target = open_backing(
                    union.gate.fd(node.place), node.real_name, write=True, waits=waits, rights=rights,
                    upper=True,
                )  # fmt: skip
            self._st = os.fstat(self._target.fd)
            if node.held < 0:
                node.check(self._st)
            self.size = self._st.st_size if limit is None else min(limit, self._st.st_size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DataCopy:
        return self

    @property
    def is_quick(self) -> bool:
        """Whether :meth:`copy` is fast enough to run between two requests."""
        return self.size <= SMALL and not self._union.stack.durable

    def copy(self, goes_on: Callable[[], None] = lambda: None) -> None:
        """Copy the data, sync it, and make the file an ordinary one.

        Raises ``OSError``; then the file is as before. ``goes_on`` is called between pieces of data; an
        exception from it ends the copy.
        """
        assert self._target is not None
        fd, capability = self._target.fd, self._capability(self._target.fd)
        try:
            if self.size:
                self._copy(self._union, layercalls.call(os.fstat, self._source.fd), fd, goes_on)
            goes_on()
            os.ftruncate(fd, self.size)
            self._restore(fd, capability, _times(self._st, self.size))
            if self._union.stack.durable:
                os.fsync(fd)
            os.removexattr(fd, self._union.markers.metacopy)
        except BaseException:
            self._take_data_away(fd, capability)
            raise
        self._is_complete = True

    def _restore(self, fd: int, capability: bytes | None, times: tuple[int, int]) -> None:
        """Restore what writing and truncating have changed; ``times``: atime and mtime."""
        if capability is not None:
            os.setxattr(fd, CAPABILITY, capability)
        if self._st.st_mode & SET_IDS:
            os.fchmod(fd, stat.S_IMODE(self._st.st_mode))
        os.utime(fd, ns=times)

    def _capability(self, fd: int) -> bytes | None:
        """The capabilities, which writing removes."""
        try:
            return os.getxattr(fd, CAPABILITY)
        except OSError:
            return None

    def _take_data_away(self, fd: int, capability: bytes | None) -> None:
        """Free the space of an incomplete copy, and restore everything else."""
        try:
            os.getxattr(fd, self._union.markers.metacopy)
        except OSError:
            return  # it is an ordinary file, and this its data
        with contextlib.suppress(OSError):
            os.ftruncate(fd, self._st.st_size)
            calls.fallocate(fd, calls.PUNCH_HOLE | calls.KEEP_SIZE, 0, self._st.st_size)
        with contextlib.suppress(OSError):
            self._restore(fd, capability, (self._st.st_atime_ns, self._st.st_mtime_ns))

    def settle(self) -> None:
        """The data is there, and readers must use it: the next copy would find no metacopy file."""
        if self._is_complete:
            self.finish()

    def finish(self, *, keep: bool = False) -> OpenFile | None:
        """Switch all opens of the file to the upper's. ``keep``: lend it to the caller too."""
        assert self._target is not None
        node, fd = self.node, self._target.fd
        node.data_lies_in(None)
        node.changes()
        try:
            st = os.fstat(fd)
        except OSError:
            st = None  # opens must no longer have the lower's file
        file = hand_over(node, fd, st, lend=keep)
        if file is not None:
            self._target = None
        self._copy_up.tell(Effects(node))
        return file if keep else None

    def _close(self) -> None:
        """Close all fds."""
        if self._target is not None:
            close_quietly(self._target.fd)
            self._target = None
        if self._open:
            self._open = False
            self._union.files.take_back_later(self.node, self._source)


def _data_of(node: Node, st: os.stat_result) -> LowerData:
    """Where the data of a lower file lies; ``st``: its attributes."""
    assert node.place is not None
    return node.lower_data or LowerData(node.place, node.name, node.place.layer.key(st), st.st_blocks)


def _times(st: os.stat_result, size: int) -> tuple[int, int]:
    """Those of a copy: its own, but a truncated one was changed, which must not show without its time."""
    return st.st_atime_ns, time.time_ns() if size < st.st_size else st.st_mtime_ns
