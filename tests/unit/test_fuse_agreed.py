"""What was agreed with the kernel, handed on to another daemon."""

from __future__ import annotations

import json

import pytest

from unionfs.fuse.direct import agreed
from unionfs.fuse.protocol import Init, IoMode, Privileges, Settings, negotiate
from unionfs.fuse.protocol.requests import InitRequest


@pytest.mark.parametrize("io", [IoMode.CACHED, IoMode.HYBRID, IoMode.PASSTHROUGH])
@pytest.mark.parametrize("flags", [int(sum(Init)), int(sum(Init) & ~Init.WRITEBACK_CACHE)])
def test_it_is_the_same(io: IoMode, flags: int) -> None:
    """Also where it is written as JSON between the two."""
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=flags)
    privileges = Privileges(initial_user_namespace=True, sys_admin=True)
    decision = negotiate(offered, Settings(io=io), privileges)
    assert agreed.from_json(json.loads(json.dumps(agreed.to_json(decision)))) == decision
