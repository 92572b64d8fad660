"""Volumes with a size where the filesystem has project quotas: ext4 and xfs mounted with prjquota."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import Done, refused, succeed
from tests.support import areas
from tests.support.storage import Storage, storage
from tests.support.worker import Worker
from tests.volumes import trees
from unionfs.sys import quota

MIB = 1 << 20
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-O", "quota,project", "-E", "quotatype=prjquota,lazy_itable_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}
LIMIT_REACHED = {"ext4": errno.EDQUOT, "xfs": errno.ENOSPC}
"""What a project quota answers: quota(5) says EDQUOT; xfs takes a project for a disk of its own."""


@pytest.fixture(params=["ext4", "xfs"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def _mounted(kind: str, home: Path, option: str) -> Path:
    image, where = home / "image", home / "quota"
    if shutil.which(MAKE[kind][0]) is None:
        pytest.skip(f"{MAKE[kind][0]} is not installed")
    with image.open("wb") as file:
        file.truncate(600 * MIB)
    subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", kind, "-o", f"loop,{option}", image, where], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = f"no project quotas on {kind} here: {done.stderr.splitlines()[0]}"
        if "UNIONFS_VM_KERNEL" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return where


@pytest.fixture
def disk(root: None, area: Path, kind: str) -> Iterator[Path]:
    """A filesystem with project quotas."""
    yield _mounted(kind, area, "prjquota")
    areas.detach(area / "quota")


@pytest.fixture
def one(area: Path, disk: Path) -> Iterator[Storage]:
    with storage(area) as found:
        found.root = disk / "storage"
        yield found
        areas.detach(found.root)


def _limits(disk: Path) -> dict[int, int]:
    """The hard limit (bytes) of each project that has one, as xfs_quota(8) reports it of any filesystem."""
    os.sync()
    done = subprocess.run(
        ["xfs_quota", "-f", "-x", "-c", "report -p -N -n -b", disk],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {}
    for line in done.stdout.splitlines():
        fields = line.split()
        if fields and fields[0].startswith("#") and int(fields[3]):
            found[int(fields[0][1:])] = int(fields[3]) * 1024
    return found


def _fill(path: str) -> int:
    """Write until it is refused; the errno."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        while True:
            os.write(fd, b"x" * 65536)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)


def _well(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def user() -> Iterator[Worker]:
    """An ordinary user: on ext4 root (CAP_SYS_RESOURCE) is bound by no quota."""
    with Worker(1000, 1000, modules=["tests.vm.test_quota"]) as worker:
        yield worker


def test_the_limit_is_met_and_moves(one: Storage, disk: Path, kind: str, user: Worker) -> None:
    succeed(one.unionfs("volume", "create", "-o", "size=20m", "data"))
    data = one.volume("data")
    assert "image" not in os.listdir(data.parent)
    (project,) = _limits(disk)
    assert _limits(disk) == {project: 20 * MIB}
    os.chmod(data, 0o777)
    one.mount("-v", "data:/data")
    there = one.merged / "data"
    status = os.statvfs(there)
    assert status.f_blocks * status.f_frsize == 20 * MIB  # df shows the limit
    assert user.call(_fill, str(there / "file")) == LIMIT_REACHED[kind]
    held = (there / "file").stat().st_size
    assert 19 * MIB < held <= 20 * MIB
    (one.merged / "elsewhere").write_bytes(bytes(MIB))  # nobody else is bound by it
    # up, while it is used
    succeed(one.unionfs("volume", "resize", "data", "40m"))
    assert _limits(disk) == {project: 40 * MIB}
    assert user.call(_fill, str(there / "file")) == LIMIT_REACHED[kind]
    assert 39 * MIB < (there / "file").stat().st_size <= 40 * MIB
    # down, to what it holds and not below
    refused(one.unionfs("volume", "resize", "data", "30m"), "data cannot be resized", "does not fit into")
    assert _limits(disk) == {project: 40 * MIB}
    os.truncate(there / "file", 5 * MIB)
    succeed(one.unionfs("volume", "resize", "data", "10m"))
    assert _limits(disk) == {project: 10 * MIB}
    assert user.call(_fill, str(there / "file")) == LIMIT_REACHED[kind]
    assert 9 * MIB < (there / "file").stat().st_size <= 10 * MIB
    (shown,) = json.loads(one.unionfs("volume", "inspect", "data").stdout)
    assert shown["Options"] == {"size": "10m"}
    one.umount()
    succeed(one.unionfs("volume", "rm", "data"))
    assert _limits(disk) == {}


def test_each_has_its_own(one: Storage, disk: Path, kind: str, user: Worker) -> None:
    for name, size in (("one", "10m"), ("two", "15m")):
        succeed(one.unionfs("volume", "create", "-o", f"size={size}", name))
        os.chmod(one.volume(name), 0o777)
    assert sorted(_limits(disk).values()) == [10 * MIB, 15 * MIB]
    one.mount("-v", "one:/data")
    assert user.call(_fill, str(one.merged / "data/file")) == LIMIT_REACHED[kind]
    one.umount()
    (one.volume("two") / "file").write_bytes(bytes(12 * MIB))
    succeed(one.unionfs("volume", "rm", "one"))
    assert sorted(_limits(disk).values()) == [15 * MIB]


def test_a_restore_keeps_it(one: Storage, disk: Path, kind: str, user: Worker, area: Path) -> None:
    succeed(one.unionfs("volume", "create", "-o", "size=20m", "data"))
    (one.volume("data") / "dir").mkdir()
    (one.volume("data") / "dir/file").write_bytes(os.urandom(12 * MIB))
    before = trees.value(one.volume("data"))
    archive = area / "data.tar"
    _well(one.unionfs("volume", "backup", "data", "-o", archive))
    (one.volume("data") / "dir/file").write_bytes(bytes(11 * MIB))
    _well(one.unionfs("volume", "restore", "data", "-i", archive))
    assert trees.value(one.volume("data")) == before
    assert list(_limits(disk).values()) == [20 * MIB]  # the old content's went with it
    assert quota.space_used(str(one.volume("data"))) >= 12 * MIB
    os.chmod(one.volume("data"), 0o777)
    one.mount("-v", "data:/data")  # the user may not enter the storage root
    assert user.call(_fill, str(one.merged / "data/more")) == LIMIT_REACHED[kind]
    one.umount()
    assert (one.volume("data") / "more").stat().st_size <= 8 * MIB
    # what does not fit is refused, and the old stays
    succeed(one.unionfs("volume", "create", "-o", "size=9m", "small"))
    (one.volume("small") / "mine").write_text("mine")
    done = one.unionfs("volume", "restore", "small", "-i", archive)
    if kind == "xfs":  # on ext4 root is not bound
        refused(done, "small")
        assert (one.volume("small") / "mine").read_text() == "mine"
    succeed(one.unionfs("volume", "rm", "small"))
    succeed(one.unionfs("volume", "rm", "data"))
    assert _limits(disk) == {}


def test_the_project_is_the_directory_s_whatever_device_it_is_on(
    one: Storage, disk: Path, kind: str, area: Path
) -> None:
    """After the filesystem was mounted from another device the same project is changed and freed."""
    succeed(one.unionfs("volume", "create", "-o", "size=20m", "data"))
    (project,) = _limits(disk)
    subprocess.run(["umount", disk], check=True)
    other = area / "other"
    with other.open("wb") as file:
        file.truncate(8 * MIB)
    taken = subprocess.run(["losetup", "--show", "-f", other], check=True, capture_output=True, text=True)
    try:
        subprocess.run(["mount", "-t", kind, "-o", "loop,prjquota", area / "image", disk], check=True)
        succeed(one.unionfs("volume", "resize", "data", "30m"))
        assert _limits(disk) == {project: 30 * MIB}
        succeed(one.unionfs("volume", "rm", "data"))
        assert _limits(disk) == {}
    finally:
        subprocess.run(["losetup", "-d", taken.stdout.strip()], check=True)


def test_counting_alone_is_no_limit(root: None, area: Path) -> None:
    """An ext4 with the feature, mounted without prjquota, enforces nothing: the volume gets an image."""
    disk = _mounted("ext4", area, "noatime")
    try:
        with storage(area) as one:
            one.root = disk / "storage"
            succeed(one.unionfs("volume", "create", "-o", "size=20m", "data"))
            assert (one.volume("data").parent / "image").exists()
            one.mount("-v", "data:/data")
            assert _fill(str(one.merged / "data/file")) == errno.ENOSPC
            os.sync()  # else the daemon's end waits for it, which takes long on an emulated machine
            one.umount()
            succeed(one.unionfs("volume", "rm", "data"))
    finally:
        areas.detach(disk)


def test_without_quotas_a_resize_says_so(one: Storage, disk: Path, kind: str, area: Path) -> None:
    succeed(one.unionfs("volume", "create", "-o", "size=20m", "data"))
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-t", kind, "-o", "loop", area / "image", disk], check=True)
    shown: Any = refused(one.unionfs("volume", "resize", "data", "30m"), "data cannot be resized", "prjquota")
    assert "Traceback" not in shown
