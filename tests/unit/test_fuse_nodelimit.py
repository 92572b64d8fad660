"""The limit of known nodes on kernels that cannot be asked for them, without a mount."""

from __future__ import annotations

from typing import Any

import pytest

from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.nodelimit import NodeLimit
from unionfs.fuse.protocol import Init, Privileges, Settings, negotiate
from unionfs.fuse.protocol.requests import InitRequest


class _Pruner:
    known = 11


@pytest.mark.parametrize(("minor", "possible"), [(44, False), (45, True)])
def test_old_kernels(caplog: pytest.LogCaptureFixture, minor: int, possible: bool) -> None:
    """The daemon sends them no FUSE_NOTIFY_PRUNE; the log and `inspect` say why."""
    offered = InitRequest.of(major=7, minor=minor, max_readahead=1 << 17, flags=int(sum(Init)))
    privileges = Privileges(initial_user_namespace=True, sys_admin=True)
    pruner: Any = _Pruner()
    limit = NodeLimit(Device(-1), pruner, negotiate(offered, Settings(), privileges), 10)
    assert limit.exceeded is possible
    assert ("option max_nodes has no effect" in caplog.text) is not possible
    shown = limit.figures()["node_limit"]
    assert shown["max_nodes"] == 10
    assert ("Linux 6.18" in shown.get("none_because", "")) is not possible
    caplog.clear()
