"""Renames: how often the replaced directory is listed, and the remains in the upper."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.unit.test_union_faults import immutable
from tests.unit.union_support import ME, OpenUnion, get, names, open_union
from unionfs.fuse.operations import Operations
from unionfs.union.changes import Changes
from unionfs.union.renaming import Renaming

__all__ = ["open_union"]


def _listings(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """The number of listings of each directory from now on, by its inode number."""
    counted: Counter[int] = Counter()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(directory: int) -> Any:
            counted[os.fstat(directory).st_ino] += 1
            return function(directory)

        return called

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    return counted


@pytest.mark.parametrize("target", ["upper", "lower", "both"])
def test_a_replaced_directory_is_listed_once(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    layers = [name for name, on in (("l0", "lower"), ("upper", "upper")) if target in (on, "both")]
    for layer in layers:
        (tmp_path / layer / "target").mkdir(parents=True)
    union = open_union()
    operations, root = Operations(union), union.nodes.root
    operations.mkdir(root.id, b"new", 0o755, ME)
    (tmp_path / "upper/new/in").touch()
    inodes = [(tmp_path / layer / "target").stat().st_ino for layer in layers]
    counted = _listings(monkeypatch)
    trio.run(operations.rename, root.id, b"new", root.id, b"target", 0, 0)
    assert [counted[inode] for inode in inodes] == [1] * len(layers)
    monkeypatch.undo()
    assert names(union) == {b"target"}
    assert names(union, "target") == {b"in"}


def test_one_that_holds_whiteouts_is_replaced(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "l0/target").mkdir(parents=True)
    (tmp_path / "l0/target/in").touch()
    union = open_union()
    operations, root = Operations(union), union.nodes.root
    operations.changes.unlink(get(union, "target"), b"in")
    operations.mkdir(root.id, b"new", 0o755, ME)
    lower = (tmp_path / "l0/target").stat().st_ino
    counted = _listings(monkeypatch)
    trio.run(operations.rename, root.id, b"new", root.id, b"target", 0, 0)
    assert counted[lower] == 1
    monkeypatch.undo()
    assert names(union) == {b"target"}
    assert names(union, "target") == set()
    assert os.listdir(tmp_path / "work/work") == []


def test_an_emptied_directory_that_cannot_be_replaced(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks as before, with its mode and owner."""
    (tmp_path / "l0/target").mkdir(parents=True)
    (tmp_path / "l0/target/in").touch()
    union = open_union()
    changes, root = Changes(union), union.nodes.root
    changes.unlink(get(union, "target"), b"in")
    changes.mkdir(root, b"new", 0o755, ME)
    target = tmp_path / "upper/target"
    if os.geteuid() == 0:
        os.chown(target, 7, 8)
    target.chmod(0o3751)
    before = target.stat()
    clear = Renaming._clear_whiteouts
    with ExitStack() as stack:

        def then_refuse(*arguments: Any) -> None:
            clear(*arguments)
            stack.enter_context(immutable(tmp_path / "upper/new"))

        monkeypatch.setattr(Renaming, "_clear_whiteouts", then_refuse)
        with pytest.raises(PermissionError):
            changes.rename(root, b"new", root, b"target", 0)
    after = target.stat()
    assert before.st_ino != after.st_ino
    assert (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)
    assert names(union) == {b"target", b"new"}
    assert names(union, "target") == set()
    assert os.listdir(tmp_path / "work/work") == []


def test_a_new_directory_over_a_whiteout_leaves_nothing_behind(tmp_path: Path, open_union: OpenUnion) -> None:
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/f").touch()
    union = open_union()
    changes, root = Changes(union), union.nodes.root
    get(union, "f")
    changes.unlink(root, b"f")
    changes.mkdir(root, b"new", 0o755, ME)
    changes.rename(root, b"new", root, b"f", 0)
    assert os.listdir(tmp_path / "upper") == ["f"]
    assert os.getxattr(tmp_path / "upper/f", "user.overlay.opaque") == b"y"
    assert os.listdir(tmp_path / "work/work") == []
