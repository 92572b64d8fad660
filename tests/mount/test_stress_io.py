"""Random reads and writes of one file, by all calls, compared with the same calls on a native file."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import mounted
from tests.support.patience import patient
from tests.support.worker import REPOSITORY
from tests.support.world import World

MakeWorld = Callable[..., World]
LARGEST = 700_000
CALLS = (
    "read", "pread", "write", "pwrite", "pwrite", "append", "truncate", "ftruncate", "map read", "map write",
    "map write", "punch", "zero", "allocate", "copy", "copy", "fsync", "fdatasync", "reopen", "reopen",
    "reopen truncating", "drop", "stat", "rename",
)  # fmt: skip


class Pair:
    """The union's file and the native one, with the same calls for both; compares every result."""

    def __init__(self, union: Path, native: Path, seed: int, *, direct: bool) -> None:
        self.roots = (union, native)
        self.random = random.Random(seed)
        self.direct = direct
        self.name = "low"
        self.done: list[str] = []
        self.fds: list[int] = []
        self.open(os.O_RDWR)

    def open(self, flags: int) -> None:
        """Reopen the file on both sides; closes the old ones."""
        self.close()
        self.fds = [os.open(root / self.name, flags) for root in self.roots]

    def close(self) -> None:
        """Close both."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def both(self, call: Callable[[int, Path], object]) -> object:
        """Make the call on both sides, which must return the same."""
        found = []
        for fd, root in zip(self.fds, self.roots, strict=True):
            try:
                found.append(call(fd, root / self.name))
            except OSError as error:
                found.append(errno.errorcode[error.errno or 0])
        assert found[0] == found[1], self.history(found)
        return found[1]

    def history(self, found: list[object]) -> str:
        """The preceding calls, for the message of a failure."""
        shown = [repr(item)[:200] for item in found]
        return "\n".join([*self.done[-40:], f"union: {shown[0]}", f"native: {shown[1]}"])

    def step(self) -> None:
        """One random call."""
        choice = self.random
        what = choice.choice(CALLS)
        at, size = choice.randrange(LARGEST), choice.choice((1, 100, 4096, 5000, 65536, 130_000))
        if choice.random() < 0.3:
            at &= ~4095
        size = min(size, LARGEST - at)
        data = choice.randbytes(size)
        self.done.append(f"{len(self.done)}: {what} at {at} size {size}")
        if what == "read":
            self.both(lambda fd, _: (os.lseek(fd, at, os.SEEK_SET), os.read(fd, size)))
        elif what == "pread":
            self.both(lambda fd, _: os.pread(fd, size, at))
        elif what == "write":
            self.both(lambda fd, _: (os.lseek(fd, at, os.SEEK_SET), os.write(fd, data)))
        elif what == "pwrite":
            self.both(lambda fd, _: os.pwrite(fd, data, at))
        elif what == "append":
            self.both(lambda fd, path: _append(path, data[:5000]) if os.fstat(fd).st_size < LARGEST else 0)
        elif what == "truncate":
            self.both(lambda _, path: os.truncate(path, at))
        elif what == "ftruncate":
            self.both(lambda fd, _: os.ftruncate(fd, at))
        elif what == "map read":
            self.both(lambda fd, _: _mapped(fd, at, size, None))
        elif what == "map write":
            self.both(lambda fd, _: _mapped(fd, at, size, data))
        elif what in ("punch", "zero", "allocate"):
            mode = {"punch": dc.PUNCH_HOLE | dc.KEEP_SIZE, "zero": dc.ZERO_RANGE, "allocate": 0}[what]
            if self.direct:
                self.both(lambda fd, _: dc.fallocate(fd, mode, at, max(size, 1)))
        elif what == "copy":
            to = choice.randrange(LARGEST)
            if self.direct and (to + size <= at or at + size <= to):
                self.both(lambda fd, _: _copied(fd, at, to, min(size, LARGEST - to)))
        elif what in ("fsync", "fdatasync"):
            self.both(lambda fd, _: getattr(os, what)(fd))
        elif what == "reopen":
            self.open(choice.choice((os.O_RDWR, os.O_RDWR, os.O_RDWR | os.O_NOATIME)))
        elif what == "reopen truncating":
            if choice.random() < 0.2:
                self.open(os.O_RDWR | os.O_TRUNC)
        elif what == "drop":
            for fd in self.fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif what == "rename":
            name = choice.choice(("low", "moved", "moved again"))
            for root in self.roots:
                os.rename(root / self.name, root / name)
            self.name = name
        self.both(lambda fd, path: (os.fstat(fd).st_size, path.stat().st_size))
        if len(self.done) % 20 == 0:
            self.compare()

    def compare(self) -> None:
        """The whole content, through the open fd and by name."""
        self.both(lambda fd, path: os.pread(fd, 2 * LARGEST, 0))
        self.both(lambda fd, path: path.read_bytes())


def _append(path: Path, data: bytes) -> int:
    with dc.opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        return os.write(fd, data)


def _mapped(fd: int, at: int, size: int, data: bytes | None) -> bytes | None:
    """Read or store through a mapping, within the current file; every other store is synced."""
    end = min(at + size, os.fstat(fd).st_size)
    if end <= at:
        return None
    with mmap.mmap(fd, end) as mapped:
        if data is not None:
            mapped[at:end] = data[: end - at]
            if at % 2:
                mapped.flush()
        return mapped[at:end]


def _copied(fd: int, at: int, to: int, size: int) -> int:
    done = 0
    while done < size:
        count = os.copy_file_range(fd, fd, size - done, at + done, to + done)
        if count == 0:
            break
        done += count
    return done


def _build(root: Path) -> None:
    (root / "low").write_bytes(random.Random(0).randbytes(300_000))


def _run(made: World, seed: int, steps: int, *, direct: bool) -> None:
    pair = Pair(made.union, made.native, seed, direct=direct)
    try:
        for _ in range(steps):
            pair.step()
        pair.compare()
        pair.both(lambda fd, _: os.fsync(fd))
    finally:
        pair.close()
    os.sync()
    assert (made.upper / pair.name).read_bytes() == (made.native / pair.name).read_bytes()
    assert (made.lower / "low").read_bytes() == random.Random(0).randbytes(300_000)


@pytest.mark.parametrize("seed", range(3))
def test_random_calls(world: MakeWorld, session: str, seed: int) -> None:
    """A lower file, from its first change on."""
    _run(world(_build), seed, 400, direct=dc.is_direct(session))


@pytest.mark.slow
@pytest.mark.watchdog(900)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_random_calls(world: MakeWorld, session: str, seed: int) -> None:
    """The same for longer."""
    _run(world(_build), seed, 4_000, direct=dc.is_direct(session))


PART = 256 << 10
DISJOINT = """
import mmap, os, random, sys
sys.path.insert(0, sys.argv[1])
from tests.mount import direct_calls as dc
path, number, direct = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"
base, part, choice = number * PART, bytearray(), random.Random(number)
fd = os.open(path, os.O_RDWR)
part[:] = os.pread(fd, PART, base)
for turn in range(250):
    at = choice.randrange(PART)
    size = min(choice.choice((1, 100, 4096, 30000)), PART - at)
    data = choice.randbytes(size)
    what = choice.choice(("write", "write", "map", "punch", "reopen", "sync"))
    if what == "punch":
        if direct:
            dc.fallocate(fd, dc.PUNCH_HOLE | dc.KEEP_SIZE, base + at, size)
            part[at:at + size] = bytes(size)
    elif what == "map":
        with mmap.mmap(fd, 4 * PART) as mapped:
            mapped[base + at:base + at + size] = data
        part[at:at + size] = data
    elif what == "write":
        assert os.pwrite(fd, data, base + at) == size
        part[at:at + size] = data
    elif what == "reopen":
        os.close(fd)
        fd = os.open(path, os.O_RDWR)
    else:
        os.fsync(fd)
    if turn % 10 == 0:
        seen = os.pread(fd, PART, base)
        wrong = next((i for i in range(PART) if seen[i] != part[i]), None) if seen != part else None
        assert wrong is None, (turn, what, wrong)
os.close(fd)
os.write(1, part)
""".replace("PART", str(PART))


def test_processes_on_parts_of_one_file(world: MakeWorld, session: str) -> None:
    """Four processes each write, map and punch a part; pages shared by two of them lose nothing."""
    made = world(lambda root: (root / "low").write_bytes(random.Random(7).randbytes(4 * PART)))
    direct = "1" if dc.is_direct(session) else "0"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DISJOINT, str(REPOSITORY), str(made.union / "low"), str(number), direct],
            stdout=subprocess.PIPE,
        )
        for number in range(4)
    ]
    parts = [process.communicate(timeout=patient(90))[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert (made.union / "low").read_bytes() == b"".join(parts)
    os.sync()
    assert (made.upper / "low").read_bytes() == b"".join(parts)


@pytest.mark.slow
@pytest.mark.watchdog(300)
@pytest.mark.timeout(400)
def test_fio_verify(root: None, area: Path, session: str) -> None:
    """fio writes in several processes, by write and by mapping, and verifies its reads."""
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    for number in range(2):
        (area / f"lower/job.{number}.0").write_bytes(os.urandom(32 << 20))
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        for engine in ("psync", "mmap"):
            done = subprocess.run(
                [
                    "fio", "--name=job", f"--directory={mount.mountpoint}", f"--ioengine={engine}",
                    "--rw=randwrite", "--bsrange=4k-64k", "--size=32m", "--numjobs=2", "--verify=crc32c",
                    "--do_verify=1", "--verify_fatal=1", "--randrepeat=1", "--end_fsync=1",
                ],
                capture_output=True, text=True, timeout=patient(250), check=False, cwd=area,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
