"""The work directory: files put in place, and leftovers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.unit.union_support import ME, OpenUnion, get, names, open_union
from unionfs.union.changes import Changes

__all__ = ["open_union"]


def test_only_what_was_not_put_into_place_is_discarded(tmp_path: Path, open_union: OpenUnion) -> None:
    union = open_union()
    root, work = union.require_upper().root_fd, tmp_path / "work/work"
    with union.work.temporary() as placed, union.work.temporary() as left:
        for temporary in (placed, left):
            os.close(temporary.mkdir())
            (work / os.fsdecode(temporary.name) / "in").touch()
        placed.put(root, b"there")
        # a new file that got its name would not be removed
        (work / os.fsdecode(placed.name)).touch()
    assert os.listdir(work) == [os.fsdecode(placed.name)]
    assert os.listdir(tmp_path / "upper/there") == ["in"]


def test_a_change_that_was_made_does_not_fail_by_what_is_left(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/f").touch()
    union = open_union()
    changes, root, d = Changes(union), union.nodes.root, get(union, "d")
    changes.unlink(d, b"f")
    os.close(changes.create(d, b"f", 0o644, ME)[2])

    def refuse(name: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    changes.unlink(d, b"f")
    with monkeypatch.context() as patched:
        patched.setattr(union.work, "_remove", refuse)
        changes.rmdir(root, b"d")
    assert names(union) == set()
    assert len(os.listdir(tmp_path / "work/work")) == 1
    with union.work.temporary():
        pass
    assert os.listdir(tmp_path / "work/work") == []
