"""Places for layers: directories on a filesystem with all features, and separate small filesystems.

An area is a directory with mode 0755 all the way, so that a worker with another identity can enter it
(pytest's tmp_path excludes others). A run's areas lie in another one, which is $TMPDIR. The creator of an
area holds flock(2) on it, so that the next run sweeps what a killed run left behind, and never what another
run uses: a process id would not distinguish these across PID namespaces.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import acl, syscalls

PREFIX = "unionfs-tests-"
_LONGEST_BASE = 40
_ENOUGH_MEMORY = 6 << 30
FILESYSTEMS = ("ext4", "tmpfs", "xfs", "btrfs")
_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_ZPOOL = shutil.which("zpool", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
_POOLS = Path("/proc/spl/kstat/zfs")
_MIN_BYTES = {"ext4": 32 << 20, "xfs": 320 << 20, "btrfs": 128 << 20, "zfs": 64 << 20}


class Unavailable(Exception):
    """This host does not support the filesystem; the text is the reason for a skip."""


def mounts_below(root: Path) -> list[tuple[int, str, str]]:
    """(minor device number, mountpoint, type) of every mount at or below ``root``, innermost first.

    From /proc/self/mountinfo, proc_pid_mountinfo(5).
    """
    found = []
    prefix = str(root).rstrip("/")
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, right = line.split(" - ", 1)
        fields = left.split()
        where = fields[4].encode(errors="surrogateescape").decode("unicode_escape")
        if where == prefix or where.startswith(prefix + "/"):
            found.append((int(fields[2].split(":")[1]), where, right.split()[0]))
    return found[::-1]


def detach_copies() -> None:
    """Unmount what other runs have mounted from this process's own mount namespace, a copy of theirs."""
    ours = tempfile.gettempdir()
    for _, where, _ in mounts_below(Path("/")):
        if f"/{PREFIX}" in where and where != ours:
            with contextlib.suppress(OSError):
                syscalls.umount(where, syscalls.MNT_DETACH)


def detach(root: Path) -> list[str]:
    """Unmount every mount at or below ``root``, hung ones too. Return their mountpoints."""
    gone = []
    for minor, where, fstype in mounts_below(root):
        if fstype.startswith("fuse"):
            abort = Path(f"/sys/fs/fuse/connections/{minor}/abort")
            if abort.exists():
                abort.write_text("1")
        try:
            syscalls.umount(where, syscalls.MNT_DETACH)
            gone.append(where)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
    return gone


def remove(root: Path) -> None:
    """Remove a tree of any depth, after everything mounted in it."""
    detach(root)
    if _ZPOOL is not None and (_POOLS / root.name).is_dir():
        subprocess.run([_ZPOOL, "destroy", "-f", root.name], check=False)
    # rm handles paths beyond PATH_MAX; shutil.rmtree does not on every supported Python.
    removal = ["rm", "-rf", "--one-file-system", "--", str(root)]
    if subprocess.run(removal, stderr=subprocess.DEVNULL).returncode != 0:
        # Files of a killed test may be immutable or append-only.
        subprocess.run(["chattr", "-R", "-f", "-ia", str(root)], stderr=subprocess.DEVNULL)
        subprocess.run(removal, check=False)


@functools.cache
def _fit(path: Path) -> str | None:
    """Why layers on ``path`` would lack a feature; None if they have all."""
    probe = Path(tempfile.mkdtemp(dir=path))
    try:
        for name in ("user.probe", "trusted.probe") if os.geteuid() == 0 else ("user.probe",):
            os.setxattr(probe, name, b"1")
        os.setxattr(probe, acl.ACCESS, acl.simple(7, 5, 5, users={1: 7}))
        if os.geteuid() == 0:
            os.mknod(probe / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", str(probe)], capture_output=True, text=True
        ).stdout.strip()
        if kind in ("overlayfs", "fuseblk", "fuse", "nfs", "ramfs"):
            return f"{path} is on {kind}"
    except OSError as error:
        return f"{path}: {error}"
    else:
        return None
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def sweep() -> None:
    """Remove what killed test runs left: areas without a lock, and the mounts in them."""
    for base in {Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/dev/shm")}:
        if not base.is_dir():
            continue
        for path in base.glob(PREFIX + "*"):
            try:
                lock = _lock(path)
            except FileNotFoundError:
                continue  # another run has just removed it
            if lock is not None:
                remove(path)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """An fd that locks the area, None if another process holds the lock."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@contextmanager
def _new(base: Path) -> Iterator[Path]:
    """A fresh area, removed at the end with everything mounted in it."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = _lock(path)
    assert lock is not None
    try:
        path.chmod(0o755)
        yield path
    finally:
        remove(path)
        os.close(lock)


def _bases(inside: int = 0) -> list[Path]:
    """Where areas may lie, or where they lie ``inside`` bytes further down.

    The path of a socket in an area has to fit into 108 bytes (unix(7)).
    """
    paths = (Path(tempfile.gettempdir()), Path("/var/tmp"))
    return [path for path in paths if path.is_dir() and len(os.fsencode(path)) + inside <= _LONGEST_BASE]


@contextmanager
def area() -> Iterator[Path]:
    """A directory on a filesystem with xattrs, ACLs and whiteouts: the host's own, else an ext4 in a file."""
    for base in _bases():
        if _fit(base) is None:
            with _new(base) as path:
                yield path
            return
    with filesystem("ext4", 2 << 30) as path:
        yield path


@contextmanager
def run_directory() -> Iterator[None]:
    """A place for everything temporary of a test run: it is $TMPDIR, here and in all child processes.

    With another $TMPDIR, it is on that filesystem.
    """
    before = os.environ.get("TMPDIR")
    base = next((path for path in _bases(len(PREFIX) + 12) if _fit(path) is None), Path("/var/tmp"))
    with _new(base) as home:
        place = home if before else _in_memory(home) or home
        place.chmod(0o1777)
        os.environ["TMPDIR"], tempfile.tempdir = str(place), None
        try:
            yield
        finally:
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before
            tempfile.tempdir = None


def _available_memory() -> int:
    """Bytes; proc_meminfo(5)."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    return int(line.split()[1]) << 10


def _in_memory(home: Path) -> Path | None:
    """A new ext4 in memory; None without root, loop devices, or a few GiB of free memory.

    On a disk, making and removing the trees of some tests takes longer than the tests.
    """
    if os.geteuid() != 0 or _available_memory() < _ENOUGH_MEMORY:
        return None
    memory, place = home / "memory", home / "fs"
    memory.mkdir()
    place.mkdir()
    syscalls.mount("tmpfs", memory, "tmpfs", 0, "mode=700")
    try:
        _mount_image("ext4", memory / "image", _ENOUGH_MEMORY, place)
    except Unavailable:
        detach(memory)
        return None
    return place


@contextmanager
def filesystem(kind: str, size: int = 256 << 20) -> Iterator[Path]:
    """A new mounted filesystem of ``size`` bytes: "tmpfs", or in a file, with ext4, xfs, btrfs or zfs.

    Raises Unavailable with the reason.
    """
    if os.geteuid() != 0:
        raise Unavailable("mounting a filesystem needs root")
    base = next((path for path in _bases() if _fit(path) is None), Path("/var/tmp"))
    with _new(base) as home:
        where = home / "fs"
        where.mkdir()
        if kind == "tmpfs":
            syscalls.mount("tmpfs", where, "tmpfs", 0, f"size={size},mode=755")
        elif kind == "zfs":
            _make_pool(home.name, home / "image", size, where)
        else:
            _mount_image(kind, home / "image", size, where)
        where.chmod(0o755)
        yield where


def _make_file(kind: str, image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(max(size, _MIN_BYTES[kind]))


def _make_pool(name: str, image: Path, size: int, where: Path) -> None:
    """A pool, which `remove` destroys. It is not in the list of pools that are imported at boot."""
    if _ZPOOL is None:
        raise Unavailable("zpool is not installed")
    _make_file("zfs", image, size)
    done = subprocess.run(
        [_ZPOOL, "create", "-o", "cachefile=none", "-m", where, name, image], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise Unavailable(f"no ZFS here: {done.stderr.strip()}")


def _mount_image(kind: str, image: Path, size: int, where: Path) -> None:
    _make_file(kind, image, size)
    make = [*_MKFS[kind], str(image)]
    if shutil.which(make[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        raise Unavailable(f"{make[0]} is not installed")
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    subprocess.run(make, check=True, capture_output=True, env=environment)
    done = subprocess.run(
        ["mount", "-t", kind, "-o", "loop", str(image), str(where)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise Unavailable(f"no {kind} on a loop device: {done.stderr.strip()}")
