"""The diff of uppers made by kernel overlayfs, and of hand-made ones that do not need the kernel."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import areas, mounting
from unionfs.union.diff import diff

PREFIX = b"trusted.overlay."

Edit = Callable[[Path], object]


def listed(area: Path, lowers: int = 1) -> list[str]:
    names = [str(area / f"lower{index}") for index in range(lowers)]
    return [f"{kind} {os.fsdecode(path)}" for kind, path in diff(str(area / "upper"), names, PREFIX)]


@contextlib.contextmanager
def edited(area: Path, *options: str, lowers: int = 1) -> Iterator[Path]:
    """The kernel's merged tree; its edits go into the upper."""
    for name in ("upper", "work"):
        (area / name).mkdir(exist_ok=True)
    paths = [area / f"lower{index}" for index in range(lowers)]
    with mounting.kernel_mounted(
        area, lowers=paths, upper=area / "upper", work=area / "work", options=options
    ) as mount:
        yield mount.mountpoint


@pytest.fixture
def tree(area: Path) -> Path:
    lower = area / "lower0"
    for name in ("etc/conf.d", "usr/bin", "usr/share/doc/x", "var"):
        (lower / name).mkdir(parents=True)
    for name in ("etc/passwd", "etc/conf.d/a", "etc/conf.d/b", "usr/bin/ls", "usr/share/doc/x/README", "f"):
        (lower / name).write_text(name)
    return area


CASES: dict[str, tuple[Edit, list[str]]] = {
    "nothing": (lambda m: None, []),
    "add": (lambda m: (m / "etc/new").write_text("x"), ["C /etc", "A /etc/new"]),
    "add at the root": (lambda m: (m / "new").write_text("x"), ["A /new"]),
    "add directories": (lambda m: (m / "a/b/c").mkdir(parents=True), ["A /a", "A /a/b", "A /a/b/c"]),
    "content": (lambda m: (m / "etc/passwd").write_text("y"), ["C /etc", "C /etc/passwd"]),
    "mode only": (lambda m: (m / "etc/passwd").chmod(0o600), ["C /etc", "C /etc/passwd"]),
    "the same mode": (lambda m: (m / "f").chmod((m / "f").stat().st_mode), ["C /f"]),
    "directory mode": (lambda m: (m / "usr/share").chmod(0o700), ["C /usr", "C /usr/share"]),
    "directory xattr": (lambda m: os.setxattr(m / "var", "user.a", b"1"), ["C /var"]),
    "copied-up directory": (lambda m: (m / "var").chmod((m / "var").stat().st_mode), []),
    "delete": (lambda m: (m / "etc/passwd").unlink(), ["C /etc", "D /etc/passwd"]),
    "delete a tree": (lambda m: remove(m / "usr/share"), ["C /usr", "D /usr/share"]),
    "add and delete": (lambda m: ((m / "x").write_text("x"), (m / "x").unlink()), []),
    "file to directory": (
        lambda m: ((m / "f").unlink(), (m / "f/g").mkdir(parents=True)),
        ["C /f", "A /f/g"],
    ),
    "directory to file": (
        lambda m: (remove(m / "etc"), (m / "etc").write_text("x")),
        ["C /etc"],
    ),
    "directory to symlink": (lambda m: (remove(m / "etc"), (m / "etc").symlink_to("/")), ["C /etc"]),
    "replaced directory": (
        lambda m: (remove(m / "etc"), (m / "etc/conf.d").mkdir(parents=True), (m / "etc/n").mkdir()),
        ["C /etc", "C /etc/conf.d", "D /etc/conf.d/a", "D /etc/conf.d/b", "A /etc/n", "D /etc/passwd"],
    ),
    "rename": (lambda m: (m / "f").rename(m / "g"), ["D /f", "A /g"]),
    "rename over": (
        lambda m: (m / "f").rename(m / "usr/bin/ls"),
        ["D /f", "C /usr", "C /usr/bin", "C /usr/bin/ls"],
    ),
    "node": (lambda m: os.mknod(m / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3)), ["A /null"]),
    "order of the bytes": (
        lambda m: [(m / "var" / name).mkdir(parents=True) for name in ("a/b", "a-b", "a0", "é", "B")],
        ["C /var", "A /var/B", "A /var/a", "A /var/a-b", "A /var/a/b", "A /var/a0", "A /var/é"],
    ),
}  # fmt: skip


def remove(path: Path) -> None:
    subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.parametrize("case", CASES)
def test_edits_through_kernel_overlayfs(kernel_overlay: None, tree: Path, case: str) -> None:
    edit, expected = CASES[case]
    with edited(tree) as merged:
        edit(merged)
    assert listed(tree) == expected


def test_a_name_that_is_no_utf8(kernel_overlay: None, tree: Path) -> None:
    with edited(tree) as merged:
        Path(os.fsdecode(os.fsencode(merged) + b"/\xff\n")).write_text("")
    found = list(diff(str(tree / "upper"), [str(tree / "lower0")], PREFIX))
    assert found == [("A", b"/\xff\n")]


def test_markers_in_the_lowers_count(kernel_overlay: None, tree: Path) -> None:
    """lower0 was an upper of lower1: the names it deleted do not exist before."""
    (tree / "lower0").rename(tree / "lower1")
    (tree / "upper").mkdir()
    (tree / "work").mkdir()
    layers = {"lowers": [tree / "lower1"], "upper": tree / "upper", "work": tree / "work"}
    with mounting.kernel_mounted(tree, **layers) as mount:
        remove(mount.mountpoint / "etc")
        (mount.mountpoint / "etc").mkdir()
        (mount.mountpoint / "f").unlink()
    (tree / "upper").rename(tree / "lower0")
    with edited(tree, lowers=2) as merged:
        (merged / "etc/passwd").write_text("new")
        (merged / "f").write_text("new")
        remove(merged / "usr")
        (merged / "usr/bin").mkdir(parents=True)
    assert listed(tree, 2) == [
        "C /etc", "A /etc/passwd", "A /f", "C /usr", "C /usr/bin", "D /usr/bin/ls", "D /usr/share",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "move",
    [("etc", "moved"), ("etc/conf.d", "etc/other"), ("etc/conf.d", "var/conf.d"), ("etc", "made/etc")],
)
def test_renamed_directories(kernel_overlay: None, tree: Path, move: tuple[str, str]) -> None:
    old, new = move
    with edited(tree, "redirect_dir=on") as merged:
        (merged / new).parent.mkdir(exist_ok=True)
        (merged / old).rename(merged / new)
        expected = naive(merged, tree / "lower0", tree / "upper")
    assert any(name.startswith("A /" + new) for name in expected)
    assert listed(tree) == expected


def test_a_renamed_directory_that_takes_another_ones_name(kernel_overlay: None, tree: Path) -> None:
    (tree / "lower0/var/passwd").write_text("another")
    with edited(tree, "redirect_dir=on") as merged:
        (merged / "etc").rename(merged / "old")
        (merged / "var").rename(merged / "etc")
    assert listed(tree) == [
        "C /etc", "D /etc/conf.d", "C /etc/passwd",
        "A /old", "A /old/conf.d", "A /old/conf.d/a", "A /old/conf.d/b", "A /old/passwd", "D /var",
    ]  # fmt: skip


def test_whiteouts_made_by_hand(area: Path, root: None) -> None:
    """Over an object: D, in both forms. Over no object: no change."""
    for path in ("lower0/d", "upper/d"):
        (area / path).mkdir(parents=True)
    for name in ("device", "xattr"):
        (area / "lower0/d" / name).write_text("x")
    for name in ("device", "ghost"):
        os.mknod(area / "upper/d" / name, stat.S_IFCHR, os.makedev(0, 0))
    for name in ("xattr", "spirit"):
        (area / "upper/d" / name).touch()
        os.setxattr(area / "upper/d" / name, PREFIX + b"whiteout", b"y")
    os.setxattr(area / "upper/d", PREFIX + b"opaque", b"x")
    copied = (area / "lower0/d").stat()
    os.utime(area / "upper/d", ns=(copied.st_atime_ns, copied.st_mtime_ns))
    assert listed(area) == ["C /d", "D /d/device", "D /d/xattr"]


def test_an_opaque_root(area: Path, root: None) -> None:
    """Overlayfs ignores it."""
    for path in ("lower0/d/e", "upper/new"):
        (area / path).mkdir(parents=True)
    os.setxattr(area / "upper", PREFIX + b"opaque", b"y")
    assert listed(area) == ["A /new"]


def test_symlinks_in_layers_are_not_followed(area: Path, root: None) -> None:
    (area / "lower0").mkdir()
    (area / "lower0/link").symlink_to(area)
    (area / "upper/link").mkdir(parents=True)
    (area / "upper/link/upper").write_text("x")
    assert listed(area) == ["C /link", "A /link/upper"]


def test_an_upper_that_is_missing(area: Path) -> None:
    (area / "lower0").mkdir()
    with pytest.raises(FileNotFoundError):
        listed(area)


DEPTH = 1200


def test_trees_deeper_than_path_max(area: Path, root: None) -> None:
    """Deeper than PATH_MAX, than the recursion limit and than the limit of open files."""
    (area / "upper").mkdir()
    (area / "lower0").mkdir()
    name = b"n" * 20
    for layer in ("lower0", "upper"):
        fd = os.open(area / layer, os.O_RDONLY)
        for level in range(DEPTH):
            os.mkdir(name, dir_fd=fd)
            # a second directory per level, so that the walk returns to every level
            os.mkdir(b"side", dir_fd=fd)
            if layer == "upper":
                mark = b"y" if level > 3 else b"x"
                os.setxattr(b"/proc/self/fd/%d/%s" % (fd, name), PREFIX + b"opaque", mark)
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        if layer == "upper":
            os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        found = list(diff(str(area / "upper"), [str(area / "lower0")], PREFIX))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ("A", (b"/" + name) * DEPTH + b"/file") in found
    assert sum(path.endswith(name) and kind == "C" for kind, path in found) == DEPTH


def test_a_name_whose_lookup_fails(root: None, area: Path) -> None:
    """It is changed if the upper has it, and is not listed for what a lower holds."""
    for name in ("upper/bad", "lower0/bad", "lower0/broken", "lower1/bad", "lower1/broken"):
        (area / name).mkdir(parents=True)
    for name in ("upper/bad", "lower0/broken"):
        os.setxattr(area / name, PREFIX + b"redirect", b"/a//b")
    assert listed(area, 2) == ["C /bad"]
    (area / "upper/new").touch()
    assert listed(area, 2) == ["C /bad", "A /new"]
    (area / "lower0/bad").rmdir()
    (area / "lower1/bad").rmdir()
    assert listed(area, 2) == ["A /bad", "A /new"]


# -- random edits: the diff must equal a comparison of the two merged trees ----------------------------------

NAMES = ("a", "b", "a-b", "c")
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
edits = st.lists(
    st.tuples(st.sampled_from(("write", "mkdir", "remove", "rename", "chmod", "symlink")), paths, paths),
    max_size=12,
)
lower_trees = st.lists(st.tuples(paths, st.booleans()), max_size=8)


def build(root: Path, entries: list[tuple[str, bool]]) -> None:
    for name, is_directory in entries:
        path = root / name
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_directory:
                path.mkdir()
            else:
                path.write_text(name)


def apply(root: Path, steps: list[tuple[str, str, str]]) -> None:
    for what, first, second in steps:
        path = root / first
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if what == "write":
                path.write_text("new")
            elif what == "mkdir":
                path.mkdir()
            elif what == "remove":
                subprocess.run(["rm", "-rf", str(path)], check=True, stderr=subprocess.DEVNULL)
            elif what == "rename":
                path.rename(root / second)
            elif what == "chmod":
                path.chmod(0o700, follow_symlinks=True)
            else:
                path.symlink_to(second)


def naive(merged: Path, before: Path, upper: Path) -> list[str]:
    """An independent diff: walk both mounted trees; C depends on a file's presence in the upper."""
    found: dict[str, str] = {}

    def attributes(path: Path) -> tuple[int, int, int, int]:
        s = path.lstat()
        return s.st_mode, s.st_uid, s.st_gid, s.st_mtime_ns

    def opaque(path: Path) -> bool:
        try:
            return os.getxattr(path, PREFIX + b"opaque", follow_symlinks=False) == b"y"
        except OSError:
            return False

    def walk(at: str) -> None:
        here, there = merged / at, before / at
        old = set(os.listdir(there)) if there.is_dir() and not there.is_symlink() else set()
        new = set(os.listdir(here))
        for name in new | old:
            path = os.path.join(at, name)
            changed = before_size = len(found)
            if name not in new:
                found[path] = "D"
            elif name not in old:
                found[path] = "A"
            else:
                both = [stat.S_ISDIR((root / path).lstat().st_mode) for root in (merged, before)]
                if all(both):
                    own = attributes(merged / path) != attributes(before / path)
                    if own or opaque(upper / path):
                        found[path] = "C"
                elif any(both) or os.path.lexists(upper / path):
                    found[path] = "C"
            is_directory = name in new and (merged / path).is_dir() and not (merged / path).is_symlink()
            if is_directory:
                walk(path)
            changed = len(found)
            if changed > before_size and name in new:
                found.setdefault(path, "C")

    walk("")
    return [f"{found[path]} /{path}" for path in sorted(found, key=os.fsencode)]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lowers=st.lists(lower_trees, min_size=1, max_size=3), steps=edits)
@example(lowers=[[]], steps=[("symlink", "b", "b"), ("remove", "b/a", "a")])
def test_any_edits(
    kernel_overlay: None, lowers: list[list[tuple[str, bool]]], steps: list[tuple[str, str, str]]
) -> None:
    with areas.area() as area:
        for index, entries in enumerate(lowers):
            (area / f"lower{index}").mkdir()
            build(area / f"lower{index}", entries)
        paths = [area / f"lower{index}" for index in range(len(lowers))]
        with edited(area, lowers=len(lowers)) as merged:
            apply(merged, steps)
            with mounting.kernel_mounted(area, lowers=paths, name="before") as before:
                expected = naive(merged, before.mountpoint, area / "upper")
        assert listed(area, len(lowers)) == expected
