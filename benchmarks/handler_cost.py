"""The cost of the direct session's handlers: CPU time per request, from its bytes to the answer's.

    python -m benchmarks.handler_cost [--files N] [--rounds N]

No mount and no kernel FUSE: requests are built here, and answers go to /dev/null, which refuses backing
files. The layers are in /dev/shm, so what remains is the daemon's work and the system calls on the layers.
Prints microseconds, of listings per name: the best and the median of the rounds. Requires root.
"""

from __future__ import annotations

import argparse
import errno
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from unionfs.core.entries import FIRST_TICKET
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.splicing import Splicer
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Init, Opcode, Privileges, Settings, negotiate
from unionfs.fuse.protocol.flags import FATTR_FH, FATTR_MODE
from unionfs.fuse.protocol.requests import InitRequest
from unionfs.fuse.session_direct import make_loop
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

_HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY
_END = FIRST_TICKET - 1
"""A cookie behind all names."""


def _message(opcode: Opcode, nodeid: int, body: bytes = b"") -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), int(opcode), 2, nodeid, 0, 0, 1, 0, 0) + body


def _setattr(number: int, fh: int, mode: int) -> bytes:
    valid = FATTR_MODE | (FATTR_FH if fh else 0)
    return _message(Opcode.SETATTR, number, struct.pack("=I4xQ52xI12x4x", valid, fh, mode))


def _create(parent: int, name: bytes) -> bytes:
    body = struct.pack("=IIII", _NEW, 0o100644, 0o22, 0) + name + b"\0"
    return _message(Opcode.CREATE, parent, body)


def _rename(parent: int, name: bytes, new_name: bytes) -> bytes:
    body = struct.pack("=QI4x", parent, 0) + name + b"\0" + new_name + b"\0"
    return _message(Opcode.RENAME2, parent, body)


def _release(number: int, fh: int) -> bytes:
    return _message(Opcode.RELEASE, number, struct.pack("=Q16x", fh))


def _list(opcode: Opcode, number: int, size: int = 1 << 20, offset: int = 0) -> bytes:
    return _message(opcode, number, struct.pack("=QQI20x", 0, offset, size))


def _read(number: int, fh: int) -> bytes:
    return _message(Opcode.READ, number, struct.pack("=QQI20x", fh, 0, 1 << 12))


class _Served:
    """A union of one lower, which has `tree` and `listed` with that many files each, and a tenth as many
    directories of ten files, and an empty upper."""

    def __init__(self, home: Path, files: int) -> None:
        self.names = [b"file%05d" % number for number in range(files)]
        self.small = [b"small%05d" % number for number in range(files // 10)]
        for layer in ("lower/tree", "lower/listed", "upper", "work"):
            (home / layer).mkdir(parents=True)
        for name in self.names:
            for directory in ("lower/tree", "lower/listed"):
                (home / directory / os.fsdecode(name)).write_bytes(b"x" * 2000)
        for name in self.small:
            (home / "lower" / os.fsdecode(name)).mkdir()
            for number in range(10):
                (home / "lower" / os.fsdecode(name) / str(number)).touch()
        self._stack = LayerStack.open([str(home / "lower")], str(home / "upper"), str(home / "work"))
        self._operations = Operations(Union(self._stack))
        offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
        privileges = Privileges(initial_user_namespace=True, sys_admin=True)
        self._device = Device(os.open(os.devnull, os.O_WRONLY))
        decision = negotiate(offered, Settings(acl=True), privileges)
        splicer = Splicer(self._device.fd, self._operations.latencies.written)
        self._loop = make_loop(self._device, splicer, self._operations, decision)
        self._loop._tells_resized = True  # in a task, and there is none

    def serve(self, messages: Sequence[bytes]) -> float:
        """Microseconds of CPU time per message."""
        loop, channel, buffer = self._loop, self._loop._channel, self._loop._buffer
        began = time.thread_time_ns()
        for message in messages:
            buffer[: len(message)] = message
            if not channel.answer(len(message)):
                loop.serve(len(message))
        took = time.thread_time_ns() - began
        self._operations.union.files.close_deferred()  # as the loop does while the caller wakes up
        return took / len(messages) / 1e3

    def id(self, *path: bytes) -> int:
        """The number of a node that was looked up."""
        node = self._operations.union.nodes.root
        for name in path:
            assert node.children is not None
            node = node.children[name]
        return node.id

    @property
    def next_handle(self) -> int:
        return self._operations.files.handles.next

    def close(self) -> None:
        self._operations.union.close()
        self._stack.close()
        self._device.close()


def _steps(served: _Served) -> Iterator[tuple[str, float]]:
    names, serve = served.names, served.serve
    serve([_message(Opcode.LOOKUP, 1, b"tree\0")])
    serve([_message(Opcode.LOOKUP, 1, b"listed\0")])
    serve([_message(Opcode.LOOKUP, 1, name + b"\0") for name in served.small])
    tree, listed = served.id(b"tree"), served.id(b"listed")
    yield "READDIR, a name", serve([_list(Opcode.READDIR, listed)]) / len(names)
    yield "READDIRPLUS, a name", serve([_list(Opcode.READDIRPLUS, listed)]) / len(names)
    small = [served.id(name) for name in served.small]
    yield "READDIR, ten names", serve([_list(Opcode.READDIR, number, 1 << 15) for number in small])
    yield "READDIR, the end", serve([_list(Opcode.READDIR, number, 1 << 15, _END) for number in small])
    yield "READDIRPLUS, ten", serve([_list(Opcode.READDIRPLUS, number, 1 << 15) for number in small])
    yield "STATFS", serve([_message(Opcode.STATFS, 1)] * len(names))
    lookups = [_message(Opcode.LOOKUP, tree, name + b"\0") for name in names]
    yield "LOOKUP", serve(lookups)
    ids = [served.id(b"tree", name) for name in names]
    yield "GETATTR", serve([_message(Opcode.GETATTR, number, bytes(16)) for number in ids])
    first = served.next_handle
    yield "OPEN, and the data", serve([_message(Opcode.OPEN, number, bytes(8)) for number in ids])
    handles = range(first, first + len(ids))
    yield "READ, 4 KiB", serve([_read(*pair) for pair in zip(ids, handles, strict=True)])
    yield "RELEASE", serve([_release(*pair) for pair in zip(ids, handles, strict=True)])
    first = served.next_handle
    yield "OPEN, once more", serve([_message(Opcode.OPEN, number, bytes(8)) for number in ids])
    handles = range(first, first + len(ids))
    yield "RELEASE, of that", serve([_release(*pair) for pair in zip(ids, handles, strict=True)])
    yield "READ, not open", serve([_read(number, 0) for number in ids])
    yield "READ, kept open", serve([_read(number, 0) for number in ids for _ in range(2)])
    yield "SETATTR, copies up", serve([_setattr(number, 0, 0o640) for number in ids])
    yield "SETATTR", serve([_setattr(number, 0, 0o600) for number in ids])
    yield "UNLINK", serve([_message(Opcode.UNLINK, tree, name + b"\0") for name in names])
    yield "FORGET", serve([_message(Opcode.FORGET, number, struct.pack("=Q", 1)) for number in ids])
    yield "LOOKUP, nothing", serve(lookups)
    first = served.next_handle
    yield "CREATE, whiteout", serve([_create(tree, name) for name in names])
    ids = [served.id(b"tree", name) for name in names]
    body = bytes(8) + b"security.capability\0"
    yield "GETXATTR", serve([_message(Opcode.GETXATTR, number, body) for number in ids])
    pairs = list(zip(ids, range(first, first + len(ids)), strict=True))
    yield "SETATTR, open file", serve([_setattr(number, handle, 0o600) for number, handle in pairs])
    serve([_release(*pair) for pair in pairs])
    serve([_message(Opcode.MKDIR, 1, struct.pack("=II", 0o755, 0o22) + b"new\0")])
    serve([_message(Opcode.LOOKUP, 1, b"new\0")])
    new, first = served.id(b"new"), served.next_handle
    yield "CREATE", serve([_create(new, name) for name in names])
    serve([_release(served.id(b"new", name), first + index) for index, name in enumerate(names)])
    yield "RENAME", serve([_rename(new, name, b"renamed-" + name) for name in names])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit(os.strerror(errno.EPERM) + ": run it as root")
    os.umask(0)
    times: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
            served = _Served(Path(home), arguments.files)
            try:
                for name, microseconds in _steps(served):
                    times.setdefault(name, []).append(microseconds)
            finally:
                served.close()
    for name, found in times.items():
        print(f"{name:20} best {min(found):6.2f} µs, median {statistics.median(found):6.2f} µs per request")


if __name__ == "__main__":
    main()
