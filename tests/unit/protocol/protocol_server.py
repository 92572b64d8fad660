"""An in-memory filesystem, served to the real kernel with only the protocol package.

Run by test_protocol_kernel.py:

    python protocol_server.py MOUNTPOINT LOG --io MODE [--unprivileged]
        [--old-copy] [--backing FILE]

Mounts by mount(2), prints "ready" when INIT is answered, serves until the mount is gone, and writes every
message to LOG, one JSON object per line: name of the class, repr, bytes in hex.

A line on standard input is a JSON list of notifications, each [function of notify.py, argument ...] with
names as strings; the answer is a line with the result of writev(2), or the name of the errno, for each. No
request is served during this.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from protocol_reference import NO_ENTRY, Dirents, negative_entry

from unionfs.fuse.protocol import (
    FOREVER,
    IoMode,
    Opcode,
    Privileges,
    Reply,
    Request,
    Settings,
    Unknown,
    decoder,
    encode,
    negotiate,
    notify,
    receive_buffer_size,
    requests,
)
from unionfs.fuse.protocol import flags as fl
from unionfs.fuse.protocol.structs import LAYOUTS

HELLO = b"Hello from the other side.\n"
LIMIT = 60
"""The maximum lifetime of this process in seconds, whatever happens to the test."""


@dataclass
class Node:
    """One inode."""

    ino: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, Node] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    target: bytes = b""
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    times: list[int] = field(default_factory=lambda: [time.time_ns()] * 3)
    backing_id: int = 0

    def attributes(self) -> bytes:
        """fuse_attr."""
        size = len(self.target) or len(self.data)
        a, m, c = self.times
        ns = 10**9
        return LAYOUTS["fuse_attr"].struct.pack(
            self.ino, size, -(-size // 512), a // ns, m // ns, c // ns, a % ns, m % ns, c % ns, self.mode,
            self.nlink, self.uid, self.gid, self.rdev, 4096, 0,
        )  # fmt: skip


class Refused(Exception):
    """An errno to answer with."""


class Memory:
    """The requests' handlers: each takes a request and returns a reply, or None for no reply."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.root = self.new(stat.S_IFDIR | 0o755, 1)
        hello = self.new(stat.S_IFREG | 0o644)
        hello.data[:] = HELLO
        self.root.names[b"hello"] = hello
        self.handlers: dict[type[Request], Callable[[Any], Reply | None]] = {
            getattr(requests, name.title().replace("_", "")): getattr(self, name)
            for name in dir(self)
            if hasattr(requests, name.title().replace("_", ""))
        }
        self.enosys: frozenset[Opcode] = frozenset()
        self.open_flags = 0
        self.slow = 0

    def new(self, mode: int, ino: int | None = None) -> Node:
        """A new inode."""
        ino = ino if ino is not None else max(self.nodes) + 1
        self.nodes[ino] = Node(ino, mode)
        return self.nodes[ino]

    def child(self, parent: int, name: bytes) -> Node:
        """The object `name` in directory `parent`."""
        try:
            return self.nodes[parent].names[name]
        except KeyError:
            raise Refused(errno.ENOENT) from None

    def entry_of(self, unique: int, node: Node) -> Reply:
        """An answer with an entry."""
        return encode.entry(unique, node.ino, 0, FOREVER, FOREVER, node.attributes())

    def make(self, r: Any, mode: int) -> Node:
        """A new object under a name."""
        if r.name in self.nodes[r.nodeid].names:
            raise Refused(errno.EEXIST)
        node = self.new(mode)
        node.uid, node.gid = r.uid, r.gid
        self.nodes[r.nodeid].names[r.name] = node
        return node

    def lookup(self, r: requests.Lookup) -> Reply | None:
        if r.name == b"gone":
            return negative_entry(r.unique, FOREVER)
        if r.name == b"slow":
            self.slow = r.unique
            return None
        return self.entry_of(r.unique, self.child(r.nodeid, r.name))

    def forget(self, r: requests.Forget) -> None: ...

    def batch_forget(self, r: requests.BatchForget) -> None: ...

    def interrupt(self, r: requests.Interrupt) -> Reply | None:
        if r.interrupted != self.slow:
            return None
        return encode.error(self.slow, errno.EINTR)

    def getattr(self, r: requests.Getattr) -> Reply:
        return encode.attr(r.unique, FOREVER, self.nodes[r.nodeid].attributes())

    def statx(self, r: requests.Statx) -> Reply:
        node = self.nodes[r.nodeid]
        raw = struct.pack(
            "=IIQIIIHxxQQQQqIiqIiqIiqIiIIII112x", 0xFFF, 4096, 0, node.nlink, node.uid, node.gid, node.mode,
            0, len(node.data), 0, 0, 5, 6, 0, 1234567890, 42, 0, 7, 8, 0, 9, 10, 0, 0, 0, 0, 0,
        )  # fmt: skip
        return encode.statx(r.unique, FOREVER, raw, node.ino)

    def setattr(self, r: requests.Setattr) -> Reply:
        node = self.nodes[r.nodeid]
        if r.valid & fl.FATTR_MODE:
            node.mode = r.mode
        if r.valid & fl.FATTR_UID:
            node.uid = r.new_uid
        if r.valid & fl.FATTR_GID:
            node.gid = r.new_gid
        if r.valid & fl.FATTR_SIZE:
            node.data[:] = node.data[: r.size].ljust(r.size, b"\0")
        if r.valid & fl.FATTR_ATIME:
            node.times[0] = r.atime * 10**9 + r.atimensec
        if r.valid & fl.FATTR_MTIME:
            node.times[1] = r.mtime * 10**9 + r.mtimensec
        return encode.attr(r.unique, FOREVER, node.attributes())

    def readlink(self, r: requests.Readlink) -> Reply:
        return encode.data(r.unique, self.nodes[r.nodeid].target)

    def symlink(self, r: requests.Symlink) -> Reply:
        node = self.make(r, stat.S_IFLNK | 0o777)
        node.target = r.target
        return self.entry_of(r.unique, node)

    def mknod(self, r: requests.Mknod) -> Reply:
        node = self.make(r, r.mode)
        node.rdev = r.rdev
        return self.entry_of(r.unique, node)

    def mkdir(self, r: requests.Mkdir) -> Reply:
        return self.entry_of(r.unique, self.make(r, stat.S_IFDIR | r.mode))

    def unlink(self, r: requests.Unlink) -> Reply:
        self.child(r.nodeid, r.name).nlink -= 1
        del self.nodes[r.nodeid].names[r.name]
        return encode.ok(r.unique)

    rmdir = unlink

    def rename(self, r: Any, exchange: bool = False) -> Reply:
        node = self.child(r.nodeid, r.name)
        old = self.nodes[r.newdir].names.get(r.newname)
        self.nodes[r.newdir].names[r.newname] = node
        if exchange and old is not None:
            self.nodes[r.nodeid].names[r.name] = old
        else:
            del self.nodes[r.nodeid].names[r.name]
        return encode.ok(r.unique)

    def rename2(self, r: requests.Rename2) -> Reply:
        return self.rename(r, exchange=bool(r.flags & 2))

    def link(self, r: requests.Link) -> Reply:
        node = self.nodes[r.oldnodeid]
        node.nlink += 1
        self.nodes[r.nodeid].names[r.name] = node
        return self.entry_of(r.unique, node)

    def open(self, r: requests.Open) -> Reply:
        node = self.nodes[r.nodeid]
        if node.backing_id:
            return encode.opened(r.unique, r.nodeid, fl.FOPEN_PASSTHROUGH, node.backing_id)
        return encode.opened(r.unique, r.nodeid, self.open_flags)

    def create(self, r: requests.Create) -> Reply:
        node = self.make(r, r.mode)
        entry = encode.entry_out(node.ino, 0, FOREVER, FOREVER, node.attributes())
        return encode.created(r.unique, entry, node.ino, self.open_flags)

    def tmpfile(self, r: requests.Tmpfile) -> Reply:
        node = self.new(r.mode)
        node.nlink = 0
        entry = encode.entry_out(node.ino, 0, FOREVER, FOREVER, node.attributes())
        return encode.created(r.unique, entry, node.ino, self.open_flags)

    def read(self, r: requests.Read) -> Reply:
        return encode.data(r.unique, bytes(self.nodes[r.nodeid].data[r.offset : r.offset + r.size]))

    def write(self, r: requests.Write) -> Reply:
        data = self.nodes[r.nodeid].data
        data.extend(bytes(max(0, r.offset - len(data))))
        data[r.offset : r.offset + r.size] = r.data
        return encode.written(r.unique, r.size)

    def done(self, r: Request) -> Reply:
        return encode.ok(r.unique)

    release = fsync = fsyncdir = done

    def fallocate(self, r: requests.Fallocate) -> Reply:
        data = self.nodes[r.nodeid].data
        data.extend(bytes(max(0, r.offset + r.length - len(data))))
        return encode.ok(r.unique)

    def lseek(self, r: requests.Lseek) -> Reply:
        return encode.lseek(
            r.unique, r.offset if r.whence == os.SEEK_DATA else len(self.nodes[r.nodeid].data)
        )

    def copy(self, r: Any) -> int:
        chunk = bytes(self.nodes[r.nodeid].data[r.off_in : r.off_in + r.len])
        target = self.nodes[r.nodeid_out].data
        target.extend(bytes(max(0, r.off_out - len(target))))
        target[r.off_out : r.off_out + len(chunk)] = chunk
        return len(chunk)

    def copy_file_range(self, r: requests.CopyFileRange) -> Reply:
        return encode.written(r.unique, self.copy(r))

    def copy_file_range64(self, r: requests.CopyFileRange64) -> Reply:
        return encode.copied(r.unique, self.copy(r))

    def ioctl(self, r: requests.Ioctl) -> Reply:
        return encode.ioctl(r.unique, 0, struct.pack("=I", 0x10).ljust(r.out_size, b"\0"))  # FS_IMMUTABLE_FL

    def statfs(self, r: requests.Statfs) -> Reply:
        return encode.statfs(r.unique, os.statvfs_result((4096, 512, 111, 99, 88, 77, 66, 66, 0, 255)))

    def setxattr(self, r: requests.Setxattr) -> Reply:
        self.nodes[r.nodeid].xattrs[r.name] = r.value
        return encode.ok(r.unique)

    def getxattr(self, r: requests.Getxattr) -> Reply:
        value = self.nodes[r.nodeid].xattrs.get(r.name)
        if value is None:
            raise Refused(errno.ENODATA)
        return self.sized(r, value)

    def listxattr(self, r: requests.Listxattr) -> Reply:
        return self.sized(r, b"".join(name + b"\0" for name in self.nodes[r.nodeid].xattrs))

    def sized(self, r: Any, value: bytes) -> Reply:
        if not r.size:
            return encode.xattr_size(r.unique, len(value))
        if r.size < len(value):
            raise Refused(errno.ERANGE)
        return encode.data(r.unique, value)

    def removexattr(self, r: requests.Removexattr) -> Reply:
        del self.nodes[r.nodeid].xattrs[r.name]
        return encode.ok(r.unique)

    def readdir(self, r: Any, plus: bool = False) -> Reply:
        listing = Dirents(r.size)
        node = self.nodes[r.nodeid]
        entries = [(b".", node), (b"..", self.root), *node.names.items()]
        for off, (name, child) in enumerate(entries[r.offset :], r.offset + 1):
            if plus:
                out = NO_ENTRY
                if off > 2:
                    out = encode.entry_out(child.ino, 0, FOREVER, FOREVER, child.attributes())
                if not listing.add_plus(name, child.ino, off, child.mode, out):
                    break
            elif not listing.add(name, child.ino, off, child.mode):
                break
        return encode.data(r.unique, listing.packed())

    def readdirplus(self, r: requests.Readdirplus) -> Reply:
        return self.readdir(r, plus=True)

    def answer(self, request: Request) -> Reply | None:
        """The reply to a request."""
        handler = self.handlers.get(type(request))
        if handler is None or request.number in self.enosys:
            return encode.error(request.unique, errno.ENOSYS)
        try:
            return handler(request)
        except Refused as error:
            return encode.error(request.unique, error.args[0])


def kind_of(request: Request) -> str:
    """The name of its class; without a class, the name its opcode implies."""
    if isinstance(request, Unknown) and request.number in set(Opcode):
        return Opcode(request.number).name.title().replace("_", "")
    return type(request).__name__


def notifications(fd: int, gate: threading.Lock) -> None:
    """Send the notifications from standard input."""
    for line in sys.stdin:
        results: list[int | str] = []
        with gate:
            for name, *arguments in json.loads(line):
                values = [value.encode() if isinstance(value, str) else value for value in arguments]
                try:
                    results.append(os.writev(fd, getattr(notify, name)(*values)))
                except OSError as error:
                    results.append(errno.errorcode[error.errno or 0])
        print(json.dumps(results), flush=True)


def mount(fd: int, mountpoint: str) -> None:
    """mount(2) of type fuse. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    if libc.mount(b"protocol-test", mountpoint.encode(), b"fuse", 6, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount", mountpoint)


def main() -> None:
    """Serve until the mount is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("log")
    parser.add_argument("--io", type=IoMode, default=IoMode.AUTO)
    parser.add_argument("--unprivileged", action="store_true")
    parser.add_argument("--old-copy", action="store_true")
    parser.add_argument("--backing")
    arguments = parser.parse_args()
    signal.alarm(LIMIT)
    settings = Settings(io=arguments.io)
    privileges = Privileges(initial_user_namespace=True, sys_admin=not arguments.unprivileged)
    memory = Memory()
    gate = threading.Lock()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    buffer = bytearray(receive_buffer_size(settings.max_write))
    view = memoryview(buffer)
    decode = decoder()
    mount(fd, arguments.mountpoint)
    with open(arguments.log, "w") as log:
        while True:
            try:
                size = os.readv(fd, [buffer])
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            with gate:
                request = decode(view, size)
                entry = {
                    "kind": kind_of(request),
                    "repr": repr(request)[:400],
                    "hex": view[: min(size, 512)].hex(),
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if not isinstance(request, requests.InitRequest):
                    reply = memory.answer(request)
                    if reply is not None:
                        # ENOENT: an umount came first, and no caller waits for the answer (fs/fuse/dev.c)
                        with contextlib.suppress(FileNotFoundError):
                            assert os.writev(fd, reply) == sum(map(len, reply))
                    continue
                decision = negotiate(request, settings, privileges)
                memory.enosys = decision.enosys
                if arguments.old_copy:
                    memory.enosys |= {Opcode.COPY_FILE_RANGE_64}
                memory.open_flags = decision.file_open_flags
                decode = decoder(decision.flags)
                os.writev(fd, encode.init(request.unique, decision.reply))
                if arguments.backing:
                    back(fd, arguments.backing, memory)
                threading.Thread(target=notifications, args=(fd, gate), daemon=True).start()
                print("ready", decision.io, int(decision.flags), flush=True)


def back(fd: int, path: str, memory: Memory) -> None:
    """Create a node "backed" whose data uses passthrough."""
    node = memory.new(stat.S_IFREG | 0o644)
    backing = os.open(path, os.O_RDWR)
    node.data[:] = os.pread(backing, 1 << 20, 0)
    node.backing_id = fcntl.ioctl(fd, fl.DEV_IOC_BACKING_OPEN, bytearray(struct.pack("=iIQ", backing, 0, 0)))
    memory.root.names[b"backed"] = node


if __name__ == "__main__":
    main()
