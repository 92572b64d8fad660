"""Small lower files are sent with their first open, so the kernel need not request their data."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import Mount, mounted
from tests.support.syscalls import drop_caches
from tests.support.world import errno_of

SIZES = (1, 4095, 4096, 4097, 10_000, 65_535, 65_536)
TOO_LARGE = 65_537


def _content(size: int) -> bytes:
    return (b"%d bytes in all; " % size * (size // 10 + 1))[:size]


@pytest.fixture
def layers(area: Path) -> Path:
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    for size in (0, *SIZES, TOO_LARGE):
        (area / f"lower/f{size}").write_bytes(_content(size))
    return area


def _mounted(area: Path, session: str) -> AbstractContextManager[Mount]:
    return mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    )


def _reads(mount: Mount) -> int:
    return int(mount.inspect()["figures"]["requests"].get("read", 0))


def test_every_size_reads_as_below(root: None, layers: Path, session: str) -> None:
    """By read(2) and through a mapping, with a first open of either kind."""
    with _mounted(layers, session) as mount:
        for size in (0, *SIZES, TOO_LARGE):
            with (mount.mountpoint / f"f{size}").open("rb") as file:
                if size:
                    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                        assert memory[:] == _content(size)
                        # the rest of the last page after the end of the file is zero
                assert os.pread(file.fileno(), size + 10, 0) == _content(size)


def test_a_small_file_needs_no_read(root: None, layers: Path, session: str) -> None:
    if session != "direct-hybrid":
        pytest.skip("only here do opens of lower files reach the daemon, and their reads, too")
    with _mounted(layers, session) as mount:
        for size in SIZES:
            assert (mount.mountpoint / f"f{size}").read_bytes() == _content(size)
        assert _reads(mount) == 0
        (mount.mountpoint / f"f{TOO_LARGE}").read_bytes()
        assert _reads(mount) > 0


def test_pages_that_the_kernel_dropped_are_read_again(root: None, layers: Path, session: str) -> None:
    with _mounted(layers, session) as mount, dc.opened(mount.mountpoint / "f10000") as fd:
        for _ in range(2):
            assert os.pread(fd, 20_000, 0) == _content(10_000)
            drop_caches(mount.mountpoint, fd)


def test_changes_after_the_first_open_are_seen(root: None, layers: Path, session: str) -> None:
    """The lower's cached data does not survive a copy-up, a truncation or a rename over it."""
    with _mounted(layers, session) as mount:
        path = mount.mountpoint / "f10000"
        assert path.read_bytes() == _content(10_000)
        with path.open("r+b") as file:
            file.write(b"new")
        assert path.read_bytes() == b"new" + _content(10_000)[3:]
        path.write_bytes(b"short")
        assert path.read_bytes() == b"short"
        other = mount.mountpoint / "f4097"
        assert other.read_bytes() == _content(4097)
        (mount.mountpoint / "f4096").rename(other)
        assert other.read_bytes() == _content(4096)
    assert (layers / "lower/f10000").read_bytes() == _content(10_000)


def test_what_the_kernel_has_is_not_opened_again(root: None, layers: Path, session: str) -> None:
    """Until it is read after all, written, or moved."""
    keeps_old = session == "direct-passthrough"  # its deviation: docs/compliance.md
    written = _content(4097) if keeps_old else b"new" + _content(4097)[3:]
    with _mounted(layers, session) as mount:
        names = [f"f{size}" for size in (*SIZES, TOO_LARGE)]
        for name in names:
            (mount.mountpoint / name).read_bytes()
        before = dc.descriptors(mount) if mount.is_ours else 0
        fds = {name: os.open(mount.mountpoint / name, os.O_RDONLY) for name in names}
        try:
            if session == "direct-hybrid":
                assert dc.descriptors(mount) <= before
            # two opens of one file; the first read opens it once
            with dc.opened(mount.mountpoint / "f10000") as again:
                assert os.pread(again, 20_000, 0) == _content(10_000)
                drop_caches(mount.mountpoint, again)
                assert os.pread(again, 20_000, 0) == _content(10_000)
                assert os.pread(fds["f10000"], 20_000, 0) == _content(10_000)
            # written by another process, which opened it later
            with dc.opened(mount.mountpoint / "f4097", os.O_RDWR) as writer:
                os.pwrite(writer, b"new", 0)
                assert os.pread(fds["f4097"], 5000, 0) == written
            os.unlink(mount.mountpoint / "f4096")
            os.rename(mount.mountpoint / "f4095", mount.mountpoint / "moved")
            (mount.mountpoint / "over").write_bytes(b"over")
            os.rename(mount.mountpoint / "over", mount.mountpoint / "f65535")
            os.chmod(mount.mountpoint / "f65536", 0o600)
            drop_caches(mount.mountpoint, *fds.values())
            for size, name in zip((*SIZES, TOO_LARGE), names, strict=True):
                expected = written if size == 4097 else _content(size)
                assert os.pread(fds[name], size + 10, 0) == expected
                assert os.fstat(fds[name]).st_size == size
            if not keeps_old:
                assert stat.S_IMODE(os.fstat(fds["f65536"]).st_mode) == 0o600
        finally:
            for fd in fds.values():
                os.close(fd)
        if mount.is_ours:
            assert dc.wait_for(lambda: mount.figure("open_files") == 0)


def test_read_while_it_is_copied_up(root: None, layers: Path, session: str) -> None:
    """Direct I/O with a buffer larger than the file, by several threads: never an error."""
    for number in range(60):
        (layers / f"lower/small{number}").write_bytes(_content(1000))
    errors: list[OSError] = []
    done = threading.Event()

    def reader(fd: int) -> None:
        with mmap.mmap(-1, 1 << 20) as buffer:
            while not done.is_set():
                try:
                    assert os.preadv(fd, [buffer], 0) == 1000
                except OSError as error:
                    errors.append(error)
                    return

    with _mounted(layers, session) as mount:
        for number in range(60):
            path = mount.mountpoint / f"small{number}"
            done.clear()
            with dc.opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
                threads = [threading.Thread(target=reader, args=[fd]) for _ in range(3)]
                for thread in threads:
                    thread.start()
                try:
                    with dc.opened(path, os.O_RDWR) as writer:
                        os.pwrite(writer, b"new", 0)
                finally:
                    done.set()
                    for thread in threads:
                        thread.join()
    assert errors == []


def test_a_lower_whose_data_cannot_be_read(root: None, area: Path, session: str) -> None:
    """Opening succeeds and reading fails, as in the layer; no file stays open."""
    layer = Path("/sys/class/net/lo").resolve()

    def calls(top: Path) -> list[object]:
        found: list[object] = []
        for _ in range(3):
            with dc.opened(top / "speed") as fd:
                found.append(errno_of(os.read, fd, 100))
        return found

    if calls(layer) != [errno.EINVAL] * 3:
        pytest.skip("the loopback device tells its speed here")
    with mounted(area, lowers=[layer], session=session) as mount:
        assert calls(mount.mountpoint) == calls(layer)
        if mount.is_ours:
            assert dc.wait_for(lambda: mount.figure("open_files") == 0)


def test_a_lower_that_lost_a_file(root: None, layers: Path, session: str) -> None:
    """Its cached data is readable; after that only the reader gets an error."""
    with _mounted(layers, session) as mount:
        assert (mount.mountpoint / "f10000").read_bytes() == _content(10_000)
        os.unlink(layers / "lower/f10000")
        if session == "direct-hybrid":
            assert (mount.mountpoint / "f10000").read_bytes() == _content(10_000)
            with dc.opened(mount.mountpoint / "f10000") as fd:
                drop_caches(mount.mountpoint, fd)
                assert errno_of(os.pread, fd, 100, 0) == errno.EIO
        assert (mount.mountpoint / "f4096").read_bytes() == _content(4096)


def test_many_readers_at_once(root: None, area: Path, session: str) -> None:
    """First opens by several threads, some of which read at once through a mapping."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    for number in range(400):
        (area / f"lower/f{number}").write_bytes(_content(5000 + number))
    wrong: list[int] = []

    def reader(seed: int) -> None:
        for number in range(400):
            path = mount.mountpoint / f"f{number}"
            with path.open("rb") as file:
                if (number + seed) % 2:
                    data = file.read()
                else:
                    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                        data = memory[:]
            if data != _content(5000 + number):
                wrong.append(number)

    with _mounted(area, session) as mount:
        threads = [threading.Thread(target=reader, args=[seed]) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
