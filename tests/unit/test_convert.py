"""`convert`: each form shows the same tree where it is understood, and a half converted upper does, too."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed, unionfs
from tests.support import mounting, named, snapshot
from unionfs.errors import LayerError
from unionfs.union.convert import FORMS, Converted, convert
from unionfs.union.resting import resting

T, U = "trusted.overlay.", "user.overlay."


def _convert(area: Path, form: str, *, userxattr: bool = False) -> Converted:
    with resting(str(area / "upper"), userxattr=userxattr, writable=True) as layers:
        return convert(layers, form)


def _shown(area: Path, *, userxattr: bool = False) -> set[bytes]:
    return set(named.shown(area / "upper", [area / "lower"], userxattr=userxattr))


@pytest.fixture
def written(kernel_overlay: None, area: Path) -> Path:
    """An upper that the kernel wrote."""
    for name in ("a", "b/x", "b/y", "c/x", "d/sub/x", "e/x", "f"):
        (area / "lower" / name).parent.mkdir(parents=True, exist_ok=True)
        (area / "lower" / name).write_text(name)
    for name in ("upper", "work"):
        (area / name).mkdir()
    with mounting.kernel_mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work"
    ) as mount:
        (mount.mountpoint / "a").unlink()
        (mount.mountpoint / "b/x").unlink()
        for name in ("c", "d/sub", "e"):
            shutil.rmtree(mount.mountpoint / name)
        (mount.mountpoint / "c").mkdir()
        (mount.mountpoint / "c/new").write_text("new")
        (mount.mountpoint / "d/sub").write_text("now a file")
        (mount.mountpoint / "f").write_text("changed")
        os.setxattr(mount.mountpoint / "f", "user.mine", b"1")
    return area


SHOWN = {b"/b", b"/b/y", b"/c", b"/c/new", b"/d", b"/d/sub", b"/f"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", FORMS)
def test_forms(written: Path, start: str, form: str) -> None:
    """From each form to each: the tree is the same, times too; a second time nothing is left to do."""
    area = written
    assert _shown(area) == SHOWN
    original = snapshot.take(area / "upper")
    times = {path: path.stat().st_mtime_ns for path in (area / "upper").rglob("*") if path.is_dir()}
    _convert(area, start)
    _convert(area, form)
    assert _shown(area) == SHOWN
    after = snapshot.take(area / "upper")
    assert _convert(area, form) == Converted()
    assert snapshot.take(area / "upper") == after
    assert {path: path.stat().st_mtime_ns for path in (area / "upper").rglob("*") if path.is_dir()} == times
    names = {path.name for path in (area / "upper").rglob("*") if path.name.startswith(".wh.")}
    assert names == (set() if form == "overlay" else {".wh.a", ".wh.x", ".wh.e", ".wh..wh..opq"})
    xattrs = {
        name for path in (area / "upper").rglob("*") for name in os.listxattr(path, follow_symlinks=False)
    }
    own = {"overlay": T + "opaque", "fuse-overlayfs": "user.fuseoverlayfs.opaque", "oci": "user.mine"}
    expected = {"user.mine"} if start == "oci" and form != "overlay" else {"user.mine", own[form]}
    assert xattrs - {T + "origin", T + "impure"} == expected
    if form == start == "overlay":
        assert after == original
    if form == "overlay":
        with mounting.kernel_mounted(
            area, lowers=[area / "lower"], upper=area / "upper", work=area / "work"
        ) as mount:
            assert set(named.contents(mount.mountpoint)) == {os.fsdecode(path[1:]) for path in SHOWN}
    else:
        with named.fuse_overlayfs(area, [area / "lower"]) as theirs:
            assert set(named.contents(theirs)) == {os.fsdecode(path[1:]) for path in SHOWN}


@pytest.mark.parametrize("form", ["oci", "fuse-overlayfs"])
def test_whiteouts_by_xattr(written: Path, form: str) -> None:
    """As overlayfs has them inside of a user namespace, in a directory whose opaque is x."""
    area = written
    (area / "upper/b/y").touch()
    os.setxattr(area / "upper/b/y", T + "whiteout", b"")
    os.setxattr(area / "upper/b", T + "opaque", b"x")
    assert _shown(area) == SHOWN - {b"/b/y"}
    assert _convert(area, form).whiteouts == 4
    assert sorted(os.listdir(area / "upper/b")) == [".wh.x", ".wh.y"]
    assert _shown(area) == SHOWN - {b"/b/y"}
    with named.fuse_overlayfs(area, [area / "lower"]) as theirs:
        assert set(named.contents(theirs)) == {os.fsdecode(path[1:]) for path in SHOWN - {b"/b/y"}}


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_an_opaque_xattr_that_cannot_be_set(
    written: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """On a filesystem without such xattrs the name suffices; other errors are reported."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "setxattr", refuse)
        with nullcontext() if error == errno.EOPNOTSUPP else pytest.raises(OSError, match="No space"):
            assert _convert(written, "fuse-overlayfs").opaque == 1
    assert _shown(written) == SHOWN
    assert (written / "upper/c/.wh..wh..opq").exists()


@pytest.mark.parametrize("form", FORMS)
def test_interrupted(written: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before whichever change it is killed, everything is shown as before; the next call finishes."""
    area = written
    _convert(area, "oci" if form == "overlay" else "overlay")
    subprocess.run(["cp", "-a", area / "upper", area / "start"], check=True)
    calls: list[str] = []

    def counted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: object, **more: object) -> object:
            calls.append(name)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return call(*arguments, **more)

        return counting

    limit, ended = 0, False
    while not ended:
        limit += 1
        shutil.rmtree(area / "upper")
        subprocess.run(["cp", "-a", area / "start", area / "upper"], check=True)
        calls.clear()
        with monkeypatch.context() as patched:
            for name in ("unlink", "setxattr", "removexattr", "mknod", "open"):
                patched.setattr(os, name, counted(name, getattr(os, name)))
            try:
                _convert(area, form)
            except KeyboardInterrupt:
                pass
            else:
                ended = True
        assert _shown(area) == SHOWN
        _convert(area, form)
        assert _shown(area) == SHOWN
        assert _convert(area, form) == Converted()
    assert limit > 8


def test_prefixes(written: Path) -> None:
    """Markers under the other prefix come under the mount's own, and back; opaque hides under either."""
    area = written
    assert _convert(area, "overlay", userxattr=True).xattrs > 0
    assert os.getxattr(area / "upper/c", U + "opaque") == b"y"
    assert T + "opaque" not in os.listxattr(area / "upper/c")
    assert _shown(area, userxattr=True) == SHOWN
    os.setxattr(area / "upper/c", T + "opaque", b"x")
    os.setxattr(area / "upper/c", U + "from-a-user", b"data")
    _convert(area, "overlay")
    assert os.getxattr(area / "upper/c", T + "opaque") == b"y"
    assert os.listxattr(area / "upper/c").count(U + "from-a-user") == 1
    assert _shown(area) == SHOWN


def test_a_crash_of_fuse_overlayfs(written: Path) -> None:
    """What stands beside its whiteout stays visible."""
    area = written
    for name in (".wh.b", ".wh.f", ".wh..wh.plnk"):
        (area / "upper" / name).touch()
    assert _shown(area) == SHOWN - {b"/b/y"}
    assert _convert(area, "overlay").whiteouts == 2
    assert _shown(area) == SHOWN - {b"/b/y"}
    assert [name for name in os.listdir(area / "upper") if name.startswith(".wh.")] == [".wh..wh.plnk"]


def _xattr(name: str, value: bytes, path: str = "c") -> Callable[[Path], None]:
    return lambda upper: os.setxattr(upper / path, name, value)


@pytest.mark.parametrize(
    ("form", "make", "cause"),
    [
        ("oci", _xattr(T + "redirect", b"/b"), "redirect"),
        ("fuse-overlayfs", _xattr(T + "redirect", b"/b"), "redirect"),
        ("oci", _xattr(T + "metacopy", b"", "f"), "metacopy"),
        ("oci", _xattr(T + "protattr", b"i", "f"), "protattr"),
        ("oci", _xattr(T + "overlay.mine", b"1"), "trusted.overlay.mine"),
        ("fuse-overlayfs", _xattr("user.fuseoverlayfs.overlay.x", b"1"), "user.fuseoverlayfs.x"),
        ("overlay", _xattr(U + "overlay.mine", b"1"), "user.overlay.overlay.mine"),
        ("oci", lambda upper: os.mknod(upper / ("n" * 253), stat.S_IFCHR, 0), "four more bytes"),
        ("overlay", lambda upper: (upper / ".wh.q").mkdir(), "directory"),
        ("overlay", lambda upper: (upper / ".wh..wh..opq").touch(), "root is opaque"),
    ],
)
def test_refused(written: Path, form: str, make: Callable[[Path], object], cause: str) -> None:
    """What a form cannot express is refused before anything changes."""
    make(written / "upper")
    before = snapshot.take(written / "upper")
    with pytest.raises(LayerError, match="cannot be converted to the form of") as error:
        _convert(written, form)
    assert cause in str(error.value)
    assert snapshot.take(written / "upper") == before


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_whiteouts_of_no_name(root: None, area: Path, name: str) -> None:
    """They are no whiteouts of the directory itself or of the one above, which may be outside."""
    (area / "upper/d").mkdir(parents=True)
    for directory in ("upper", "upper/d"):
        (area / directory / name).touch()
    assert _convert(area, "overlay").whiteouts == 0
    for directory in (area, area / "upper", area / "upper/d"):
        assert T + "opaque" not in os.listxattr(directory)


def test_command(written: Path) -> None:
    done = unionfs("convert", "-u", written / "upper", "--to", "oci")
    assert [line.split() for line in succeed(done).splitlines()][1][:2] == ["3", "1"]
    assert (written / "upper/.wh.a").exists()
    os.setxattr(written / "upper/b", T + "redirect", b"/c")
    refused(unionfs("convert", "-u", written / "upper", "--to", "oci"), "redirect", "copy it")
