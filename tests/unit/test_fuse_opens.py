"""Opens that wait, while others change the same file: what they get then, without a mount."""

from __future__ import annotations

import errno
import struct
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

__all__ = ["open_union"]

ME = Process(0, 0, 0)


@pytest.mark.parametrize("truncated", [False, True])
async def test_a_program_that_others_use(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, truncated: bool
) -> None:
    """While it is looked whether it is one, another reader opens it with a backing file, and it is copied up.
    The open joins that reader if the data is still the same; else the kernel must look the name up again."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/program").write_bytes(b"\x7fELF" + bytes(100_000))
    union = open_union()
    node = get(union, "program")
    node.looked_up()
    operations = Operations(union)
    offered = rq.InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    decision = negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))
    ios = NodeIos(-1, decision)
    unused: Any = None
    data = DataRequests(operations, ios, unused, Device(-1), unused, decision)
    other = Handle(union.files.lend(node, write=False), ME, writes=False, node=node)

    async def is_program(file: OpenFile) -> bool:
        node.in_use().passes_through(3, of_upper=False)
        node.in_use().opened(other)
        copy_up(union, node)
        if truncated:
            node.in_use().resize()
        return True

    monkeypatch.setattr(operations.files, "is_program", is_program)
    opening = data.waiting[Opcode.OPEN](rq.Open.of(unique=8, nodeid=node.id))
    if truncated:
        with pytest.raises(OSError, match="Stale") as raised:
            await opening
        assert raised.value.errno == errno.ESTALE
        assert node.successor is not None
        assert len(operations.files) == 0
    else:
        (answer,) = await opening or [b""]
        _, error, unique, number, flags, backing_id = struct.unpack("=IiQQIi", answer)
        assert (error, unique, flags & FOPEN_PASSTHROUGH, backing_id) == (0, 8, FOPEN_PASSTHROUGH, 3)
        assert node.successor is None
        node.in_use().closed(operations.files[number])
        operations.files.release(number)
    assert node.in_use().closed(other) == 3
    union.files.take_back(node, other.file)
