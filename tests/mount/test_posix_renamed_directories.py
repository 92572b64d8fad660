"""Renames of directories with lower parts: as on kernel overlayfs with redirect_dir=on, and natively."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import normalise
from tests.support import snapshot, syscalls
from tests.support.mounting import kernel_mounted, mounted
from tests.support.worker import Worker
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]
CLOCK = normalise.Clock.start()
REDIRECT = "trusted.overlay.redirect"
NOREPLACE, EXCHANGE = 1, 2
LONG = "n" * 128
"""Two of these are too long for a redirect."""


def _file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)


def _build(home: Path) -> None:
    """Three lowers of one case; the middle one was renamed in as an upper."""
    for name in ("l0/m/sub/top", "l0/m/f0", "l1/m/sub/mid", "l2/m/sub/low", "l2/m/f2", "l2/p/q/r/s/deep",
                 "l0/p/q/r/near", "l2/empty/x", "l1/new/in", "l2/old/in2", "l2/old/sub/in3", "l2/file",
                 "l2/hidden/a", "l1/full/a", f"l2/{LONG}/{LONG}/in/x"):  # fmt: skip
        _file(home / name)
    os.setxattr(home / "l1/new", REDIRECT, b"old")
    os.mknod(home / "l1/old", stat.S_IFCHR, 0)
    (home / "l1/empty").mkdir()
    os.mknod(home / "l1/empty/x", stat.S_IFCHR, 0)
    (home / "l0/hidden").mkdir()
    os.setxattr(home / "l0/hidden", "trusted.overlay.opaque", b"y")


def _within(top: Path) -> None:
    os.rename(top / "m", top / "n")


def _twice(top: Path) -> None:
    os.rename(top / "m", top / "n")
    os.rename(top / "n", top / "o")


def _and_back(top: Path) -> None:
    os.rename(top / "m", top / "n")
    os.rename(top / "n", top / "m")


def _old_name_again(top: Path) -> None:
    os.rename(top / "m", top / "n")
    (top / "m").mkdir()
    _file(top / "m/mine")
    os.rename(top / "m", top / "p/m")


def _elsewhere(top: Path) -> None:
    os.rename(top / "m", top / "p/m")


def _below_a_renamed_one(top: Path) -> None:
    os.rename(top / "p", top / "x")
    os.rename(top / "x/q", top / "x/y")
    os.rename(top / "x/y/r", top / "r")
    os.rename(top / "r/s", top / "x/y/s")


def _into_a_renamed_one(top: Path) -> None:
    os.rename(top / "m", top / "n")
    os.rename(top / "p/q", top / "n/sub/q")
    os.rename(top / "n/sub", top / "sub")


def _into_a_new_one(top: Path) -> None:
    (top / "new1").mkdir()
    os.rename(top / "m", top / "new1/m")
    os.rename(top / "new1", top / "new2")
    os.rename(top / "new2/m/sub", top / "sub")


def _over_an_empty_one(top: Path) -> None:
    os.rename(top / "m", top / "empty")


def _over_an_emptied_one(top: Path) -> None:
    os.unlink(top / "full/a")
    os.rename(top / "m", top / "full")


def _over_a_removed_name(top: Path) -> None:
    os.unlink(top / "file")
    os.rename(top / "m", top / "file")
    os.rename(top / "file", top / "p/file")


def _an_empty_one(top: Path) -> None:
    os.rename(top / "empty", top / "p/empty")
    os.rmdir(top / "p/empty")


def _exchanged(top: Path) -> None:
    syscalls.renameat2(top / "m", top / "p", EXCHANGE)
    syscalls.renameat2(top / "m/q", top / "p/sub", EXCHANGE)


def _exchanged_with_a_file(top: Path) -> None:
    syscalls.renameat2(top / "m", top / "file", EXCHANGE)
    syscalls.renameat2(top / "p/q", top / "m", EXCHANGE)


def _exchanged_with_a_new_one(top: Path) -> None:
    (top / "made").mkdir()
    syscalls.renameat2(top / "m", top / "made", EXCHANGE)
    syscalls.renameat2(top / "m", top / "p/q", EXCHANGE)


def _redirected_in_a_lower(top: Path) -> None:
    os.rename(top / "new", top / "p/new")
    os.rename(top / "p/new/sub", top / "sub")


def _opaque_in_a_lower(top: Path) -> None:
    os.rename(top / "hidden", top / "p/shown")
    _file(top / "p/shown/b")


def _changed_inside(top: Path) -> None:
    os.unlink(top / "m/f2")
    _file(top / "m/sub/new")
    os.rename(top / "m", top / "p/q/m")
    os.unlink(top / "p/q/m/sub/low")
    (top / "p/q/m/f0").write_text("changed")
    subprocess.run(["rm", "-r", top / "p"], check=True)


def _too_long(top: Path) -> None:
    os.rename(top / LONG / LONG, top / LONG / "short")
    os.rename(top / LONG / "short/in", top / "in")


SCENARIOS: list[Callable[[Path], None]] = [
    _within, _twice, _and_back, _old_name_again, _elsewhere, _below_a_renamed_one, _into_a_renamed_one,
    _into_a_new_one, _over_an_empty_one, _over_an_emptied_one, _over_a_removed_name, _an_empty_one,
    _exchanged, _exchanged_with_a_file, _exchanged_with_a_new_one, _redirected_in_a_lower, _opaque_in_a_lower,
    _changed_inside, _too_long,
]  # fmt: skip


@contextmanager
def _mounted(home: Path, which: str, *options: str) -> Iterator[Path]:
    layers: dict[str, Any] = {
        "lowers": [home / name for name in ("l0", "l1", "l2")],
        "upper": home / "upper",
        "work": home / "work",
    }
    context = (
        kernel_mounted(home, **layers, options=["redirect_dir=on"])
        if which == "kernel"
        else mounted(home, **layers, session=which, options=options)
    )
    with context as mount:
        yield mount.mountpoint


def _format(upper: Path) -> dict[str, object]:
    """The redirects and whiteouts in an upper."""
    found: dict[str, object] = {}
    for at, folders, files in os.walk(upper):
        for name in (*folders, *files):
            path = Path(at, name)
            if stat.S_ISCHR(path.lstat().st_mode):
                found[str(path.relative_to(upper))] = "whiteout"
            elif REDIRECT in os.listxattr(path, follow_symlinks=False):
                found[str(path.relative_to(upper))] = os.getxattr(path, REDIRECT)
    return found


def _compare(ours: snapshot.Tree, theirs: snapshot.Tree) -> None:
    lines = normalise.compare_trees(ours, theirs, CLOCK, lambda path: False)
    assert not lines, "\n".join(lines[:20])


@pytest.mark.slow_on("direct-passthrough")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__.strip("_"))
def test_as_on_overlayfs(
    kernel_overlay: None, area: Path, session: str, scenario: Callable[[Path], None]
) -> None:
    """The tree, the redirects and the whiteouts; after a remount; and each upper under the other one."""
    homes, trees, ended = {}, {}, {}
    for which in ("kernel", session):
        home = homes[which] = area / which
        (home / "upper").mkdir(parents=True)
        (home / "work").mkdir()
        _build(home)
        with _mounted(home, which) as top:
            ended[which] = errno_of(scenario, top)
            trees[which] = snapshot.take(top)
            assert not normalise.strict(trees[which]) or which == "kernel"
    assert ended[session] == ended["kernel"] == (errno.EXDEV if scenario is _too_long else 0)
    _compare(trees[session], trees["kernel"])
    assert _format(homes[session] / "upper") == _format(homes["kernel"] / "upper")
    for home in homes.values():
        for reader in (session, "kernel"):
            with _mounted(home, reader) as top:
                _compare(snapshot.take(top), trees["kernel"])


def _for_errors(root: Path) -> None:
    for name in ("full/a", "full2/b", "d/sub/c", "other/e", "his/f", "sticky/his/g", "sticky/mine/h"):
        _file(root / name)
    (root / "empty").mkdir()
    (root / "closed/inner").mkdir(parents=True)
    _file(root / "file")
    (root / "link").symlink_to("d")
    for name, mode in (("sticky", 0o1777), ("his", 0o777), ("closed", 0o555)):
        (root / name).chmod(mode)
    for name in ("sticky/mine", "closed/inner", "other", "full"):
        os.chown(root / name, 1000, 1000)
    root.chmod(0o777)
    (root / "full").chmod(0o555)


def _errors(root: Path) -> list[int]:
    """pjdfstest's rename errors, for directories of a lower."""
    long = "n" * 256
    pairs = [
        ("d", "d/sub/in"), ("d", "d/new"), ("d/sub", "d"), ("d", "full"), ("d", "file"), ("file", "d"),
        ("file", "empty"), ("none", "d"), ("d", "none/x"), ("d", "file/x"), ("d/.", "x"), ("d", "d/."),
        ("d/..", "x"), ("d", "full/.."), ("d", long), (long, "x"), ("d/", "link"), ("link", "d"),
        ("d", "link/x"), ("d", "d"), ("d", "./d/"),
    ]  # fmt: skip
    exchanged = [("d", "d/sub"), ("d/sub", "d"), ("d", "none"), ("none", "d"), ("d", "d/."), ("d", "d")]
    calls = [(NOREPLACE, pairs), (0, pairs), (EXCHANGE, exchanged)]
    return [
        errno_of(syscalls.renameat2, os.path.join(root, old), os.path.join(root, new), flags)
        for flags, names in calls
        for old, new in names
    ]


def _as_user(user: Worker, root: Path) -> list[int]:
    """Rights: the sticky bit, and a directory without write permission, whose `..` would change."""
    pairs = [
        ("sticky/his", "sticky/x"), ("sticky/his", "x"), ("sticky/mine", "sticky/y"), ("his", "his2"),
        ("closed/inner", "closed/x"), ("closed/inner", "x"), ("full", "full3"), ("full3", "other/full"),
        ("other", "his2/other"), ("his2", "sticky/his2"),
    ]  # fmt: skip
    return [user.errno(os.rename, root / old, root / new) for old, new in pairs]


def test_errors_are_those_of_a_native_filesystem(world: MakeWorld, user: Worker) -> None:
    made = world(_for_errors)
    found = made.as_native(_errors)
    assert {errno.EINVAL, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT,
            errno.EBUSY, errno.ENAMETOOLONG} <= set(found)  # fmt: skip
    found = made.as_native(lambda root: _as_user(user, root))
    assert {0, errno.EACCES, errno.EPERM} <= set(found)
    assert sorted(os.listdir(made.union)) == sorted(os.listdir(made.native))


def test_what_is_in_use_moves_along(world: MakeWorld) -> None:
    """Open files, listings, current directories and inode numbers below a renamed directory."""
    made = world(lambda root: [_file(root / name) for name in ("d/sub/deep/f", "d/sub/g", "other/h")])
    top = made.union
    before = snapshot.take(top)
    paths = ("d", "d/sub", "d/sub/deep", "d/sub/deep/f", "d/sub/g")
    fds = {path: os.open(top / path, os.O_RDONLY) for path in paths}
    with subprocess.Popen(
        ["sh", "-c", "read line; readlink /proc/self/cwd; cat f; echo new > made; ls ../g"],
        cwd=top / "d/sub/deep", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as inside:  # fmt: skip
        os.rename(top / "d", top / "other/d")
        os.rename(top / "other/d/sub", top / "sub")
        said, _ = inside.communicate("\n")
    assert said == f"{top}/sub/deep\nf../g\n"
    now = {"d": "other/d", "d/sub": "sub", "d/sub/deep": "sub/deep", "d/sub/deep/f": "sub/deep/f",
           "d/sub/g": "sub/g"}  # fmt: skip
    for path, fd in fds.items():
        assert os.readlink(f"/proc/self/fd/{fd}") == str(top / now[path])
        assert os.fstat(fd).st_ino == (top / now[path]).stat().st_ino == before[path.encode()].ino
        os.close(fd)
    listing = os.open(top / "sub", os.O_RDONLY)
    numbers = {item.name: item.ino for item in syscalls.list_directory(listing)}
    os.close(listing)
    assert numbers[b".."] == top.stat().st_ino
    assert (made.upper / "sub/deep/made").read_text() == "new\n"


def test_switched_off(world: MakeWorld) -> None:
    """As overlayfs: a directory with lower parts is EXDEV, and redirects are still read unless nofollow."""
    made = world(lambda root: _file(root / "d/sub/f"), options=("redirect_dir=off",))

    def calls(root: Path) -> list[object]:
        (root / "own").mkdir()
        return [errno_of(os.rename, root / "d", root / "e"), errno_of(os.rename, root / "own", root / "mine")]

    assert made.as_kernel(calls) == [errno.EXDEV, 0]


@pytest.mark.parametrize("value", ["on", "off", "follow", "nofollow"])
def test_reading_by_value(kernel_overlay: None, area: Path, session: str, value: str) -> None:
    found = []
    for which in ("kernel", session):
        home = area / which
        for name in ("lower/old/f", "lower/d/f", "upper/new/g"):
            _file(home / name)
        (home / "work").mkdir()
        os.mknod(home / "upper/old", stat.S_IFCHR, 0)
        os.setxattr(home / "upper/new", REDIRECT, b"old")
        layers: dict[str, Any] = {
            "lowers": [home / "lower"], "upper": home / "upper", "work": home / "work",
            "options": [f"redirect_dir={value}"],
        }  # fmt: skip
        with (
            kernel_mounted(home, **layers)
            if which == "kernel"
            else mounted(home, **layers, session=which)
        ) as mount:
            top = mount.mountpoint
            listed = outcome(lambda folder: sorted(os.listdir(folder)), top / "new")
            found.append((listed, errno_of(os.rename, top / "d", top / "x")))
    assert found[0] == found[1]


def test_an_upper_of_a_kernel_that_has_it_off(kernel_overlay: None, area: Path, session: str) -> None:
    """Then it is off by default."""
    if Path("/sys/module/overlay/parameters/redirect_dir").read_text().strip() == "Y":
        pytest.skip("this kernel has redirect_dir on")
    _file(area / "lower/d/f")
    for name in ("upper", "work"):
        (area / name).mkdir()
    layers: dict[str, Any] = {"lowers": [area / "lower"], "upper": area / "upper", "work": area / "work"}
    with kernel_mounted(area, **layers):
        pass
    if "trusted.overlay.uuid" not in os.listxattr(area / "upper"):
        pytest.skip("this kernel leaves no uuid (before Linux 6.6)")
    with mounted(area, **layers, session=session) as mount:
        assert errno_of(os.rename, mount.mountpoint / "d", mount.mountpoint / "e") == errno.EXDEV
    with mounted(area, **layers, session=session, options=["redirect_dir=on"]) as mount:
        os.rename(mount.mountpoint / "d", mount.mountpoint / "e")
    with mounted(area, **layers, session=session) as mount:
        assert os.listdir(mount.mountpoint / "e") == ["f"]


def test_user_xattrs_of_root(root: None, area: Path, session: str) -> None:
    """With markers that any user could set, none is written or followed, as with overlayfs's userxattr."""
    _file(area / "lower/d/f")
    _file(area / "lower/r/f")
    os.setxattr(area / "lower/r", "user.overlay.redirect", b"d")
    for name in ("upper", "work", "lowest"):
        (area / name).mkdir()
    with mounted(
        area, lowers=[area / "lower", area / "lowest"], upper=area / "upper", work=area / "work",
        session=session, options=["userxattr"],
    ) as mount:  # fmt: skip
        assert errno_of(os.rename, mount.mountpoint / "d", mount.mountpoint / "e") == errno.EXDEV
        assert errno_of(os.stat, mount.mountpoint / "r") == errno.EPERM
