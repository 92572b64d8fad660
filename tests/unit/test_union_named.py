"""Whiteouts by name without a mount: redirects, the number of system calls, the diff, an odd upper."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import named as layers
from tests.support.world import errno_of
from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, names
from tests.unit.union_support import open_union as open_union
from unionfs.union.changes import Changes
from unionfs.union.diff import diff
from unionfs.union.named import OPAQUE, hidden_name, is_reserved

FOREIGN = "user.fuseoverlayfs."


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """Lookups of such names, and listings for them, since the last call."""
    counted: Counter[str] = Counter()
    stat, listdir = os.stat, os.listdir

    def counting(path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        counted["named"] += dir_fd is not None and bytes(path).startswith(b".wh.")
        return stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    def listing(fd: Any) -> list[str]:
        counted["listings"] += 1
        return listdir(fd)

    monkeypatch.setattr(os, "stat", lambda path, **more: counting(path, **more) if more else stat(path))
    monkeypatch.setattr(os, "listdir", listing)

    def since() -> Counter[str]:
        found = +counted
        counted.clear()
        return found

    return since


def test_names() -> None:
    assert [hidden_name(name) for name in (b".wh.x", b".wh..x", b".wh.", OPAQUE, b".wh..wh.plnk", b"x")] == [
        b"x", b".x", None, None, None, None,
    ]  # fmt: skip
    assert [hidden_name(name) for name in (b".wh..", b".wh...", b".wh....")] == [None, None, b"..."]
    assert [is_reserved(name) for name in (b".wh.", b".wh.x", OPAQUE, b".wh", b"a.wh.b")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_names_that_are_never_shown(tmp_path: Path, open_union: OpenUnion) -> None:
    """Nor can they be made."""
    for layer in ("l0", "l1", "upper"):
        (tmp_path / layer / "d").mkdir(parents=True)
    for name in (".wh.", ".wh.x", ".wh..wh.plnk"):
        (tmp_path / "l0/d" / name).touch()
        (tmp_path / "upper/d" / name).touch()
    for name in (".wh", "x.wh."):
        (tmp_path / "l0/d" / name).touch()
    union = open_union(2)
    directory = get(union, "d")
    assert names(union, "d") == {b".wh", b"x.wh."}
    changes = Changes(union)
    for name in (b".wh.", b".wh.x", b".wh..wh.plnk", b".wh.other"):
        assert union.lookup(directory, name) is None
        assert errno_of(changes.mkdir, directory, name, 0o700, ME) == errno.EINVAL
    for name in (b".wh", b"x.wh."):
        assert union.lookup(directory, name) is not None


def test_absent_names_cost_little(
    tmp_path: Path, open_union: OpenUnion, calls: Callable[[], Counter[str]]
) -> None:
    """A directory without such names is asked for them four times and listed once; the lowest never."""
    for layer in ("l0", "l1"):
        (tmp_path / layer / "d").mkdir(parents=True)
    (tmp_path / "l1/d/low").touch()
    union = open_union(2)
    directory = get(union, "d")
    calls()
    for number in range(4):
        assert find(union, f"d/absent{number}") is None
    assert calls() == {"named": 4}
    assert find(union, "d/absent") is None
    assert calls() == {"listings": 1}
    for number in range(10):
        assert union.lookup(directory, b"more%d" % number) is None
    assert union.lookup(directory, b"low") is not None
    assert calls() == {}
    changes = Changes(union)
    os.close(changes.create(directory, b"new", 0o600, ME)[2])
    made, _ = changes.mkdir(directory, b"made", 0o700, ME)
    assert calls()["named"] == 0
    os.close(changes.create(made, b"new", 0o600, ME)[2])
    assert calls() == {}


def test_a_listing_tells(
    tmp_path: Path, open_union: OpenUnion, calls: Callable[[], Counter[str]]
) -> None:
    for layer in ("l0", "l1"):
        (tmp_path / layer / "d").mkdir(parents=True)
    union = open_union(2)
    directory = get(union, "d")
    assert names(union, "d") == set()
    assert directory.territory.listing(directory).entries().names() == []
    calls()
    assert union.lookup(directory, b"absent") is None
    assert calls() == {}


def test_a_large_directory_is_not_listed(
    tmp_path: Path, open_union: OpenUnion, calls: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unionfs.union.named.LARGE", -1)
    for layer in ("l0", "l1"):
        (tmp_path / layer / "d").mkdir(parents=True)
        (tmp_path / layer / "d/x").touch()
    (tmp_path / "l0/d/x").rename(tmp_path / "l0/d/.wh.x")
    union = open_union(2)
    get(union, "d")
    calls()
    for number in range(10):
        assert find(union, f"d/absent{number}") is None
    assert find(union, "d/x") is None
    assert calls() == {"named": 11}


def test_redirects_pass_through_them(tmp_path: Path, open_union: OpenUnion) -> None:
    """A whiteout by name ends the search for what a redirect names, on the way and at its end."""
    for name in ("cut/x", "way/to/x", "seen/x", "dir/x"):
        (tmp_path / "l1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "l1" / name).touch()
    (tmp_path / "l0/dir").mkdir(parents=True)
    for name in (".wh.cut", ".wh.way", "dir/.wh..wh..opq"):
        (tmp_path / "l0" / name).touch()
    for name, target in (("a", b"/cut"), ("b", b"/way/to"), ("c", b"/seen"), ("d", b"/dir"), ("e", b"cut")):
        (tmp_path / "upper" / name).mkdir(parents=True)
        os.setxattr(tmp_path / "upper" / name, "user.overlay.redirect", target)
    union = open_union(2)
    assert {name: names(union, name) for name in "abcde"} == {
        "a": set(), "b": set(), "c": {b"x"}, "d": set(), "e": set(),
    }  # fmt: skip


def test_opaque_of_fuse_overlayfs(tmp_path: Path, open_union: OpenUnion) -> None:
    """Its xattr makes a directory opaque, and is not copied up; a user's own of that name is data."""
    for layer in ("l0", "l1"):
        (tmp_path / layer / "d").mkdir(parents=True)
        (tmp_path / layer / "d" / layer).touch()
        (tmp_path / layer / "plain").mkdir()
        (tmp_path / layer / "plain" / layer).touch()
    os.setxattr(tmp_path / "l0/d", FOREIGN + "opaque", b"y")
    os.setxattr(tmp_path / "l0/plain", FOREIGN + "opaque", b"x")
    os.setxattr(tmp_path / "l0/plain", FOREIGN + "overlay.opaque", b"y")
    union = open_union(2)
    assert names(union, "d") == {b"l0"}
    assert names(union, "plain") == {b"l0", b"l1"}
    changes = Changes(union)
    for name in ("d", "plain"):
        os.close(changes.create(get(union, name), b"new", 0o600, ME)[2])
        assert (FOREIGN + "opaque") not in os.listxattr(tmp_path / "upper" / name)
    markers = union.markers
    stored = [os.fsencode(name) for name in os.listxattr(tmp_path / "upper/plain")]
    assert markers.shown_names(stored) == [FOREIGN.encode() + b"opaque"]
    assert markers.stored_name(FOREIGN.encode() + b"opaque") == FOREIGN.encode() + b"overlay.opaque"


def test_the_diff(tmp_path: Path, area: Path) -> None:
    """What they mean, the same as for overlayfs's own."""
    top, bottom = layers.build(area)
    plain = layers.translate(top, area / "plain")

    def found(upper: Path) -> list[tuple[str, bytes]]:
        return list(diff(str(upper), [str(bottom)], b"trusted.overlay."))

    assert found(top) == found(plain)
    assert ("D", b"/one") in found(top)
    assert not any(b".wh." in path for _, path in found(top))
    (top / OPAQUE.decode()).touch()
    assert ("D", b"/d/y") in found(top)


def test_an_odd_upper(tmp_path: Path, open_union: OpenUnion) -> None:
    """A directory as a whiteout, and a name beside its whiteout, as after a crash of fuse-overlayfs."""
    for name in ("a", "b/x"):
        (tmp_path / "l0" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "l0" / name).touch()
    (tmp_path / "upper/.wh.a").mkdir(parents=True)
    (tmp_path / "upper/b").mkdir()
    (tmp_path / "upper/.wh.b").touch()
    union = open_union(1)
    assert names(union) == {b"b"}
    assert names(union, "b") == set()
    changes = Changes(union)
    os.close(changes.create(union.nodes.root, b"a", 0o600, ME)[2])
    changes.unlink(union.nodes.root, b"a")
    changes.rmdir(union.nodes.root, b"b")
    assert names(union) == set()
    again = open_union_again(union, open_union)
    assert names(again) == set()


def open_union_again(union: Any, open_union: OpenUnion) -> Any:
    """The same layers, opened anew."""
    union.close()
    union.stack.close()
    return open_union(1)


def test_a_copied_up_directory_has_none(
    tmp_path: Path, open_union: OpenUnion, calls: Callable[[], Counter[str]]
) -> None:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").touch()
    union = open_union(1)
    copy_up(union, get(union, "d/file"))
    directory = get(union, "d")
    calls()
    assert union.lookup(directory, b"absent") is None
    os.close(Changes(union).create(directory, b"new", 0o600, ME)[2])
    assert calls()["named"] == 0
