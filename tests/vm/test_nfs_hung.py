"""A lower on NFS whose server cannot be reached any more: only those who need it wait."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mount.hung_calls import Start, ends_while_it_hangs, hangs_and_goes_on, standing
from tests.vm import nfs

#: The server's, while it can be reached (RFC 5737).
_ADDRESS = "192.0.2.1"


class _Export:
    """A directory of the server that has the files of another one."""

    def __init__(self, there: Path, device: str, source: Path, target: Path) -> None:
        self._target = target
        self._reachable = False
        self.go_on()
        subprocess.run(["cp", "-a", f"{source}/.", there], check=True)
        command = ["mount", "-t", "nfs", "-o", "vers=4.2,actimeo=0", f"{_ADDRESS}{device}", target]
        subprocess.run(command, check=True)

    def stop(self) -> None:
        subprocess.run(["ip", "address", "del", f"{_ADDRESS}/32", "dev", "lo"], check=True)
        self._reachable = False

    def go_on(self) -> None:
        if not self._reachable:
            subprocess.run(["ip", "address", "add", f"{_ADDRESS}/32", "dev", "lo"], check=True)
            self._reachable = True

    def end(self) -> None:
        subprocess.run(["umount", "-l", self._target], check=True)
        self.stop()


@pytest.fixture
def start(server: nfs.Server) -> Iterator[Start]:
    with server.directory() as there:
        yield partial(_Export, there, server.device(there))


def test_stopped(root: None, area: Path, session: str, start: Start) -> None:
    """The others go on, who waits can be killed, commands answer; later everything goes on."""
    with standing(area, session, start=start) as place:
        hangs_and_goes_on(place)


def test_umount(root: None, area: Path, session: str, start: Start) -> None:
    """With callers: the mount ends, and its upper can be mounted again, whatever the server does."""
    with standing(area, session, start=start) as place:
        ends_while_it_hangs(place)
