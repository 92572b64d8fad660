"""Requests for open files: handlers that translate and answer.

A request names an open file by its number or, where the kernel sends no OPEN, by its node alone: then the
number is 0, and a limited number of files stays open (`OpenFiles.keep`).
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import Final

from unionfs.core import layercalls, marks
from unionfs.core.files import Handle, OpenFile
from unionfs.core.loop import new_buffer
from unionfs.core.node import Attributes, Node
from unionfs.core.reads import SPLICED
from unionfs.fuse.direct import ioctl
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.former import NO_FORMER, Former, made
from unionfs.fuse.direct.loop import Answer, Waiting
from unionfs.fuse.direct.names import NameRequests
from unionfs.fuse.direct.nodeio import NodeIos, stale
from unionfs.fuse.direct.splicing import Splicer
from unionfs.fuse.inline import in_thread
from unionfs.fuse.operations import Named, Operations
from unionfs.fuse.protocol import Decision, Opcode, Reply, encode, notify
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import (
    FSYNC_FDATASYNC,
    OPEN_KILL_SUIDGID,
    WRITE_CACHE,
    WRITE_KILL_SUIDGID,
)
from unionfs.sys.calls import os_error
from unionfs.union.flags import APPEND

_MAX_COPY: Final = 0x7FFFF000  # MAX_RW_COUNT, and it fits the 32 bits of the answer


class DataRequests:
    """Handlers by opcode in `table`; those of `waiting` are coroutine functions."""

    def __init__(
        self,
        operations: Operations,
        ios: NodeIos,
        names: NameRequests,
        device: Device,
        splicer: Splicer,
        decision: Decision,
        former: Former = NO_FORMER,
    ) -> None:
        self._operations = operations
        self._union = operations.union
        self._files = operations.files
        self._ios = ios
        self._names = names
        self._device = device
        self._splicer = splicer
        self._open_files = operations.union.files
        self._former = former
        #: Whether the kernel sends no OPEN.
        self._opens_unseen = Opcode.OPEN in decision.enosys
        self._buffer = memoryview(new_buffer(max(1 << 20, decision.reply.max_write)))
        self.table: dict[Opcode, Answer] = {
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._tmpfile,
            Opcode.LSEEK: self._lseek,
        }
        self.waiting: dict[Opcode, Waiting] = {
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._fsync,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.COPY_FILE_RANGE: self._copy_file_range,
            Opcode.COPY_FILE_RANGE_64: self._copy_file_range_64,
            Opcode.IOCTL: partial(ioctl.answer, operations),
        }

    # -- opening and closing --------------------------------------------------------------------------

    async def _open(self, request: rq.Open) -> Reply:
        opened = self._former.opened_by(request.unique) if request.resent else None
        if opened is not None:
            return encode.opened(request.unique, opened[0], *self._ios.mode_of(opened[1]))
        node = self._union.nodes.named(request.nodeid)
        if node is None or node.successor is not None:
            raise stale()
        flags = request.flags
        reads = flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY
        if not reads and self._ios.holds_lower(node):
            node.territory.require_writable()
            # This open fails and may not be retried (/proc/self/fd), so it must not truncate.
            if not self._operations.copy_ups.is_running(node):
                self._ios.await_writer(self._union.nodes.supersede(node))
                self._operations.invalidations.of_node(node)
                raise stale()
            flags = os.O_RDWR
        prepared = await self._files.prepare(node, flags, request.uid)
        try:
            self._require_current(node, writes=not reads)
        except OSError:
            if prepared is not None:
                self._open_files.take_back(node, prepared)
            raise
        kills = bool(request.open_flags & OPEN_KILL_SUIDGID)
        number = self._files.open(node, request.flags, request, prepared, kills_set_ids=kills)
        handle = self._files[number]
        mapped = node.use is not None and node.use.mapped
        try:
            program = False
            if self._ios.asks_for_program(handle):
                program = await self._files.is_program(handle.file)
                self._require_current(node, writes=not reads)
            open_flags, backing_id = self._ios.opened(handle, program=program)
        except BaseException:
            self._files.release(number)
            raise
        if not mapped and node.use is not None and node.use.mapped:
            # Stores through a mapping will change them.
            self._operations.invalidations.of_node(node)
        return encode.opened(request.unique, number, open_flags, backing_id)

    def _require_current(self, node: Node, *, writes: bool) -> None:
        """Raise ESTALE for an open that needs a new node, which then exists."""
        if node.successor is None:
            if not self._ios.is_outdated(node, writes=writes):
                return
            self._union.nodes.supersede(node)
        raise stale()

    def _create(self, request: rq.Create) -> Reply:
        if request.resent and (answer := self._created_before(request)) is not None:
            return answer
        parent = self._operations.directory(request.nodeid)
        created = self._files.create(
            self._operations.changes, parent, request.name, request.mode, request.flags,
            self._names.caller(request), request, tried=not self._opens_unseen,
        )  # fmt: skip
        return self._created(request.unique, *created)

    def _created_before(self, request: rq.Create) -> Reply | None:
        """The answer, if the file was made by the same request before."""
        found = made(self._operations, request.nodeid, request.name, stat.S_IFREG)
        if found is None:
            return None
        opened = self._former.opened_by(request.unique)
        if opened is not None:
            return self._opened_before(request.unique, opened, found)
        number = self._files.open(found[0], request.flags & os.O_ACCMODE, request, None, kills_set_ids=False)
        return self._created(request.unique, number, *found)

    def _opened_before(self, unique: int, opened: tuple[int, Handle], found: Named) -> Reply:
        entry = self._names.entry_out(found, unique)
        return encode.created(unique, entry, opened[0], *self._ios.mode_of(opened[1]))

    def _tmpfile(self, request: rq.Tmpfile) -> Reply:
        opened = self._former.opened_by(request.unique) if request.resent else None
        if opened is not None:
            node = opened[1].node
            return self._opened_before(request.unique, opened, (node, self._union.attributes(node)))
        parent = self._operations.directory(request.nodeid)
        created = self._files.tmpfile(
            self._operations.changes, parent, request.mode, request.flags, self._names.caller(request),
            request,
        )  # fmt: skip
        return self._created(request.unique, *created)

    def _created(self, unique: int, number: int, node: Node, attributes: Attributes) -> Reply:
        if self._opens_unseen:
            # The kernel sends no RELEASE either.
            entry = self._names.entry_out((node, attributes), unique)
            self._open_files.keep(node, write=True)
            self._files.release(number)
            return encode.created(unique, entry, 0, 0)
        opened = self._ios.opened(self._files[number])
        return encode.created(unique, self._names.entry_out((node, attributes), unique), number, *opened)

    # -- data -----------------------------------------------------------------------------------------

    def _reading(self, id_: int, number: int) -> OpenFile:
        """The file to read, opened here if it was not open yet, not in a thread."""
        if number:
            file = self._files[number].file
            _ = file.fd
            return file
        return self._open_files.keep(self._operations.node(id_), write=False)

    async def _writing(self, id_: int, number: int, uid: int) -> OpenFile:
        if number:
            handle = self._files[number]
            if not handle.file.writable:
                raise os_error(errno.EBADF)
            return handle.file
        node = self._operations.node(id_)
        if self._open_files.is_open_for_writing(node) and not node.lacks_names:
            return self._open_files.keep(node, write=True)
        # Where the kernel sends no OPEN, it does not say whether a write appends: see `_end_of`.
        check = partial(self._union.flags.may_write, node, appends=True)
        prepared = await self._operations.copy_ups.ensure_data(node, uid, keep=True, check=check)
        try:
            return self._open_files.keep(node, write=True)
        finally:
            if prepared is not None:
                self._open_files.take_back(node, prepared)

    async def _read(self, request: rq.Read) -> Reply | None:
        file = self._reading(request.nodeid, request.fh)
        slow = marks.slow(file.fd)  # what is read of it comes from the request's memo
        if request.size >= SPLICED and not slow:
            if await self._spliced(request, file):
                return None
            file = self._reading(request.nodeid, request.fh)  # a copy-up may have replaced it
        # The answer is sent before the next request is read, so one buffer serves all reads that do not wait.
        if file.waits and request.size >= SPLICED and not slow:
            here = None  # other requests were read in between, and may use the buffer
        else:
            here = file.read_into(self._buffer[: request.size], request.offset)
        if here is not None:
            self._files.was_read(here)
            return encode.data(request.unique, self._buffer[:here])
        return encode.data(request.unique, await self._files.read(file, request.offset, request.size))

    async def _spliced(self, request: rq.Read, file: OpenFile) -> bool:
        """Answer by splicing; in a thread if a read may wait for a disk, so that several run concurrently.
        Returns False if that is not possible."""
        arguments = request.unique, file, request.offset, request.size
        if not file.waits:
            count = self._splicer.answer(*arguments)
        else:
            with file:
                count = await in_thread(self._splicer.answer, *arguments)
        self._files.was_read(count)
        return count > 0

    async def _write(self, request: rq.Write) -> Reply:
        try:
            file = await self._writing(request.nodeid, request.fh, request.uid)
            if request.write_flags & WRITE_CACHE and self._names.write_back is not None:
                with self._names.write_back.kept(self._operations.node(request.nodeid), file):
                    count = await self._write_all(request, file)
            else:
                count = await self._write_all(request, file)
        except OSError as error:
            if request.write_flags & WRITE_CACHE:
                # Data that could not be written must not remain readable in the page cache.
                self._device.notify_later(notify.inval_inode(request.nodeid))
                if error.errno == errno.EINTR:
                    # fsync(2) would report it once, and succeed when its caller repeats it
                    raise os_error(errno.EIO) from error
            raise
        return encode.written(request.unique, count)

    async def _write_all(self, request: rq.Write, file: OpenFile) -> int:
        killer = request if request.write_flags & WRITE_KILL_SUIDGID else None
        end = self._end_of(request, file)
        if end > request.offset:
            count = end - request.offset
            if count >= len(request.data):
                if request.resent and _has(file, request):
                    return len(request.data)
                raise os_error(errno.EPERM)
            return count + await self._files.write(file, end, request.data[count:], killer)
        count = await self._files.write(file, request.offset, request.data, killer)
        # The kernel does not check the count of a write-back, so a short one must be an error
        # (fs/fuse/file.c, fuse_writepage_end).
        while request.write_flags & WRITE_CACHE and count < len(request.data):
            rest = request.data[count:]
            count += await self._files.write(file, request.offset + count, rest, killer)
        return count

    def _end_of(self, request: rq.Write, file: OpenFile) -> int:
        """Where an append-only file ends, if it may be open for other writes since the kernel sent no OPEN;
        else 0. The kernel writes whole pages back, with what the file has before its end."""
        if request.fh:
            return 0
        flags = self._union.flags.of(self._operations.node(request.nodeid))
        return os.fstat(file.fd).st_size if flags & APPEND else 0

    async def _fsync(self, request: rq.Fsync) -> Reply:
        if request.fh:
            handle = self._files[request.fh]
            node, file = handle.node, handle.file
        else:
            node = self._operations.node(request.nodeid)
            file = self._open_files.keep(node, write=False)
        await self._files.fsync(node, file, datasync=bool(request.fsync_flags & FSYNC_FDATASYNC))
        return encode.ok(request.unique)

    async def _fallocate(self, request: rq.Fallocate) -> Reply:
        file = await self._writing(request.nodeid, request.fh, request.uid)
        await self._files.allocate(file, request.mode, request.offset, request.length)
        return encode.ok(request.unique)

    def _lseek(self, request: rq.Lseek) -> Reply:
        file = self._reading(request.nodeid, request.fh)
        position = layercalls.call(os.lseek, file.fd, request.offset, request.whence)
        return encode.lseek(request.unique, position)

    async def _copy_file_range(self, request: rq.CopyFileRange) -> Reply:
        return encode.written(request.unique, await self._copied(request))

    async def _copy_file_range_64(self, request: rq.CopyFileRange64) -> Reply:
        return encode.copied(request.unique, await self._copied(request))

    async def _copied(self, request: rq.CopyFileRange) -> int:
        target = await self._writing(request.nodeid_out, request.fh_out, request.uid)
        source = self._reading(request.nodeid, request.fh_in)
        return await self._files.copy_range(
            source, request.off_in, target, request.off_out, min(request.len, _MAX_COPY)
        )


def _has(file: OpenFile, request: rq.Write) -> bool:
    """Whether a file has the data of a write, which a former daemon has made then."""
    return os.pread(file.fd, len(request.data), request.offset) == bytes(request.data)
