"""The parts of merged directories, as the Python specification finds them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from itertools import product
from pathlib import Path

from tests.unit.union_support import OpenUnion
from tests.unit.union_support import open_union as open_union
from unionfs.core.places import Place
from unionfs.union.named import NamedWhiteouts
from unionfs.union.redirects import PartSearch


def _absent(path: Path) -> None:
    pass


def _hidden(path: Path) -> None:
    (path.parent / f".wh.{path.name}").touch()


def _directory_that_hides(path: Path) -> None:
    path.mkdir()
    _hidden(path)


def _opaque_by_name(path: Path) -> None:
    path.mkdir()
    (path / ".wh..wh..opq").touch()


def _with(name: str, value: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        os.setxattr(path, name, value)

    return make


MAKE: list[Callable[[Path], None]] = [
    _absent,
    Path.mkdir,
    Path.touch,
    _hidden,
    _directory_that_hides,
    _opaque_by_name,
    _with("user.overlay.opaque", b"y"),
    _with("user.overlay.redirect", b"elsewhere"),
    _with("user.other", b"x"),
]


def test_compiled_code_finds_the_same_parts(tmp_path: Path, open_union: OpenUnion) -> None:
    """All combinations of what three lowers may have as one name."""
    made = list(product(MAKE, repeat=3))
    for index in range(3):
        (tmp_path / f"l{index}/elsewhere").mkdir(parents=True)
        for number, makes in enumerate(made):
            makes[index](tmp_path / f"l{index}/d{number}")
    union = open_union(3)
    merge, parts = union.merge, union.nodes.root.parts
    specified = PartSearch(union.stack.layers, union.stack.markers, NamedWhiteouts(union.gate), union.gate)
    compared = 0
    for number in range(len(made)):
        name = b"d%d" % number
        found = merge.search(parts, name)
        if found is None or not stat.S_ISDIR(found[0].st_mode):
            continue
        first = parts.index(found[1][0].parent)
        expected = specified.parts(parts, parts[first], name, found[0], parts[first + 1 :])
        assert list(map(_described, found[1])) == list(map(_described, expected)), made[number]
        compared += 1
    assert compared > 500


def _described(place: Place) -> tuple[object, ...]:
    return place.layer.index, place.name, place.key, place.identity, place.impure, place.copied
