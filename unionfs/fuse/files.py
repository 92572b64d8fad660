"""Reading and writing for requests, and the open files that a session counts."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from unionfs.fuse.copying import CopyUps
from unionfs.fuse.inline import in_thread
from unionfs.sys import calls
from unionfs.union.attributes import Attributes
from unionfs.union.changes import Caller, Changes
from unionfs.union.files import Handle, OpenFile, mode_without_set_ids
from unionfs.union.nodes import Node
from unionfs.union.tree import Union

#: A write above this many bytes goes to a thread: the disk may make it wait.
_LONG_WRITE: Final = 256 * 1024


def drop_set_ids(fd: int) -> None:
    """What a write or truncation does by anybody who may not keep setuid and setgid."""
    mode = mode_without_set_ids(os.fstat(fd).st_mode)
    if mode is not None:
        os.fchmod(fd, mode)


class Files:
    """The open files of one mount, by the number that the kernel has for each. Raises ``OSError``."""

    def __init__(self, union: Union, copy_ups: CopyUps) -> None:
        self._union = union
        self._copy_ups = copy_ups
        self._handles: dict[int, Handle] = {}
        self._next = 1
        #: Bytes that came by here, unlike those that the kernel has in its page cache or handles by itself.
        self.bytes_read = 0
        self.bytes_written = 0

    def __len__(self) -> int:
        return len(self._handles)

    def __getitem__(self, number: int) -> Handle:
        try:
            return self._handles[number]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def get(self, number: int) -> Handle | None:
        """The open file with that number, if there is one."""
        return self._handles.get(number)

    # -- opening --------------------------------------------------------------------------------------

    async def prepare(self, node: Node, flags: int) -> None:
        """Have a node in the upper when it is opened with ``flags`` that change it."""
        if flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            await self._copy_ups.ensure(node, 0 if flags & os.O_TRUNC else None)

    def open_unread(self, node: Node, uid: int) -> int:
        """Open a lower's file to read it, though the kernel may have all its data; gives the number."""
        return self._register(node, self._union.open_unread(node), uid, writes=False)

    def open(self, node: Node, flags: int, uid: int, *, kills_set_ids: bool) -> int:
        """Open a node that :meth:`prepare` was called for; gives the number."""
        truncates = bool(flags & os.O_TRUNC)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        file = self._union.open_file(node, write=writes or truncates)
        try:
            if truncates:
                os.ftruncate(file.fd, 0)
                if kills_set_ids:
                    drop_set_ids(file.fd)
        except BaseException:
            self._union.close_file(node, file)
            raise
        return self._register(node, file, uid, writes=writes)

    def create(
        self, changes: Changes, parent: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[int, Node, Attributes]:
        """A new file and its number."""
        node, attributes, fd = changes.create(parent, name, stat.S_IMODE(mode), caller)
        return self._created(node, fd, flags, caller), node, attributes

    def tmpfile(
        self, changes: Changes, parent: Node, mode: int, flags: int, caller: Caller
    ) -> tuple[int, Node, Attributes]:
        """A new file without a name and its number."""
        node, attributes, fd = changes.tmpfile(parent, stat.S_IMODE(mode), caller, flags)
        return self._created(node, fd, flags, caller), node, attributes

    def _created(self, node: Node, fd: int, flags: int, caller: Caller) -> int:
        assert node.place is not None
        file = OpenFile(fd, readable=True, writable=True, waits=not node.place.layer.memory)
        file.users = 1
        node.file = file
        return self._register(node, file, caller.uid, writes=flags & os.O_ACCMODE != os.O_RDONLY)

    def _register(self, node: Node, file: OpenFile, uid: int, *, writes: bool) -> int:
        handle = Handle(node, file, uid, writes=writes)
        if node.handles is None:
            node.handles = []
        node.handles.append(handle)
        number = self._next
        self._next += 1
        self._handles[number] = handle
        return number

    def release(self, number: int) -> Handle:
        """Close an open file."""
        handle = self._handles.pop(number)
        node = handle.node
        assert node.handles is not None
        node.handles.remove(handle)
        if not node.handles:
            node.handles = None
        self._union.close_file(node, handle.file)
        self._union.nodes.forget(node, 0)
        return handle

    # -- data -----------------------------------------------------------------------------------------

    async def read(self, file: OpenFile, offset: int, size: int) -> bytes | bytearray:
        """Up to ``size`` bytes, from a disk if need be; fewer only at the end of the file."""
        file.users += 1
        try:
            data = await in_thread(file.read, size, offset)
        finally:
            file.release()
        self.bytes_read += len(data)
        return data

    async def write(
        self, file: OpenFile, offset: int, data: bytes | memoryview, *, kills_set_ids: bool
    ) -> int:
        """Write; gives the number of bytes, fewer than all only when there was no room for more."""
        if kills_set_ids:
            drop_set_ids(file.fd)
        if len(data) <= _LONG_WRITE or not file.waits:
            count = file.write(data, offset)
        else:
            file.users += 1
            try:
                count = await in_thread(file.write, data, offset)
            finally:
                file.release()
        self.bytes_written += count
        return count

    async def fsync(self, node: Node, file: OpenFile, *, datasync: bool) -> None:
        """fsync(2) or fdatasync(2). Of a lower nothing can have changed, and memory keeps nothing anyway."""
        if not node.is_upper or (self._union.stack.volatile and node.bound is None):
            return
        if node.place is not None and node.place.layer.memory:
            return
        file.users += 1
        try:
            await in_thread(os.fdatasync if datasync else os.fsync, file.fd)
        finally:
            file.release()

    async def allocate(self, file: OpenFile, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        file.users += 1
        try:
            await in_thread(calls.fallocate, file.fd, mode, offset, length)
        finally:
            file.release()

    async def copy_range(
        self, source: OpenFile, offset_in: int, target: OpenFile, offset_out: int, length: int
    ) -> int:
        """copy_file_range(2); gives the number of bytes."""
        source.users += 1
        target.users += 1
        try:
            count = await in_thread(
                os.copy_file_range, source.fd, target.fd, length, offset_in, offset_out
            )
        finally:
            source.release()
            target.release()
        self.bytes_read += count
        self.bytes_written += count
        return count
