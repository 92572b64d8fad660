"""Several FUSE filesystems that show one directory, as several hosts see a shared filesystem: bindfs(1).
Locks by flock(2) of one do not reach another."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import areas
from tests.support.mounting import is_mounted
from tests.support.patience import patient


class View:
    """One of them, served by a process that can be stopped."""

    def __init__(self, source: Path, at: Path) -> None:
        self.at = at
        at.mkdir()
        self._server = subprocess.Popen(
            ["bindfs", "-f", "-o", "attr_timeout=0,entry_timeout=0,negative_timeout=0", source, at]
        )
        deadline = time.monotonic() + patient(20)
        while not is_mounted(at):
            assert self._server.poll() is None
            assert time.monotonic() < deadline, "it is not mounted"
            time.sleep(0.01)

    @property
    def upper(self) -> Path:
        return self.at / "upper"

    @property
    def lease(self) -> Path:
        return self.at / "upper.lease"

    @property
    def layers(self) -> tuple[str | Path, ...]:
        """The upper with its work directory, as arguments of `unionfs mount`."""
        return ("-u", self.upper, "-w", self.at / "work")

    def stop(self) -> None:
        self._server.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._server.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.go_on()
        areas.detach(self.at)
        self._server.kill()
        self._server.wait()


class Host:
    """Another host, as far as it matters here: with a mount table, a registry of mounts, a name and a boot id
    of its own."""

    def __init__(self, area: Path) -> None:
        (area / "boot").write_text("11111111-2222-3333-4444-555555555555\n")
        script = (
            f"hostname elsewhere; mount --bind {area}/boot /proc/sys/kernel/random/boot_id; "
            "mkdir -p /run/unionfs; mount -t tmpfs -o mode=755 none /run/unionfs; "
            "echo ready; exec sleep infinity"
        )
        words = ["unshare", "-m", "-u", "--propagation", "private", "sh", "-ec", script]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words before a command that is to run there."""
        return ("nsenter", "-t", str(self._process.pid), "-m", "-u")

    def path(self, path: Path) -> Path:
        """What that host has there."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def views(area: Path, count: int) -> Iterator[list[View]]:
    """Views of a new directory with an empty upper and two work directories."""
    if shutil.which("bindfs") is None:
        pytest.skip("bindfs is not installed")
    source = area / "shared"
    for name in ("upper", "work", "work2"):
        (source / name).mkdir(parents=True)
    made: list[View] = []
    try:
        for number in range(count):
            made.append(View(source, area / f"view{number}"))
        yield made
    finally:
        for one in made:
            one.end()
