"""How the session of pyfuse3 ends, without a mount."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pyfuse3
import pytest

from tests.unit.union_support import OpenUnion, open_union
from unionfs.fuse import session_pyfuse3
from unionfs.fuse.errors import SessionError
from unionfs.fuse.operations import Operations
from unionfs.union.tree import Union

__all__ = ["open_union"]

@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the library unmounts, each time that it is closed."""
    found: list[bool] = []
    monkeypatch.setattr(pyfuse3, "init", lambda *arguments: None)
    monkeypatch.setattr(pyfuse3, "close", lambda unmount: found.append(unmount))
    monkeypatch.setattr(session_pyfuse3, "mounted_at", lambda mountpoint: None)
    return found


async def _serve(union: Union, monkeypatch: pytest.MonkeyPatch, *codes: int) -> Operations:
    operations = Operations(union)

    async def main() -> None:
        if codes:
            raise BaseExceptionGroup("ended", [OSError(code, os.strerror(code)) for code in codes])

    monkeypatch.setattr(pyfuse3, "main", main)
    await session_pyfuse3.serve(operations, "/nowhere", [], lambda: None, {"more": 1})
    return operations


@pytest.mark.parametrize("codes", [(), (errno.ECONNABORTED,), (errno.ECONNABORTED, errno.ECONNABORTED)])
async def test_unmounted(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, closed: list[bool], codes: tuple[int, ...]
) -> None:
    operations = await _serve(open_union(), monkeypatch, *codes)
    assert closed == [True]
    figures = operations.figures()
    assert figures["more"] == 1
    assert figures["cache"] == {"writeback": False, "opens_without_request": False}
    assert figures["passthrough"] == {"upper": False, "lower": False, "lower_programs_only": False}


@pytest.mark.parametrize("codes", [(errno.EIO,), (errno.ECONNABORTED, errno.EIO)])
async def test_other_errors(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, closed: list[bool], codes: tuple[int, ...]
) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await _serve(open_union(), monkeypatch, *codes)
    assert raised.group_contains(OSError, match=os.strerror(errno.EIO))
    assert closed == [True]


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("is_fuse", [True, False])
async def test_disconnected(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, closed: list[bool], dead: bool, is_fuse: bool
) -> None:
    """Its mount is left, and dead; the number of its device may be that of another one."""
    mount = SimpleNamespace(device="0:99", is_fuse=is_fuse, mountpoint="/nowhere")
    monkeypatch.setattr(session_pyfuse3, "mounted_at", lambda mountpoint: mount)
    monkeypatch.setattr(session_pyfuse3, "mounts_of_device", {"0:99": [mount]}.get)
    monkeypatch.setattr(session_pyfuse3, "is_dead", lambda mountpoint: dead)
    if dead and is_fuse:
        with pytest.raises(SessionError, match="/nowhere"):
            await _serve(open_union(), monkeypatch)
    else:
        await _serve(open_union(), monkeypatch)
    assert closed == [True]
