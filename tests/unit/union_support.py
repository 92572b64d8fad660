"""A union over directories below ``tmp_path``, without a mount."""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from unionfs.core.node import Node
from unionfs.core.state import State
from unionfs.core.steps import NotPlain, set_hook
from unionfs.settings.features import Features
from unionfs.union.changes import Caller
from unionfs.union.copyup import CopyUp
from unionfs.union.filecopy import FileCopy
from unionfs.union.layers import LayerStack
from unionfs.union.shortcuts import Shortcuts
from unionfs.union.tree import Union


def _open_files() -> dict[str, str]:
    """What this process has open: the number of the file descriptor, and a path or description."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


OpenUnion = Callable[..., Union]
ME = Caller(os.geteuid(), os.getegid())


@pytest.fixture
def open_union(tmp_path: Path) -> Iterator[OpenUnion]:
    """Opens a union over lowers ``l0`` (top), ``l1`` ... and ``upper``, all below ``tmp_path``.

    Without ``fast_layers`` the calls on the lowers are wanted first: see `unionfs.core.memo`.

    After the test, nothing may be open but what the test itself has opened before.
    """
    opened: list[Union] = []
    before = set(_open_files())

    def open_(
        lowers: int = 1, *, upper: bool = True, directory_fds: int = 1024, redirect_dir: str = "on",
        state: State | None = None, fast_layers: bool = True,
    ) -> Union:
        for name in [f"l{n}" for n in range(lowers)] + ["upper", "work"]:
            (tmp_path / name).mkdir(exist_ok=True)
        stack = LayerStack.open(
            [str(tmp_path / f"l{n}") for n in range(lowers)],
            str(tmp_path / "upper") if upper else None,
            str(tmp_path / "work") if upper else None,
            userxattr=True,
            features=Features(redirect_dir=redirect_dir),
        )
        union = Union(
            stack, directory_fds=directory_fds, state=state, shortcuts=Shortcuts(fast_layers=fast_layers)
        )
        opened.append(union)
        return union

    yield open_
    for union in opened:
        close_nodes(union)
        union.close()
        union.stack.close()
    left = {number: path for number, path in _open_files().items() if number not in before}
    if left:
        gc.collect()  # what a failed call has left to a frame of its traceback
        left = {number: path for number, path in _open_files().items() if number not in before}
    assert not left, f"still open: {left}"


def close_nodes(union: Union) -> None:
    """Close what is open for as long as the kernel knows a node."""
    for node in union.nodes:
        file = node.use.file if node.use is not None else None
        union.files.gone(node)
        while file is not None and file.users > 0:
            file.release()
        if node.held >= 0:
            os.close(node.held)


def find(union: Union, path: str) -> Node | None:
    """The node at a path, looked up step by step."""
    node = union.nodes.root
    for step in path.encode().split(b"/"):
        found = union.lookup(node, step)
        if found is None:
            return None
        node = found[0]
    return node


def get(union: Union, path: str) -> Node:
    node = find(union, path)
    assert node is not None, path
    return node


def names(union: Union, path: str = "") -> set[bytes]:
    node = get(union, path) if path else union.nodes.root
    return set(node.territory.listing(node).names())


def read(union: Union, path: str) -> bytes:
    node = get(union, path)
    file = union.files.lend(node, write=False)
    try:
        return file.read(1 << 20, 0)
    finally:
        union.files.take_back(node, file)


def copy_up(union: Union, node: Node, limit: int | None = None) -> None:
    with FileCopy(CopyUp(union), node, limit) as copy:
        copy.copy()
        copy.finish()


def not_plain(step: str) -> None:
    """A hook that lets no bundle make a change."""
    raise NotPlain


@contextmanager
def without_bundles() -> Iterator[None]:
    """Make changes in steps alone."""
    set_hook(not_plain)
    try:
        yield
    finally:
        set_hook(None)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)
