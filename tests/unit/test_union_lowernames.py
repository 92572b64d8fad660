"""Directories merged from many lowers: the number and results of lookups in layers."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, names, read, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.core.entries import Entries
from unionfs.core.lowernames import MANY, LowerNames
from unionfs.union.changes import Changes
from unionfs.union.tree import Union

COUNT = MANY + 4


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
    assert union.merge._lower_names.has_listed(get(union, "d").parts)
    assert names(union, "d/x") == {
        *(b"x%d" % number for number in (0, 1, 2)),
        *(b"old%d" % number for number in (3, 4, 5)),
        *(b"other%d" % number for number in (6, 7, 8)),
    }


def _ask_often(names: LowerNames, union: Union, path: str) -> None:
    for number in range(10):
        names.parts(get(union, path).parts, b"absent%d" % number)


@pytest.mark.parametrize("why", ["large", "error"])
def test_what_cannot_be_listed_is_asked(tmp_path: Path, union: Union, why: str) -> None:
    names = LowerNames(union.gate, large=1 if why == "large" else 1 << 20)
    parts = get(union, "d").parts
    if why == "error":
        union.gate.forget(parts[-1])
        (tmp_path / f"l{COUNT - 1}/d").rename(tmp_path / f"l{COUNT - 1}/elsewhere")
    _ask_often(names, union, "d")
    assert not names.has_listed(parts)
    assert names.parts(parts, b"absent") == parts


def test_a_name_that_several_lowers_have(tmp_path: Path, open_union: OpenUnion) -> None:
    """Also those in which it is a whiteout by name, and with both."""
    for number in range(COUNT):
        (tmp_path / f"l{number}").mkdir()
        (tmp_path / f"l{number}/other{number}").touch()
    for number in (1, 2, 5, 7):
        (tmp_path / f"l{number}/same").write_text(str(number))
    for number in (5, 9):
        (tmp_path / f"l{number}/.wh.same").touch()
    union = open_union(COUNT)
    root = union.nodes.root
    _warm_root(union)
    lowers = root.parts[1:]
    found = union.merge._lower_names.parts(root.parts, b"same")
    assert found == [root.parts[0], *(lowers[number] for number in (1, 2, 5, 7, 9))]
    assert read(union, "same") == b"1"


def _warm_root(union: Union) -> None:
    for number in range(10):
        assert find(union, f"absent{number}") is None


def test_names_with_one_hash_are_told_apart(union: Union) -> None:
    """Two names of these many have one hash of 31 bits."""
    lowers = get(union, "d").parts
    seen: dict[int, bytes] = {}
    number, pair = 0, None
    while pair is None:
        some = [b"n%d" % index for index in range(number, number + 10_000)]
        entries = Entries(lowers)
        entries.add_records(0, b"".join(_record(name) for name in some))
        entries.order()
        for index in range(len(entries)):
            name, hash_ = entries.name(index), entries.hash(index)
            if seen.setdefault(hash_, name) != name:
                pair = seen[hash_], name
        number += 10_000
    for place, name in zip((lowers[2], lowers[6]), pair, strict=True):
        (Path(place.layer.path) / "d" / os.fsdecode(name)).touch()
    _warm(union)
    for place, name in zip((lowers[2], lowers[6]), pair, strict=True):
        assert union.merge._lower_names.parts(lowers, name) == [place]


def _record(name: bytes) -> bytes:
    """struct linux_dirent64 (fs/readdir.c) of a file."""
    size = 19 + len(name) + 1
    padding = -size % 8
    return struct.pack("=QQHB", 9, 0, size + padding, 8) + name + bytes(1 + padding)


def test_the_least_recently_used_are_dropped(tmp_path: Path, open_union: OpenUnion) -> None:
    directories = [f"d{number}" for number in range(4)]
    for number in range(COUNT):
        for name in directories:
            (tmp_path / f"l{number}/{name}").mkdir(parents=True)
            (tmp_path / f"l{number}/{name}/f{number}").touch()
    union = open_union(COUNT)
    names = LowerNames(union.gate, names=COUNT * 2)
    for name in directories[:2]:
        _ask_often(names, union, name)
    assert names.count == COUNT * 2
    _ask_often(names, union, "d0")
    _ask_often(names, union, "d2")
    listed = [names.has_listed(get(union, name).parts) for name in directories]
    assert listed == [True, False, True, False]
    assert names.count == COUNT * 2
    assert len(names) == 2
    names.forget(get(union, "d0").parts)
    assert names.count == COUNT
    names.clear()
    assert (len(names), names.count) == (0, 0)


def test_directories_without_listed_lowers_are_dropped_too(tmp_path: Path, open_union: OpenUnion) -> None:
    """One lookup in each of many directories is not remembered for ever."""
    for number in range(COUNT):
        for name in range(6):
            (tmp_path / f"l{number}/d{name}").mkdir(parents=True)
    union = open_union(COUNT)
    names = LowerNames(union.gate, directories=3)
    for name in range(6):
        names.parts(get(union, f"d{name}").parts, b"absent")
        assert len(names) == min(name + 1, 3)
