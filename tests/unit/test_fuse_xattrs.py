"""Xattrs for a caller with a buffer of some size, and errors; without a mount."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.fuse.direct.names import NameRequests
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Init, Opcode, Privileges, Settings, negotiate
from unionfs.fuse.protocol import requests as rq
from unionfs.union.xattrs import CAPABILITY

__all__ = ["open_union"]


class World:
    """A file with an xattr, and the handlers of its mount."""

    def __init__(self, open_union: OpenUnion, path: Path) -> None:
        path.parent.mkdir()
        path.touch()
        os.setxattr(path, "user.x", b"value")
        union = open_union()
        self.operations, self.node = Operations(union), get(union, path.name)
        offered = rq.InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
        decision = negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))
        self._table = NameRequests(self.operations, NodeIos(-1, decision), decision).table

    def answer(self, size: int, name: bytes | None) -> bytes:
        """To GETXATTR, or to LISTXATTR without a name."""
        values = {"unique": 8, "nodeid": self.node.id, "size": size}
        request = rq.Listxattr.of(**values) if name is None else rq.Getxattr.of(name=name, **values)
        return b"".join(self._table[Opcode(request.number)](request) or [])


@pytest.fixture
def world(tmp_path: Path, open_union: OpenUnion) -> World:
    return World(open_union, tmp_path / "l0/f")


@pytest.mark.parametrize(("name", "value"), [(b"user.x", b"value"), (None, b"user.x\0")])
def test_sizes(world: World, name: bytes | None, value: bytes) -> None:
    """The size alone for a buffer without one; else the value, if it fits."""
    assert world.answer(0, name) == struct.pack("=IiQI4x", 24, 0, 8, len(value))
    for size in (len(value), len(value) + 1, 1 << 16):
        assert world.answer(size, name) == struct.pack("=IiQ", 16 + len(value), 0, 8) + value
    with pytest.raises(OSError) as raised:  # noqa: PT011
        world.answer(len(value) - 1, name)
    assert raised.value.errno == errno.ERANGE


@pytest.mark.parametrize(("protection", "code"), [(b"a", 0), (b"i", errno.EPERM)])
async def test_a_capability_that_the_kernel_removes(
    world: World, tmp_path: Path, protection: bytes, code: int
) -> None:
    """It does so before a write, which is an append to an append-only file."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path, name = tmp_path / "upper/g", os.fsdecode(CAPABILITY)
    path.touch()
    os.setxattr(path, name, struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    os.setxattr(path, "user.overlay.protattr", protection)
    id_ = get(world.operations.union, "g").id
    if code:
        with pytest.raises(PermissionError):
            await world.operations.removexattr(id_, CAPABILITY, 0)
    else:
        await world.operations.removexattr(id_, CAPABILITY, 0)
    assert (name in os.listxattr(path)) == bool(code)


def test_errors_of_a_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no xattrs the list is empty; any other error is that of the caller."""
    code = errno.EOPNOTSUPP

    def fail(path: bytes) -> list[str]:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "listxattr", fail)
    assert world.operations.listxattr(world.node.id, 0) == []
    code = errno.EACCES
    with pytest.raises(PermissionError):
        world.operations.listxattr(world.node.id, 0)
