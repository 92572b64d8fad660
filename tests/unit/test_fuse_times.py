"""Times that the kernel sends by itself, where it writes data back; without a mount."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.fuse.direct.names import NameRequests
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Init, IoMode, Opcode, Privileges, Settings, negotiate
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import FATTR_CTIME, FATTR_LOCKOWNER, FATTR_MTIME

__all__ = ["open_union"]

PAST = 10**18 + 7


@pytest.mark.parametrize("valid", [FATTR_MTIME | FATTR_CTIME, FATTR_MTIME | FATTR_CTIME | FATTR_LOCKOWNER])
@pytest.mark.parametrize("changed", [0, 1, 10**9])
@pytest.mark.parametrize("removed", [True, False])
async def test_of_a_removed_lower_file(
    tmp_path: Path, open_union: OpenUnion, valid: int, changed: int, removed: bool
) -> None:
    """The ctime that removing it has changed needs no copy-up; another time of modification does."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/f").write_text("data")
    os.utime(tmp_path / "l0/f", ns=(PAST, PAST))
    union = open_union()
    operations = Operations(union)
    offered = rq.InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    privileges = Privileges(initial_user_namespace=True, sys_admin=True)
    decision = negotiate(offered, Settings(io=IoMode.CACHED), privileges)
    names = NameRequests(operations, NodeIos(-1, decision), decision)
    node = get(union, "f")
    node.looked_up()
    if removed:
        await operations.unlink(1, b"f", 0)
    seconds, nanoseconds = divmod(PAST + changed, 10**9)
    request = rq.Setattr.of(unique=8, nodeid=node.id, valid=valid, mtime=seconds, mtimensec=nanoseconds)
    answer = b"".join(await names.waiting[Opcode.SETATTR](request) or [])
    assert struct.unpack_from("=IiQ", answer) == (len(answer), 0, 8)
    assert node.in_place == (not removed or changed != 0)
    assert union.stat(node).st_mtime_ns == PAST + changed
