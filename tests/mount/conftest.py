"""Fixtures of the tests that call the command line."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place, gone, listed, wait_for
from tests.mount.user_calls import Host


@pytest.fixture
def place(root: None, area: Path) -> Iterator[Place]:
    """Layers in a separate area for the test."""
    with cli_calls.place(area) as found:
        yield found


@pytest.fixture
def host(place: Place) -> Iterator[Host]:
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    if not os.path.exists("/etc/mtab"):
        pytest.skip("fusermount3 wants /etc/mtab (a link to /proc/self/mounts), which is not there")
    found = Host(place)
    pids: list[int] = []
    try:
        if not found.find_python():
            pytest.skip("an ordinary user cannot read this repository, or no Python with pyfuse3")
        yield found
        pids = [int(one["pid"]) for one in listed(found.unionfs("ls", "--json"))]
    finally:
        found.root("umount", "-l", str(place.merged), check=False)
        for pid in pids:
            if not wait_for(lambda pid=pid: gone(pid), 5):
                os.kill(pid, signal.SIGKILL)
        found.holder.kill()
        found.holder.communicate()
