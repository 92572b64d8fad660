"""Signals to callers that wait for the copy-up of a big file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support.mounting import Mount, mounted
from tests.support.patience import patient

SIZE = 300 << 20

CALLS = {
    "open": "os.open(sys.argv[1], os.O_RDWR)",
    "write": "fd = os.open(sys.argv[1], os.O_RDWR); os.write(fd, b'x'); os.fsync(fd)",
    "chmod": "os.chmod(sys.argv[1], 0o600)",
    "rename": "os.rename(sys.argv[1], sys.argv[1] + '.moved')",
}


@pytest.fixture
def big(root: None, area: Path, session: str) -> Iterator[Mount]:
    """A union with a lower file of 300 MiB without holes, on a filesystem without reflinks."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    chunk = random.Random(1).randbytes(1 << 20)
    with (area / "lower/big").open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(chunk)
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        yield mount


def _work(mount: Mount) -> Path:
    """The directory where copies are prepared."""
    assert mount.work is not None
    return mount.work / "work"


def _copied(mount: Mount) -> int:
    """Bytes of the temporary copy in the work directory."""
    found = 0
    for path in _work(mount).iterdir():
        try:
            found += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return found


def _start(mount: Mount, call: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, sys; {CALLS[call]}", str(mount.mountpoint / "big")],
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def _slow_copies(mount: Mount) -> Iterator[None]:
    """Stop the daemon during a copy and continue it, so that a fast disk makes no difference."""
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(mount.pid, signal.SIGCONT)


@pytest.mark.parametrize("call", ["open", "chmod", "rename"])
def test_killed_while_it_waits(big: Mount, session: str, call: str) -> None:
    """SIGKILL ends it within two seconds; the daemon survives, the copy is removed, the next try succeeds."""
    dc.need_direct(session, "INTERRUPT")
    path = big.mountpoint / "big"
    assert big.upper is not None
    if session == "direct-cached" and call == "open":
        call = "write"  # an open alone does not copy up there
    waiting = _start(big, call)
    assert dc.wait_for(lambda: _copied(big) > 0 or waiting.poll() is not None, 20), "no copy was begun"
    begun = time.monotonic()
    with _slow_copies(big):
        waiting.kill()  # while no answer is possible
        was_waiting = _copied(big) > 0
    waiting.wait(patient(20))
    took = time.monotonic() - begun
    assert took < patient(2)
    if not was_waiting:
        pytest.skip("the copy was too fast to be interrupted")
    assert dc.wait_for(lambda: os.listdir(_work(big)) == [], 10), os.listdir(_work(big))
    assert big.process is not None
    assert big.process.poll() is None
    interrupted = not (big.upper / "big").exists()
    with dc.opened(path) as fd:
        assert os.fstat(fd).st_size == SIZE
        assert os.pread(fd, 100, SIZE - 100) == os.pread(fd, 100, (1 << 20) - 100)
    with dc.opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"after", 0)
        os.fsync(fd)
    assert (big.upper / "big").stat().st_size == SIZE
    with path.open("rb") as file:
        assert file.read(5) == b"after"
    # cached data is written back, whether its writer lives or not
    assert interrupted or call == "write", "the copy ran to its end for nobody"


def test_only_the_killed_one_gives_up(big: Mount, session: str) -> None:
    """Two wait for one copy; the one that started it is killed, the other succeeds."""
    first = _start(big, "write")
    assert dc.wait_for(lambda: _copied(big) > 0 or first.poll() is not None, 20)
    second = _start(big, "write")
    time.sleep(0.05)
    first.kill()
    first.wait(patient(20))
    assert second.wait(patient(60)) == 0
    with (big.mountpoint / "big").open("rb") as file:
        assert file.read(1) == b"x"
        assert os.fstat(file.fileno()).st_size == SIZE
    assert dc.wait_for(lambda: os.listdir(_work(big)) == [], 10)


def test_a_signal_that_is_handled_interrupts_nothing(big: Mount, session: str) -> None:
    """A program with a handler and SA_RESTART gets no EINTR from open, write or fsync, as on a disk.

    The calls use ctypes, because Python itself retries after EINTR (PEP 475).
    """
    script = (
        "import ctypes, os, signal, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "came = 0\n"
        "def handle(*_):\n"
        "    global came\n"
        "    came += 1\n"
        "def call(function, *arguments):\n"
        "    result = function(*arguments)\n"
        "    assert result >= 0, (function.__name__, os.strerror(ctypes.get_errno()))\n"
        "    return result\n"
        "signal.signal(signal.SIGALRM, handle)\n"
        "signal.siginterrupt(signal.SIGALRM, False)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\n"
        "fd = call(libc.open, sys.argv[1].encode(), os.O_RDWR)\n"
        "assert call(libc.write, fd, b'handled', ctypes.c_size_t(7)) == 7\n"
        "call(libc.fsync, fd)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "assert came\n"
    )
    path = str(big.mountpoint / "big")
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=patient(60), check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with (big.mountpoint / "big").open("rb") as file:
        assert file.read(7) == b"handled"
