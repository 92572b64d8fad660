"""The index of hard links, without a mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, copy_up, get, open_union
from unionfs.union.changes import Changes
from unionfs.union.index import Index

__all__ = ["open_union"]


def test_a_count_that_cannot_be_known(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without privilege the original cannot be asked: the copy stays, as others may have names of it."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/a").write_text("old")
    os.link(tmp_path / "l0/a", tmp_path / "l0/b")
    union = open_union()
    node = get(union, "a")
    node.looked_up()
    copy_up(union, node)
    (tmp_path / "upper/a").write_text("new")
    (entry,) = (tmp_path / "work/index").iterdir()
    os.setxattr(entry, "user.overlay.nlink", b"L+0")
    monkeypatch.setattr(Index, "_links_of_original", lambda *_: 0, raising=False)
    union.nodes.forget(node, 1)
    get(union, "a")
    Changes(union).unlink(union.nodes.root, b"a")
    assert union.stat(get(union, "b")).st_size == 3
    assert entry.read_text() == "new"
    assert get(union, "b").is_indexed
