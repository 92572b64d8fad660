"""Requests for names that are sent again to another daemon: each is carried out once. Without a mount."""

from __future__ import annotations

import inspect
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.fuse.direct.names import NameRequests
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Init, Opcode, Privileges, Settings, negotiate
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import UNIQUE_RESEND
from unionfs.sys.calls import RENAME_NOREPLACE
from unionfs.union.tree import Union

__all__ = ["open_union"]

OWN = {"uid": os.geteuid(), "gid": os.getegid()}
#: The request for a change in the root directory, and the same change of an ordinary directory.
CHANGES: dict[str, tuple[rq.Request, Callable[[Path], object]]] = {
    "unlink": (rq.Unlink.of(name=b"f"), lambda top: os.unlink(top / "f")),
    "rmdir": (rq.Rmdir.of(name=b"d"), lambda top: os.rmdir(top / "d")),
    "rename": (rq.Rename.of(name=b"f", newdir=1, newname=b"g"), lambda top: os.rename(top / "f", top / "g")),
    "rename2": (
        rq.Rename2.of(name=b"f", newdir=1, newname=b"g", flags=RENAME_NOREPLACE),
        lambda top: os.rename(top / "f", top / "g"),
    ),
    "mkdir": (rq.Mkdir.of(name=b"new", mode=0o755, **OWN), lambda top: os.mkdir(top / "new", 0o755)),
    "mknod": (
        rq.Mknod.of(name=b"p", mode=stat.S_IFIFO | 0o644, **OWN), lambda top: os.mkfifo(top / "p", 0o644)
    ),
    "symlink": (rq.Symlink.of(name=b"l", target=b"f", **OWN), lambda top: os.symlink("f", top / "l")),
    "link": (rq.Link.of(name=b"h", oldnodeid=-1), lambda top: os.link(top / "keep", top / "h")),
}  # fmt: skip


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A directory as the upper is."""
    for name in ("upper", "native"):
        (tmp_path / name / "d").mkdir(parents=True)
        for file in ("f", "keep"):
            (tmp_path / name / file).write_text(file)
    return tmp_path / "native"


async def _answer(union: Union, request: rq.Request, unique: int) -> None:
    operations = Operations(union)
    offered = rq.InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    decision = negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))
    names = NameRequests(operations, NodeIos(-1, decision), decision)
    values: dict[str, Any] = dict(zip(request.fields, request, strict=True))
    values.update(unique=unique, nodeid=1)
    if values.get("oldnodeid") == -1:
        values["oldnodeid"] = get(union, "keep").id
    handlers: dict[Opcode, Callable[[Any], Any]] = {**names.table, **names.waiting}
    found = handlers[Opcode(request.number)](type(request).of(**values))
    if inspect.isawaitable(found):
        await found


def _tree(top: Path) -> dict[str, tuple[int, int, str]]:
    """Names, with types, permissions, link counts and data."""
    found = {}
    for path in top.iterdir():
        st = path.lstat()
        found[path.name] = st.st_mode, st.st_nlink, path.read_text() if stat.S_ISREG(st.st_mode) else ""
    return found


@pytest.mark.parametrize("change", CHANGES)
async def test_not_carried_out_before(native: Path, open_union: OpenUnion, change: str) -> None:
    request, natively = CHANGES[change]
    natively(native)
    await _answer(open_union(), request, 8 | UNIQUE_RESEND)
    assert _tree(native.parent / "upper") == _tree(native)


@pytest.mark.parametrize("change", CHANGES)
async def test_carried_out_before(native: Path, open_union: OpenUnion, change: str) -> None:
    """It succeeds without a change. What was not sent before fails, as natively."""
    request, natively = CHANGES[change]
    for top in (native, native.parent / "upper"):
        natively(top)
    wanted = _tree(native)
    union = open_union()
    await _answer(union, request, 8 | UNIQUE_RESEND)
    with pytest.raises(OSError) as error:  # noqa: PT011 - the native one says which
        natively(native)
    with pytest.raises(type(error.value)):
        await _answer(union, request, 10)
    assert _tree(native.parent / "upper") == wanted
