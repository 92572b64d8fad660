"""Directories merged from many lowers: the number and results of lookups in layers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, names, read, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.union import lowernames
from unionfs.union.changes import Changes
from unionfs.union.tree import Union

COUNT = lowernames.MANY + 4


@pytest.fixture
def union(tmp_path: Path, open_union: OpenUnion) -> Union:
    """Every lower has the directory ``d``, with ``own<number>`` in it; the last one also has ``last``."""
    for number in range(COUNT):
        (tmp_path / f"l{number}/d").mkdir(parents=True)
        (tmp_path / f"l{number}/d/own{number}").write_text(str(number))
    (tmp_path / f"l{COUNT - 1}/d/last").write_text("last")
    (tmp_path / f"l{COUNT - 1}/d/hidden").write_text("hidden")
    whiteout(tmp_path / "l3/d/hidden")
    return open_union(COUNT)


def asked(union: Union, name: bytes) -> int:
    """The number of layers in which a lookup of ``name`` in ``d`` looks for it."""
    return len(union.merge._lower_names.parts(get(union, "d").parts, name))


def _warm(union: Union) -> None:
    for number in range(10):
        assert find(union, f"d/absent{number}") is None


def test_absent_names_are_not_asked_for(union: Union) -> None:
    assert asked(union, b"first") >= COUNT
    _warm(union)
    assert union.lookup(get(union, "d"), b"not there") is None
    assert asked(union, b"not there") == 0
    assert asked(union, b"last") == 1
    assert read(union, "d/last") == b"last"
    assert find(union, "d/hidden") is None
    for number in range(COUNT):
        assert read(union, f"d/own{number}") == str(number).encode()
    assert names(union, "d") == {b"last", *(b"own%d" % number for number in range(COUNT))}


def test_the_upper_is_asked(union: Union) -> None:
    """Names created, removed and copied up afterwards are seen."""
    _warm(union)
    changes, node = Changes(union), get(union, "d")
    changes.mkdir(node, b"absent1", 0o755, ME)
    copy_up(union, get(union, "d/own5"))
    changes.unlink(node, b"own6")
    changes.unlink(node, b"own5")
    expected = {b"last", b"absent1", *(b"own%d" % number for number in range(COUNT) if number not in (5, 6))}
    assert names(union, "d") == expected
    assert {name for name in names(union, "d") if union.lookup(node, name)} == expected
    assert find(union, "d/own5") is find(union, "d/own6") is None


def test_directories_below_are_merged(tmp_path: Path, open_union: OpenUnion) -> None:
    """A relative and an absolute redirect continue under names that the lowers have too."""
    for number in range(COUNT):
        (tmp_path / f"l{number}/d/x").mkdir(parents=True)
        (tmp_path / f"l{number}/d/x/x{number}").touch()
        (tmp_path / f"l{number}/d/old").mkdir()
        (tmp_path / f"l{number}/d/old/old{number}").touch()
        (tmp_path / f"l{number}/other").mkdir()
        (tmp_path / f"l{number}/other/other{number}").touch()
    os.setxattr(tmp_path / "l2/d/x", "user.overlay.redirect", b"old")
    os.setxattr(tmp_path / "l5/d/old", "user.overlay.redirect", b"/other")
    os.setxattr(tmp_path / "l8/other", "user.overlay.opaque", b"y")
    union = open_union(COUNT)
    _warm(union)
    assert union.merge._lower_names._kept[get(union, "d").parts[-1]].having
    assert names(union, "d/x") == {
        *(b"x%d" % number for number in (0, 1, 2)),
        *(b"old%d" % number for number in (3, 4, 5)),
        *(b"other%d" % number for number in (6, 7, 8)),
    }


@pytest.mark.parametrize("why", ["large", "error"])
def test_what_cannot_be_listed_is_asked(union: Union, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "large":
        monkeypatch.setattr(lowernames, "LARGE", 1)
    else:
        listdir = os.listdir

        def refuse(fd: int) -> list[str]:
            if len(found := listdir(fd)) == 3:
                raise PermissionError
            return found

        monkeypatch.setattr(os, "listdir", refuse)
    _warm(union)
    assert union.merge._lower_names._kept[get(union, "d").parts[-1]].having is None
    assert read(union, "d/last") == b"last"
    assert find(union, "d/hidden") is None


def test_the_oldest_are_dropped(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowernames, "_KEPT_NAMES", 25)
    directories = [f"d{number}" for number in range(4)]
    for number in range(COUNT):
        for name in directories:
            (tmp_path / f"l{number}/{name}").mkdir(parents=True)
            (tmp_path / f"l{number}/{name}/f{number}").touch()
    union = open_union(COUNT)
    for _ in range(2):
        for name in directories:
            for number in range(10):
                assert find(union, f"{name}/absent{number}") is None
                assert find(union, f"{name}/f{number}") is not None
            kept = union.merge._lower_names
            assert kept._count == sum(len(one.having or ()) for one in kept._kept.values()) <= 25


def test_directories_without_listed_lowers_are_dropped_too(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lookup in each of many directories is not remembered for ever."""
    monkeypatch.setattr(lowernames, "_KEPT_DIRECTORIES", 3)
    for number in range(COUNT):
        for name in range(6):
            (tmp_path / f"l{number}/d{name}").mkdir(parents=True)
    union = open_union(COUNT)
    for name in range(6):
        assert find(union, f"d{name}/absent") is None
        assert len(union.merge._lower_names._kept) <= 3
    assert get(union, "d5").parts[-1] in union.merge._lower_names._kept
