"""Targets: inside the merged root despite symlinks, created if missing, and removed after a failure."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion
from tests.unit.union_support import open_union as open_union
from unionfs.errors import UserError
from unionfs.storage.attach import attach
from unionfs.storage.served import UnionTree
from unionfs.storage.sources import Sources
from unionfs.storage.targets import MountedTree, Tree, find, prepare
from unionfs.storage.volumes import Volumes
from unionfs.sys.mountinfo import mounted_at


@pytest.fixture(params=["directory", "union"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, open_union: OpenUnion) -> Iterator[Tree]:
    """A tree with all kinds of symlinks: a real directory, and the same as the lower of a union."""
    os.umask(0o022)
    top = tmp_path / "l0"
    (top / "var/run").mkdir(parents=True)
    (top / "run").mkdir()
    (top / "file").touch()
    (top / "etc").mkdir()
    for name, target in {
        "abs": "/etc", "rel": "var/../etc", "up": "../../../../../etc", "dangling": "/srv/new/place",
        "loop": "loop", "self": ".", "root": "/", "var/lock": "/run/lock", "chain": "abs/sub",
        "deep": "nowhere/../etc",
    }.items():  # fmt: skip
        (top / name).symlink_to(target)
    if request.param == "union":
        union = open_union()
        yield UnionTree(union)
        return
    fd = os.open(top, os.O_PATH)
    yield MountedTree(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("target", "there", "missing"),
    [
        ("/etc", "etc", ""),
        ("/abs", "etc", ""),
        ("/abs/x", "etc", "x"),
        ("/rel/x/y", "etc", "x/y"),
        ("/up", "etc", ""),
        ("/up/../..", "", ""),
        ("/dangling/sub", "", "srv/new/place/sub"),
        ("/self/self/var", "var", ""),
        ("/var/lock", "run", "lock"),
        ("/chain", "etc", "sub"),
        ("/root", "", ""),
    ],
)
def test_resolution(tree: Tree, target: str, there: str, missing: str) -> None:
    found, lacking = find(tree, target)
    assert b"/".join(found).decode() == there
    assert b"/".join(lacking).decode() == missing


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("/loop", "loop of symlinks"),
        ("/file/x", "not a directory"),
        ("/deep", "something that is missing"),
        ("/root", "the union's root"),
        ("/up/..", "the union's root"),
        ("/file", "is a file in the union"),
        ("/" + "n" * 300, "too long"),
    ],
)
def test_refused(tree: Tree, target: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        prepare(tree, target, "the source", directory=True)
    assert str(caught.value).endswith(".")


def test_a_directory_is_no_place_for_a_file(tree: Tree) -> None:
    with pytest.raises(UserError, match="is a directory in the union, but the source is a file"):
        prepare(tree, "/etc", "the source", directory=False)


@pytest.mark.parametrize("directory", [True, False])
def test_missing_is_made_and_unmade(tree: Tree, directory: bool) -> None:
    target = prepare(tree, "/dangling/a", "the source", directory=directory)
    assert target.path == "/srv/new/place/a"
    assert tree.kind(target.names) == (stat.S_IFDIR if directory else stat.S_IFREG)
    assert tree.kind(target.names[:-1]) == stat.S_IFDIR
    target.undo()
    with pytest.raises(FileNotFoundError):
        tree.kind((b"srv",))
    target.undo()
    # Existing entries stay.
    prepare(tree, "/etc", "the source", directory=True).undo()
    assert tree.kind((b"etc",)) == stat.S_IFDIR


def test_a_failure_on_the_way_leaves_nothing(tree: Tree) -> None:
    with pytest.raises(UserError, match="too long"):
        prepare(tree, "/srv/new/" + "n" * 300, "the source", directory=True)
    with pytest.raises(FileNotFoundError):
        tree.kind((b"srv",))


def test_modes_are_dockers(open_union: OpenUnion, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    fd = os.open(tmp_path / "tree", os.O_PATH)
    try:
        prepare(MountedTree(fd), "/a/b", "s", directory=False)
    finally:
        os.close(fd)
    assert stat.S_IMODE((tmp_path / "tree/a").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "tree/a/b").stat().st_mode) == 0o644


def test_without_an_upper_nothing_can_be_made(open_union: OpenUnion) -> None:
    tree = UnionTree(open_union(upper=False))
    with pytest.raises(UserError, match=r"does not exist, and nothing can be made there .* an upper"):
        prepare(tree, "/x", "the source", directory=True)


def test_a_union_that_is_gone_is_not_mounted_on(tmp_path: Path, open_union: OpenUnion) -> None:
    """The mountpoint then shows the host's own directory."""
    stack = open_union().stack
    sources = Sources(Volumes(str(tmp_path)), "nobody", kernel_mounts=False)
    elsewhere = mounted_at("/proc")
    assert elsewhere is not None
    with pytest.raises(UserError, match="was unmounted before its storage was there"):
        attach(replace(elsewhere, mountpoint=str(tmp_path)), sources, stack)
    with pytest.raises(UserError, match=r"storage was there \(no such file"):
        attach(replace(elsewhere, mountpoint=str(tmp_path / "gone")), sources, stack)
