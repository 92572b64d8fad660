"""The watches of a union's lowers: what is watched and until when, and what events say. No mount."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.union_support import copy_up, get, names, read
from unionfs.core.node import Node
from unionfs.sys.inotify import Inotify
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union
from unionfs.union.watching import Told, Watches

OpenWatched = Callable[..., tuple[Union, Watches]]


@pytest.fixture
def open_watched(tmp_path: Path) -> Iterator[OpenWatched]:
    """Opens a union over directories below ``tmp_path``, and watches them."""
    opened: list[Union] = []
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()

    def open_(*lowers: str) -> tuple[Union, Watches]:
        stack = LayerStack.open(
            [str(tmp_path / name) for name in lowers], str(tmp_path / "upper"), str(tmp_path / "work"),
            userxattr=True,
        )  # fmt: skip
        union = Union(stack, notifier=Inotify())
        opened.append(union)
        assert union.watches is not None
        return union, union.watches

    yield open_
    for union in opened:
        union.close()
        union.stack.close()


def taken(watches: Watches) -> dict[Node, dict[bytes, Told]]:
    while watches.read():
        pass
    changed = watches.take()
    assert not changed.everything
    return changed.names


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    path = tmp_path / "lower"
    (path / "d/sub").mkdir(parents=True)
    (path / "d/f").write_text("f\n")
    (path / "d/sub/g").write_text("g\n")
    return path


def test_what_the_daemon_does_itself(lower: Path, open_watched: OpenWatched) -> None:
    """Looking up, listing, reading and copying up cause no events; nor do changes in the upper."""
    union, watches = open_watched("lower")
    assert names(union, "d/sub") == {b"g"}
    assert read(union, "d/sub/g") == b"g\n"
    copy_up(union, get(union, "d/f"))
    os.unlink(lower.parent / "upper/d/f")
    assert taken(watches) == {}


def test_kinds_of_changes(lower: Path, open_watched: OpenWatched) -> None:
    union, watches = open_watched("lower")
    root, d, sub = union.nodes.root, get(union, "d"), get(union, "d/sub")
    (lower / "d/f").write_text("changed\n")
    (lower / "d/f").chmod(0o600)
    assert taken(watches) == {d: {b"f": Told.OBJECT}}
    os.rename(lower / "d/f", lower / "d/sub/h")
    (lower / "d/sub/g").unlink()
    assert taken(watches) == {d: {b"f": Told.NAME}, sub: {b"h": Told.NAME, b"g": Told.NAME}}
    (lower / "d").chmod(0o700)
    assert taken(watches) == {root: {b"d": Told.OBJECT}}
    lower.chmod(0o700)
    assert taken(watches) == {root: {b".": Told.OBJECT}}
    (lower / "d/sub/h").write_text("h\n")
    (lower / "d/sub/h").unlink()
    (lower / "d/sub/h").write_text("h\n")
    assert taken(watches) == {sub: {b"h": Told.NAME}}


def test_only_while_it_is_known(lower: Path, open_watched: OpenWatched) -> None:
    union, watches = open_watched("lower")
    (lower / "d/f").write_text("not known yet\n")
    assert taken(watches) == {}
    sub = get(union, "d/sub")
    assert watches.figures() == {"watches": 3, "watches_refused": 0}
    union.nodes.forget(sub, 0)
    assert watches.figures() == {"watches": 1, "watches_refused": 0}
    (lower / "d/f").write_text("forgotten\n")
    assert taken(watches) == {}


def test_one_directory_in_two_nodes(lower: Path, open_watched: OpenWatched) -> None:
    union, watches = open_watched("lower/d", "lower")
    root, d = union.nodes.root, get(union, "d")
    (lower / "d/new").write_text("new\n")
    assert taken(watches) == {root: {b"new": Told.NAME}, d: {b"new": Told.NAME}}
    union.nodes.forget(d, 0)
    (lower / "d/new").unlink()
    assert taken(watches) == {root: {b"new": Told.NAME}}


def test_a_hard_link_by_another_name(lower: Path, tmp_path: Path, open_watched: OpenWatched) -> None:
    os.link(lower / "d/f", tmp_path / "outside")
    union, watches = open_watched("lower")
    d, _ = get(union, "d"), get(union, "d/f")
    (tmp_path / "outside").write_text("changed outside\n")
    assert taken(watches) == {d: {b"f": Told.OBJECT}}


def test_an_overflow(lower: Path, open_watched: OpenWatched) -> None:
    union, watches = open_watched("lower")
    get(union, "d")
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 2 + 1):
        os.utime(lower / "d/f")
        os.utime(lower / "d/sub")
    while watches.read():
        pass
    assert watches.take().everything
    (lower / "d/f").write_text("later\n")
    assert taken(watches) == {get(union, "d"): {b"f": Told.OBJECT}}


def test_a_removed_directory(lower: Path, open_watched: OpenWatched) -> None:
    union, watches = open_watched("lower")
    root, d = union.nodes.root, get(union, "d")
    for path in (lower / "d/f", lower / "d/sub/g"):
        path.unlink()
    (lower / "d/sub").rmdir()
    (lower / "d").rmdir()
    found = taken(watches)
    assert found[root] == {b"d": Told.NAME}
    union.nodes.lose(d, root, b"d")
    union.nodes.forget(d, 0)
    assert watches.figures() == {"watches": 1, "watches_refused": 0}
