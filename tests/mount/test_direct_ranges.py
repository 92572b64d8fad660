"""Parts of files: holes found, punched and preserved, ranges copied between files."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support import world as worlds
from tests.support.mounting import mounted
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]
KIB, MIB = 1 << 10, 1 << 20
NO_DATA = f"errno {errno.ENXIO} ({os.strerror(errno.ENXIO)})"


def _digest(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def _sparse(root: Path) -> None:
    """data 0-64K, hole, data 1M-1M+64K, hole up to 3M; and files with only holes, only data, no content."""
    with (root / "sparse").open("wb") as file:
        file.write(b"d" * 64 * KIB)
        file.seek(MIB)
        file.write(b"e" * 64 * KIB)
        file.truncate(3 * MIB)
        os.fsync(file.fileno())
    with (root / "hole").open("wb") as file:
        file.truncate(MIB)
    with (root / "full").open("wb") as file:
        file.write(b"f" * 100_000)
        os.fsync(file.fileno())
    (root / "empty").touch()


def _segments(fd: int) -> list[object]:
    found: list[object] = []
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        for at in (0, 1, 64 * KIB - 1, 64 * KIB, 500 * KIB, MIB, MIB + 64 * KIB, 3 * MIB - 1, 3 * MIB, -1):
            found.append(outcome(lambda _, at=at, whence=whence: os.lseek(fd, at, whence), Path()))  # type: ignore[misc]
    return found


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=["reading", "writing"])
def test_seek_data_and_hole(world: MakeWorld, session: str, flags: int) -> None:
    """In lower files and copies in the upper: where data and holes begin."""
    dc.need_direct(session, "SEEK_DATA")
    made = world(_sparse)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for name in ("sparse", "hole", "full", "empty"):
            fd = os.open(root / name, flags)
            found += _segments(fd)
            os.lseek(fd, 7, os.SEEK_SET)
            found.append(os.read(fd, 3))
            os.close(fd)
        return found

    if session == "direct-cached":
        # left to the kernel, which reports everything as data: see test_data_just_written_is_no_hole
        found = calls(made.union)
        assert found[:2] == [0, 1]
        assert found[7:9] == [3 * MIB - 1, NO_DATA]
        assert found[10:18] == [3 * MIB] * 8
        return
    dc.natively(made, calls)


@pytest.mark.parametrize("how", ["write", "mapping"])
def test_data_just_written_is_no_hole(world: MakeWorld, session: str, how: str) -> None:
    """Data that is written but on no disk yet must not be reported as a hole: programs that copy would skip
    it."""
    if how == "mapping" and not dc.passes_through(session):
        pytest.skip("a store through a mapping is known to the page cache alone until msync or close")
    made = world()

    def calls(root: Path) -> list[object]:
        with dc.opened(root / "new", os.O_RDWR | os.O_CREAT) as fd:
            os.ftruncate(fd, 4 * MIB)
            if how == "write":
                os.pwrite(fd, b"w" * 64 * KIB, 2 * MIB)
            else:
                with mmap.mmap(fd, 4 * MIB) as mapped:
                    mapped[2 * MIB : 2 * MIB + 64 * KIB] = b"m" * 64 * KIB
            data = os.lseek(fd, 0, os.SEEK_DATA)
            covered = data <= 2 * MIB and os.lseek(fd, 2 * MIB, os.SEEK_HOLE) >= 2 * MIB + 64 * KIB
        subprocess.run(["cp", "--sparse=auto", str(root / "new"), str(root / "copy")], check=True)
        return [covered, _digest(root / "new"), _digest(root / "copy")]

    assert dc.natively(made, calls)[0] is True


def test_cp_of_a_file_being_written(world: MakeWorld, session: str) -> None:
    """A program that copies by SEEK_DATA while the writer has the file open misses no data."""
    made = world()

    def calls(root: Path) -> list[object]:
        with (root / "new").open("w+b", buffering=0) as file:
            file.truncate(3 * MIB)
            file.seek(MIB)
            file.write(b"w" * 100_000)
            subprocess.run(["cp", "--reflink=never", str(root / "new"), str(root / "copy")], check=True)
            return [(root / "copy").read_bytes() == (root / "new").read_bytes()]

    assert dc.natively(made, calls) == [True]


# -- fallocate

PATTERN = bytes(range(256)) * 512  # 128 KiB
MODES: dict[str, tuple[int, int, int]] = {
    "plain inside": (0, 4096, 8192),
    "plain beyond": (0, 100 * KIB, 64 * KIB),
    "keep size": (dc.KEEP_SIZE, 100 * KIB, 200 * KIB),
    "punch": (dc.PUNCH_HOLE | dc.KEEP_SIZE, 8192, 16384),
    "punch odd": (dc.PUNCH_HOLE | dc.KEEP_SIZE, 5000, 20001),
    "punch at end": (dc.PUNCH_HOLE | dc.KEEP_SIZE, 120 * KIB, 64 * KIB),
    "punch without keep size": (dc.PUNCH_HOLE, 8192, 8192),
    "zero": (dc.ZERO_RANGE, 4096, 12288),
    "zero odd": (dc.ZERO_RANGE, 4097, 12289),
    "zero beyond": (dc.ZERO_RANGE, 120 * KIB, 64 * KIB),
    "zero keep size": (dc.ZERO_RANGE | dc.KEEP_SIZE, 120 * KIB, 64 * KIB),
    "length 0": (0, 0, 0),
    "offset below 0": (0, -1, 4096),
    "far too big": (0, 1 << 62, 1 << 62),
    "unknown": (0x4000, 0, 4096),
}
SHIFTS = {
    "collapse": (dc.COLLAPSE, 8192, 8192),
    "insert": (dc.INSERT, 8192, 8192),
    "collapse odd": (dc.COLLAPSE, 100, 100),
    "unshare": (dc.UNSHARE, 0, 8192),
}


def _patterns(root: Path) -> None:
    for number in range(len(MODES)):
        (root / f"f{number}").write_bytes(PATTERN)
    for number in range(len(SHIFTS)):
        (root / f"s{number}").write_bytes(PATTERN)


@pytest.mark.parametrize("kind", ["area", "tmpfs", "xfs", "btrfs"])
def test_fallocate(
    kernel_overlay: None, area: Path, session: str, kind: str, filesystem: Callable[..., Path]
) -> None:
    """Every mode, on a copy of a lower file, including unsupported and invalid ones; sizes and content."""
    dc.need_direct(session, "fallocate")
    place = area if kind == "area" else filesystem(kind)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for number, arguments in enumerate(MODES.values()):
            path = root / f"f{number}"
            fd = os.open(path, os.O_RDWR)
            found.append((arguments, errno_of(dc.fallocate, fd, *arguments), os.fstat(fd).st_size))
            found.append(os.pread(fd, 256 * KIB, 0) == path.read_bytes())
            os.close(fd)
            found.append(_digest(path))
        fd = os.open(root / "f0", os.O_RDONLY)
        found.append(errno_of(dc.fallocate, fd, 0, 0, 4096))
        os.close(fd)
        fd = os.open(root, os.O_RDONLY)
        found.append(errno_of(dc.fallocate, fd, 0, 0, 4096))
        os.close(fd)
        return found

    with worlds.world(place, session, [_patterns]) as made:
        dc.natively(made, calls)
        for name in ("f0", "f4"):
            assert (made.lower / name).read_bytes() == PATTERN
        if session != "overlay":
            # The kernel itself refuses these on every FUSE filesystem (fs/fuse/file.c).
            for number, arguments in enumerate(SHIFTS.values()):
                with (made.union / f"s{number}").open("r+b") as file:
                    assert errno_of(dc.fallocate, file.fileno(), *arguments) == errno.EOPNOTSUPP
                assert (made.union / f"s{number}").read_bytes() == PATTERN
        # freed blocks return to the filesystem
        holed = made.union / "holed"
        holed.write_bytes(b"h" * 4 * MIB)
        with holed.open("r+b") as file:
            os.fsync(file.fileno())
            before = os.fstat(file.fileno()).st_blocks
            dc.fallocate(file.fileno(), dc.PUNCH_HOLE | dc.KEEP_SIZE, MIB, 2 * MIB)
            os.fsync(file.fileno())
            assert os.fstat(file.fileno()).st_blocks <= before - 2 * MIB // 512


def test_posix_fallocate_without_space(
    root: None, area: Path, session: str, filesystem: Callable[..., Path]
) -> None:
    """ENOSPC, and the file keeps its size."""
    dc.need_direct(session, "fallocate")
    small = filesystem("tmpfs", 8 * MIB)
    for path in (area / "lower", small / "upper", small / "work"):
        path.mkdir()
    with (
        mounted(
            area, lowers=[area / "lower"], upper=small / "upper", work=small / "work", session=session
        ) as mount,
        dc.opened(mount.mountpoint / "f", os.O_RDWR | os.O_CREAT) as fd,
    ):
        os.pwrite(fd, b"x" * 5000, 0)
        assert errno_of(os.posix_fallocate, fd, 0, 64 * MIB) == errno.ENOSPC
        assert os.fstat(fd).st_size == 5000
        assert os.pread(fd, 10000, 0) == b"x" * 5000


# -- copy_file_range


def _copies(root: Path) -> None:
    data = random.Random(1).randbytes(300_000)
    for name in ("low1", "low2", "low3", "low4"):
        (root / name).write_bytes(data)
    (root / "small").write_bytes(b"small")


def test_copy_file_range(world: MakeWorld, session: str) -> None:
    """Lower to upper, upper to upper, into a copied-up lower file, within one file; and errors."""
    dc.need_direct(session, "copy_file_range")
    made = world(_copies)

    def copy(source: int, target: int, count: int, at: int, to: int) -> object:
        done = 0
        while done < count:
            here = os.copy_file_range(source, target, count - done, at + done, to + done)
            if here == 0:
                break
            done += here
        return done

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        low = os.open(root / "low1", os.O_RDONLY)
        own = os.open(root / "own", os.O_RDWR | os.O_CREAT, 0o644)
        found.append(copy(low, own, 200_000, 1000, 0))
        found.append(os.fstat(own).st_size)
        found.append(hashlib.sha256(os.pread(own, 1 << 20, 0)).hexdigest())
        # unsynced data is copied too
        os.pwrite(own, b"FRESH" * 1000, 150_000)
        other = os.open(root / "other", os.O_RDWR | os.O_CREAT, 0o644)
        found.append(copy(own, other, 1 << 20, 100, 7777))
        found.append([os.fstat(other).st_size, os.pread(other, 12_000, 150_000)])
        old_reader = os.open(root / "low2", os.O_RDONLY)
        into = os.open(root / "low2", os.O_RDWR)
        found.append(os.pread(into, 100, 5000))
        found.append(copy(other, into, 50_000, 10_000, 290_000))
        found += [os.fstat(into).st_size, hashlib.sha256(os.pread(into, 1 << 20, 0)).hexdigest()]
        found.append(copy(own, own, 5000, 0, 190_000))
        found.append(outcome(lambda _: copy(own, own, 5000, 0, 2000), root))
        found.append(outcome(lambda _: copy(own, low, 5000, 0, 2000), root))
        found.append(copy(low, own, 5000, 400_000, 0))  # beyond the end: nothing
        for fd in (low, own, other, old_reader, into):
            os.close(fd)
        appending = os.open(root / "low3", os.O_WRONLY | os.O_APPEND)
        low = os.open(root / "low4", os.O_RDONLY)
        found.append(outcome(lambda _: copy(low, appending, 5000, 0, 0), root))
        os.close(appending)
        os.close(low)
        found += [_digest(root / name) for name in ("own", "other", "low1", "low2", "low3", "low4")]
        return found

    dc.natively(made, calls)
    assert _digest(made.lower / "low2") == _digest(made.lower / "low1")


def test_copies_share_extents(root: None, area: Path, session: str, filesystem: Callable[..., Path]) -> None:
    """On a filesystem with reflinks copy_file_range between upper files takes no additional space."""
    dc.need_direct(session, "copy_file_range")
    place = filesystem("xfs", 400 * MIB)
    if not dc.can_reflink(place):
        pytest.skip("this xfs has no reflinks")
    with worlds.world(place, session, [worlds.nothing]) as made:
        fd = os.open(made.union / "big", os.O_RDWR | os.O_CREAT, 0o644)
        data = os.urandom(MIB)
        for at in range(64):
            os.pwrite(fd, data, at * MIB)
        os.fsync(fd)
        free = os.statvfs(place).f_bavail
        target = os.open(made.union / "copy", os.O_RDWR | os.O_CREAT, 0o644)
        done = 0
        while done < 64 * MIB:
            done += os.copy_file_range(fd, target, 64 * MIB - done, done, done)
        os.fsync(target)
        taken = (free - os.statvfs(place).f_bavail) * os.statvfs(place).f_bsize
        assert os.pread(target, MIB, 63 * MIB) == data
        os.close(fd)
        os.close(target)
        assert taken < 16 * MIB
