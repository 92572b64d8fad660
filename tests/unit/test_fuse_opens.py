"""Opens that wait, while others change the same file: what they get then, without a mount."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.union_support import OpenUnion, copy_up, get, open_union
from unionfs.core.files import Handle, OpenFile
from unionfs.fuse.direct.data import DataRequests
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Init, Opcode, Privileges, Settings, negotiate
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import FOPEN_PASSTHROUGH
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
        unused: Any = None
        self.data = DataRequests(self.operations, self.ios, unused, Device(device), unused, decision)
        self.node = get(union, "program")
        self.node.looked_up()

    async def open(self, flags: int = os.O_RDONLY) -> tuple[int, int, int]:
        """The number, FOPEN_* flags and backing id."""
        request = rq.Open.of(unique=8, nodeid=self.node.id, flags=flags)
        (answer,) = await self.data.waiting[Opcode.OPEN](request) or [b""]
        _, error, unique, number, open_flags, backing_id = struct.unpack("=IiQQIi", answer)
        assert (error, unique) == (0, 8)
        return number, open_flags, backing_id

    def release(self, number: int) -> None:
        self.node.in_use().closed(self.operations.files[number])
        self.operations.files.release(number)


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
