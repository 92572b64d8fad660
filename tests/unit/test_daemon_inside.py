"""The mounts inside of a union: its storage, and taking that off. Here a tmpfs stands for the union."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import areas, syscalls
from unionfs.daemon.inside import TakenOff, mounted_inside, reachable, storage_mounts, unmount_inside
from unionfs.settings.specs import BindSpec
from unionfs.sys.mountinfo import MountEntry, mounted_at, read_mountinfo

MS_SHARED = 1 << 20  # include/uapi/linux/mount.h


def _entry(path: Path) -> MountEntry:
    entry = mounted_at(str(path))
    assert entry is not None
    return entry


def _mount(path: Path) -> None:
    path.mkdir(exist_ok=True)
    syscalls.mount("t", path, "tmpfs", 0, "size=64k")
    syscalls.mount("none", path, "", syscalls.MS_PRIVATE)


def _bind(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    syscalls.mount(str(source), target, "", syscalls.MS_BIND | syscalls.MS_REC)


@pytest.fixture
def top(root: None, area: Path) -> Iterator[Path]:
    """A private mount; ``volume`` beside it has another one on ``sub``, and that one on ``deep``."""
    for path in ("volume", "volume/sub", "volume/sub/deep", "top"):
        _mount(area / path)
    try:
        yield area / "top"
    finally:
        for _, where, _ in areas.mounts_below(area):
            areas.detach(Path(where))


def _paths(found: list[MountEntry], top: Path) -> list[str]:
    return [entry.mountpoint.removeprefix(f"{top}/") for entry in found]


def test_storage_with_the_mounts_below_it(top: Path) -> None:
    _bind(top.parent / "volume", top / "data")
    for stranger in ("other", "data/strange", "data/sub/strange", "other/in"):
        _mount(top / stranger)
    storage = [BindSpec(target="/data", path=str(top.parent / "volume"))]
    union = _entry(top)
    assert _paths(storage_mounts(union, storage), top) == ["data", "data/sub", "data/sub/deep"]
    everything = mounted_inside(union)
    assert _paths(everything, top) == [
        "data", "other", "data/sub", "data/strange", "other/in", "data/sub/deep", "data/sub/strange"
    ]  # fmt: skip
    assert reachable(union) == everything
    assert storage_mounts(union, []) == []
    unmount_inside(union)
    assert mounted_inside(union) == []
    assert (top.parent / "volume/sub/deep").is_mount()


def test_what_is_covered_is_left_out(top: Path) -> None:
    _bind(top.parent / "volume", top / "data")
    _mount(top / "data")
    storage = [BindSpec(target="/data", path=str(top.parent / "volume"))]
    found = storage_mounts(_entry(top), storage)
    assert [entry.mount_id for entry in found] == []


def test_taken_off_and_put_back(top: Path) -> None:
    """With the content of a tmpfs, and what is mounted below; at the place that the union has moved to."""
    _mount(top / "data")
    (top / "data/f").write_text("data")
    _mount(top / "data/sub")
    (top / "data/sub/g").write_text("below")
    union = _entry(top)
    before = len(os.listdir("/proc/self/fd"))
    taken = TakenOff(union, mounted_inside(union))
    taken.take_off()
    assert mounted_inside(union) == []
    assert os.listdir(top / "data") == []
    moved = top.parent / "moved"
    moved.mkdir()
    syscalls.mount(str(top), moved, "", syscalls.MS_MOVE)
    taken.put_back()
    assert (moved / "data/f").read_text() == "data"
    assert (moved / "data/sub/g").read_text() == "below"
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_in_use_restores_the_others(top: Path) -> None:
    for name in ("a", "b", "c"):
        _mount(top / name)
        (top / name / name).touch()
    union = _entry(top)
    before = len(os.listdir("/proc/self/fd"))
    with open(top / "b/b"), pytest.raises(OSError, match="busy") as found:
        TakenOff(union, mounted_inside(union)).take_off()
    assert found.value.filename == str(top / "b")
    assert sorted(_paths(mounted_inside(union), top)) == ["a", "b", "c"]
    assert all((top / name / name).exists() for name in ("a", "b", "c"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_mounts_of_other_users_are_left_alone(top: Path) -> None:
    """Their daemons may never answer; what is mounted on them, or below, is as far away."""
    for name in ("theirs", "ours"):
        (top / name).mkdir()
    _mount(top / "ours/in")
    with open("/dev/fuse", "r+b", buffering=0) as device:
        data = f"fd={device.fileno()},rootmode=40000,user_id=1001,group_id=1001"
        syscalls.mount("x", top / "theirs", "fuse.x", 0, data)
        theirs = _entry(top / "theirs")
        syscalls.mount("t", top / "theirs", "tmpfs", 0, "size=64k")
        union = _entry(top)
        assert _paths(mounted_inside(union), top) == ["ours/in", "theirs", "theirs"]
        assert _paths(reachable(union), top) == ["ours/in"]
        unmount_inside(union)
        assert _paths(mounted_inside(union), top) == ["theirs", "theirs"]
        syscalls.umount(top / "theirs")
        assert _entry(top / "theirs").mount_id == theirs.mount_id
        syscalls.umount(top / "theirs", syscalls.MNT_DETACH)


def test_mounts_of_the_host_stay(top: Path) -> None:
    """A bind mount with shared propagation has peers below its source."""
    volume = top.parent / "volume"
    syscalls.mount("none", volume, "", syscalls.MS_REC | MS_SHARED)
    _bind(volume, top / "data")
    assert _paths(mounted_inside(_entry(top)), top) == ["data", "data/sub", "data/sub/deep"]
    unmount_inside(_entry(top))
    assert mounted_inside(_entry(top)) == []
    assert (volume / "sub").is_mount()
    assert (volume / "sub/deep").is_mount()


def test_storage_at_the_root_of_the_host(root: None) -> None:
    """Its mountpoint ends with the slash that others begin with."""
    top = mounted_at("/")
    assert top is not None
    # A run in namespaces of its own has another /proc on top of the host's.
    entry = next(
        one for one in read_mountinfo()
        if one.parent_id == top.mount_id and mounted_at(one.mountpoint) == one and one.mountpoint != "/"
    )  # fmt: skip
    found = storage_mounts(top, [BindSpec(target=entry.mountpoint, path="/x")])
    assert entry.mount_id in {one.mount_id for one in found}
