"""tmpfs in a union and under it: limits, options, and no byte on a disk."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.cli_calls import gone, listed, refused, succeed, wait_for
from tests.support import areas
from tests.support.storage import Storage, storage


def fill(path: Path, size: int) -> None:
    """Write that many bytes to a file, and close it so that all of them have arrived."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        left = size
        while left:
            left -= os.write(fd, b"x" * min(left, 65536))
        os.fsync(fd)
    finally:
        os.close(fd)


def options_of(path: Path) -> set[str]:
    """All options of the mount at `path` in the mount table."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        if left.split()[4] == str(path):
            return {*left.split()[5].split(","), *right.split()[2].split(",")}
    raise AssertionError(f"{path} is no mountpoint")


def has_noswap() -> bool:
    """Whether this kernel can exclude a tmpfs from swap."""
    return tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 4)


def test_options_and_limits(one: Storage) -> None:
    one.mount(
        "--tmpfs", "/a:size=1m,mode=0751,nr_inodes=5,uid=7,gid=8",
        "--tmpfs", "/b:size=64k,exec,swap", "--tmpfs", "/c:ro",
        "--mount", "type=tmpfs,target=/d,tmpfs-size=64k,tmpfs-mode=0700",
    )  # fmt: skip
    a = one.merged / "a"
    assert (a.stat().st_uid, a.stat().st_gid, stat.S_IMODE(a.stat().st_mode)) == (7, 8, 0o751)
    assert options_of(a) >= {"nosuid", "nodev", "noexec", "size=1024k", "nr_inodes=5"}
    assert ("noswap" in options_of(a)) == has_noswap()
    assert not {"noexec", "noswap"} & options_of(one.merged / "b")
    assert "ro" in options_of(one.merged / "c")
    assert stat.S_IMODE((one.merged / "d").stat().st_mode) == 0o700
    fill(a / "full", 1 << 20)
    with pytest.raises(OSError, match="No space") as caught:
        fill(a / "more", 4096)
    assert caught.value.errno == errno.ENOSPC
    (a / "full").unlink()
    (a / "more").unlink()
    for number in range(4):  # the root is an inode too
        (a / f"n{number}").touch()
    with pytest.raises(OSError, match="No space"):
        (a / "n4").touch()
    with pytest.raises(OSError, match="No space"):
        fill(one.merged / "d/f", 128 << 10)
    with pytest.raises(OSError, match="Read-only"):
        (one.merged / "c/x").touch()
    one.umount()
    # None of it was in the union's upper.
    assert all(not path.is_file() for path in one.place.upper.rglob("*"))


def test_gone_with_the_mount(one: Storage) -> None:
    for _ in range(2):
        one.mount("--tmpfs", "/t")
        assert os.listdir(one.merged / "t") == []
        (one.merged / "t/x").touch()
        one.umount()


def test_upper_in_memory(storing: Storage) -> None:
    lowers = ("-l", storing.place.lower, "-l", storing.place.lower2)
    storing.place.lower.chmod(0o751)
    os.chown(storing.place.lower, 3, 4)
    before = storing.place.snapshot()
    storing.mount(*lowers, "-u", "tmpfs:size=4m", layers=False)
    merged = storing.merged
    found = merged.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (3, 4, 0o751)
    (merged / "base").write_text("changed\n")
    (merged / "deep").unlink()
    (merged / "new").mkdir()
    os.setxattr(merged / "new", "trusted.mine", b"1")
    os.link(merged / "base", merged / "hard")
    os.rename(merged / "hard", merged / "new/hard")
    assert (merged / "base").stat().st_nlink == 2
    assert os.statvfs(merged).f_blocks * os.statvfs(merged).f_frsize == 4 << 20
    # All of it only in memory.
    assert {**storing.place.snapshot(), **before} == {
        **before, **{f"merged/{name}": data for name, data in (
            ("base", b"changed\n"), ("new", None), ("new/hard", b"changed\n")
        )},
    }  # fmt: skip
    assert storing.unionfs("diff", merged).stdout == "C /base\nD /deep\nA /new\nA /new/hard\n"
    settings = listed(storing.unionfs("inspect", "--json", merged))["settings"]
    assert settings["upper_tmpfs"]["size"] == "4194304"
    with pytest.raises(OSError, match="No space"):
        fill(merged / "too-big", 8 << 20)
    (merged / "too-big").unlink()
    # No mount table lists the tmpfs.
    assert [kind for _, kind in storing.mounts()] == ["fuse.unionfs"]
    pid = storing.place.pid()
    assert "size=4096k" not in Path("/proc/self/mountinfo").read_text()
    assert "size=4096k" not in Path(f"/proc/{pid}/mountinfo").read_text()
    storing.umount()
    assert storing.place.snapshot() == before


def test_upper_in_memory_read_only(one: Storage) -> None:
    one.mount("-l", one.place.lower, "-u", "tmpfs", "-o", "ro", layers=False)
    with pytest.raises(OSError, match="Read-only"):
        (one.merged / "x").touch()
    one.umount()


def test_upper_in_memory_is_gone_with_a_killed_daemon(one: Storage) -> None:
    pid = one.mount("-l", one.place.lower, "-u", "tmpfs:size=64m", layers=False)
    fill(one.merged / "big", 48 << 20)
    shared = _shared_memory()
    os.kill(pid, 9)
    assert wait_for(lambda: gone(pid))
    succeed(one.unionfs("umount", one.merged))
    assert wait_for(lambda: _shared_memory() < shared - (40 << 10))


def _shared_memory() -> int:
    """KiB of tmpfs and shared memory in use on this machine."""
    text = Path("/proc/meminfo").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Shmem:")))


def test_refused_options(one: Storage) -> None:
    for upper, part in (
        ("tmpfs:huge=perhaps", "huge"),
        ("tmpfs:mpol=nothing", "mpol"),
        ("tmpfs:size=9999999999g", "size="),
    ):
        done = one.try_mount("-l", one.place.lower, "-u", upper, layers=False)
        refused(done, part)
        assert one.mounts() == []


def test_a_directory_called_tmpfs(one: Storage) -> None:
    for name in ("tmpfs", "w"):
        (one.place.root / name).mkdir()
    succeed(
        one.unionfs(
            "mount", "-l", one.place.lower, "-u", "./tmpfs", "-w", "w", one.merged, cwd=one.place.root
        )
    )
    (one.merged / "x").touch()
    assert (one.place.root / "tmpfs/x").exists()
    one.umount()


MARKER = b"the-secret-that-must-not-be-on-a-disk-" + os.urandom(16).hex().encode()


@pytest.mark.parametrize("where", ["upper", "tmpfs"])
def test_not_one_byte_reaches_the_disk(
    root: None, filesystem: Callable[..., Path], where: str, session: str
) -> None:
    """Lower, mountpoint and storage root are on a loop device; its image is searched for the written data."""
    disk = filesystem("ext4", 64 << 20)
    image = disk.parent / "image"
    (disk / "place").mkdir()
    with storage(disk / "place", session) as one:
        (one.place.lower / "config").write_bytes(b"public\n" * 100)
        if where == "upper":
            one.mount("-l", one.place.lower, "-u", "tmpfs:size=16m", layers=False)
            target = one.merged
        else:
            one.mount("--tmpfs", "/run/secrets:size=16m")
            target = one.merged / "run/secrets"
        (target / "secret").write_bytes(MARKER * 1000)
        (target / MARKER.decode()[:200]).touch()
        (target / "link").symlink_to(MARKER.decode())
        os.setxattr(target / "secret", "trusted.secret", MARKER)
        if where == "upper":
            with (target / "config").open("ab") as file:  # a copy-up
                file.write(MARKER)
            os.sync()
            os.rename(target / "secret", target / "renamed")
        os.sync()
        assert not contains(image, MARKER)
        one.umount()
    os.sync()
    assert not contains(image, MARKER)
    # The search finds existing data.
    (disk / "proof").write_bytes(MARKER)
    os.sync()
    assert contains(image, MARKER)


def contains(image: Path, marker: bytes) -> bool:
    """Whether the file contains the marker, read without the page cache."""
    fd = os.open(image, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        tail = b""
        while chunk := os.read(fd, 1 << 20):
            if marker in tail + chunk:
                return True
            tail = chunk[-len(marker) :]
    finally:
        os.close(fd)
    return False


def test_what_the_mount_table_shows(one: Storage) -> None:
    """`--tmpfs` is listed in the mount table like any mount; the upper's tmpfs is not."""
    one.mount("-l", one.place.lower, "-u", "tmpfs:size=2m", "--tmpfs", "/s:size=3m", layers=False)
    table = Path("/proc/self/mountinfo").read_text()
    assert table.count("size=3072k") == 1
    assert "size=2048k" not in table
    one.umount()
    assert areas.mounts_below(one.merged) == []


def test_swapping_can_be_chosen(one: Storage) -> None:
    if not has_noswap():
        done = one.try_mount("--tmpfs", "/t:noswap")
        refused(done, "noswap")
        return
    one.mount("--tmpfs", "/t:noswap", "--tmpfs", "/u:swap")
    assert "noswap" in options_of(one.merged / "t")
    assert "noswap" not in options_of(one.merged / "u")
    one.umount()


def test_umount_of_the_image_below(root: None, filesystem: Callable[..., Path]) -> None:
    """The unmounted union keeps no filesystem of its lowers and binds busy."""
    disk = filesystem("ext4", 64 << 20)
    with areas.area() as other, storage(other) as one:
        (disk / "shared").mkdir()
        one.mount("-l", disk, "-u", "tmpfs", "-v", f"{disk}/shared:/s", layers=False)
        one.umount()
        subprocess.run(["umount", disk], check=True)
        subprocess.run(["mount", "-o", "loop", disk.parent / "image", disk], check=True)
