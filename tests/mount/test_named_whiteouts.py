"""Whiteouts by name (AUFS, OCI, fuse-overlayfs): in lowers, and in an upper that fuse-overlayfs wrote."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, succeed
from tests.mount.user_calls import UID, Host
from tests.oracle import normalise
from tests.support import named, snapshot
from tests.support.mounting import kernel_mounted, mounted
from tests.support.world import errno_of

CLOCK = normalise.Clock.start()
MANY = 12
"""More lowers than are looked at one after the other."""


def _make(area: Path, *more: str) -> None:
    for name in ("upper", "work", *more):
        (area / name).mkdir()


def _same_tree(ours: Path, theirs: Path) -> None:
    lines = normalise.compare_trees(snapshot.take(ours), snapshot.take(theirs), CLOCK, lambda path: False)
    assert not lines, "\n".join(lines[:20])


def _walk_by_name(root: Path, *paths: str) -> dict[str, bool]:
    """Which paths exist, by lookups alone."""
    return {path: os.path.lexists(root / path) for path in paths}


PATHS = (
    "one", "both", "d/x", "d/y", "o/old", "o/new", "o/sub", "o/sub/x", "cut", "cut/x", "cut/new", "file",
    "reborn/x", "reborn/new", "stays/x", "stays/new", "absent",
)  # fmt: skip


@pytest.mark.parametrize("listed_first", [True, False])
@pytest.mark.parametrize("count", [0, MANY])
def test_lowers(kernel_overlay: None, area: Path, session: str, count: int, listed_first: bool) -> None:
    """The tree is that of the same layers in overlayfs's form, in whichever order names are found."""
    layers = named.build(area)
    between = [area / f"between{number}" for number in range(count)]
    for path in between:
        (path / "d").mkdir(parents=True)
    translated = [named.translate(layer, area / f"plain-{layer.name}") for layer in layers]
    _make(area)
    lowers = [layers[0], *between, layers[1]]
    with (
        mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount,
        contextlib.chdir(area),
        kernel_mounted(area, lowers=[translated[0], *between, translated[1]]) as kernel,
    ):
        if listed_first:
            _same_tree(mount.mountpoint, kernel.mountpoint)
        for _ in range(2):
            found = _walk_by_name(mount.mountpoint, *PATHS)
            assert found == _walk_by_name(kernel.mountpoint, *PATHS)
        for name in range(10):  # so many lookups that directories get listed
            assert not (mount.mountpoint / f"d/absent{name}").exists()
        assert not (mount.mountpoint / "d/x").exists()
        _same_tree(mount.mountpoint, kernel.mountpoint)
        assert not os.path.lexists(mount.mountpoint / ".wh.one")


@pytest.mark.parametrize("layer", ["top", "upper"])
def test_an_opaque_root(area: Path, root: None, session: str, layer: str) -> None:
    """The root of an image layer may be opaque, too."""
    _make(area, "top", "bottom")
    (area / "bottom/old").write_text("old")
    (area / "top/middle").write_text("middle")
    (area / layer / ".wh..wh..opq").touch()
    lowers = [area / "top", area / "bottom"]
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        assert os.listdir(mount.mountpoint) == ([] if layer == "upper" else ["middle"])
        assert not (mount.mountpoint / "old").exists()
        (mount.mountpoint / "old").write_text("new")
    assert (area / "upper/old").read_text() == "new"


def test_removed_names_stay_removed(area: Path, root: None, session: str) -> None:
    """A removed and recreated directory over a lower with whiteouts by name, over two mounts."""
    _make(area)
    named.build(area)
    layers = {"lowers": [area / "top", area / "bottom"], "upper": area / "upper", "work": area / "work"}
    with mounted(area, **layers, session=session) as mount:  # type: ignore[arg-type]
        for name in ("d", "o", "stays"):
            shutil.rmtree(mount.mountpoint / name)
            (mount.mountpoint / name).mkdir()
        (mount.mountpoint / "one").mkdir()
        (mount.mountpoint / "file").mkdir()
        os.rename(mount.mountpoint / "both", mount.mountpoint / "moved")
        before = named.contents(mount.mountpoint)
    assert before == {
        "cut": None, "cut/new": "top cut/new", "d": None, "file": None, "moved": "top both", "o": None,
        "one": None, "reborn": None, "reborn/new": "top reborn/new", "stays": None,
    }  # fmt: skip
    with mounted(area, **layers, session=session) as mount:  # type: ignore[arg-type]
        assert named.contents(mount.mountpoint) == before


def test_an_upper_that_a_user_wrote_by_fuse_overlayfs(host: Host, place: Place) -> None:
    """Without root its opaque directories have another xattr, beside `.wh..wh..opq`."""
    (place.lower / "d").mkdir()
    (place.lower / "d/x").write_text("x")
    for path in (place.lower / "d", place.lower / "d/x"):
        os.chown(path, UID, UID)
    if host.run("fuse-overlayfs", "-o", place.data, place.merged).returncode != 0:
        pytest.skip("an ordinary user cannot run fuse-overlayfs here")
    change = f"rm -r {place.merged}/d; mkdir {place.merged}/d; rm {place.merged}/deep"
    succeed(host.run("sh", "-c", change))
    succeed(host.run("fusermount3", "-u", place.merged))
    assert "user.fuseoverlayfs.opaque" in os.listxattr(place.upper / "d")
    host.mount()
    assert host.run("ls", "-A", place.merged, f"{place.merged}/d").stdout.split() == [
        f"{place.merged}:", "base", "d", f"{place.merged}/d:",
    ]  # fmt: skip
    assert host.unionfs("diff", place.merged).stdout == "C /d\nD /d/x\nD /deep\n"
    succeed(host.unionfs("umount", place.merged))


@pytest.mark.parametrize("layer", ["top", "bottom", "upper"])
def test_xattr_whiteouts_in_unmarked_directories(
    kernel_overlay: None, area: Path, session: str, layer: str
) -> None:
    """As on overlayfs, they are listed but not found, in merged and in other directories."""
    sides = [area / "ours", area / "theirs"]
    for side in sides:
        for name in ("top/d", "bottom/d", "upper/d", "work", f"{layer}/own"):
            (side / name).mkdir(parents=True)
        for name in ("d/x", "own/x", "x"):
            (side / layer / name).touch()
            os.setxattr(side / layer / name, "trusted.overlay.whiteout", b"y")
        if layer != "bottom":
            (side / "bottom/d/x").write_text("hidden")
    ours, theirs = (
        {"lowers": [side / "top", side / "bottom"], "upper": side / "upper", "work": side / "work"}
        for side in sides
    )
    with (
        mounted(area, **ours, session=session) as mount,  # type: ignore[arg-type]
        kernel_mounted(area, **theirs) as kernel,  # type: ignore[arg-type]
    ):
        for top in ("", "d", "own"):
            assert sorted(os.listdir(mount.mountpoint / top)) == sorted(os.listdir(kernel.mountpoint / top))
        for name in ("d/x", "own/x", "x"):
            found = [errno_of(os.stat, side.mountpoint / name) for side in (mount, kernel)]
            assert found == [errno.ENOENT, errno.ENOENT]


def test_reserved_names(area: Path, root: None, session: str) -> None:
    """No name can be made that the next mount would take for a whiteout; other names with a dot can."""
    _make(area, "lower")
    (area / "lower/file").write_text("file")
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        top = mount.mountpoint
        for name in (".wh.file", ".wh..wh..opq", ".wh.", ".wh.x"):
            calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
                (os.open, (top / name, os.O_CREAT | os.O_WRONLY)),
                (os.mkdir, (top / name,)),
                (os.mkfifo, (top / name,)),
                (os.symlink, ("x", top / name)),
                (os.link, (top / "file", top / name)),
                (os.rename, (top / "file", top / name)),
            ]
            assert [errno_of(call, *arguments) for call, arguments in calls] == [errno.EINVAL] * len(calls)
            assert errno_of(os.stat, top / name) == errno.ENOENT
            assert errno_of(os.unlink, top / name) == errno.ENOENT
        (top / ".whx").write_text("x")
        assert named.contents(top) == {".whx": "x", "file": "file"}


@pytest.mark.parametrize("by_name", [True, False])
def test_upper_of_fuse_overlayfs(area: Path, root: None, session: str, by_name: bool) -> None:
    """What fuse-overlayfs changed looks the same here; what is changed here looks the same there again."""
    _make(area, "lower")
    for name in ("gone", "again", "d/a", "d/b", "r/x", "target", "linked", "dir/x", "far/x", "moved/x"):
        (area / "lower" / name).parent.mkdir(exist_ok=True)
        (area / "lower" / name).write_text(name)
    lowers = [area / "lower"]
    with named.fuse_overlayfs(area, lowers, by_name=by_name) as theirs:
        for name in ("gone", "again", "target", "linked", "d/a"):
            (theirs / name).unlink()
        for name in ("r", "dir", "far", "moved"):
            shutil.rmtree(theirs / name)
        (theirs / "r").mkdir()
        (theirs / "own").write_text("own")
        before = named.contents(theirs)
    assert before == {"d": None, "d/b": "d/b", "own": "own", "r": None}
    assert (area / "upper/.wh.gone").exists() is by_name
    with mounted(
        area, lowers=lowers, upper=area / "upper", work=area / "work", session=session
    ) as mount:
        ours = mount.mountpoint
        assert _walk_by_name(ours, "gone", "d/a", "r/x") == dict.fromkeys(("gone", "d/a", "r/x"), False)
        assert named.contents(ours) == before
        (ours / "again").write_text("new")
        (ours / "dir").mkdir()
        (ours / "r/x").write_text("new")
        (ours / "r/x").unlink()
        os.link(ours / "own", ours / "linked")
        os.rename(ours / "own", ours / "target")
        (ours / "made").mkdir()
        os.rename(ours / "made", ours / "moved")
        os.mknod(ours / "far", stat.S_IFREG | 0o600)
        (ours / "far").unlink()
        after = named.contents(ours)
    assert after == {
        "again": "new", "d": None, "d/b": "d/b", "dir": None, "linked": "own", "moved": None, "r": None,
        "target": "own",
    }  # fmt: skip
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        assert named.contents(mount.mountpoint) == after
    with named.fuse_overlayfs(area, lowers, by_name=by_name) as theirs:
        assert named.contents(theirs) == after


def _opaque_file(directory: Path) -> None:
    (directory / ".wh..wh..opq").touch()


def _device(directory: Path) -> None:
    """fuse-overlayfs leaves it in a removed and recreated directory whose copy was in the upper."""
    os.mknod(directory / ".wh..opq", stat.S_IFCHR | 0o700, 0)


def _xattr(name: str) -> Callable[[Path], None]:
    return lambda directory: os.setxattr(directory, name, b"y")


MARKERS: dict[str, Sequence[Callable[[Path], None]]] = {
    "file": [_opaque_file],
    "device": [_device],
    "file-device": [_opaque_file, _device],
    "user": [_xattr("user.fuseoverlayfs.opaque")],
    "trusted": [_xattr("trusted.overlay.opaque")],
    "all": [_opaque_file, _device, _xattr("trusted.overlay.opaque")],
}


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_each_marker_of_fuse_overlayfs(area: Path, root: None, session: str, where: str) -> None:
    """Directories with them show what fuse-overlayfs shows, can be removed, and made again."""
    _make(area, "lower", "bottom")
    for name, marks in MARKERS.items():
        (area / "bottom" / name / "sub").mkdir(parents=True)
        for path in ("old", ".opq", "sub/x"):
            (area / "bottom" / name / path).write_text("old")
        (area / where / name).mkdir()
        for mark in marks:
            mark(area / where / name)
        (area / where / name / "new").write_text("new")
    lowers = [area / "lower", area / "bottom"]
    with named.fuse_overlayfs(area, lowers) as theirs:
        before = named.contents(theirs)
    assert before["file/new"] == "new"
    assert "file/old" not in before
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        ours = mount.mountpoint
        names = [
            f"{name}/{path}" for name in MARKERS
            for path in ("old", ".opq", "sub/x", ".wh..opq", ".wh..wh..opq", "new")
        ]  # fmt: skip
        assert _walk_by_name(ours, *names) == {name: name in before for name in names}
        assert named.contents(ours) == before
        for name in MARKERS:
            shutil.rmtree(ours / name)
        assert named.contents(ours) == {}
        for name in MARKERS:
            (ours / name).mkdir()
            (ours / name / "last").write_text("last")
        after = named.contents(ours)
    assert after == {**dict.fromkeys(MARKERS), **dict.fromkeys((f"{name}/last" for name in MARKERS), "last")}
    with named.fuse_overlayfs(area, lowers) as theirs:
        assert named.contents(theirs) == after


@pytest.mark.parametrize("merged", [False, True])
def test_whiteouts_of_no_name(area: Path, root: None, session: str, merged: bool) -> None:
    """They hide nothing, and no name is listed for them: least of all `.` and `..` once more."""
    _make(area, "top", "bottom")
    for lower in ("top", "bottom") if merged else ("top",):
        (area / lower / "d").mkdir()
        (area / lower / "d" / lower).touch()
    for name in (".wh.", ".wh..", ".wh..."):
        (area / "top/d" / name).touch()
    lowers = [area / "top", area / "bottom"]
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        directory = mount.mountpoint / "d"
        shown = subprocess.run(["ls", "-a", directory], capture_output=True, text=True, check=True).stdout
        assert shown.split() == sorted([".", "..", "top", *(["bottom"] if merged else [])])
