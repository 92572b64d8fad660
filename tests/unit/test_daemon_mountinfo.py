"""The mount table, and the filesystem location of a path."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from unionfs.sys.mountinfo import (
    Location,
    location_of,
    mount_id_of_path,
    mounted_at,
    mounts_of_device,
    parse_mountinfo,
    read_mountinfo,
)

TABLE = (
    b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
    b"30 27 0:39 / /a\\040b\\134c rw,relatime shared:3 master:1 - fuse.unionfs my\\054src rw,user_id=0\n"
    b"31 27 0:40 / /k rw - overlay overlay rw,lowerdir=/l,upperdir=/u\\134:p\\054\\040x,workdir=/w\n"
    b"32 27 0:41 /sub/vol /btrfs rw - btrfs /dev/vdb rw\n"
    b"broken line\n"
)


def test_parse() -> None:
    root, union, kernel, btrfs = parse_mountinfo(TABLE)
    assert (root.mount_id, root.parent_id, root.device, root.mountpoint) == (27, 1, "254:0", "/")
    assert (union.mountpoint, union.fstype, union.source) == ("/a b\\c", "fuse.unionfs", "my,src")
    assert union.is_fuse
    assert not root.is_fuse
    assert kernel.super_option("upperdir") == "/u\\:p, x"
    assert kernel.super_option("workdir") == "/w"
    assert kernel.super_option("lower") is None
    assert btrfs.root == "/sub/vol"


def test_names_that_are_not_utf8() -> None:
    (entry,) = parse_mountinfo(b"1 2 0:1 / /x\xff rw - tmpfs t\xfe rw\n")
    assert os.fsencode(entry.mountpoint) == b"/x\xff"
    assert os.fsencode(entry.source) == b"t\xfe"


def test_this_process() -> None:
    table = read_mountinfo()
    assert mounted_at("/", table) is not None
    assert mounted_at("/surely/not/there", table) is None
    entry = mounted_at("/proc", table)
    assert entry is not None
    assert entry.fstype == "proc"
    assert mount_id_of_path("/proc") == entry.mount_id
    assert entry in mounts_of_device(entry.device, table)


def test_location_contains() -> None:
    outer = Location("8:1", ("a",))
    assert outer.contains(Location("8:1", ("a", "b")))
    assert outer.contains(outer)
    assert not outer.contains(Location("8:1", ("ab",)))
    assert not outer.contains(Location("8:2", ("a", "b")))
    assert Location("8:1", ()).contains(outer)


def test_location_sees_through_bind_mounts(root: None, area: Path) -> None:
    for name in ("real/sub", "bound"):
        (area / name).mkdir(parents=True)
    subprocess.run(["mount", "--bind", area / "real" / "sub", area / "bound"], check=True)
    try:
        assert location_of(str(area / "bound")) == location_of(str(area / "real" / "sub"))
        real = location_of(str(area / "real"))
        bound = location_of(str(area / "bound"))
        assert real is not None
        assert bound is not None
        assert real.contains(bound)
    finally:
        subprocess.run(["umount", area / "bound"], check=True)


def test_the_mount_on_top_is_found(root: None, area: Path) -> None:
    for kind in ("tmpfs", "ramfs"):
        subprocess.run(["mount", "-t", kind, kind, area], check=True)
    try:
        entry = mounted_at(str(area))
        assert entry is not None
        assert entry.fstype == "ramfs"
    finally:
        subprocess.run(["umount", area], check=True)
        subprocess.run(["umount", area], check=True)


def test_no_such_process() -> None:
    with pytest.raises(OSError, match="No such file"):
        read_mountinfo(2**22 + 1)
