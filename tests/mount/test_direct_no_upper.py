"""Unions without an upper: there is no copy-up, so hybrid passes large files through too."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support import snapshot, syscalls
from tests.support.mounting import Mount, kernel_mounted, mounted
from tests.support.world import errno_of

SMALL = 65_536
"""The maximum size of a file that uses the page cache of the mount."""
SIZES = (0, 1, 4097, SMALL - 1, SMALL, SMALL + 1, 1_000_000, 5 << 20)
LARGE = [size for size in SIZES if size > SMALL]


def _content(size: int) -> bytes:
    return (b"%d bytes in all; " % size * (size // 10 + 1))[:size]


@pytest.fixture
def lowers(area: Path) -> list[Path]:
    """Two lowers with files of every size; the topmost has a sparse file and a file with two names."""
    found = [area / "top", area / "bottom"]
    for lower in found:
        lower.mkdir()
    for number, size in enumerate(SIZES):
        (found[number % 2] / f"f{size}").write_bytes(_content(size))
    with (found[0] / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"data")
    (found[0] / "one").write_bytes(_content(200_000))
    os.link(found[0] / "one", found[0] / "two")
    return found


def _expected(session: str, large: int, small: int) -> int:
    """The expected number of opens with a backing file."""
    return {"direct-hybrid": large, "direct-passthrough": large + small}.get(session, 0)


def _opened_with_backing_file(mount: Mount) -> int:
    return mount.figure("opened_with_backing_file") if mount.session.startswith("direct") else 0


def test_every_size_reads_as_below(root: None, area: Path, lowers: list[Path], session: str) -> None:
    """By pread(2), through a mapping, and by sendfile(2); the lowers stay unchanged."""
    before = [snapshot.manifest(lower) for lower in lowers]
    with mounted(area, lowers=lowers, session=session) as mount:
        for size in SIZES:
            with dc.opened(mount.mountpoint / f"f{size}") as fd:
                assert os.pread(fd, size + 10, 0) == _content(size)
                assert os.pread(fd, 10, size) == b""
                assert os.fstat(fd).st_size == size
                if size:
                    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
                        assert memory[:] == _content(size)
                with (area / "copy").open("wb") as copy:
                    at = 0
                    while count := os.sendfile(copy.fileno(), fd, at, 1 << 30):
                        at += count
                assert (area / "copy").read_bytes() == _content(size)
        assert _opened_with_backing_file(mount) == _expected(session, len(LARGE), len(SIZES) - len(LARGE))
        if session.startswith("direct"):
            assert dc.wait_for(lambda: mount.figure("backing_files") == 0)
            assert mount.figure("backing_files_refused") == 0
    assert [snapshot.manifest(lower) for lower in lowers] == before


def test_a_small_file_is_never_passed_through(
    root: None, area: Path, lowers: list[Path], session: str
) -> None:
    """However often it is opened: its data is in the page cache."""
    with mounted(area, lowers=lowers, session=session) as mount:
        for _ in range(3):
            for size in SIZES:
                assert (mount.mountpoint / f"f{size}").read_bytes() == _content(size)
        large = 3 * len(LARGE)
        assert _opened_with_backing_file(mount) == _expected(session, large, 3 * len(SIZES) - large)


def test_holes_are_found(root: None, area: Path, lowers: list[Path], session: str) -> None:
    dc.need_direct(session, "LSEEK")

    def calls(top: Path) -> list[int]:
        with dc.opened(top / "sparse") as fd:
            found = [os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 0, os.SEEK_HOLE)]
            found += [os.lseek(fd, 32 << 20, os.SEEK_HOLE), len(os.pread(fd, 1 << 20, 40 << 20))]
            found.append(errno_of(os.lseek, fd, 40 << 20, os.SEEK_DATA))
        return found

    with mounted(area, lowers=lowers, session=session) as mount:
        assert calls(mount.mountpoint) == calls(lowers[0])


def test_many_opens_of_one_file(root: None, area: Path, lowers: list[Path], session: str) -> None:
    """Of both its names, some closed while others stay; every backing file is unregistered."""
    with mounted(area, lowers=lowers, session=session) as mount:
        fds = [os.open(mount.mountpoint / name, os.O_RDONLY) for name in ("one", "two") * 5]
        try:
            for fd in fds[::3]:
                os.close(fd)
            kept = [fd for number, fd in enumerate(fds) if number % 3]
            fds = kept
            again = os.open(f"/proc/self/fd/{kept[0]}", os.O_RDONLY)
            fds.append(again)
            for fd in fds:
                assert os.pread(fd, 300_000, 0) == _content(200_000)
            assert _opened_with_backing_file(mount) == _expected(session, 11, 0)
            if session in ("direct-hybrid", "direct-passthrough"):
                assert mount.figure("backing_files") in (1, 2)  # one per inode
        finally:
            for fd in fds:
                os.close(fd)
        if session.startswith("direct"):
            assert dc.wait_for(lambda: mount.figure("backing_files") == 0)


def test_nothing_can_be_written(kernel_overlay: None, area: Path, lowers: list[Path], session: str) -> None:
    """Not by an open of a large file either; nor if the mount is declared writable, as on overlayfs."""

    def calls(top: Path) -> list[int]:
        found = [
            errno_of(lambda name=name, flags=flags: os.close(os.open(top / name, flags)))
            for name in (f"f{SIZES[-1]}", f"f{SMALL}")
            for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC)
        ]
        return [*found, errno_of(os.truncate, top / f"f{SIZES[-1]}", 5), errno_of(os.unlink, top / "one")]

    with mounted(area, lowers=lowers, session=session) as mount:
        assert set(calls(mount.mountpoint)) == {errno.EROFS}
        with kernel_mounted(area, lowers=lowers) as kernel:
            assert calls(kernel.mountpoint) == calls(mount.mountpoint)
        before = snapshot.manifest(mount.mountpoint)
        syscalls.mount("none", mount.mountpoint, "none", syscalls.MS_REMOUNT)
        with dc.opened(mount.mountpoint / "f5242880") as reader:
            fd = -1
            try:
                fd = os.open(mount.mountpoint / "f5242880", os.O_RDWR)
                written = errno_of(os.pwrite, fd, b"x", 0)  # where opens do not reach the daemon
            except OSError as error:
                written = error.errno or 0
            finally:
                if fd >= 0:
                    os.close(fd)
            assert written == errno.EROFS
            if session != "direct-cached":  # where opens do not reach the daemon
                again = f"/proc/self/fd/{reader}"
                assert errno_of(lambda: os.close(os.open(again, os.O_RDWR))) == errno.EROFS
            assert os.pread(reader, 100, 0) == _content(5 << 20)[:100]
        assert errno_of(os.truncate, mount.mountpoint / "one", 5) == errno.EROFS
        assert snapshot.manifest(mount.mountpoint) == before


def test_read_only_with_an_upper_may_become_writable(
    root: None, area: Path, lowers: list[Path], session: str
) -> None:
    """A process with a large lower file open then sees writes, as always with hybrid."""
    for name in ("upper", "work"):
        (area / name).mkdir()
    with mounted(
        area, lowers=lowers, upper=area / "upper", work=area / "work", session=session, options=["ro"]
    ) as mount:
        path = mount.mountpoint / "one"
        assert errno_of(lambda: os.close(os.open(path, os.O_RDWR))) == errno.EROFS
        with dc.opened(path) as reader:
            assert os.pread(reader, 4, 100_000) == _content(200_000)[100_000:100_004]
            syscalls.mount("none", mount.mountpoint, "none", syscalls.MS_REMOUNT)
            with dc.opened(path, os.O_RDWR) as writer:
                os.pwrite(writer, b"NEW!", 100_000)
                os.fsync(writer)
            if session != "direct-passthrough":
                assert os.pread(reader, 4, 100_000) == b"NEW!"
        assert path.read_bytes()[100_000:100_004] == b"NEW!"
    assert (lowers[0] / "one").read_bytes() == _content(200_000)
    assert (area / "upper/one").read_bytes()[100_000:100_004] == b"NEW!"


def test_it_can_be_a_lower(kernel_overlay: None, area: Path, lowers: list[Path], session: str) -> None:
    """Of kernel overlayfs, which permits two stacked filesystems: passthrough uses one level."""
    with (
        mounted(area, lowers=lowers, session=session) as mount,
        kernel_mounted(area, lowers=[mount.mountpoint, area / "bottom"]) as kernel,
    ):
        for size in SIZES:
            assert (kernel.mountpoint / f"f{size}").read_bytes() == _content(size)


def test_on_an_overlayfs(kernel_overlay: None, area: Path, lowers: list[Path], session: str) -> None:
    """Only an explicit passthrough goes as deep; hybrid uses the page cache there."""
    with (
        kernel_mounted(area, lowers=lowers, name="ground") as ground,
        mounted(area, lowers=[ground.mountpoint], session=session) as mount,
    ):
        for size in SIZES:
            assert (mount.mountpoint / f"f{size}").read_bytes() == _content(size)
        through = len(SIZES) if session == "direct-passthrough" else 0
        assert _opened_with_backing_file(mount) == through
