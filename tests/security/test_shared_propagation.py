"""Unmounting in a union does not unmount on the host, even if a bind mount shares its submounts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed, wait_for
from tests.support import areas, syscalls
from tests.support.storage import Storage, storage, unmounted


@pytest.fixture(params=["rshared", "rslave", "shared"])
def one(request: pytest.FixtureRequest, root: None, area: Path) -> Iterator[Storage]:
    """A union with a bind mount of a shared mount of the host, with others below it."""
    with storage(area) as found:
        subprocess.run(["mount", "--bind", found.host, found.host], check=True)
        subprocess.run(["mount", "--make-shared", found.host], check=True)
        for path in (found.host / "sub", found.host / "sub/deep", found.host / "new"):
            path.mkdir()
            if path.name != "new":
                subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
                (path / "file").write_text(path.name)
        spec = f"type=bind,source={found.host},target=/data,bind-propagation={request.param}"
        found.mount("--mount", spec)
        yield found


def on_host(one: Storage) -> list[str]:
    return [where.removeprefix(str(one.host)) for _, where, _ in areas.mounts_below(one.host)[::-1]]


INSIDE = ["/", "/data", "/data/sub", "/data/sub/deep"]
OUTSIDE = ["", "/sub", "/sub/deep"]


def paths(one: Storage) -> list[str]:
    return sorted(path for path, _ in one.mounts())


@pytest.mark.parametrize("how", ["umount", "lazy", "terminated", "killed"])
def test_the_hosts_mounts_stay(one: Storage, how: str) -> None:
    assert paths(one) == INSIDE
    assert on_host(one) == OUTSIDE
    pid = one.place.pid()
    if how == "umount":
        one.umount()
    elif how == "lazy":
        succeed(one.unionfs("umount", "--lazy", one.merged))
    else:
        os.kill(pid, signal.SIGTERM if how == "terminated" else signal.SIGKILL)
    assert wait_for(lambda: unmounted(one))
    assert on_host(one) == OUTSIDE
    assert (one.host / "sub/deep/file").read_text() == "deep"


@pytest.mark.parametrize("busy", ["data", "data/sub", "data/sub/deep"])
def test_what_is_busy_goes_on_sharing(one: Storage, busy: str, request: pytest.FixtureRequest) -> None:
    """Later mounts of the host appear in the union as before, without duplicates."""
    before = peers(one)
    fd = os.open(one.merged / busy, os.O_RDONLY)
    try:
        refused(one.unionfs("umount", one.merged), "is busy", f"pid {os.getpid()}")
    finally:
        os.close(fd)
    assert paths(one) == INSIDE
    assert on_host(one) == OUTSIDE
    assert peers(one) == before
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", one.host / "new"], check=True)
    assert paths(one) == sorted([*INSIDE, "/data/new"])
    syscalls.umount(one.host / "new")
    assert paths(one) == INSIDE
    one.umount()
    assert on_host(one) == OUTSIDE


def peers(one: Storage) -> list[tuple[str, str]]:
    """The optional fields (shared:N, master:N) of the union's mounts; proc_pid_mountinfo(5)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" - ")[0].split()
        if fields[4].startswith(f"{one.merged}/"):
            found.append((fields[4], " ".join(fields[6:])))
    return sorted(found)
