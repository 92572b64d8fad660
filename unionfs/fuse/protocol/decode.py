"""Bytes from /dev/fuse to typed requests.

    decode = decoder(agreed_flags)          # once a connection; before INIT is answered: decoder()
    request = decode(view, size)            # a message: the first `size` bytes of `view`

Rules:
- For any bytes, the only exception is ProtocolError. An unknown opcode is not an error: it becomes `Unknown`,
  to be answered with ENOSYS.
- `view` is a memoryview of bytes over the whole receive buffer, made once; `size` is what read(2) returned.
  `data` of a request is a slice of it (see requests.py), so a buffer holds one message at a time.
- A message has exactly the length in its header and of its opcode: the kernel never sends less or more, so
  anything else is an error. Only INIT may grow.
- `_SHAPES` maps each class to the data after its structure. No other module depends on that.
- Without SETXATTR_EXT the structure of SETXATTR is shorter: the only fact that is not in the bytes
  themselves.

Source: as requests.py. Timing: tests/unit/protocol/protocol_timing.py.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any, Final

from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.errors import ProtocolError
from unionfs.fuse.protocol.flags import Init
from unionfs.fuse.protocol.request import HEADER_FIELDS, Request, Unknown
from unionfs.fuse.protocol.structs import (
    IN_HEADER,
    IN_HEADER_SIZE,
    INIT_COMPAT_SIZE,
    LAYOUTS,
    SETXATTR_COMPAT_SIZE,
    record_align,
)

Decode = Callable[[memoryview, int], Request]
"""(view, size) -> request. Raises ProtocolError."""

_OPCODE_BYTE: Final = 4 if sys.byteorder == "little" else 7  # its lowest byte: every known opcode fits
_HEADER: Final = IN_HEADER.struct
_UNIQUE_AT: Final = HEADER_FIELDS.index("unique")
_SLASH: Final = ord("/")


def _layout(kind: type[Request]) -> struct.Struct:
    """Header and body of a request as one structure."""
    body = LAYOUTS[kind.body].format if kind.body is not None else ""
    return struct.Struct("=" + IN_HEADER.format + body)


def _bad(kind: type[Request], view: memoryview, size: int, why: str) -> ProtocolError:
    return ProtocolError(
        f"A {kind.opcode.name} message of {size} bytes {why}.", _HEADER.unpack_from(view)[_UNIQUE_AT]
    )


def _other(kind: type[Request] | None, view: memoryview, size: int) -> Request:
    """Decode a message whose length or opcode differs from what the decoder of `kind` expects."""
    fields = _HEADER.unpack_from(view)
    if fields[0] != size:
        raise ProtocolError(f"A message of {size} bytes says it has {fields[0]}.", fields[_UNIQUE_AT])
    if kind is not None and fields[1] == kind.opcode:
        raise _bad(kind, view, size, "does not have the right length")
    return Unknown((*fields, view[IN_HEADER_SIZE:size]))


# -- the shapes: the data after the structure -------------------------------------------------------------


_Fields = tuple[Any, ...]
_Rest = Callable[[_Fields, memoryview, int], _Fields]
"""(fields of the structure, view, size) -> the fields after them. Raises ProtocolError."""


def _decoder(kind: type[Request], layout: struct.Struct, shortest: int, rest: _Rest) -> Decode:
    """The decoder of messages of at least `shortest` bytes."""
    unpack, opcode = layout.unpack_from, int(kind.opcode)

    def decode(view: memoryview, size: int) -> Request:
        if size < shortest:
            return _other(kind, view, size)
        fields = unpack(view)
        if fields[0] != size or fields[1] != opcode:
            return _other(kind, view, size)
        return kind(fields + rest(fields, view, size))

    return decode


def _nothing(kind: type[Request]) -> Decode:
    layout = _layout(kind)
    exact = layout.size

    def rest(fields: _Fields, view: memoryview, size: int) -> _Fields:
        if size != exact:
            raise _bad(kind, view, size, "does not have the right length")
        return ()

    return _decoder(kind, layout, exact, rest)


def _name(kind: type[Request]) -> Decode:
    """One name."""
    layout = _layout(kind)
    start = layout.size

    def rest(fields: _Fields, view: memoryview, size: int) -> _Fields:
        name = view[start : size - 1].tobytes()
        if view[size - 1] or 0 in name or _SLASH in name:
            raise _bad(kind, view, size, "has a bad name")
        return (name,)

    return _decoder(kind, layout, start + len(b"n\0"), rest)


def _strings(*slash: bool) -> Callable[[type[Request]], Decode]:
    """As many names as arguments; True allows a slash."""

    def shape(kind: type[Request]) -> Decode:
        layout = _layout(kind)
        start, expected = layout.size, len(slash) + 1

        def rest(fields: _Fields, view: memoryview, size: int) -> _Fields:
            names = view[start:size].tobytes().split(b"\0")
            if len(names) != expected or names.pop():
                raise _bad(kind, view, size, "has not the right number of names")
            for name, allowed in zip(names, slash, strict=True):
                if not name or (_SLASH in name and not allowed):
                    raise _bad(kind, view, size, "has a bad name")
            return tuple(names)

        return _decoder(kind, layout, start + 1, rest)

    return shape


def _data(length_field: str) -> Callable[[type[Request]], Decode]:
    """Data of `length_field` bytes; a view of the buffer."""

    def shape(kind: type[Request]) -> Decode:
        layout, length_at = _layout(kind), kind.fields.index(length_field)
        start = layout.size

        def rest(fields: _Fields, view: memoryview, size: int) -> _Fields:
            if fields[length_at] != size - start:
                raise _bad(kind, view, size, f"says it has {fields[length_at]} bytes of data")
            return (view[start:size],)

        return _decoder(kind, layout, start, rest)

    return shape


def _forgets(kind: type[Request]) -> Decode:
    """Pairs of nodeid and nlookup."""
    layout, pair = _layout(kind), LAYOUTS["fuse_forget_one"].struct
    start, count_at = layout.size, kind.fields.index("entries")

    def rest(fields: _Fields, view: memoryview, size: int) -> _Fields:
        if fields[count_at] * pair.size != size - start:
            raise _bad(kind, view, size, f"says it has {fields[count_at]} entries")
        return (tuple(pair.iter_unpack(view[start:size])),)

    return _decoder(kind, layout, start, rest)


def _xattr(kind: type[Request], extended: bool = True) -> Decode:
    """A name, which may have slashes, and a value; a short structure unless `extended`."""
    short = struct.Struct("=" + IN_HEADER.format + "II")
    assert short.size == IN_HEADER_SIZE + SETXATTR_COMPAT_SIZE
    layout, missing = (_layout(kind), ()) if extended else (short, (0,))
    start, length_at = layout.size, kind.fields.index("size")

    def rest(fields: _Fields, view: memoryview, size: int) -> _Fields:
        name, nul, value = view[start:size].tobytes().partition(b"\0")
        if not name or not nul or len(value) != fields[length_at]:
            raise _bad(kind, view, size, "has a bad name or value")
        return (*missing, name, value)

    return _decoder(kind, layout, start + 1, rest)


def _init(kind: type[Request]) -> Decode:
    """16 bytes before 7.36, 64 since. flags2 counts only with INIT_EXT (fs/fuse/inode.c, fuse_new_init)."""
    short, long = struct.Struct("=IIII"), LAYOUTS["fuse_init_in"]
    assert short.size == INIT_COMPAT_SIZE
    flags2_at = long.names.index("flags2")

    def decode(view: memoryview, size: int) -> Request:
        fields = _HEADER.unpack_from(view)
        if size < IN_HEADER_SIZE + INIT_COMPAT_SIZE or fields[:2] != (size, kind.opcode):
            return _other(kind, view, size)
        major, minor, readahead, flags = short.unpack_from(view, IN_HEADER_SIZE)
        # A newer kernel may send more: that is how the structure grew before.
        if flags & Init.INIT_EXT and size >= IN_HEADER_SIZE + long.size:
            flags |= long.struct.unpack_from(view, IN_HEADER_SIZE)[flags2_at] << 32
        return kind((*fields, major, minor, readahead, flags))

    return decode


# -- the table ------------------------------------------------------------------------------------------

_SHAPES: Final[dict[type[Request], Callable[[type[Request]], Decode]]] = {
    rq.Lookup: _name,
    rq.Forget: _nothing,
    rq.Getattr: _nothing,
    rq.Setattr: _nothing,
    rq.Readlink: _nothing,
    rq.Symlink: _strings(False, True),
    rq.Mknod: _name,
    rq.Mkdir: _name,
    rq.Unlink: _name,
    rq.Rmdir: _name,
    rq.Rename: _strings(False, False),
    rq.Link: _name,
    rq.Open: _nothing,
    rq.Read: _nothing,
    rq.Write: _data("size"),
    rq.Statfs: _nothing,
    rq.Release: _nothing,
    rq.Fsync: _nothing,
    rq.Setxattr: _xattr,
    rq.Getxattr: _strings(True),
    rq.Listxattr: _nothing,
    rq.Removexattr: _strings(True),
    rq.InitRequest: _init,
    rq.Readdir: _nothing,
    rq.Fsyncdir: _nothing,
    rq.Create: _name,
    rq.Interrupt: _nothing,
    rq.Ioctl: _data("in_size"),
    rq.BatchForget: _forgets,
    rq.Fallocate: _nothing,
    rq.Readdirplus: _nothing,
    rq.Rename2: _strings(False, False),
    rq.Lseek: _nothing,
    rq.CopyFileRange: _nothing,
    rq.Syncfs: _nothing,
    rq.Tmpfile: _strings(True),
    rq.Statx: _nothing,
    rq.CopyFileRange64: _nothing,
}

REQUESTS: Final = tuple(_SHAPES)
"""Every class but `Unknown`, in the order of opcodes."""


def decoder(agreed: Init | int = Init.SETXATTR_EXT) -> Decode:
    """Create the decoder of a connection with the INIT flags `agreed`."""
    table: list[Decode] = [lambda view, size: _other(None, view, size)] * 256
    for kind, shape in _SHAPES.items():
        table[kind.opcode] = shape(kind)
    table[rq.Setxattr.opcode] = _xattr(rq.Setxattr, extended=bool(agreed & Init.SETXATTR_EXT))

    def decode(view: memoryview, size: int) -> Request:
        if size < IN_HEADER_SIZE:
            raise ProtocolError(f"A message of {size} bytes has no whole header.")
        return table[view[_OPCODE_BYTE]](view, size)

    return decode


def receive_buffer_size(max_write: int) -> int:
    """Bytes a receive buffer needs for every message of a connection with this `max_write` (bytes).

    The kernel requires room for a WRITE, and at least 8 KiB (fs/fuse/dev.c, fuse_dev_do_read); a request that
    does not fit fails with EIO, SETXATTR with E2BIG. The largest other request is SETXATTR (a name of 255
    bytes, a value of 64 KiB); 128 KiB hold it.
    """
    write = IN_HEADER_SIZE + LAYOUTS["fuse_write_in"].size + max_write
    return max(record_align(write), 128 << 10)
