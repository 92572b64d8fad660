"""The times of a file after stores through a shared mapping, of which the kernel tells no FUSE daemon."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.worker import Worker
from tests.support.world import World
from unionfs.sys import calls

MakeWorld = Callable[..., World]
OLD = 10**18
SIZE = 4096
# Of struct statx, include/uapi/linux/stat.h
STATX_MTIME, STATX_CTIME = 0x40, 0x80
CTIME_AT, MTIME_AT = 96, 112
WHERE = ("lower", "upper", "created")


def _files(root: Path) -> None:
    for name in WHERE[:2]:
        (root / name).write_bytes(b"a" * SIZE)


def times(path: str, only: bool) -> tuple[int, int]:
    """mtime and ctime in nanoseconds, by stat(2), or by statx(2) that asks for them alone."""
    if not only:
        st = os.stat(path)
        return st.st_mtime_ns, st.st_ctime_ns
    raw = calls.statx(calls.AT_FDCWD, os.fsencode(path), 0, STATX_MTIME | STATX_CTIME)
    mtime, ctime = (struct.unpack_from("=qI", raw, at) for at in (MTIME_AT, CTIME_AT))
    return mtime[0] * 10**9 + mtime[1], ctime[0] * 10**9 + ctime[1]


def _open(root: Path, where: str) -> tuple[int, str]:
    path = root / where
    if where == "upper":
        path.chmod(0o640)  # copies it up
    if where == "created":
        path.unlink(missing_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), str(path)
    os.stat(path)  # now the kernel has its attributes
    return os.open(path, os.O_RDWR), str(path)


def passes_through(made: World) -> bool:
    return made.mount.session in ("direct-hybrid", "direct-passthrough")


@pytest.mark.parametrize("only", [False, True], ids=["stat", "statx"])
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("where", WHERE)
def test_times(world: MakeWorld, where: str, closed: bool, only: bool) -> None:
    """Before, between and after stores, from this process and another one; the file is closed before the
    stores, or after them."""
    made = world(_files)
    if not passes_through(made):
        pytest.skip("stores into the page cache have coarse times, or none until they are written")

    def changes(root: Path) -> list[object]:
        found: list[object] = []
        fd, path = _open(root, where)
        with Worker(modules=[__name__]) as other:

            def asked() -> list[tuple[int, int]]:
                return [times(path, only), other.call(times, path, only)]

            def note(before: list[tuple[int, int]]) -> None:
                """Whether mtime and ctime differ from those before, for both processes."""
                for old, new in zip(before, asked(), strict=True):
                    found.append((old[0] != new[0], old[1] != new[1]))

            os.ftruncate(fd, SIZE)
            os.utime(path, ns=(OLD, OLD))
            with dc.mapped(fd, SIZE) as address:
                if closed:
                    os.close(fd)
                before = asked()
                note(before)
                ctypes.memmove(address, b"store", 5)
                note(before)
                dc.msync(address, SIZE)
                os.utime(path, ns=(OLD, OLD))
                before = asked()
                ctypes.memmove(address, b"again", 5)
                note(before)
                dc.msync(address, SIZE)
                os.utime(path, ns=(OLD, OLD))
                before = asked()
                ctypes.memmove(address, b"last", 4)
            if not closed:
                os.close(fd)
            note(before)
            last = asked()
            note(last)
        found.append(Path(path).read_bytes()[:5])
        return found

    expected = changes(made.native)
    assert changes(made.kernel) == expected
    assert changes(made.union) == expected


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("where", WHERE)
def test_mtime_after_msync(world: MakeWorld, where: str, closed: bool) -> None:
    """On every session, at once."""
    made = world(_files)

    def changes(root: Path) -> list[bool]:
        found = []
        fd, path = _open(root, where)
        os.ftruncate(fd, SIZE)
        with Worker(modules=[__name__]) as other, dc.mapped(fd, SIZE) as address:
            if closed:
                os.close(fd)
            for round_ in range(3):
                os.utime(path, ns=(OLD, OLD))
                found += [times(path, False)[0] != OLD, other.call(times, path, True)[0] != OLD]
                ctypes.memmove(address, b"%5d" % round_, 5)
                dc.msync(address, SIZE)
                found += [other.call(times, path, True)[0] != OLD, times(path, False)[0] != OLD]
        if not closed:
            os.close(fd)
        return found

    made.as_native(changes)


@pytest.mark.parametrize("where", WHERE)
def test_every_store_of_many_rounds(world: MakeWorld, where: str) -> None:
    """open, map, store, unmap, close, stat at once; each round with other opens in between."""
    made = world(_files)

    def changes(root: Path) -> list[bool]:
        found = []
        for round_ in range(40):
            fd, path = _open(root, where)
            os.ftruncate(fd, SIZE)
            os.utime(path, ns=(OLD, OLD))
            asks = round_ % 2 == 0
            if asks:
                os.stat(path)
            with dc.mapped(fd, SIZE) as address:
                ctypes.memmove(address, b"%5d" % round_, 5)
                if round_ % 3 == 0:
                    os.close(fd)
            if round_ % 3 != 0:
                os.close(fd)
            found.append(os.stat(path).st_mtime_ns != OLD)
            with open(path, "rb") as reader:
                found.append(reader.read(5) == b"%5d" % round_)
            with open(path, "ab") as writer:
                os.utime(path, ns=(OLD, OLD))
                os.stat(path)
                writer.write(b"x")
            found.append(os.stat(path).st_mtime_ns != OLD)
        return found

    assert all(made.as_native(changes))


def test_attributes_are_cached_again(world: MakeWorld) -> None:
    """When nothing is mapped any more, a stat costs no request; while something is, each costs one."""
    made = world(_files)
    if not passes_through(made):
        pytest.skip("without passthrough the kernel knows of each store")

    def requests(path: Path) -> int:
        """The GETATTRs of 20 stats, after those that settle it: RELEASE is sent in the background."""
        for _ in range(20):
            before = made.mount.figure("getattr")
            os.stat(path)
            if made.mount.figure("getattr") == before:
                break
            time.sleep(0.01)
        before = made.mount.figure("getattr")
        for _ in range(20):
            os.stat(path)
        return made.mount.figure("getattr") - before

    path = made.union / "upper"
    fd, _ = _open(made.union, "upper")
    assert requests(path) == 20
    os.close(fd)
    assert requests(path) == 0
    fd, _ = _open(made.union, "upper")
    with dc.mapped(fd, SIZE) as address:
        os.close(fd)
        ctypes.memmove(address, b"store", 5)
        assert requests(path) == 20
    assert requests(path) == 0
    with path.open("ab") as writer:
        writer.write(b"x")
        assert requests(path) == 0
    assert requests(path) == 0
