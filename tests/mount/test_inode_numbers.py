"""``st_ino`` and ``d_ino`` outlive copy-up, remount and new layers on top, and are unique."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.direct_calls import statx
from tests.oracle import normalise
from tests.support import areas, snapshot
from tests.support.mounting import Mount, kernel_mounted, mounted

AT_SYMLINK_NOFOLLOW = 0x100
MakeFilesystem = Callable[..., Path]
ORIGIN, IMPURE = "trusted.overlay.origin", "trusted.overlay.impure"


def _tree(root: Path) -> None:
    """One object of each type, at the top and in directories."""
    for directory in (root, root / "d", root / "d/e", root / "other"):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "file").write_bytes(b"data")
        (directory / "plain").write_bytes(b"")
        (directory / "readonly").write_bytes(b"data")
        (directory / "readonly").chmod(0o444)
        (directory / "link").symlink_to("file")
        os.mkfifo(directory / "fifo")
        os.mknod(directory / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(directory / "socket"))


def _touch(root: Path, *, but: Sequence[str] = ()) -> None:
    """Copy everything up."""
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            if name not in but:
                os.utime(Path(directory, name), ns=(1, 1), follow_symlinks=False)


def _numbers(root: Path) -> dict[bytes, int]:
    """``st_ino`` by path; every ``d_ino`` and statx(2) must agree, and no number occurs twice."""
    tree = snapshot.take(root)
    assert not normalise.strict(tree)
    for path, entry in tree.items():
        assert statx(root / os.fsdecode(path), flags=AT_SYMLINK_NOFOLLOW).ino == entry.ino
    found = {path: entry.ino for path, entry in tree.items()}
    assert len(set(found.values())) == len(found)
    return found


class _Stack:
    """Layers that can be mounted, and pushed: the upper becomes a lower below a new one."""

    def __init__(self, area: Path, session: str, lowers: list[Path], places: Iterator[Path]) -> None:
        self.area, self.session, self.lowers = area, session, lowers
        self._places = places
        self._count = 0
        self.push()

    def push(self) -> None:
        if self._count:
            self.lowers.insert(0, self.upper)
        place = next(self._places)
        self.upper, self.work = place / f"upper{self._count}", place / f"work{self._count}"
        self.upper.mkdir()
        self.work.mkdir()
        self._count += 1

    @contextmanager
    def mounted(self, *options: str) -> Iterator[Mount]:
        with mounted(
            self.area, lowers=self.lowers, upper=self.upper, work=self.work, session=self.session,
            options=options,
        ) as mount:  # fmt: skip
            yield mount

    @contextmanager
    def kernel(self, *options: str) -> Iterator[Path]:
        with kernel_mounted(
            self.area, lowers=self.lowers, upper=self.upper, work=self.work, options=options
        ) as kernel:
            yield kernel.mountpoint

    def numbers(self) -> dict[bytes, int]:
        with self.mounted() as mount:
            return _numbers(mount.mountpoint)


def _changes(root: Path) -> dict[str, str]:
    """Copy up, and move copies; returns the new paths by the old ones."""
    _touch(root, but=("plain",))
    (root / "new").mkdir()
    os.rename(root / "d/file", root / "new/file")
    os.rename(root / "other/readonly", root / "moved")
    os.rename(root / "d/e/link", root / "d/link")
    return {"d/file": "new/file", "other/readonly": "moved", "d/e/link": "d/link"}


def _after(before: dict[bytes, int], renames: dict[str, str]) -> dict[bytes, int]:
    found = dict(before)
    moved = {new.encode(): found.pop(old.encode()) for old, new in renames.items()}
    return {**found, **moved}


@pytest.mark.parametrize("where", ["one", "three"])
def test_numbers_outlive_everything(
    kernel_overlay: None, area: Path, session: str, filesystem: MakeFilesystem, where: str
) -> None:
    """With layers on one or several filesystems."""
    others = [] if where == "one" else [filesystem("tmpfs"), filesystem("ext4", 64 << 20)]
    _outlive(area, session, [*others, area])


@pytest.mark.parametrize("kind", ["tmpfs", "xfs", "btrfs"])
def test_numbers_on_each_filesystem(
    kernel_overlay: None, area: Path, filesystem: MakeFilesystem, kind: str
) -> None:
    """With layers on it and on another one by turns."""
    _outlive(area, "direct-cached", [filesystem(kind), area])


def _outlive(area: Path, session: str, places: list[Path]) -> None:
    """Numbers stay over copy-up, rename, remount, and new layers on top."""

    def turns() -> Iterator[Path]:
        while True:
            yield from places

    lower = area / "lower"
    _tree(lower)
    stack = _Stack(area, session, [lower], turns())
    before = stack.numbers()
    with stack.mounted() as mount:
        expected = _after(before, _changes(mount.mountpoint))
        after = _numbers(mount.mountpoint)
        assert after.pop(b"new")
        assert after == expected
    for _ in range(3):
        first = stack.numbers()
        assert {path: ino for path, ino in first.items() if path in expected} == expected
        stack.push()
        assert stack.numbers() == first
        with stack.mounted() as mount:
            _touch(mount.mountpoint)
            assert _numbers(mount.mountpoint) == first
        assert stack.numbers() == first


def test_same_numbers_as_the_kernel(kernel_overlay: None, area: Path, session: str) -> None:
    """Origins that one writes, the other reads; so long as no upper becomes a lower."""
    lower = area / "lower"
    _tree(lower)
    stack = _Stack(area, session, [lower], iter([area]))

    def same() -> None:
        with stack.kernel("xino=on") as kernel:
            theirs = _numbers(kernel)
        ours = stack.numbers()
        assert ours.pop(b".")
        theirs.pop(b".")
        assert ours == theirs

    same()
    with stack.mounted() as mount:
        _changes(mount.mountpoint)
    same()
    with stack.kernel("xino=on") as kernel:
        (kernel / "by kernel").mkdir()
        os.rename(kernel / "d/readonly", kernel / "by kernel/readonly")
        _touch(kernel)
    same()


@pytest.mark.parametrize("kind", areas.FILESYSTEMS)
def test_origin_is_the_kernels(
    kernel_overlay: None, area: Path, session: str, filesystem: MakeFilesystem, kind: str
) -> None:
    """The same bytes, on every type of object and on the same directories."""
    place = filesystem(kind)
    lower = place / "lower"
    _tree(lower)
    found = []
    for side in ("ours", "kernel"):
        stack = _Stack(area, session, [lower], iter([area]))
        with stack.kernel() if side == "kernel" else stack.mounted() as top:
            _changes(top if isinstance(top, Path) else top.mountpoint)
        tree = snapshot.take(stack.upper)
        found.append({
            path: {name: entry.xattrs.get(name) for name in (ORIGIN, IMPURE)} for path, entry in tree.items()
        })
        os.rename(stack.upper, area / side)
        os.rename(stack.work, area / f"{side}-work")
    # the kernel sets the root's origin at mount
    assert {path: found[0][path] for path in found[0] if path != b"."} == {
        path: found[1][path] for path in found[1] if path != b"."
    }


@pytest.mark.parametrize("value", [b"", b"\0", b"\0\xfb\x1d", b"\xff" * 29, b"\0\xfb\xff" + bytes(26), None])
def test_broken_origins_are_ignored(
    kernel_overlay: None, area: Path, session: str, value: bytes | None
) -> None:
    """Such an object has its own number. ``None``: the origin of an object on an unknown filesystem."""
    lower = area / "lower"
    _tree(lower)
    stack = _Stack(area, session, [lower], iter([area]))
    with stack.mounted() as mount:
        _touch(mount.mountpoint)
    for name in ("file", "link", "fifo", "d"):
        path = stack.upper / name
        origin = bytearray(os.getxattr(path, ORIGIN, follow_symlinks=False))
        origin[5:21] = b"u" * 16
        os.setxattr(path, ORIGIN, bytes(origin) if value is None else value, follow_symlinks=False)
    with stack.mounted() as mount:
        numbers = _numbers(mount.mountpoint)
    for name in (b"file", b"link", b"fifo"):
        assert numbers[name] == os.lstat(os.fsencode(stack.upper) + b"/" + name).st_ino
    assert numbers[b"d"] == (lower / "d").stat().st_ino


def test_xino_off(kernel_overlay: None, area: Path, session: str, filesystem: MakeFilesystem) -> None:
    """Files have the number of their layer's file, as on kernel overlayfs with ``xino=off``; directories
    have a unique one; all fit into 32 bits."""
    lower, place = filesystem("ext4", 64 << 20) / "lower", filesystem("tmpfs")
    _tree(lower)
    stack = _Stack(area, session, [lower], iter([place]))

    def files(root: Path) -> dict[bytes, int]:
        tree = snapshot.take(root)
        return {path: entry.ino for path, entry in tree.items() if not stat.S_ISDIR(entry.mode)}

    def number(root: Path) -> dict[bytes, int]:
        (root / "new").mkdir()
        (root / "new/file").write_bytes(b"")
        os.utime(root / "d/file", ns=(1, 1))
        (root / "d/own").write_bytes(b"")
        return files(root)

    with stack.kernel("xino=off") as kernel:
        theirs = number(kernel)
    with stack.kernel("xino=off") as kernel:
        assert files(kernel) == theirs
    with stack.mounted("xino=off") as mount:
        tree = snapshot.take(mount.mountpoint)
        assert files(mount.mountpoint) == theirs
        assert not normalise.strict(tree)
        assert max(entry.ino for entry in tree.values()) < 1 << 32
        directories = [entry.ino for entry in tree.values() if stat.S_ISDIR(entry.mode)]
        assert len(set(directories)) == len(directories)
    with stack.mounted() as mount:
        assert max(_numbers(mount.mountpoint).values()) >= 1 << 32
