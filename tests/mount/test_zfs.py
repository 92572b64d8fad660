"""What the storage driver zfs alone does: datasets and their properties, and what a pool refuses."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import refused, wait_for
from tests.mount.run_calls import Life, lives
from tests.support import acl, snapshot

MIB = 1 << 20
DRIVER = ("--storage-driver", "zfs")


class Zfs(Life):
    """Containers on a pool in a file."""

    pool = ""

    def zfs(self, *words: str) -> list[str]:
        done = subprocess.run(["zfs", *words], check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    def datasets(self, kind: str) -> list[str]:
        """The datasets of containers or bases."""
        names = self.zfs("list", "-H", "-o", "name", "-r", self.pool)
        return [name for name in names if name.rpartition("/")[2].startswith(f"{kind}-")]


@pytest.fixture
def box(root: None, area: Path, filesystem: Callable[..., Path]) -> Iterator[Zfs]:
    place = filesystem("zfs")
    with lives(Zfs, area, "bubblewrap") as found:
        found.root = place / "storage"
        (found.pool,) = found.zfs("list", "-H", "-o", "name", str(place))
        yield found


def test_a_container_is_a_clone_of_its_base(box: Zfs) -> None:
    for name in ("one", "two"):
        box.say(*DRIVER, "--name", name, "--", "touch", "/new")
    (base,) = box.datasets("base")
    assert len(box.datasets("container")) == 2
    for name in box.datasets("container"):
        assert box.zfs("get", "-H", "-o", "value", "origin,mountpoint", name) == [f"{base}@base", "legacy"]
    box.ok("rm", "one", "two")
    assert (box.datasets("container"), box.datasets("base")) == ([], [base])
    box.ok("container", "prune", "-f")
    assert box.zfs("list", "-H", "-o", "name") == [box.pool]


def test_what_files_have_is_in_the_clone(box: Zfs, area: Path) -> None:
    """ACLs, too, which ZFS has only if a property asks for them."""
    file = box.base / "data/seed"
    os.setxattr(file, "user.some", b"value" * 100)
    os.setxattr(file, acl.ACCESS, acl.simple(7, 5, 5, users={1: 7}))
    os.setxattr(box.base / "data", acl.DEFAULT, acl.simple(7, 5, 5, users={1: 7}))
    box.say(*DRIVER, "--name", "kept", "--", "true")
    (clone,) = box.datasets("container")
    place = area / "clone"
    place.mkdir()
    subprocess.run(["mount", "-t", "zfs", "-o", "ro", clone, place], check=True)
    try:
        found = snapshot.take(place / "data")
    finally:
        subprocess.run(["umount", place], check=True)
    expected = snapshot.take(box.base / "data")
    for name in (b".", b"seed"):
        for what in ("mode", "uid", "gid", "nlink", "mtime", "content", "xattrs"):
            assert getattr(found[name], what) == getattr(expected[name], what), (name, what)


def test_a_base_that_does_not_fit(box: Zfs) -> None:
    """It leaves nothing, so that the pool has room for another one."""
    large = box.base / "data/large"
    large.write_bytes(os.urandom(300 * MIB))
    done = box.run(*DRIVER, "--name", "kept", "--", "true")
    refused(done, "the lowers cannot be copied to", box.pool, "no space left on device", "make room")
    assert (box.datasets("base"), box.datasets("container"), box.kept()) == ([], [], [])
    subprocess.run(["zpool", "wait", "-t", "free", box.pool], check=True)
    large.write_bytes(os.urandom(10 * MIB))
    assert box.say(*DRIVER, "--name", "kept", "--", "cat", "/data/seed") == "seed\n"


def test_a_container_fills_the_pool(box: Zfs) -> None:
    done = box.run(*DRIVER, "--name", "kept", "--", "dd", "if=/dev/urandom", "of=/large", "bs=1M")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "A /large" in box.ok("container", "diff", "kept").splitlines()
    refused(box.run(*DRIVER, "--name", "other", "--", "true"), "out of space", "see `zpool list`")
    assert box.ok("rm", "kept") == "kept\n"
    assert box.say(*DRIVER, "--rm", "--", "cat", "/data/seed") == "seed\n"


def test_snapshots_of_a_container_go_with_it(box: Zfs) -> None:
    box.say(*DRIVER, "--name", "kept", "--", "touch", "/new")
    (clone,) = box.datasets("container")
    box.zfs("snapshot", f"{clone}@mine")
    box.zfs("clone", f"{clone}@mine", f"{box.pool}/mine")
    refused(box.call("rm", "kept"), "zfs destroy", "dependent clones", f"{box.pool}/mine")
    assert box.ok("run", "--name", "kept", "--", "ls", "/new") == "/new\n"
    box.zfs("destroy", f"{box.pool}/mine")
    assert box.ok("rm", "kept") == "kept\n"
    assert box.datasets("container") == []


def test_a_killed_creation_is_made_again(box: Zfs) -> None:
    for number in range(3000):
        (box.base / "data" / str(number)).write_text("x" * 100)
    run = box.start(*DRIVER, "--name", "kept", "--", "true")
    assert wait_for(lambda: box.datasets("base"))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert box.say(*DRIVER, "--name", "kept", "--", "sh", "-c", "ls /data | busybox wc -l") == "3001\n"
    box.ok("rm", "kept")
    box.ok("container", "prune", "-f")
    assert (box.datasets("base"), box.datasets("container")) == ([], [])


def test_a_root_that_is_not_on_a_pool(box: Zfs) -> None:
    box.root = box.area / "storage"
    done = box.run(*DRIVER, "--rm", "--", "true")
    refused(done, "zfs needs the storage root on ZFS", f"{box.root} is on", "--root on a ZFS dataset")
    assert box.kept() == []
    assert "zfs" not in cli_calls.succeed(box.call("info", "--format", "{{.StorageDrivers}}"))
