"""Reading and writing for requests, and the open files counted by a session."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from unionfs.core.files import Handle, OpenFile
from unionfs.core.node import Attributes, Node
from unionfs.core.opening import Handles
from unionfs.core.setting import Change
from unionfs.fuse.copying import CopyUps
from unionfs.fuse.inline import in_thread
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned, fd_limit
from unionfs.union import setids
from unionfs.union.changes import Caller, Changes
from unionfs.union.permissions import Permissions
from unionfs.union.setids import Who
from unionfs.union.tree import Union

#: A write above this many bytes runs in a thread: it may wait for the disk.
_LONG_WRITE: Final = 256 * 1024
_ELF: Final = b"\x7fELF"


def truncate(node: Node, file: OpenFile, size: int, killer: Who | None) -> None:
    """ftruncate(2) of a node's file. ``killer``: the process, if it clears set-id bits."""
    try:
        os.ftruncate(file.fd, size)
    except OSError as error:
        # The copy-up for the same request has left no more of it.
        if error.errno == errno.EPERM or os.fstat(file.fd).st_size != size:
            raise
        calls.futimens(file.fd, None, time.time_ns())
    if killer is not None:
        setids.clear(file.fd, killer, node.layer.permissions)


def set_times(call: Callable[[int, int | None, int | None], None], fd: int, change: Change) -> None:
    """Set the times of a change with `call`."""
    try:
        call(fd, change.atime_ns, change.mtime_ns)
    except OSError:
        # The truncation is made, and has its own time. After an error a kernel that caches writes would keep
        # the old size, with zeros for what is gone.
        if change.size is None:
            raise


class Files:
    """The open files of one mount, by number (file handle). Raises ``OSError``."""

    def __init__(self, union: Union, copy_ups: CopyUps) -> None:
        self._union = union
        self._open_files = union.files
        self._copy_ups = copy_ups
        self.handles = Handles(union.nodes, limit=fd_limit(), counts_all=True)
        #: Bytes written by the daemon, excluding the page cache and passthrough.
        self.bytes_written = 0

    def __len__(self) -> int:
        return len(self.handles)

    def figures(self) -> dict[str, object]:
        """Counts, and the bytes of requests; JSON-able."""
        return {
            "open_files": len(self),
            "fds_of_open_files": self.handles.fds,
            "fds_of_users": {str(uid): count for uid, count in self.handles.fds_of_users.items()},
            "fds_of_lowers": len(self._open_files.resting),
            "read_bytes": self.bytes_read,
            "written_bytes": self.bytes_written,
        }

    def __getitem__(self, number: int) -> Handle:
        handle = self.handles.get(number)
        if handle is None:
            raise os_error(errno.EBADF)
        return handle

    def get(self, number: int) -> Handle | None:
        """The open file with that number, or None."""
        return self.handles.get(number)

    @property
    def bytes_read(self) -> int:
        """Bytes read by the daemon, excluding the page cache and passthrough."""
        return self.handles.bytes_read

    # -- opening --------------------------------------------------------------------------------------

    async def prepare(self, node: Node, flags: int, uid: int) -> OpenFile | None:
        """Copy a node up with its data if ``flags`` open it for a change, for user ``uid``.

        Then it is lent: pass it to :meth:`open`, or return it.
        """
        if flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY:
            return None
        truncates = bool(flags & os.O_TRUNC)
        appends = bool(flags & os.O_APPEND) and not truncates
        check = partial(self._union.flags.may_write, node, appends=appends)
        if not node.in_place:  # not copied up for an open that is refused
            self.handles.may_hold(uid)
        return await self._copy_ups.ensure_data(node, uid, 0 if truncates else None, keep=True, check=check)

    async def is_program(self, file: OpenFile) -> bool:
        """Whether the file begins as ELF files do: programs, shared libraries."""
        beginning = bytearray(len(_ELF))
        try:
            if file.read_into(memoryview(beginning), 0) is None:
                with file:
                    return await in_thread(file.read, len(_ELF), 0) == _ELF
        except OSError:
            return False  # the READ reports the error
        return beginning == _ELF

    def open(
        self, node: Node, flags: int, who: Who, prepared: OpenFile | None, *, kills_set_ids: bool
    ) -> int:
        """Open a node, with the result of :meth:`prepare`; returns the number.

        ``kills_set_ids``: a truncation clears set-id bits.
        """
        if node.in_place or prepared is not None:
            try:
                self.handles.may_hold(who.uid)
            except OSError:
                if prepared is not None:
                    self._open_files.take_back(node, prepared)
                raise
        truncates = bool(flags & os.O_TRUNC)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        file = prepared or self._open_files.lend(node, write=writes or truncates)
        try:
            if truncates:
                truncate(node, file, 0, who if kills_set_ids else None)
        except BaseException:
            self._open_files.take_back(node, file)
            raise
        return self._register(node, file, flags, who)

    def create(
        self,
        changes: Changes,
        parent: Node,
        name: bytes,
        mode: int,
        flags: int,
        caller: Caller,
        who: Who,
        *,
        tried: bool = False,
    ) -> tuple[int, Node, Attributes]:
        """Create a file; returns its number too. ``tried``: as in `Changes`."""
        self.handles.may_hold(who.uid)
        node, attributes, fd = changes.create(parent, name, stat.S_IMODE(mode), caller, tried=tried)
        return self._created(node, fd, flags, who), node, attributes

    def tmpfile(
        self, changes: Changes, parent: Node, mode: int, flags: int, caller: Caller, who: Who
    ) -> tuple[int, Node, Attributes]:
        """Create a file without a name; returns its number too."""
        self.handles.may_hold(who.uid)
        node, attributes, fd = changes.tmpfile(parent, stat.S_IMODE(mode), caller, flags)
        return self._created(node, fd, flags, who), node, attributes

    def _created(self, node: Node, fd: int, flags: int, who: Who) -> int:
        file = self._open_files.lend_new(node, fd)
        return self._register(node, file, flags, who)

    def _register(self, node: Node, file: OpenFile, flags: int, who: Who) -> int:
        mode = flags & os.O_ACCMODE
        return self.handles.register(node, file, who, writes=mode != os.O_RDONLY, maps=mode == os.O_RDWR)

    def release(self, number: int) -> Handle:
        """Close an open file."""
        return self.handles.release(number)

    def was_read(self, count: int) -> None:
        """Count bytes read for an answer."""
        self.handles.was_read(count)

    # -- data -----------------------------------------------------------------------------------------

    async def read(self, file: OpenFile, offset: int, size: int) -> bytes | bytearray:
        """Read up to ``size`` bytes in a thread; fewer only at the end of the file."""
        with file:
            data = await in_thread(file.read, size, offset)
        self.handles.was_read(len(data))
        return data

    async def write(
        self,
        file: OpenFile,
        offset: int,
        data: bytes | memoryview,
        killer: Who | None,
        permissions: Permissions | None = None,
    ) -> int:
        """Write; returns the number of bytes, short only if there is no space for more.

        ``killer``: the process, if it clears set-id bits. ``permissions``: where the mode is, if not in the
        file.
        """
        if killer is not None:
            setids.clear(file.fd, killer, permissions)
        if len(data) <= _LONG_WRITE or not file.waits:
            count = file.write(data, offset)
        else:
            with file:
                count = await in_thread(file.write, data, offset)
        self.bytes_written += count
        return count

    async def fsync(self, node: Node, file: OpenFile, *, datasync: bool) -> None:
        """fsync(2) or fdatasync(2). Does nothing for a lower's file, which has not changed, or in memory."""
        if not node.in_place or not node.territory.durable:
            return
        sync = os.fdatasync if datasync else os.fsync
        if not node.data_in_place:
            with self._union.checked_path(node) as path:
                metadata = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with Owned(metadata):
                await in_thread(sync, metadata)
            return
        with file:
            await in_thread(sync, file.fd)

    async def allocate(self, file: OpenFile, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        with file:
            await in_thread(calls.fallocate, file.fd, mode, offset, length)

    async def copy_range(
        self, source: OpenFile, offset_in: int, target: OpenFile, offset_out: int, length: int
    ) -> int:
        """copy_file_range(2); returns the number of bytes."""
        with source, target:
            count = await in_thread(os.copy_file_range, source.fd, target.fd, length, offset_in, offset_out)
        self.handles.was_read(count)
        self.bytes_written += count
        return count
