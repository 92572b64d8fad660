"""Two unions whose layers are on one NFS server, by two clients that share nothing: two mounts with
`nosharecache` have a superblock each, and flock(2) on directories is local to it, as on two hosts."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import Done, kill, refused, succeed, unionfs, wait_for
from tests.support import areas
from tests.support.mounting import kernel_mounted
from tests.support.patience import patient
from tests.vm.nfs import ADDRESS, Server
from unionfs.daemon import live

SECONDS = patient(3.0)


class Client:
    """A mount of the directory on the server, and a union over it."""

    def __init__(self, server: Server, there: Path, base: Path) -> None:
        self.at = base / "nfs"
        self.merged = base / "merged"
        for path in (self.at, self.merged):
            path.mkdir(parents=True)
        source = f"{ADDRESS}{server.device(there)}"
        words = ("mount", "-t", "nfs", "-o", "vers=4.2,nosharecache", source, self.at)
        subprocess.run(words, check=True, timeout=patient(60))

    def mount(self, upper: str = "upper", work: str = "work") -> Done:
        return unionfs(
            "mount", "-o", "userxattr", "-l", self.at / "lower", "-u", self.at / upper, "-w", self.at / work,
            self.merged, env={"UNIONFS_LEASE_SECONDS": str(SECONDS)}, timeout=patient(100),
        )  # fmt: skip

    def umount(self) -> None:
        succeed(unionfs("umount", self.merged, timeout=patient(60)))

    def pid(self) -> int:
        return next(one.pid for one in live.entries() if one.settings.mountpoint == str(self.merged))

    def lease(self) -> dict[str, object]:
        shown = json.loads(succeed(unionfs("inspect", "--json", self.merged)))
        found: dict[str, object] = shown["figures"]["lease"]
        return found


@contextmanager
def clients(server: Server, exported: Path) -> Iterator[list[Client]]:
    for name in ("lower", "upper", "work", "work2", "upper2"):
        (exported / name).mkdir()
    (exported / "lower/base").write_text("base\n")
    base = Path(tempfile.mkdtemp(prefix=areas.PREFIX, dir="/var/tmp"))
    try:
        yield [Client(server, exported, base / name) for name in ("one", "two")]
    finally:
        areas.detach(base)
        areas.remove(base)


@pytest.fixture
def two(root: None, server: Server, exported: Path) -> Iterator[list[Client]]:
    with clients(server, exported) as found:
        yield found


def test_one_upper(two: list[Client], exported: Path, area: Path) -> None:
    """Mounted by one of them at a time, whatever its work directory; taken over from one that died."""
    one, other = two
    assert os.stat(one.at).st_dev != os.stat(other.at).st_dev
    succeed(one.mount())
    (one.merged / "base").write_text("changed\n")
    for work in ("work", "work2"):
        refused(other.mount(work=work), f"process {one.pid()} of this host", "unmount it there")
    assert len(os.listdir(exported / "upper.lease")) == 1
    one.umount()
    assert not (exported / "upper.lease").exists()
    succeed(other.mount())
    assert (other.merged / "base").read_text() == "changed\n"
    kill(other.pid())
    subprocess.run(["umount", "-l", other.merged], check=True)
    began = time.monotonic()
    waited = one.mount()
    assert waited.returncode == 0, waited.stderr
    assert "waiting until it runs out" in waited.stderr
    assert time.monotonic() - began >= SECONDS
    assert (one.merged / "base").read_text() == "changed\n"
    one.umount()
    assert not (exported / "upper.lease").exists()
    with kernel_mounted(
        area, lowers=[exported / "lower"], upper=exported / "upper", work=exported / "work",
        options=["userxattr"],
    ) as kernel:
        assert (kernel.mountpoint / "base").read_text() == "changed\n"


def test_shared_lowers(two: list[Client], exported: Path) -> None:
    """Each with its own upper beside them."""
    one, other = two
    succeed(one.mount())
    succeed(other.mount("upper2", "work2"))
    (one.merged / "base").write_text("of one\n")
    (other.merged / "base").write_text("of the other\n")
    assert (one.merged / "base").read_text() == "of one\n"
    assert (other.merged / "base").read_text() == "of the other\n"
    assert (exported / "lower/base").read_text() == "base\n"
    one.umount()
    other.umount()
    assert sorted(os.listdir(exported)) == ["lower", "upper", "upper2", "work", "work2"]


def test_a_server_that_goes_away_and_comes_back(two: list[Client], exported: Path) -> None:
    """Nothing is lost, and the lease is kept: nobody can take it while there is no server."""
    one, other = two
    succeed(one.mount())
    (one.merged / "file").write_text("before\n")
    subprocess.run(["rpc.nfsd", "0"], check=True)
    try:
        assert wait_for(lambda: one.lease()["waits"] is True, 60)
        code = "import sys\nwith open(sys.argv[1], 'a') as file: file.write('after\\n')"
        writer = subprocess.Popen(["python3", "-c", code, one.merged / "file"])
    finally:
        subprocess.run(["rpc.nfsd", "-N", "3", "-L", "10", "-G", "10", "4"], check=True)
        Path("/proc/fs/nfsd/v4_end_grace").write_text("Y\n")
    assert writer.wait(patient(100)) == 0
    assert one.lease()["lost_because"] is None
    refused(other.mount(), "unmount it there")
    one.umount()
    assert (exported / "upper/file").read_text() == "before\nafter\n"
