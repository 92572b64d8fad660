"""Opens and writes of files that others use or a former daemon opened, without a mount."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.union_support import OpenUnion, copy_up, get, open_union
from unionfs.core.files import Handle, OpenFile
from unionfs.fuse.direct.data import DataRequests
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.former import Former
from unionfs.fuse.direct.names import NameRequests
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.direct.splicing import Splicer
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Init, Opcode, Privileges, Reply, Settings, negotiate
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import FOPEN_KEEP_CACHE, FOPEN_PASSTHROUGH, UNIQUE_RESEND, WRITE_CACHE
from unionfs.union.setids import Process
from unionfs.union.tree import Union

__all__ = ["open_union"]

ME = Process(0, 0, 0)


@pytest.fixture
def world(tmp_path: Path, open_union: OpenUnion) -> Iterator[World]:
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/program").write_bytes(b"\x7fELF" + bytes(100_000))
    device = os.open(os.devnull, os.O_RDWR)  # which registers no backing file
    yield World(open_union(), device)
    os.close(device)


class World:
    """A union with a program, and the handlers of its mount."""

    def __init__(self, union: Union, device: int) -> None:
        self.union, self.operations = union, Operations(union)
        offered = rq.InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
        privileges = Privileges(initial_user_namespace=True, sys_admin=True)
        decision = negotiate(offered, Settings(), privileges)
        self.ios = NodeIos(device, decision)
        names = NameRequests(self.operations, self.ios, decision)
        splicer = Splicer(device, lambda unique: None)
        self.former: dict[int, tuple[int, Handle]] = {}
        self.data = DataRequests(
            self.operations, self.ios, names, Device(device), splicer, decision, Former(self.former)
        )
        self.node = get(union, "program")
        self.node.looked_up()

    async def open(self, flags: int = os.O_RDONLY, unique: int = 8) -> tuple[int, int, int]:
        """The number, FOPEN_* flags and backing id."""
        request = rq.Open.of(unique=unique, nodeid=self.node.id, flags=flags)
        return _opened(await self.data.waiting[Opcode.OPEN](request), unique)

    def release(self, number: int) -> None:
        handle = self.operations.files[number]
        handle.node.in_use().closed(handle)
        self.operations.files.release(number)


def _opened(answer: Reply | None, unique: int) -> tuple[int, int, int]:
    """What the answer to OPEN, CREATE or TMPFILE says of the open file."""
    whole = b"".join(answer or [])
    length, error, of = struct.unpack_from("=IiQ", whole)
    assert (length, error, of) == (len(whole), 0, unique)
    number, flags, backing_id = struct.unpack("=QIi", whole[-16:])
    return number, flags, backing_id


@pytest.mark.parametrize("kind", ["open", "create", "tmpfile"])
async def test_what_a_former_daemon_opened(world: World, kind: str) -> None:
    """The request is sent again: it gets the same file, which is not opened or made once more. The kernel has
    cached data of it already, so its cache is not said to be new."""
    who = {"uid": os.geteuid(), "gid": os.getegid()}
    made: dict[str, rq.Request] = {
        "create": rq.Create.of(nodeid=1, name=b"new", flags=os.O_RDWR, mode=stat.S_IFREG | 0o600, **who),
        "tmpfile": rq.Tmpfile.of(nodeid=1, name=b"", flags=os.O_RDWR, mode=stat.S_IFREG | 0o600, **who),
    }

    async def ask(unique: int) -> tuple[int, int, int]:
        if kind == "open":
            return await world.open(os.O_RDWR, unique)
        request = made[kind]
        values: dict[str, Any] = dict(zip(request.fields, request, strict=True))
        again = type(request).of(**{**values, "unique": unique})
        return _opened(world.data.table[Opcode(request.number)](again), unique)

    number, flags, _ = await ask(8)
    handle = world.operations.files[number]
    world.former[8] = number, handle
    assert await ask(8 | UNIQUE_RESEND) == (number, flags & ~FOPEN_KEEP_CACHE, 0)
    assert len(world.operations.files) == 1
    world.release(number)


async def test_a_file_that_was_created_but_not_opened(world: World) -> None:
    """The daemon died between the two: the request that is sent again opens what it made."""
    who = {"uid": os.geteuid(), "gid": os.getegid()}
    flags, mode = os.O_RDWR | os.O_CREAT, stat.S_IFREG | 0o600
    values: dict[str, Any] = {"nodeid": 1, "name": b"new", "flags": flags, "mode": mode, **who}
    create = world.data.table[Opcode.CREATE]
    world.release(_opened(create(rq.Create.of(unique=8, **values)), 8)[0])
    again = 8 | UNIQUE_RESEND
    number = _opened(create(rq.Create.of(unique=again, **values)), again)[0]
    assert world.operations.files[number].writes
    world.release(number)


async def test_a_write_back_is_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not look how much of it was written."""
    number, _, _ = await world.open(os.O_RDWR)
    written: list[tuple[int, bytes]] = []

    async def write(file: OpenFile, offset: int, data: memoryview, killer: object) -> int:
        written.append((offset, bytes(data)))
        return min(4, len(data))

    monkeypatch.setattr(world.operations.files, "write", write)
    for offset in (0, 100):
        request = rq.Write.of(
            unique=8, nodeid=world.node.id, fh=number, offset=offset, size=10, write_flags=WRITE_CACHE,
            data=memoryview(b"0123456789"),
        )  # fmt: skip
        answer = b"".join(await world.data.waiting[Opcode.WRITE](request) or [])
        assert struct.unpack("=IiQI4x", answer) == (24, 0, 8, 10)
        assert written == [(offset, b"0123456789"), (offset + 4, b"456789"), (offset + 8, b"89")]
        written.clear()
    world.release(number)


@pytest.mark.parametrize("truncated", [False, True])
async def test_a_program_that_others_use(
    world: World, monkeypatch: pytest.MonkeyPatch, truncated: bool
) -> None:
    """While it is looked whether it is one, another reader opens it with a backing file, and it is copied up.
    The open joins that reader if the data is still the same; else the kernel must look the name up again."""
    union, node = world.union, world.node
    other = Handle(union.files.lend(node, write=False), ME, writes=False, node=node)

    async def is_program(file: OpenFile) -> bool:
        node.in_use().passes_through(3, of_upper=False)
        node.in_use().opened(other)
        copy_up(union, node)
        if truncated:
            node.in_use().resize()
        return True

    monkeypatch.setattr(world.operations.files, "is_program", is_program)
    if truncated:
        with pytest.raises(OSError, match="Stale"):
            await world.open()
        assert node.successor is not None
        assert len(world.operations.files) == 0
    else:
        number, flags, backing_id = await world.open()
        assert (flags & FOPEN_PASSTHROUGH, backing_id) == (FOPEN_PASSTHROUGH, 3)
        assert node.successor is None
        world.release(number)
    assert node.in_use().closed(other) == 3
    union.files.take_back(node, other.file)


async def test_a_file_that_is_open_without_a_backing_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of the upper may be that a snapshot has made a lower's. The kernel refuses a backing file until
    all have closed it."""
    registered: list[Handle] = []

    def register(self: NodeIos, handle: Handle) -> bool:
        registered.append(handle)
        return False

    monkeypatch.setattr(NodeIos, "register", register)
    other = Handle(world.union.files.lend(world.node, write=False), ME, writes=False, node=world.node)
    world.node.in_use().opened(other)
    number, flags, _ = await world.open()
    assert not flags & FOPEN_PASSTHROUGH
    assert registered == []
    world.release(number)
    world.node.in_use().closed(other)
    world.union.files.take_back(world.node, other.file)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
async def test_a_file_that_may_be_mapped(
    world: World, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """With a backing file stores through a mapping change its times without a request, so the kernel has to
    ask for them."""

    def register(self: NodeIos, handle: Handle) -> bool:
        handle.node.in_use().passes_through(3, of_upper=True)
        return True

    monkeypatch.setattr(NodeIos, "register", register)
    first, _, _ = await world.open(flags)
    world.operations.invalidations.take_now()  # of the copy-up
    second, _, _ = await world.open(flags)
    assert world.operations.invalidations.take_now() == []
    for number in (first, second):
        world.release(number)
    third, _, _ = await world.open(os.O_RDWR)
    assert world.operations.invalidations.take_now() == ([] if flags == os.O_RDWR else [world.node.id])
    world.release(third)
