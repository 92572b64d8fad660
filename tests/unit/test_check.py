"""`check`: what the kernel and the union write is clean; what is wrong is found, and repaired unseen."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, unionfs
from tests.support import mounting, named, snapshot
from unionfs.sys.fds import Owned
from unionfs.union.check import check
from unionfs.union.checkwork import Finding
from unionfs.union.resting import names_below, resting

T = "trusted.overlay."


def _whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, 0)


def _make(area: Path) -> None:
    for name in ("upper", "work", "lower/d/sub", "lower/e"):
        (area / name).mkdir(parents=True, exist_ok=True)
    for name in ("d/a", "d/sub/b", "e/c", "f", "g", "big"):
        (area / "lower" / name).write_text(name)
    os.link(area / "lower/f", area / "lower/f2")


def findings(area: Path, *, repair: bool = False, userxattr: bool = False) -> list[Finding]:
    """The findings of a check; ``repair``: each is repaired before the next is looked for."""
    found = []
    with resting(
        str(area / "upper"), [str(area / "lower")], str(area / "work"), userxattr=userxattr, writable=repair
    ) as layers:
        for finding in check(layers):
            found.append(finding)
            if repair and finding.repair is not None:
                finding.repair()
    return found


@contextlib.contextmanager
def _kernel(area: Path, *options: str) -> Iterator[Path]:
    with mounting.kernel_mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", options=options
    ) as mount:
        yield mount.mountpoint


@pytest.mark.parametrize(
    "options",
    [(), ("index=on",), ("redirect_dir=on", "index=on"), ("redirect_dir=on", "metacopy=on"),
     ("index=on", "nfs_export=on"), ("userxattr",)],
)  # fmt: skip
def test_what_the_kernel_writes_is_clean(kernel_overlay: None, area: Path, options: tuple[str, ...]) -> None:
    _make(area)
    with _kernel(area, *options) as merged:
        _change(merged, renames="redirect_dir=on" in options)
    assert findings(area, userxattr="userxattr" in options) == []


@pytest.mark.parametrize("options", [(), ("redirect_dir=on", "metacopy=on"), ("userxattr",)])
def test_what_the_union_writes_is_clean(root: None, area: Path, options: tuple[str, ...]) -> None:
    _make(area)
    with mounting.mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", options=options
    ) as mount:
        _change(mount.mountpoint, renames="redirect_dir=on" in options)
    assert findings(area, userxattr="userxattr" in options) == []


def _change(merged: Path, *, renames: bool) -> None:
    """One change of each kind."""
    (merged / "f").write_text("changed")
    (merged / "big").chmod(0o600)
    (merged / "g").unlink()
    (merged / "new").mkdir()
    (merged / "new/file").touch()
    os.setxattr(merged / "new", "user.mine", b"1")
    shutil.rmtree(merged / "e")
    (merged / "e").mkdir()
    (merged / "d/a").rename(merged / "new/a")
    if renames:
        (merged / "d").rename(merged / "moved")
        (merged / "moved/sub").rename(merged / "new/sub")
    (merged / "f2").unlink()


def _set(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, T + name, value, follow_symlinks=False)


def _dangling(area: Path) -> None:
    (area / "upper/d").mkdir()
    _set(area / "upper/d", "redirect", b"/nowhere")
    (area / "upper/d/own").touch()


def _broken(area: Path) -> None:
    (area / "upper/d").mkdir()
    _set(area / "upper/d", "redirect", b"../..")
    (area / "upper/d/own").touch()


def _nothing_below(area: Path) -> None:
    _whiteout(area / "upper/absent")


def _nothing_below_opaque(area: Path) -> None:
    (area / "upper/d").mkdir()
    _set(area / "upper/d", "opaque", b"y")
    _whiteout(area / "upper/d/a")


def _named_nothing(area: Path) -> None:
    (area / "upper/.wh.absent").touch()


def _beside(area: Path) -> None:
    (area / "upper/d").mkdir()
    (area / "upper/.wh.d").touch()


def _unmarked(area: Path) -> None:
    (area / "upper/f").touch()
    _set(area / "upper/f", "whiteout", b"")


def _without_data(area: Path) -> None:
    (area / "upper/orphan").write_text("x")
    _set(area / "upper/orphan", "metacopy", b"")


def _without_redirected_data(area: Path) -> None:
    (area / "upper/orphan").write_text("x")
    _set(area / "upper/orphan", "metacopy", b"")
    _set(area / "upper/orphan", "redirect", b"/d/sub")


def _nlink(value: bytes) -> Callable[[Path], None]:
    def make(area: Path) -> None:
        (area / "upper/n").touch()
        _set(area / "upper/n", "nlink", value)

    return make


def _odd(name: str, value: bytes) -> Callable[[Path], None]:
    def make(area: Path) -> None:
        (area / "upper/odd").mkdir()
        _set(area / "upper/odd", name, value)

    return make


def _mixed(area: Path) -> None:
    (area / "upper/d").mkdir()
    os.setxattr(area / "upper/d", "user.overlay.opaque", b"y")


def _left(area: Path) -> None:
    (area / "work/work/#1/deep").mkdir(parents=True)


def _foreign(area: Path) -> None:
    (area / "work/work").mkdir()
    (area / "work/work/mine").touch()


def _foreign_beside(area: Path) -> None:
    (area / "work/mine").touch()


def _index_orphan(area: Path) -> None:
    (area / "work/index").mkdir()
    handle = bytes([0, 0xFB, 29, 0, 1]) + bytes(16) + bytes(8)
    (area / "work/index" / handle.hex()).touch()


def _index_name(area: Path) -> None:
    (area / "work/index").mkdir()
    (area / "work/index/odd").touch()


def _no_directory(name: str, *, symlink: bool) -> Callable[[Path], None]:
    def make(area: Path) -> None:
        if symlink:
            (area / "work" / name).symlink_to("/")
        else:
            (area / "work" / name).touch()

    return make


CASES: dict[str, tuple[Callable[[Path], None], str, str, bool]] = {
    "dangling redirect": (_dangling, "upper/d", "leads to /nowhere", True),
    "broken redirect": (_broken, "upper/d", "cannot be followed", True),
    "whiteout of nothing": (_nothing_below, "upper/absent", "no lower has", True),
    "whiteout in an opaque directory": (_nothing_below_opaque, "upper/d/a", "no lower has", True),
    "whiteout by name of nothing": (_named_nothing, "upper/.wh.absent", "no lower has", True),
    "whiteout beside its name": (_beside, "upper/.wh.d", "fuse-overlayfs would hide", True),
    "unmarked xattr whiteout": (_unmarked, "upper/f", "not marked", True),
    "metacopy": (_without_data, "upper/orphan", "without its data", False),
    "metacopy of a directory": (_without_redirected_data, "upper/orphan", "without its data", False),
    "nlink": (_nlink(b"U-1"), "upper/n", "leaves the file without links (1-1)", True),
    "odd nlink": (_nlink(b"2"), "upper/n", "not a difference", True),
    "opaque": (_odd("opaque", b"yes"), "upper/odd", "neither y nor x", True),
    "origin": (_odd("origin", b"\0\xfb\x1c"), "upper/odd", "not a file handle", True),
    "impure": (_odd("impure", b"n"), "upper/odd", "not the y", True),
    "uuid": (_odd("uuid", b"n"), "upper/odd", "not a UUID", True),
    "protattr": (_odd("protattr", b"q"), "upper/odd", "other flags", True),
    "unknown": (_odd("from-the-future", b"q"), "upper/odd", "none that overlayfs knows", False),
    "other prefix": (_mixed, "upper/d", "has no meaning for a mount with trusted.overlay.*", False),
    "leftover": (_left, "work/work/#1", "did not end cleanly", True),
    "foreign": (_foreign, "work/work/mine", "no union filesystem", False),
    "foreign beside work": (_foreign_beside, "work/mine", "no union filesystem", False),
    "index": (_index_orphan, "work/index/", "no name in the union", True),
    "work is a symlink": (_no_directory("work", symlink=True), "work/work", "not a directory", False),
    "work is a file": (_no_directory("work", symlink=False), "work/work", "not a directory", False),
    "index is a symlink": (_no_directory("index", symlink=True), "work/index", "not a directory", False),
    "index is a file": (_no_directory("index", symlink=False), "work/index", "not a directory", False),
    "index name": (_index_name, "work/index/odd", "not that of an entry", True),
}


SEEN = {"broken redirect": {b"/d", b"/d/own"}, "unmarked xattr whiteout": {b"/f"}}
"""The paths at which a repair changes what a union shows."""


@pytest.mark.parametrize("case", CASES)
def test_findings(root: None, area: Path, case: str) -> None:
    """Each is found, without a change; repaired, it is gone, and the union shows the same tree."""
    make, path, cause, repairable = CASES[case]
    _make(area)
    make(area)

    before = snapshot.take(area / "upper"), snapshot.take(area / "work")
    (finding,) = findings(area)
    assert os.fsdecode(finding.path).startswith(str(area / path))
    assert cause in finding.cause
    assert (finding.repair is not None) is repairable
    assert (snapshot.take(area / "upper"), snapshot.take(area / "work")) == before
    if repairable:
        there = named.shown(area / "upper", [area / "lower"])
        findings(area, repair=True)
        changed = named.shown(area / "upper", [area / "lower"]).items() ^ there.items()
        assert {path for path, _ in changed} == SEEN.get(case, set())
    assert [one.cause for one in findings(area)] == ([] if repairable else [finding.cause])


def test_a_repaired_redirect_goes_on_below(root: None, area: Path) -> None:
    """The walk continues in the directory that a repair made understandable."""
    _make(area)
    _broken(area)
    _whiteout(area / "upper/d/sub")
    assert [finding.cause[:12] for finding in findings(area)] == ["its redirect"]
    assert [finding.cause[:12] for finding in findings(area, repair=True)] == ["its redirect", "a whiteout o"]
    assert findings(area) == []
    assert sorted(os.listxattr(area / "upper/d")) == [T + "opaque"]


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_whiteouts_of_no_name(root: None, area: Path, name: str) -> None:
    """A repair changes neither the directory itself nor the one above, which may be outside."""
    _make(area)
    (area / "upper/d").mkdir()
    for directory in ("upper", "upper/d"):
        (area / directory / name).touch()
    found = findings(area, repair=True)
    assert [finding.cause for finding in found] == ["a whiteout without a name"] * 2
    for directory in (area, area / "upper", area / "upper/d"):
        assert T + "opaque" not in os.listxattr(directory)


def test_command(root: None, area: Path) -> None:
    """Exit codes, a line for each finding, JSON, and refusals."""
    _make(area)
    layers = ("-u", area / "upper", "-w", area / "work", "-l", area / "lower")
    done = unionfs("check", *layers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    _nothing_below(area)
    (area / "upper/\n").mkdir()
    _set(area / "upper/\n", "opaque", b"?")
    done = unionfs("check", *layers)
    assert done.returncode == 1
    assert done.stdout == (
        f"'{area}/upper/\\n': its xattr trusted.overlay.opaque is neither y nor x; remove the xattr.\n"
        f"{area}/upper/absent: a whiteout of a name that no lower has; remove it.\n"
    )
    found = json.loads(unionfs("check", "--json", *layers).stdout)
    assert [one["path"] for one in found] == [f"{area}/upper/\n", f"{area}/upper/absent"]
    assert not any(one["repaired"] for one in found)
    _without_data(area)
    assert unionfs("check", "--repair", *layers).returncode == 1
    (area / "upper/orphan").unlink()
    _nothing_below(area)
    done = unionfs("check", "--repair", *layers)
    assert done.returncode == 3
    assert done.stdout.endswith("; remove it. (repaired)\n")
    assert unionfs("check", *layers).returncode == 0


@pytest.mark.parametrize("tool", ["check", "convert"])
def test_a_mounted_upper_is_refused(kernel_overlay: None, area: Path, tool: str) -> None:
    _make(area)
    words = ("-l", area / "lower") if tool == "check" else ("--to", "oci")
    with _kernel(area):
        refused(unionfs(tool, "-u", area / "upper", *words), "in use by the kernel's overlayfs")
    with mounting.mounted(area, lowers=[area / "lower"], upper=area / "upper", work=area / "work"):
        refused(unionfs(tool, "-u", area / "upper", *words), "in use by")
    fd = os.open(area / "upper", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        refused(unionfs(tool, "-u", area / "upper", *words), "already in use by another mount")
    finally:
        os.close(fd)
    refused(unionfs(tool, "-u", area / "nowhere", *words), "does not exist")


@pytest.mark.parametrize("kind", ["symlink", "fifo", "file"])
def test_what_is_no_directory_is_not_opened(tmp_path: Path, kind: str) -> None:
    """The same error as natively: no symlink is followed, a fifo is not waited for."""
    (tmp_path / "d").mkdir()
    for name in ("b", "a"):
        (tmp_path / "d" / name).touch()
    if kind == "symlink":
        (tmp_path / "x").symlink_to("d")
    elif kind == "fifo":
        os.mkfifo(tmp_path / "x")
    else:
        (tmp_path / "x").touch()
    with Owned(os.open(tmp_path, os.O_PATH)) as fd:
        assert names_below(fd, b"d") == [b"a", b"b"]
        assert names_below(fd, b"missing") == []
        with pytest.raises(NotADirectoryError):
            os.open("x", os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        with pytest.raises(NotADirectoryError):
            names_below(fd, b"x")
