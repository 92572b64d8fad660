"""Trees with every kind of entry of a filesystem, and trees as values."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import acl
from tests.support.snapshot import read_xattrs


def fill(root: Path) -> None:
    """Owners, modes, times, xattrs, ACLs, capabilities, links, holes, pipes, devices and odd names."""
    (root / "dir/inner").mkdir(parents=True)
    (root / "dir/file").write_text("hello\n")
    os.link(root / "dir/file", root / "dir/inner/second name")
    os.link(root / "dir/file", root / "zz third name")
    os.symlink("/etc/passwd", root / "absolute")
    os.symlink("../" * 60 + "nowhere", root / "long link")
    os.symlink("x" * 300, root / "longer link")
    os.mkfifo(root / "pipe", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mknod(root / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    with (root / "sparse").open("wb") as file:
        file.truncate(3 << 40)
        file.seek(1 << 30)
        file.write(b"middle")
        file.seek((2 << 40) + 5)
        file.write(os.urandom(200_000))
    with (root / "only a hole").open("wb") as file:
        file.truncate(10 << 20)
    with (root / "data at the end").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
    (root / "zeros").write_bytes(bytes(100_000))
    (root / "large").write_bytes(os.urandom(3_000_001))
    (root / "empty").touch()
    for size in (1, 511, 512, 513, 4096, 262143, 262144, 262145):
        (root / f"size {size}").write_bytes(os.urandom(size))
    (root / ("n" * 250)).write_text("long name")
    deep = root
    for _ in range(20):
        deep = deep / ("d" * 60)
        deep.mkdir()
    (deep / "leaf").write_text("deep")
    for name in (
        b"new\nline",
        b"tab\there",
        b"back\\slash",
        b"\xff\xfe not utf-8",
        "ünïcödé".encode(),
        b"-dash",
        b"\xc3(" + b"y" * 120,
        b" blank ",
        b"%41=b",
    ):
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(name)
    os.setxattr(root / "dir/file", "user.note", b"a=b\n\0c")
    os.setxattr(root / "dir/file", "user.per%cent=equals", b"value")
    os.setxattr(root / "dir", "trusted.mark", b"\xff" * 3000)
    os.setxattr(root / "absolute", "trusted.link", b"on a symlink", follow_symlinks=False)
    os.setxattr(root / "pipe", "trusted.pipe", b"on a pipe", follow_symlinks=False)
    os.setxattr(
        root / "large", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    os.setxattr(root / "dir/inner", acl.DEFAULT, acl.simple(7, 5, 0, users={1000: 7, 4000000000: 4}))
    os.setxattr(root / "size 1", acl.ACCESS, acl.simple(6, 4, 0, users={1000: 6}))
    (root / "dir/inner/below a default acl").write_text("x")
    os.chown(root / "large", 12345, 54321)
    os.chown(root / "size 511", 4_000_000_000, 3_000_000_000)
    os.chown(root / "absolute", 7, 8, follow_symlinks=False)
    os.chmod(root / "size 512", 0o6755)
    os.chmod(root / "dir/inner", 0o3770)
    os.chmod(root / "size 513", 0)
    os.utime(root / "size 4096", ns=(0, -1_500_000_000))
    os.utime(root / "empty", ns=(0, 0))
    os.utime(root / "zeros", ns=(0, 20_000_000_000 * 1_000_000_000 + 7) if _has_far_times(root) else (0, 7))
    os.utime(root / "absolute", ns=(1, 1_000_000_123_456_789), follow_symlinks=False)
    os.chmod(root, 0o751)
    os.setxattr(root, "user.root", b"of the volume")
    for path in (root / "dir", root / "dir/inner", deep, root):
        os.utime(path, ns=(5, 1_234_567_890_123_456_789))


def _has_far_times(root: Path) -> bool:
    """Whether the filesystem supports times after the year 2446, ext4's limit."""
    probe = root / "probe"
    probe.touch()
    os.utime(probe, ns=(0, 20_000_000_000 * 1_000_000_000))
    far = probe.stat().st_mtime == 20_000_000_000
    probe.unlink()
    return far


def add_socket(path: Path) -> None:
    """Create a socket file."""
    with socket.socket(socket.AF_UNIX) as made:
        fd = os.open(path.parent, os.O_PATH)
        try:
            made.bind(f"/proc/self/fd/{fd}/{path.name}")
        finally:
            os.close(fd)


def value(root: Path, *, without: Sequence[str] = ()) -> dict[bytes, dict[str, Any]]:
    """All content of a backup, by path; links by the set of their names, not by inode numbers."""
    found: dict[bytes, dict[str, Any]] = {}
    names: dict[tuple[int, int], list[bytes]] = {}
    start = os.fsencode(root)
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        whole = start + b"/" + path if path else start
        if os.fsdecode(path) in without:
            continue
        status = os.lstat(whole)
        kind = stat.S_IFMT(status.st_mode)
        entry: dict[str, Any] = {
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mtime": status.st_mtime_ns,
            "rdev": status.st_rdev,
            "xattrs": read_xattrs(whole),
        }
        if kind == stat.S_IFDIR:
            waiting += [path + b"/" + name if path else name for name in os.listdir(whole)]
        else:
            names.setdefault((status.st_dev, status.st_ino), []).append(path)
            entry["inode"] = (status.st_dev, status.st_ino)
            entry["size"] = status.st_size
        if kind == stat.S_IFLNK:
            entry["link"] = os.readlink(whole)
        elif kind == stat.S_IFREG:
            entry["content"] = _content(whole, status)
            entry["holes"] = status.st_blocks * 512 < status.st_size
        found[path] = entry
    for entry in found.values():
        if "inode" in entry:
            entry["names"] = sorted(names[entry.pop("inode")])
    return found


def _content(path: bytes, status: os.stat_result) -> str:
    total = hashlib.blake2b()
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while at < status.st_size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(fd, at, os.SEEK_HOLE)
            while at < end:
                chunk = os.pread(fd, min(end - at, 4096), at)
                # The blocks of zeros that are holes may differ.
                if chunk.strip(b"\0"):
                    total.update(b"%d" % at + chunk)
                at += len(chunk)
    finally:
        os.close(fd)
    return total.hexdigest()


def tar(*arguments: str | Path) -> str:
    """Run GNU tar, which must succeed without output on stderr."""
    done = subprocess.run(["tar", *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return os.fsdecode(done.stdout)
