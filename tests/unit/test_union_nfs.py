"""Leftovers of an NFS client in directories: a file removed while in use is renamed until its close."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.world import errno_of
from tests.unit.union_support import OpenUnion, get, names, open_union
from unionfs.core.places import Layer
from unionfs.daemon.preflight import _check_work_content
from unionfs.errors import UserError
from unionfs.union.changes import Changes
from unionfs.union.diff import diff
from unionfs.union.tree import Union

__all__ = ["open_union"]

REMOVED = ".nfs000000000000abcd00000001"  # nfs_sillyrename, fs/nfs/unlink.c: "%0*llx%0*x" of 64 and 32 bits
OTHERS = [".nfs", ".nfs1", ".nfs000000000000abcd", ".nfs000000000000ABCD00000001", f"{REMOVED}0", "nfs"]


def _on_nfs(open_union: OpenUnion) -> Union:
    """As if the upper were on NFS, which needs a server; the test with one runs in a virtual machine."""
    union = open_union()
    union.require_upper().links_of_removed = 1
    return union


def test_only_such_names_are_hidden_and_only_of_the_upper(tmp_path: Path, open_union: OpenUnion) -> None:
    for layer in ("l0", "upper"):
        (tmp_path / layer / "d").mkdir(parents=True)
    (tmp_path / "upper/d" / REMOVED).touch()
    for name in OTHERS:
        (tmp_path / "upper/d" / name).touch()
    theirs = REMOVED.replace("1", "2")
    (tmp_path / "l0/d" / theirs).touch()
    assert names(_on_nfs(open_union), "d") == {name.encode() for name in [*OTHERS, theirs]}


def test_a_directory_that_shows_one_of_a_lower_is_not_empty(tmp_path: Path, open_union: OpenUnion) -> None:
    for layer in ("l0", "upper"):
        (tmp_path / layer / "d").mkdir(parents=True)
    (tmp_path / "l0/d" / REMOVED).touch()
    union = _on_nfs(open_union)
    assert errno_of(Changes(union).rmdir, union.nodes.root, b"d") == errno.ENOTEMPTY
    assert get(union, f"d/{REMOVED}")


def test_the_diff_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in ("l0", "upper"):
        (tmp_path / layer).mkdir()
    for name in (REMOVED, OTHERS[2]):
        (tmp_path / "upper" / name).touch()

    def on_nfs(*arguments: Any, **extra: Any) -> Layer:
        layer = Layer(*arguments, **extra)
        layer.links_of_removed = 1
        return layer

    monkeypatch.setattr("unionfs.union.diff.Layer", on_nfs)
    changes = diff(str(tmp_path / "upper"), [str(tmp_path / "l0")], b"user.overlay.")
    assert list(changes) == [("A", f"/{OTHERS[2]}".encode())]


def test_what_is_in_use_is_removed_from_work_later(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, and without retrying everything at each change."""
    work = open_union().work
    in_use = {b"%d" % number for number in range(100)}
    tried: list[bytes] = []

    def remove(name: bytes) -> None:
        tried.append(name)
        if name in in_use:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(work, "_remove", remove)
    names = sorted(in_use)
    for name in names:
        work.discard(name)
    assert len(tried) <= 5 * len(names)
    in_use.clear()
    tried.clear()
    for _ in range(30):
        work.discard(b"other")
    assert sorted(name for name in tried if name != b"other") == names


def test_work_may_hold_one_but_nothing_that_only_looks_like_it(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / REMOVED).touch()
    _check_work_content(str(tmp_path))
    (tmp_path / "work/.nfsbackup").touch()
    with pytest.raises(UserError, match="would be deleted"):
        _check_work_content(str(tmp_path))
