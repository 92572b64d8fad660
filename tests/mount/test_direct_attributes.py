"""stat of open files being written in every way: never an old size, and soon the new times."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support import actions
from tests.support.worker import Worker
from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]
OLD = 10**18
LATE = 1.2
"""The maximum delay of a time without a notice: a second, and a little for the test itself."""


def _files(root: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        (root / name).write_bytes(name.encode() * 1000)
        os.utime(root / name, ns=(OLD, OLD))


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_changes_of_an_open_file(world: MakeWorld, where: str) -> None:
    """rename, rename over, unlink, link, truncate, chmod, chown of a file open for writing."""
    made = world(_files)

    def calls(root: Path) -> list[object]:
        if where == "upper":
            for name in "abcde":
                os.chmod(root / name, 0o640)
        found: list[object] = []
        with dc.opened(root / "a", os.O_RDWR) as a, dc.opened(root / "b", os.O_RDWR) as b:

            def look(*names: str) -> None:
                for fd in (a, b):
                    seen = os.fstat(fd)
                    found.append((seen.st_size, seen.st_nlink, oct(seen.st_mode), seen.st_uid))
                found.extend((root / name).stat().st_size for name in names)

            os.pwrite(a, b"x" * 10, 1000)
            look("a")
            os.rename(root / "a", root / "z")
            os.pwrite(a, b"x" * 10, 1010)
            look("z")
            os.truncate(root / "z", 5)
            look("z")
            found.append(os.pread(a, 100, 0))
            os.pwrite(a, b"y" * 10, 3)
            os.link(root / "z", root / "y")
            look("z", "y")
            os.ftruncate(a, 4000)
            look("y", "z")
            os.chmod(root / "y", 0o600)
            os.chown(root / "z", 12, 34)
            look("y")
            os.rename(root / "z", root / "b")
            os.pwrite(b, b"b" * 50, 2000)
            look("b", "y")
            os.unlink(root / "y")
            os.unlink(root / "b")
            os.pwrite(a, b"end", 4000)
            os.ftruncate(b, 7)
            look()
            found += [os.pread(a, 10, 3998), os.pread(b, 100, 0), errno_of(os.fsync, a)]
        found.append(sorted(os.listdir(root)))
        return found

    dc.natively(made, calls)


def test_another_process_sees_each_size_at_once(world: MakeWorld, session: str) -> None:
    """After appending through one fd, every stat by name, by fd and by another process has the new size."""
    made = world(_files)
    path = made.union / "a"
    with Worker() as other, dc.opened(path, os.O_WRONLY | os.O_APPEND) as fd, dc.opened(path) as reader:
        for number in range(1, 60):
            os.write(fd, b"0123456789")
            size = 1000 + 10 * number
            assert os.stat(path).st_size == os.fstat(reader).st_size == os.fstat(fd).st_size == size
            assert other.call(os.path.getsize, str(path)) == size
            assert os.pread(reader, 20, size - 10) == b"0123456789"
        os.ftruncate(reader if session == "none" else fd, 3)
        assert other.call(os.path.getsize, str(path)) == os.fstat(reader).st_size == 3


def test_mtime_and_ctime_after_a_write(world: MakeWorld) -> None:
    """At most a second old in every process, while the file is open and after its close."""
    made = world(_files)

    def changes(path: Path) -> list[bool]:
        found = []
        for closes in (False, True):
            fd = os.open(path, os.O_RDWR)
            os.utime(fd, ns=(OLD, OLD))
            assert os.stat(path).st_mtime_ns == OLD  # the kernel now caches it
            before = time.time_ns()
            os.pwrite(fd, b"written", 3)
            if closes:
                os.close(fd)
            found.append(dc.wait_for(lambda: os.stat(path).st_mtime_ns > before - 50_000_000, LATE))  # noqa: B023
            found += [os.stat(path).st_ctime_ns > before - 50_000_000]
            found.append(os.stat(path).st_mtime_ns < time.time_ns())
            if not closes:
                os.close(fd)
        return found

    assert all(changes(made.native / "a"))
    assert all(changes(made.union / "a"))


def test_data_of_a_mapping_meets_reads_and_writes(world: MakeWorld) -> None:
    """Two mappings, a reader and a writer of one file in two processes: one content."""
    made = world(_files)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        with Worker() as other, dc.opened(root / "d", os.O_RDWR) as fd, dc.opened(root / "d") as reader:
            with (
                mmap.mmap(fd, 1000) as mapped,
                mmap.mmap(reader, 1000, prot=mmap.PROT_READ) as seen,
            ):
                mapped[0:3] = b"MAP"
                found += [seen[0:4], os.pread(reader, 4, 0), other.call(_read, str(root / "d"), 4)]
                os.pwrite(fd, b"PWRITE", 10)
                found += [mapped[10:17], seen[10:17]]
                other.call(actions.write_at, str(root / "d"), b"OTHER", 500)
                found += [mapped[500:506], seen[500:506], os.pread(fd, 6, 500)]
                os.ftruncate(fd, 5000)
                os.pwrite(fd, b"tail", 4996)
            found += [os.fstat(reader).st_size, os.pread(reader, 10, 4990)]
        return found

    dc.natively(made, calls)


def _read(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


# -- set-id bits


WRITE = """
import os, sys
path, how = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
os.setresgid(1000, 1000, 1000) if how.startswith("user") else None
os.setresuid(1000, 1000, 1000) if how.startswith("user") else None
if how.endswith("truncate"):
    os.ftruncate(fd, 3)
elif how.endswith("allocate"):
    os.posix_fallocate(fd, 0, 100)
else:
    os.pwrite(fd, b"written", 0)
os.fsync(fd)
os.close(fd)
"""


@pytest.mark.parametrize("how", ["user write", "root write", "user truncate", "user allocate"])
def test_set_id_bits_go_with_another_users_write(world: MakeWorld, session: str, how: str) -> None:
    """Through an fd opened for the user: cleared at once for all, and on disk; a write by root keeps them."""
    if how.endswith("allocate"):
        dc.need_direct(session, "fallocate")
    modes = (0o4777, 0o2777, 0o6777, 0o6755)

    def build(root: Path) -> None:
        for mode in modes:
            (root / f"l{mode:o}").write_bytes(b"content")
            os.chmod(root / f"l{mode:o}", mode)

    made = world(build)

    def calls(root: Path) -> list[object]:
        os.chmod(root, 0o777)
        found: list[object] = []
        for mode in modes:
            (root / f"u{mode:o}").write_bytes(b"content")
            os.chmod(root / f"u{mode:o}", mode)
        for mode in modes:
            for path in (root / f"l{mode:o}", root / f"u{mode:o}"):
                subprocess.run([sys.executable, "-c", WRITE, str(path), how], check=True)
                found.append((path.name, oct(stat.S_IMODE(path.stat().st_mode))))
        return found

    dc.natively(made, calls)
    for path in made.upper.iterdir():
        assert oct(path.stat().st_mode) == oct((made.native / path.name).stat().st_mode)
    for mode in modes:
        assert stat.S_IMODE((made.lower / f"l{mode:o}").stat().st_mode) == mode
