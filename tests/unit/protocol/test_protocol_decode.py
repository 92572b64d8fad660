"""Bytes to requests: real messages, generated ones, broken ones."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_abi import NUMBERS, STRUCTS
from protocol_messages import GOLDEN, MESSAGES, decode, message, number

from unionfs.fuse.protocol import (
    ProtocolError,
    Unknown,
    decoder,
    receive_buffer_size,
    requests,
)
from unionfs.fuse.protocol.decode import REQUESTS
from unionfs.fuse.protocol.flags import (
    FATTR_CTIME,
    FATTR_MTIME,
    UNIQUE_RESEND,
    WRITE_CACHE,
    Init,
    Opcode,
)
from unionfs.fuse.protocol.request import HEADER_FIELDS, Request

NEVER_SENT = {"Syncfs", "CopyFileRange"}
"""Not without virtiofs, or an older kernel."""


NOT_SERVED = {Opcode.FLUSH, Opcode.OPENDIR, Opcode.POLL}


def test_there_is_a_real_message_of_each_kind() -> None:
    assert {kind.__name__ for kind in REQUESTS} - NEVER_SENT == GOLDEN.keys()


# The values in golden_6_18.txt, read by a person: nodeid, then the fields.
EXPECTED: dict[str, dict[str, Any]] = {
    "InitRequest": {"nodeid": 0, "major": 7, "minor": 45, "max_readahead": 131072, "flags": 0x5FD73FFFFFB},
    "Lookup": {"nodeid": 1, "name": b"gone"},
    "BatchForget": {"entries": 6, "forgets": tuple((nodeid, 1) for nodeid in range(311, 317))},
    "Mknod": {"mode": 0o20644, "rdev": os.makedev(1, 300), "umask": 0o22, "name": b"null", "extlen": 0},
    "Mkdir": {"mode": 0o750, "umask": 0o22, "name": b"dir"},
    "Symlink": {"name": b"link", "target": b"a/target"},
    "Create": {"flags": os.O_WRONLY | os.O_CREAT | os.O_TRUNC | 0o100000, "name": b"x"},
    "Tmpfile": {"mode": 0o100600, "name": b"/"},
    "Rename": {"newdir": 303, "name": b"new", "newname": b"new"},
    "Rename2": {"newdir": 303, "flags": 2, "name": b"copy", "newname": b"new"},
    "Link": {"oldnodeid": 2, "name": b"hello2"},
    "Read": {"nodeid": 2, "offset": 0, "size": 4096, "flags": 0o100000},
    "Write": {"nodeid": 311, "offset": 0, "size": 1, "write_flags": WRITE_CACHE, "data": b"a"},
    "Setattr": {"nodeid": 2, "valid": FATTR_MTIME | FATTR_CTIME, "mtimensec": 398297142, "new_uid": 0},
    "Lseek": {"offset": 5, "whence": os.SEEK_DATA},
    "Fallocate": {"offset": 0, "length": 3 << 20, "mode": 0},
    "CopyFileRange64": {"off_in": 100, "nodeid_out": 307, "off_out": 7, "len": 500, "flags": 0},
    "Setxattr": {"size": 7, "flags": 0, "name": b"user.a/b", "value": b"\0value\xff"},
    "Getxattr": {"size": 0, "name": b"security.capability"},
    "Interrupt": {"unique": 3187, "interrupted": 3186},
    "Statx": {"nodeid": 2, "sx_mask": 0xFFF},
    "Readdir": {"offset": 3, "size": 32768},
    "Readdirplus": {"offset": 0, "size": 32768},
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_real_messages(kind: str) -> None:
    raw = GOLDEN[kind]
    request = decode(raw)
    assert type(request).__name__ == kind
    for name, value in EXPECTED.get(kind, {}).items():
        assert getattr(request, name) == value, name
    header = STRUCTS["fuse_in_header"]
    offset, size = header.fields["unique"]
    assert request.unique == int.from_bytes(raw[offset : offset + size], "little")
    assert not request.resent
    assert kind in repr(request)


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_message_cut_short_or_with_more_is_refused(kind: str) -> None:
    """At every length, whether or not its header matches."""
    raw = GOLDEN[kind]
    length_at, length_size = STRUCTS["fuse_in_header"].fields["len"]
    for size in range(len(raw)):
        with pytest.raises(ProtocolError) as caught:
            decode(raw[:size])
        assert caught.value.unique in (None, decode(raw).unique)
    for size in [*range(STRUCTS["fuse_in_header"].size, len(raw)), len(raw) + 1, len(raw) + 8]:
        other = bytearray(raw.ljust(size, b"\0")[:size])
        other[length_at : length_at + length_size] = number(size, length_size)
        if kind == "InitRequest" and size >= 56:
            assert decode(bytes(other)).opcode == Opcode.INIT
            continue
        with pytest.raises(ProtocolError):
            decode(bytes(other))


@pytest.mark.parametrize("kind", [kind for kind in REQUESTS if kind.body], ids=lambda kind: kind.__name__)
def test_every_field_is_read_at_the_headers_offset(kind: type[Request]) -> None:
    """One value per field, placed by the header's facts, followed by names and data."""
    assert kind.body is not None
    facts = STRUCTS[kind.body].fields
    body = bytearray(STRUCTS[kind.body].size)
    skipped = ("padding", "unused", "dummy", "reserved")
    values = {name: index for index, name in enumerate(facts, 2) if not name.startswith(skipped)}
    tail = b""
    if "data" in kind.fields or "value" in kind.fields:
        values["in_size" if kind is requests.Ioctl else "size"] = 3
        tail = b"n\0abc" if "value" in kind.fields else b"abc"
    elif "newname" in kind.fields:
        tail = b"n\0newname\0"
    elif "name" in kind.fields:
        tail = b"n\0"
    elif kind is requests.BatchForget:
        values["count"] = 1
        tail = number(8, 8) + number(9, 8)
    for name, value in values.items():
        offset, size = facts[name]
        body[offset : offset + size] = number(value, size)
    request = decode(message(kind.opcode, bytes(body) + tail))
    assert type(request) is kind
    assert [request.unique, request.nodeid, request.uid, request.gid, request.pid] == [1, 2, 3, 4, 5]
    own = request[len(HEADER_FIELDS) :]
    assert list(own[: len(values)]) == list(values.values())
    rest = [bytes(value) if isinstance(value, memoryview) else value for value in own[len(values) :]]
    assert rest == {
        "data": [b"abc"],
        "value": [b"n", b"abc"],
        "newname": [b"n", b"newname"],
        "name": [b"n"],
        "forgets": [((8, 9),)],
    }.get(kind.fields[-1], [])
    assert (
        kind.fields[-1] == "forgets"
        or kind.fields[-1] in HEADER_FIELDS
        or getattr(request, kind.fields[-1]) == own[-1]
    )


@pytest.mark.parametrize("kind", [kind for kind in REQUESTS if not kind.body], ids=lambda kind: kind.__name__)
def test_requests_without_a_structure(kind: type[Request]) -> None:
    body = {
        requests.InitRequest: number(7, 4) + number(31, 4) + number(4096, 4) + number(0x3FFFFFFF, 4),
        requests.Symlink: b"name\0target\0",
    }.get(kind, b"name\0" if "name" in kind.fields else b"")
    request = decode(message(kind.opcode, body))
    assert type(request) is kind
    if isinstance(request, requests.InitRequest):
        assert request[len(HEADER_FIELDS) :] == (7, 31, 4096, 0x3FFFFFFF)


@pytest.mark.parametrize("name", [b"\0", b"a/b\0", b"a\0b\0", b"a", b"/\0", b"", b"a\0\0"])
@pytest.mark.parametrize(
    "kind", [requests.Lookup, requests.Mkdir, requests.Link, requests.Rename, requests.Create]
)
def test_bad_names(kind: type[Request], name: bytes) -> None:
    body = bytes(STRUCTS[kind.body].size) if kind.body else b""
    for tail in [name, *([name + b"good\0", b"good\0" + name] if kind is requests.Rename else [])]:
        if kind is requests.Rename and tail in (b"a\0b\0", b"agood\0", b"good\0a"):
            continue
        with pytest.raises(ProtocolError) as caught:
            decode(message(kind.opcode, body + tail, unique=99))
        assert caught.value.unique == 99


def test_names_are_any_other_bytes() -> None:
    assert decode(message(Opcode.LOOKUP, b"\xff.\n\0")).name == b"\xff.\n"  # type: ignore[attr-defined]
    assert decode(message(Opcode.REMOVEXATTR, b"user.a/b\0")).name == b"user.a/b"  # type: ignore[attr-defined]


def test_data_is_a_view_and_not_a_copy() -> None:
    buffer = bytearray(1 << 16)
    raw = GOLDEN["Write"]
    buffer[: len(raw)] = raw
    request = decoder()(memoryview(buffer), len(raw))
    assert isinstance(request, requests.Write)
    assert request.data.obj is buffer
    buffer[len(raw) - 1] = ord("z")
    assert bytes(request.data) == b"z"


def test_setxattr_without_setxattr_ext() -> None:
    raw = message(Opcode.SETXATTR, number(3, 4) + number(1, 4) + b"user.x\0" + b"a\0b")
    request = decode(raw, setxattr_ext=False)
    assert request[len(HEADER_FIELDS) :] == (3, 1, 0, b"user.x", b"a\0b")
    with pytest.raises(ProtocolError):
        decode(raw, setxattr_ext=True)


def test_init_of_old_and_of_future_kernels() -> None:
    head = number(7, 4) + number(99, 4) + number(1 << 17, 4)
    flags = Init.INIT_EXT | Init.ASYNC_READ
    full = head + number(flags, 4) + number(Init.PASSTHROUGH >> 32, 4) + bytes(44)
    for body, expected in [
        (full, flags | Init.PASSTHROUGH),
        (full + bytes(64), flags | Init.PASSTHROUGH),
        (
            head + number(Init.ASYNC_READ, 4) + full[16:],
            Init.ASYNC_READ,
        ),  # flags2 means nothing without INIT_EXT
        (full[:16], flags),
    ]:
        request = decode(message(Opcode.INIT, body))
        assert isinstance(request, requests.InitRequest)
        assert (request.minor, request.flags) == (99, expected)


def test_resent_requests() -> None:
    request = decode(message(Opcode.READLINK, b"", unique=42 | UNIQUE_RESEND))
    assert request.resent
    assert request.unique == 42 | UNIQUE_RESEND


@pytest.mark.parametrize(
    "opcode", [0, 7, 19, *sorted(NOT_SERVED), 48, 49, 54, 255, 257, 4096, 1 << 31]
)
def test_unknown_opcodes_are_values(opcode: int) -> None:
    for body in (b"", b"body", bytes(100)):
        request = decode(message(opcode, body, unique=7))
        assert isinstance(request, Unknown)
        assert (request.number, bytes(request.data), request.unique) == (opcode, body, 7)
        with pytest.raises(ProtocolError):
            decode(message(opcode, body, length=39))


@settings(max_examples=1500, deadline=None)
@given(raw=MESSAGES, extended=st.booleans())
def test_no_bytes_raise_anything_but_protocolerror(raw: bytes, extended: bool) -> None:
    for view in (memoryview(raw), memoryview(bytearray(raw) + bytes(300))):
        try:
            request = decoder(Init.SETXATTR_EXT if extended else 0)(view, len(raw))
        except ProtocolError as error:
            assert str(error)  # noqa: PT017
        else:
            assert len(request) == len(type(request).fields)
            repr(request)


@settings(max_examples=300, deadline=None)
@given(
    name=st.binary(min_size=1, max_size=255).filter(lambda name: not {0, 47} & set(name)),
    unique=st.integers(0, (1 << 64) - 1),
    data=st.binary(max_size=300),
)
def test_names_and_data_arrive_whole(name: bytes, unique: int, data: bytes) -> None:
    lookup = decode(message(Opcode.LOOKUP, name + b"\0", unique=unique))
    assert (lookup.unique, lookup[-1]) == (unique, name)
    body = bytearray(STRUCTS["fuse_write_in"].size)
    offset, size = STRUCTS["fuse_write_in"].fields["size"]
    body[offset : offset + size] = number(len(data), size)
    assert bytes(decode(message(Opcode.WRITE, bytes(body) + data))[-1]) == data


def test_requests_made_by_hand() -> None:
    request = requests.Read.of(unique=3, nodeid=4, fh=5)
    assert (request.unique, request.nodeid, request.fh, request.size) == (3, 4, 5, 0)
    with pytest.raises(TypeError, match="no field nowhere"):
        requests.Read.of(nowhere=1)
    with pytest.raises(TypeError, match="fuse_read_in has"):

        class Wrong(Request, opcode=Opcode.READ, body="fuse_read_in"):
            offset: int


def test_one_class_an_opcode() -> None:
    assert len({kind.opcode for kind in REQUESTS}) == len(REQUESTS)
    assert set(Opcode) - {kind.opcode for kind in REQUESTS} == NOT_SERVED


def test_receive_buffer() -> None:
    assert receive_buffer_size(1 << 20) == (1 << 20) + 80
    assert receive_buffer_size(4096) >= NUMBERS["FUSE_MIN_READ_BUFFER"]
