"""Copy-ups whose data is copied in a thread, without a mount: what is left when they end early."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.patience import patient
from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.fuse.copying import CopyUps
from unionfs.fuse.operations import Operations
from unionfs.union.filecopy import FileCopy
from unionfs.union.tree import Union

__all__ = ["open_union"]

SIZE = 1 << 20


@pytest.fixture(params=["a lower", "a slow lower"])
def union(request: pytest.FixtureRequest, tmp_path: Path, open_union: OpenUnion) -> Union:
    """With a large file; threads that read slow layers may never end, so nobody waits for them."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/large").write_bytes(os.urandom(SIZE))
    found = open_union()
    if request.param == "a slow lower":
        found.stack.layers[-1].is_slow()
    return found


async def _copied(copy_ups: CopyUps, union: Union) -> None:
    """It can be copied up now."""
    node = get(union, "large")
    assert not copy_ups.is_running(node)
    with trio.fail_after(patient(20)):
        await copy_ups.ensure_data(node, 0)
    assert node.data_in_place


async def test_an_error(union: Union, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a full disk. Nothing is left of it, and a further request does not wait for it."""

    def fail(copy: FileCopy, goes_on: Callable[[], None] = lambda: None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    copy_ups = Operations(union).copy_ups
    with monkeypatch.context() as patches:
        patches.setattr(FileCopy, "copy", fail)
        with pytest.raises(OSError, match="No space"):
            await copy_ups.ensure_data(get(union, "large"), 0)
        assert os.listdir(tmp_path / "work/work") == os.listdir(tmp_path / "upper") == []
    await _copied(copy_ups, union)
    assert (tmp_path / "upper/large").read_bytes() == (tmp_path / "l0/large").read_bytes()


async def test_a_request_that_is_cancelled(
    union: Union, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file counts as being copied until the thread has ended. Then it is copied, or can be."""
    copy, begun, goes_on = FileCopy.copy, threading.Event(), threading.Event()

    def wait(self: FileCopy, on: Callable[[], None] = lambda: None) -> None:
        begun.set()
        assert goes_on.wait(patient(60))
        copy(self)

    copy_ups = Operations(union).copy_ups
    node = get(union, "large")
    with trio.fail_after(patient(40)):
        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(FileCopy, "copy", wait)
            with trio.CancelScope() as scope:

                async def cancel() -> None:
                    await trio.to_thread.run_sync(begun.wait)
                    assert copy_ups.is_running(node)
                    scope.cancel()
                    await trio.sleep(0.1)
                    assert copy_ups.is_running(node)
                    goes_on.set()

                nursery.start_soon(cancel)
                await copy_ups.ensure_data(node, 0)
        while copy_ups.is_running(node):  # noqa: ASYNC110 - a thread ends it
            await trio.sleep(0.01)
    monkeypatch.undo()
    await _copied(copy_ups, union)
    assert (tmp_path / "upper/large").read_bytes() == (tmp_path / "l0/large").read_bytes()
