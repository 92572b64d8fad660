"""Volumes of `type=nfs`: mounted for their first user, unmounted with the last."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import Done, refused, succeed
from tests.support.storage import Storage, storage
from tests.vm.nfs import ADDRESS, Server
from tests.volumes import trees


@pytest.fixture
def one(root: None, area: Path) -> Iterator[Storage]:
    with storage(area) as found:
        yield found


def _create(one: Storage, server: Server, exported: Path, name: str = "media") -> None:
    options = f"addr={ADDRESS},rw,nfsvers=4.2"
    words = ("-o", "type=nfs", "-o", f"o={options}", "-o", f"device={server.device(exported)}")
    assert succeed(one.unionfs("volume", "create", *words, name)) == f"{name}\n"


def _well(done: Done) -> None:
    assert done.returncode == 0, done.stderr


def _is_nfs(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) and " - nfs4 " in line for line in lines)


def test_its_life(one: Storage, server: Server, exported: Path) -> None:
    (exported / "there").write_text("there\n")
    _create(one, server, exported)
    data = one.volume("media")
    assert not os.path.ismount(data)
    one.mount("-v", "media:/data")
    merged = one.merged
    assert _is_nfs(data)
    assert _is_nfs(merged / "data")
    assert (merged / "data/there").read_text() == "there\n"
    (merged / "data/new").write_text("new\n")
    (merged / "data/dir").mkdir(mode=0o750)
    os.link(merged / "data/new", merged / "data/dir/link")
    assert (exported / "new").read_text() == "new\n"
    assert (exported / "dir/link").samefile(exported / "new")
    refused(one.unionfs("volume", "rm", "media"), "media", "in use")
    assert (exported / "new").read_text() == "new\n"
    one.umount()
    assert not os.path.ismount(data)
    assert succeed(one.unionfs("volume", "rm", "media")) == "media\n"
    assert one.volumes() == []
    assert sorted(os.listdir(exported)) == ["dir", "new", "there"]  # what is on the server stays


def test_the_mount_stays_until_the_last_user_is_gone(
    one: Storage, server: Server, exported: Path, area: Path
) -> None:
    _create(one, server, exported)
    one.mount("-v", "media:/data")
    second = area / "second"
    for name in ("lower", "merged"):
        (second / name).mkdir(parents=True)
    (second / "lower/data").mkdir()
    words = ("-l", second / "lower", "-v", "media:/data")
    succeed(one.unionfs("mount", *words, second / "merged"))
    (second / "merged/data/file").write_text("of the second")
    assert (one.merged / "data/file").read_text() == "of the second"
    one.umount()
    assert _is_nfs(one.volume("media"))
    assert (second / "merged/data/file").read_text() == "of the second"
    succeed(one.unionfs("umount", second / "merged"))
    assert not os.path.ismount(one.volume("media"))


def test_an_empty_one_is_filled(one: Storage, server: Server, exported: Path) -> None:
    """With what the union has at its target, as any volume."""
    (one.place.lower / "data").mkdir()
    (one.place.lower / "data/seed").write_text("seed\n")
    _create(one, server, exported)
    one.mount("-v", "media:/data")
    assert (one.merged / "data/seed").read_text() == "seed\n"
    assert (exported / "seed").read_text() == "seed\n"
    one.umount()


def test_backup_and_restore(one: Storage, server: Server, exported: Path, area: Path) -> None:
    _create(one, server, exported)
    (exported / "dir").mkdir(mode=0o2750)
    (exported / "dir/file").write_bytes(os.urandom(300_000))
    os.link(exported / "dir/file", exported / "second")
    os.symlink("dir/file", exported / "link")
    os.mkfifo(exported / "pipe", 0o640)
    os.chown(exported / "dir", 1000, 1001)
    os.setxattr(exported / "dir/file", "user.one", b"1")
    before = trees.value(exported)
    archive = area / "media.tar.zst"
    _well(one.unionfs("volume", "backup", "media", "-o", archive))
    assert not os.path.ismount(one.volume("media"))
    (exported / "dir/file").write_text("changed")
    (exported / "later").touch()
    os.unlink(exported / "link")
    _well(one.unionfs("volume", "restore", "media", "-i", archive))
    assert trees.value(exported) == before
    assert not os.path.ismount(one.volume("media"))
    one.mount("-v", "media:/data")
    refused(one.unionfs("volume", "restore", "media", "-i", archive), "media", "in use")
    _well(one.unionfs("volume", "backup", "media", "-o", area / "used.tar"))  # also while it is used
    one.umount()


def test_a_server_that_refuses(one: Storage, server: Server, exported: Path) -> None:
    """One sentence; the union is not mounted, and the volume has no user."""
    _create(one, server, exported)
    exported.rmdir()
    refused(one.try_mount("-v", "media:/data"), "volume media cannot be mounted", "No such file or directory")
    assert one.mounts() == []
    assert not os.path.ismount(one.volume("media"))
    assert succeed(one.unionfs("volume", "rm", "media")) == "media\n"
