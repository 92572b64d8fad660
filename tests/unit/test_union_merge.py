"""The merge alone: searches and lists names in layers, without nodes and without a union."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support import snapshot
from tests.unit.union_support import OpenUnion, get, names, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.core.places import Place
from unionfs.union.merge import Merge
from unionfs.union.tree import Union


@pytest.fixture
def union(tmp_path: Path, open_union: OpenUnion) -> Union:
    """Two lowers and an upper, all with ``d``."""
    for layer in ("l0", "l1", "upper"):
        (tmp_path / layer / "d").mkdir(parents=True)
        (tmp_path / layer / "d" / layer).write_text(layer)
        (tmp_path / layer / "d/all").write_text(layer)
    (tmp_path / "l1/d/hidden").touch()
    whiteout(tmp_path / "l0/d/hidden")
    return open_union(2)


def _path(place: Place) -> str:
    return f"{place.layer.path.rpartition('/')[2]}/{place.name.decode()}"


def test_a_name_is_searched_in_parts(union: Union) -> None:
    merge = Merge(union.stack.layers, union.stack.markers)
    found = merge.search(merge.roots, b"d")
    assert found is not None
    st, parts = found
    assert stat.S_ISDIR(st.st_mode)
    assert [_path(part) for part in parts] == ["upper/d", "l0/d", "l1/d"]
    for name, place in ((b"all", "upper/d"), (b"l0", "l0/d"), (b"l1", "l1/d")):
        there = merge.search(parts, name)
        assert there is not None
        assert [_path(one) for one in there[1]] == [place]
    assert merge.search(parts, b"hidden") is None
    assert merge.search(parts[2:], b"hidden") is not None
    assert set(merge.listing(parts).names()) == {b"all", b"l0", b"l1", b"upper"}
    listed = merge.listing(parts).entries()
    topmost = {listed.name(index): listed.part(index) for index in range(len(listed))}
    assert topmost == {b"all": 0, b"upper": 0, b"l0": 1, b"hidden": 1, b"l1": 2}
    assert merge.is_visible_below(parts, b"all")
    assert not merge.is_visible_below(parts, b"upper")
    merge.close()


def test_a_found_object_that_is_replaced_is_stale(union: Union, tmp_path: Path) -> None:
    merge = Merge(union.stack.layers, union.stack.markers)
    found = merge.search(merge.roots, b"d")
    assert found is not None
    file = merge.search(found[1], b"l1")
    assert file is not None
    fd = merge.open_object(file, b"l1")
    assert os.stat(fd).st_ino == file[0].st_ino
    os.close(fd)
    (tmp_path / "other").write_text("other")
    (tmp_path / "other").chmod(0o600)
    (tmp_path / "other").rename(tmp_path / "l1/d/l1")
    with pytest.raises(OSError, match="another object"):
        merge.open_object(file, b"l1")
    merge.close()


def test_it_stands_beside_the_union_that_serves(union: Union, tmp_path: Path) -> None:
    """It has separate directory fds, and changes neither the layers nor the work directory."""
    before = [snapshot.take(tmp_path / name) for name in ("l0", "l1", "upper", "work")]
    merge = Merge(union.stack.layers, union.stack.markers)
    shown = names(union, "d")
    found = merge.search(merge.roots, b"d")
    assert found is not None
    assert all(part not in get(union, "d").parts for part in found[1])
    assert set(merge.listing(found[1]).names()) == shown
    merge.close()
    assert names(union, "d") == shown
    assert [snapshot.take(tmp_path / name) for name in ("l0", "l1", "upper", "work")] == before
