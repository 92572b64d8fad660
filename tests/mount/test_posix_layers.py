"""Stacks of layers: their number, filesystems, read-only ones, and the result on disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.oracle import layers, normalise
from tests.support import areas, snapshot, syscalls
from tests.support.mounting import kernel_mounted, mounted
from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]
CLOCK = normalise.Clock.start()


def _same_tree(ours: Path, theirs: Path, *, separate: bool = False) -> None:
    lines = normalise.compare_trees(snapshot.take(ours), snapshot.take(theirs), CLOCK, separate=separate)
    assert not lines, "\n".join(lines[:20])


@pytest.mark.parametrize("count", [1, 2, 30, 500])
def test_numbers_of_lowers(kernel_overlay: None, area: Path, session: str, count: int) -> None:
    """The topmost wins, all are visible, whiteouts and opaque directories of each apply."""
    lowers = [area / f"l{index}" for index in range(count)]
    for index, lower in enumerate(lowers):
        (lower / "d").mkdir(parents=True)
        (lower / "all").write_text(str(index))
        (lower / f"d/own{index}").write_text(str(index))
        (lower / f"d/pair{index // 2}").write_text(str(index))
        if index % 10 == 3:
            os.mknod(lower / f"d/own{index + 1}", stat.S_IFCHR, os.makedev(0, 0))
    for name in ("upper", "work"):
        (area / name).mkdir()
    with (
        mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount,
        # names relative to the current directory, because mount(2) limits options to one page
        contextlib.chdir(area),
        kernel_mounted(area, lowers=[Path(lower.name) for lower in lowers]) as kernel,
    ):
        _same_tree(mount.mountpoint, kernel.mountpoint)
        assert (mount.mountpoint / "all").read_text() == "0"
        bottom = mount.mountpoint / f"d/own{count - 1}"
        if bottom.exists():
            bottom.write_text("changed")
            assert bottom.read_text() == "changed"
        shutil.rmtree(mount.mountpoint / "d")
        assert sorted(os.listdir(mount.mountpoint)) == ["all"]


def test_read_only_union(kernel_overlay: None, area: Path, session: str) -> None:
    """Without an upper every change is EROFS, as on a read-only overlayfs; so is ro with an upper."""
    layers.build([area / "l1", area / "l2", area / "l3"])
    lowers = [area / name for name in ("l1", "l2", "l3")]
    for name in ("upper", "work"):
        (area / name).mkdir()

    def calls(root: Path) -> list[int]:
        return [
            errno_of(lambda: os.open(root / "file", os.O_RDWR)),
            errno_of(lambda: os.open(root / "file", os.O_RDONLY | os.O_TRUNC)),
            errno_of(lambda: os.open(root / "new", os.O_CREAT | os.O_WRONLY)),
            errno_of(os.unlink, root / "file"),
            errno_of(os.unlink, root / "nowhere"),
            errno_of(os.mkdir, root / "new"),
            errno_of(os.rmdir, root / "m"),
            errno_of(os.rename, root / "file", root / "new"),
            errno_of(os.link, root / "file", root / "new"),
            errno_of(os.symlink, "x", root / "new"),
            errno_of(os.mkfifo, root / "new"),
            errno_of(os.chmod, root / "file", 0o600),
            errno_of(os.chown, root / "file", 1, 1),
            errno_of(os.utime, root / "file"),
            errno_of(os.truncate, root / "file", 0),
            errno_of(os.setxattr, root / "file", "user.x", b"1"),
            errno_of(os.removexattr, root / "xattrs", "user.one"),
            errno_of(lambda: (root / "file").read_bytes()),
        ]

    with kernel_mounted(area, lowers=lowers) as kernel:
        with mounted(area, lowers=lowers, session=session) as mount:
            _same_tree(mount.mountpoint, kernel.mountpoint)
            assert calls(mount.mountpoint) == calls(kernel.mountpoint)
            assert os.statvfs(mount.mountpoint).f_flag & os.ST_RDONLY
        with mounted(
            area, lowers=lowers, upper=area / "upper", work=area / "work", session=session, options=["ro"]
        ) as mount:
            assert calls(mount.mountpoint) == calls(kernel.mountpoint)
    assert os.listdir(area / "upper") == []


@contextmanager
def _read_only_image(area: Path, source: Path, kind: str) -> Iterator[Path]:
    where = area / f"image-{kind}"
    where.mkdir()
    image = area / f"{kind}.img"
    if kind == "bind":
        syscalls.mount(str(source), where, "none", syscalls.MS_BIND)
        syscalls.mount("none", where, "none", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
    else:
        tool = {"squashfs": "mksquashfs", "erofs": "mkfs.erofs"}[kind]
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        if kind == "erofs":
            # erofs-utils 1.5 reports "No such file or directory" for a name with 255 bytes.
            for entry in source.iterdir():
                if len(os.fsencode(entry.name)) == 255:
                    entry.unlink()
        pair = [str(source), str(image)] if kind == "squashfs" else [str(image), str(source)]
        made = subprocess.run([tool, *pair], capture_output=True, text=True, errors="replace")
        assert made.returncode == 0, made.stdout + made.stderr
        done = subprocess.run(
            ["mount", "-t", kind, "-o", "loop,ro", str(image), str(where)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"no {kind} on a loop device: {done.stderr.strip()}")
    try:
        yield where
    finally:
        areas.detach(where)


@pytest.mark.parametrize("kind", ["bind", "squashfs", "erofs"])
def test_lower_on_a_read_only_filesystem(kernel_overlay: None, area: Path, session: str, kind: str) -> None:
    """Lowers that are never writable work like others, including copy-up."""
    layers.build([area / "top", area / "bottom"])
    for side in ("u", "k"):
        for name in ("upper", "work"):
            (area / side / name).mkdir(parents=True)
    with _read_only_image(area, area / "bottom", kind) as bottom:
        lowers = [area / "top", bottom]
        with (
            mounted(
                area / "u", lowers=lowers, upper=area / "u/upper", work=area / "u/work", session=session
            ) as mount,
            kernel_mounted(area / "k", lowers=lowers, upper=area / "k/upper", work=area / "k/work") as kernel,
        ):
            _same_tree(mount.mountpoint, kernel.mountpoint, separate=session == normalise.SEPARATE)
            for top in (mount.mountpoint, kernel.mountpoint):
                (top / "m/low").write_bytes(b"changed")
                os.utime(top / "m/low", ns=(1, 1))
                (top / "xattrs").chmod(0o600)
                (top / "m/both").unlink()
                os.rename(top / "acl", top / "moved")
                shutil.rmtree(top / "opaque")
                (top / "opaque").mkdir()
                for path in (top / "m", top / "opaque", top):
                    os.utime(path, ns=(1, 1))
            _same_tree(mount.mountpoint, kernel.mountpoint, separate=session == normalise.SEPARATE)
            tree = snapshot.take(mount.mountpoint)
            assert len({entry.dev for entry in tree.values()}) == 1
            assert not normalise.strict(tree)


def test_the_space_is_that_of_the_topmost_layer(
    kernel_overlay: None, area: Path, session: str, filesystem: Callable[..., Path]
) -> None:
    """As on kernel overlayfs, with an upper on a small filesystem over a lower on another one."""
    place = filesystem("tmpfs", 8 << 20)
    for name in ("upper", "work", "lower"):
        ((area if name == "lower" else place) / name).mkdir()
    lowers, upper, work = [area / "lower"], place / "upper", place / "work"
    found = []
    for mounts in (
        mounted(area, lowers=lowers, upper=upper, work=work, session=session),
        kernel_mounted(area, lowers=lowers, upper=upper, work=work),
    ):
        with mounts as mount:
            st = os.statvfs(mount.mountpoint)
            found.append((st.f_bsize, st.f_frsize, st.f_blocks, st.f_files, st.f_namemax))
    assert found[0] == found[1]
    assert found[0][1] * found[0][2] == 8 << 20


@pytest.mark.parametrize("upper", areas.FILESYSTEMS)
def test_upper_on_each_filesystem(
    kernel_overlay: None, area: Path, session: str, filesystem: Callable[..., Path], upper: str
) -> None:
    """On other filesystems than the lowers: the same tree, one st_dev, and the kernel reads it."""
    layers.build([area / "l1", area / "l2", area / "l3"])
    lowers = [area / name for name in ("l1", "l2", "l3")]
    place = filesystem(upper)
    for name in ("upper", "work"):
        (place / name).mkdir()
    with mounted(area, lowers=lowers, upper=place / "upper", work=place / "work", session=session) as mount:
        top = mount.mountpoint
        before = snapshot.take(top)
        for number in range(200):
            (top / f"m/new{number}").write_bytes(b"n" * number)
        for path in sorted(before):
            if before[path].kind == stat.S_IFREG:
                os.utime(os.fsencode(top) + b"/" + path, ns=(5, 5))
        (top / "sparse").open("r+b").close()
        (top / "m/low").unlink(missing_ok=True)
        shutil.rmtree(top / "white")
        (top / "white").mkdir()
        os.rename(top / "file", top / "white/file")
        time.sleep(0.2)  # the sizes of directories with copy-ups are shown a little later
        with snapshot.held(top):
            after, again = snapshot.take(top), snapshot.take(top)
        assert not normalise.strict(after)
        assert not normalise.moved_inodes(before, after, (b"file", b"white", b"m/low"))
        plain = [entry.ino for entry in after.values() if entry.nlink == 1]
        assert len(set(plain)) == len(plain)
    assert again == after
    with kernel_mounted(
        area, lowers=lowers, upper=place / "upper", work=place / "work", options=("index=on",)
    ) as kernel:
        lines = normalise.compare_trees(after, snapshot.take(kernel.mountpoint), CLOCK)
        assert not lines, "\n".join(lines[:20])


def test_statfs(world: MakeWorld) -> None:
    """Sizes are the upper's, names may have 255 bytes."""
    made = world()
    ours, theirs = os.statvfs(made.union), os.statvfs(made.kernel)
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert abs(ours.f_bavail - theirs.f_bavail) * ours.f_frsize < 256 << 20


# -- the disk format


def _for_format(root: Path) -> None:
    (root / "merged/sub").mkdir(parents=True)
    (root / "merged/f").write_bytes(b"f")
    (root / "merged/sub/g").write_bytes(b"g")
    (root / "gone").mkdir()
    (root / "gone/x").write_bytes(b"x")
    (root / "replaced").mkdir()
    (root / "replaced/x").write_bytes(b"x")
    (root / "file").write_bytes(b"file")
    (root / "other").write_bytes(b"other")
    (root / "to-dir").write_bytes(b"file")
    (root / "to-file").mkdir()
    (root / "swap1").write_bytes(b"1")
    (root / "swap2").write_bytes(b"2")
    for name in ("recreated1", "recreated2"):
        (root / name).mkdir()
        (root / name / "x").write_bytes(b"x")
    (root / "a/b/c/d").mkdir(parents=True)
    (root / "a/b/c/d/deep").write_bytes(b"deep")


def _change(root: Path) -> None:
    (root / "new-dir").mkdir()
    (root / "new-dir/f").write_bytes(b"new")
    shutil.rmtree(root / "gone")
    shutil.rmtree(root / "replaced")
    (root / "replaced").mkdir(0o750)
    (root / "replaced/y").write_bytes(b"y")
    (root / "merged/f").unlink()
    (root / "merged/sub/g").write_bytes(b"changed")
    os.rename(root / "file", root / "merged/moved")
    os.rename(root / "other", root / "swap1")
    syscalls.renameat2(str(root / "swap1"), str(root / "swap2"), syscalls.RENAME_EXCHANGE)
    for one, other in (("recreated1", "pure1"), ("pure2", "recreated2")):
        shutil.rmtree(root / f"recreated{one[-1]}")
        for name in (one, other):
            (root / name).mkdir()
        syscalls.renameat2(str(root / one), str(root / other), syscalls.RENAME_EXCHANGE)
    (root / "to-dir").unlink()
    (root / "to-dir").mkdir()
    (root / "to-file").rmdir()
    (root / "to-file").write_bytes(b"now a file")
    os.chmod(root / "a/b/c/d/deep", 0o600)
    (root / "created").write_bytes(b"")
    (root / "created").unlink()
    (root / "merged/f").symlink_to("elsewhere")
    (root / "over").mkdir()
    (root / "to-dir/in").write_bytes(b"")
    shutil.rmtree(root / "to-dir")
    os.rename(root / "over", root / "to-dir")
    os.link(root / "merged/sub/g", root / "hard")
    os.mkfifo(root / "pipe")


def _on_disk(upper: Path) -> list[tuple[object, ...]]:
    """A raw upper: types, whiteouts, modes, owners, markers.

    ``origin``, ``impure`` and ``uuid`` are hints that a writer may omit
    (Documentation/filesystems/overlayfs.rst).
    """
    origin, uuid = "trusted.overlay.origin", "trusted.overlay.uuid"
    found: list[tuple[object, ...]] = []
    for path, entry in sorted(snapshot.take(upper).items()):
        xattrs = {name: value for name, value in entry.xattrs.items() if name != uuid}
        if origin in xattrs:
            xattrs[origin] = b"of another lower"
        if path == b".":  # where the kernel always sets it
            xattrs.pop(origin, None)
        size = entry.size if entry.kind == stat.S_IFREG else 0
        nlink = entry.nlink if entry.kind == stat.S_IFREG else 0  # the kernel hard-links its whiteouts
        is_whiteout = entry.kind == stat.S_IFCHR and entry.rdev == 0
        mode = stat.S_IFCHR if is_whiteout else entry.mode
        found.append((path, oct(mode), entry.uid, entry.gid, size, entry.rdev, nlink, entry.content, xattrs))
    return found


def test_upper_is_what_the_kernel_writes(world: MakeWorld) -> None:
    """The same changes leave the same whiteouts, opaque directories, copies and xattrs in the raw upper."""
    made = world(_for_format, options=("index=off", "redirect_dir=off"))
    for root in (made.union, made.kernel):
        _change(root)
    ours, theirs = _on_disk(made.upper), _on_disk(made.kernel_upper)
    assert ours == theirs
    assert os.listdir(made.upper.parent / "work/work") == []


def test_each_reads_what_the_other_wrote(kernel_overlay: None, area: Path, session: str) -> None:
    """An upper is used under the other filesystem, writable, and then again here."""
    (area / "lower").mkdir()
    _for_format(area / "lower")
    for name in ("upper", "work"):
        (area / name).mkdir()
    layer = {"lowers": [area / "lower"], "upper": area / "upper", "work": area / "work"}
    with mounted(area, session=session, **layer) as mount:  # type: ignore[arg-type]
        _change(mount.mountpoint)
        first = snapshot.take(mount.mountpoint)
    with kernel_mounted(area, **layer) as kernel:  # type: ignore[arg-type]
        second = snapshot.take(kernel.mountpoint)
        assert not normalise.compare_trees(first, second, CLOCK)
        (kernel.mountpoint / "new-dir/kernel").write_bytes(b"k")
        shutil.rmtree(kernel.mountpoint / "merged/sub")
        (kernel.mountpoint / "merged/sub").mkdir()
        os.rename(kernel.mountpoint / "swap2", kernel.mountpoint / "merged/sub/swap2")
        third = snapshot.take(kernel.mountpoint)
    with mounted(area, session=session, **layer) as mount:  # type: ignore[arg-type]
        fourth = snapshot.take(mount.mountpoint)
        assert not normalise.compare_trees(fourth, third, CLOCK)


def test_hostile_upper(kernel_overlay: None, area: Path, session: str) -> None:
    """Odd xattrs and files in layers are data: nothing crashes, and readable files are read."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    for name in ("lower", "upper"):
        (area / name / "d").mkdir()
        (area / name / f"d/{name}").write_bytes(b"x")
    for name, value in (
        ("origin", b"\xff" * 200), ("impure", b"maybe"), ("nlink", b"U+99999999999"),
        ("uuid", b"short"), ("protattr", b"i"), ("nothing", b""),
    ):  # fmt: skip
        os.setxattr(area / "upper/d", "trusted.overlay." + name, value)
    (area / "upper/r").mkdir()
    os.setxattr(area / "upper/r", "trusted.overlay.redirect", b"../../../etc")
    (area / "lower/f").write_bytes(b"hello")
    (area / "upper/loop").symlink_to("loop")
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        mount.allow_log("redirect")
        top = mount.mountpoint
        assert (top / "f").read_bytes() == b"hello"
        assert errno_of(lambda: (top / "loop").read_bytes()) == errno.ELOOP
        assert sorted(os.listdir(top / "d")) == ["lower", "upper"]
        assert errno_of(os.listdir, top / "r") in (0, errno.EIO, errno.ESTALE, errno.EINVAL)
        assert errno_of(os.stat, top / "r/passwd") != 0
        assert not [name for name in os.listxattr(top / "d") if name.startswith("trusted.overlay")]
        (top / "f").write_bytes(b"still works")
