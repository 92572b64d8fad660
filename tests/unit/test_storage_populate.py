"""First use of an empty volume: the merged directory is copied completely, as by GNU cp -a."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import acl, snapshot
from tests.unit.union_support import OpenUnion, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.errors import UserError
from unionfs.storage import copying as subject
from unionfs.storage.model import Volume
from unionfs.storage.populate import populate
from unionfs.sys import attributes
from unionfs.union.layers import LayerStack

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


def fill(stack: LayerStack, volume: Path, *names: bytes) -> bool:
    """Populate the directory of a volume from a path of the union."""
    home = volume.parent / "root/volumes/vol"
    home.mkdir(parents=True, exist_ok=True)
    fd = os.open(volume, os.O_PATH | os.O_DIRECTORY)
    try:
        return populate(stack, names, fd, Volume("vol", "local", str(volume), False, directory=str(home)))
    finally:
        os.close(fd)


def make_tree(top: Path) -> None:
    """Make one entry of each kind."""
    (top / "sub/deeper").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "file").write_bytes(b"data\n" * 1000)
    (top / "suid").touch()
    os.chown(top / "suid", 1000, 1001)
    (top / "suid").chmod(0o6755)
    os.link(top / "file", top / "sub/hard")
    os.link(top / "file", top / "sub/deeper/hard2")
    (top / "symlink").symlink_to("/nowhere/at all")
    os.chown(top / "symlink", 5, 6, follow_symlinks=False)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with (top / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
        file.truncate(3 << 20)
    os.setxattr(top / "file", "user.note", b"value")
    os.setxattr(top / "sub", "trusted.note", b"value")
    os.setxattr(top / "sub", acl.ACCESS, acl.simple(7, 5, 5, users={1000: 7}))
    os.setxattr(top, acl.DEFAULT, acl.simple(7, 5, 0, users={1000: 7}))
    (top / b"\xff\xfe odd\nname".decode(errors="surrogateescape")).touch()
    for number, path in enumerate([*sorted(top.rglob("*"), reverse=True), top]):
        os.utime(path, ns=(1_000_000_001 + number, 1_500_000_000_123_456_789 + number), follow_symlinks=False)
    os.chown(top, 33, 34)
    top.chmod(0o2750)


def comparable(root: Path) -> dict[bytes, object]:
    """The attributes that a copy preserves: all except inode and device numbers and ctimes."""
    found: dict[bytes, object] = {}
    for path, entry in snapshot.take(root).items():
        size = 0 if stat.S_ISDIR(entry.mode) else entry.size
        found[path] = replace(entry, ino=0, d_ino=0, dev=0, ctime=0, size=size)
    return found


def test_everything_is_kept(open_union: OpenUnion, tmp_path: Path) -> None:
    make_tree_at = tmp_path / "l0/var/data"
    make_tree_at.mkdir(parents=True)
    make_tree(make_tree_at)
    subprocess.run(["cp", "-a", make_tree_at, tmp_path / "reference"], check=True)
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o700)
    stack = open_union().stack
    fds = os.listdir("/proc/self/fd")
    assert fill(stack, volume, b"var", b"data")
    assert os.listdir("/proc/self/fd") == fds
    assert comparable(volume) == comparable(tmp_path / "reference")
    links = {(volume / name).stat().st_ino for name in ("file", "sub/hard", "sub/deeper/hard2")}
    assert len(links) == 1
    assert (volume / "holes").stat().st_blocks == (tmp_path / "reference/holes").stat().st_blocks
    # It is no longer empty, so the next use does not change it.
    (volume / "suid").unlink()
    assert not fill(stack, volume, b"var", b"data")
    assert not (volume / "suid").exists()


def test_what_is_merged_is_copied(open_union: OpenUnion, tmp_path: Path) -> None:
    for layer in ("l0", "l1", "upper"):
        (tmp_path / layer / "d").mkdir(parents=True)
    (tmp_path / "l1/d/low").write_text("low")
    (tmp_path / "l1/d/hidden").write_text("hidden")
    (tmp_path / "l1/d/opaque").mkdir()
    (tmp_path / "l1/d/opaque/below").touch()
    (tmp_path / "l0/d/opaque").mkdir()
    os.setxattr(tmp_path / "l0/d/opaque", "user.overlay.opaque", b"y")
    (tmp_path / "l0/d/opaque/above").touch()
    (tmp_path / "upper/d/up").write_text("up")
    (tmp_path / "upper/d/up").chmod(0o600)
    os.setxattr(tmp_path / "upper/d/up", "user.overlay.origin", b"private")
    os.setxattr(tmp_path / "upper/d/up", "user.overlay.overlay.shown", b"plain")
    whiteout(tmp_path / "upper/d/hidden")
    volume = tmp_path / "volume"
    volume.mkdir()
    assert fill(open_union(2).stack, volume, b"d")
    found = {str(path.relative_to(volume)) for path in volume.rglob("*")}
    assert found == {"low", "up", "opaque", "opaque/above"}
    assert os.listxattr(volume / "opaque") == []
    # The xattr shown as user.overlay.shown in the union has that name in a volume, which is not a layer.
    assert snapshot.read_xattrs(str(volume / "up")) == {"user.overlay.shown": b"plain"}


def test_the_work_directory_is_left_alone(open_union: OpenUnion, tmp_path: Path) -> None:
    """The serving union uses it at the same time."""
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/file").touch()
    (tmp_path / "volume").mkdir()
    stack = open_union().stack
    before = snapshot.take(tmp_path / "work")
    assert fill(stack, tmp_path / "volume", b"d")
    assert snapshot.take(tmp_path / "work") == before


def test_deep_trees(open_union: OpenUnion, tmp_path: Path) -> None:
    """Deeper than PATH_MAX and than Python's recursion limit."""
    (tmp_path / "l0").mkdir()
    fd = os.open(tmp_path / "l0", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.mkdir("bottom", dir_fd=fd)
    os.close(fd)
    volume = tmp_path / "volume"
    volume.mkdir()
    assert fill(open_union().stack, volume)
    fd = os.open(volume, os.O_RDONLY)
    for _ in range(1200):
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    assert os.listdir(fd) == ["bottom"]
    os.close(fd)
    subprocess.run(["rm", "-rf", tmp_path / "l0/d", volume / "d"], check=True)


def test_nothing_to_copy(open_union: OpenUnion, tmp_path: Path) -> None:
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/file").touch()
    volume = tmp_path / "volume"
    volume.mkdir()
    stack = open_union().stack
    assert not fill(stack, volume, b"missing")
    assert not fill(stack, volume, b"file")
    assert not fill(stack, volume, b"file", b"x")
    assert os.listdir(volume) == []


def test_lost_and_found_is_nothing(open_union: OpenUnion, tmp_path: Path) -> None:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/x").touch()
    (tmp_path / "volume/lost+found").mkdir(parents=True)
    assert fill(open_union().stack, tmp_path / "volume", b"d")
    assert sorted(os.listdir(tmp_path / "volume")) == ["lost+found", "x"]


def test_a_failure_leaves_the_volume_empty(
    open_union: OpenUnion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "l0/d/sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (tmp_path / "l0/d" / name).write_text("data")
    volume = tmp_path / "volume"
    volume.mkdir()
    stack = open_union().stack

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(subject, "copy_data", full)
    with pytest.raises(UserError, match=r"volume vol cannot be filled .* at /d: no space left .* nocopy"):
        fill(stack, volume, b"d")
    assert os.listdir(volume) == []


@pytest.mark.parametrize("planted", [".unionfs-copy", ".unionfs-copy-unfinished", ".unionfs-restore"])
def test_nothing_in_a_volume_is_believed(open_union: OpenUnion, tmp_path: Path, planted: str) -> None:
    """A writer of the volume may create any name: it is content, and the volume keeps its attributes."""
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/x").write_text("layer")
    volume = tmp_path / "volume"
    (volume / planted).mkdir(parents=True)
    os.chown(volume / planted, 1000, 1000)
    (volume / planted).chmod(0o777)
    before = snapshot.take(volume)
    assert not fill(open_union().stack, volume, b"d")
    assert snapshot.take(volume) == before


@pytest.mark.parametrize(
    ("name", "code", "tolerated"),
    [
        (attributes.OWNER, errno.EPERM, True),
        (attributes.OWNER, errno.EACCES, True),  # sshfs
        (attributes.OWNER, errno.EROFS, False),
        (b"user.note", errno.EPERM, True),
        (b"user.note", errno.EACCES, False),
    ],
)
def test_an_ordinary_user_keeps_what_is_permitted(
    monkeypatch: pytest.MonkeyPatch, name: bytes, code: int, tolerated: bool
) -> None:
    error = OSError(code, os.strerror(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        subject._refused(name, error)  # root
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if tolerated:
        subject._refused(name, error)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            subject._refused(name, error)
