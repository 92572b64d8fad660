"""Copy-up: its cost, its waiters, preserved attributes, and a full upper."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount import direct_calls as dc
from tests.support import snapshot
from tests.support.mounting import kernel_mounted, mounted
from tests.support.patience import patient
from tests.support.world import World, errno_of

MakeWorld = Callable[..., World]
MIB = 1 << 20


def _writes_later(session: str) -> bool:
    """Whether the daemon gets a write when it is synced, and never an open (docs/compliance.md)."""
    return session == "direct-cached"


def _eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + patient(seconds)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _layers(area: Path, build: Callable[[Path], object]) -> None:
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    build(area / "lower")


def _union(area: Path, session: str) -> Any:
    return mounted(area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session)


def test_truncating_opens_copy_no_data(root: None, area: Path, session: str) -> None:
    """O_TRUNC, truncate(0) and truncate(n) of a lower file copy nothing, nothing, and n bytes."""
    _layers(area, lambda lower: [(lower / name).write_bytes(os.urandom(8 * MIB)) for name in "abc"])
    with _union(area, session) as mount:
        base = mount.figure("copied_bytes")
        reader = os.open(mount.mountpoint / "a", os.O_RDONLY)
        (mount.mountpoint / "a").open("wb").close()
        os.close(reader)
        os.truncate(mount.mountpoint / "b", 0)
        assert mount.figure("copied_bytes") == base
        os.truncate(mount.mountpoint / "c", 5000)
        assert mount.figure("copied_bytes") - base <= 8192
        assert mount.figure("copy_ups") == 3
        assert [(mount.mountpoint / name).stat().st_size for name in "abc"] == [0, 0, 5000]
        assert (mount.mountpoint / "c").read_bytes() == (area / "lower/c").read_bytes()[:5000]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_copy_up_shares_extents(
    root: None, area: Path, session: str, filesystem: Callable[..., Path], kind: str
) -> None:
    """With reflinks the copy of a big file takes no space: it shares the lower's blocks."""
    place = filesystem(kind, 400 * MIB)
    if not dc.can_reflink(place):
        pytest.skip(f"this {kind} has no reflinks")
    _layers(place, lambda lower: (lower / "big").write_bytes(os.urandom(64 * MIB)))
    with mounted(
        area, lowers=[place / "lower"], upper=place / "upper", work=place / "work", session=session
    ) as mount:
        os.sync()
        before = os.statvfs(place)
        with (mount.mountpoint / "big").open("ab") as file:
            file.write(b"more")
            file.flush()
            os.fsync(file.fileno())
        assert mount.figure("copy_ups") == 1
        assert (mount.mountpoint / "big").read_bytes() == (place / "lower/big").read_bytes() + b"more"
        shared = dc.shared_bytes(place / "upper/big")
        assert 63 * MIB < shared <= 64 * MIB
        assert dc.shared_bytes(place / "lower/big") == shared
    # not while a daemon has the file open: xfs then reserves space after its end
    assert (before.f_bavail - os.statvfs(place).f_bavail) * before.f_bsize < 4 * MIB


def test_two_writers_cause_one_copy_up(root: None, area: Path, session: str) -> None:
    """Many concurrent opens for writing wait for one copy."""
    size = 64 * MIB
    _layers(area, lambda lower: (lower / "big").write_bytes(os.urandom(MIB) * 64))
    with _union(area, session) as mount:
        errors: list[BaseException] = []

        def write(number: int) -> None:
            try:
                fd = os.open(mount.mountpoint / "big", os.O_RDWR)
                os.pwrite(fd, b"%04d" % number, number * 4)
                os.close(fd)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert mount.figure("copy_ups") == 1
        assert mount.figure("copied_bytes") <= size
        with (mount.mountpoint / "big").open("rb") as file:
            assert file.read(32) == b"".join(b"%04d" % number for number in range(8))
            assert os.fstat(file.fileno()).st_size == size


def test_requests_go_on_during_copy_up(root: None, area: Path, session: str) -> None:
    """During a copy-up of 300 MiB, other requests are answered and the parent can be listed and changed."""
    chunk = os.urandom(MIB)

    def build(lower: Path) -> None:
        with (lower / "big").open("wb") as file:
            for _ in range(300):
                file.write(chunk)
        (lower / "small").write_bytes(b"small")

    _layers(area, build)
    with _union(area, session) as mount:
        done = threading.Event()

        def write() -> None:
            with (mount.mountpoint / "big").open("r+b") as file:
                file.write(b"!")
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        during = 0
        while not done.is_set():
            (mount.mountpoint / f"new{during}").write_bytes(b"x")
            assert (mount.mountpoint / "small").read_bytes() == b"small"
            assert "big" in os.listdir(mount.mountpoint)
            assert not done.is_set() or during
            during += not done.is_set()
            if during > 2000:
                time.sleep(0.01)
        thread.join()
        assert during >= 3
        assert mount.figure("copy_ups") == 1
        with (mount.mountpoint / "big").open("rb") as file:
            assert file.read(2) == b"!" + chunk[1:2]
            file.seek(299 * MIB)
            assert file.read(MIB) == chunk


def test_no_space_leaves_no_trace(
    root: None, area: Path, session: str, filesystem: Callable[..., Path]
) -> None:
    """ENOSPC during copy-up reaches the caller; upper and work are unchanged, the file stays readable.

    If copy-up waits for the first write and writes wait for a sync, the sync reports ENOSPC.
    """
    small = filesystem("tmpfs", 8 * MIB)
    data = os.urandom(16 * MIB)
    (area / "lower/d").mkdir(parents=True)
    (area / "lower/d/big").write_bytes(data)
    (area / "lower/d/little").write_bytes(b"little")
    for name in ("upper", "work"):
        (small / name).mkdir()
    with mounted(
        area, lowers=[area / "lower"], upper=small / "upper", work=small / "work", session=session
    ) as mount:
        top = mount.mountpoint
        _write_synced(top / "own", b"own")
        reader = os.open(top / "d/big", os.O_RDONLY)
        for call in (
            lambda: _write_and_sync(top / "d/big", later=_writes_later(session), how="fsync"),
            lambda: _write_and_sync(top / "d/big", later=_writes_later(session), how="close"),
            lambda: _write_and_sync(top / "d/big", later=_writes_later(session), how="msync"),
            lambda: os.chmod(top / "d/big", 0o600),
            lambda: os.rename(top / "d/big", top / "moved"),
            lambda: os.link(top / "d/big", top / "linked"),
            lambda: os.setxattr(top / "d/big", "user.x", b"1"),
            lambda: os.truncate(top / "d/big", 12 * MIB),
        ):
            assert errno_of(call) == errno.ENOSPC
        assert os.pread(reader, 100, 5 * MIB) == data[5 * MIB : 5 * MIB + 100]
        # Data that could not be written does not remain in the page cache as if it had been.
        assert _eventually(lambda: os.pread(reader, 100, 0) == data[:100])
        os.close(reader)
        assert (top / "d/big").read_bytes() == data
        assert (top / "d/big").stat().st_size == len(data)
        files = [path for path in (small / "upper").rglob("*") if not path.is_dir()]
        assert files == [small / "upper/own"]
        assert os.listdir(small / "work/work") == []
        assert sorted(os.listdir(top)) == ["d", "own"]
        # smaller copies still work, and their space is available again
        (top / "d/little").write_bytes(b"bigger than before")
        os.truncate(top / "d/big", MIB)
        assert (top / "d/big").read_bytes() == data[:MIB]
    assert (small / "upper/d/little").read_bytes() == b"bigger than before"


def _write_and_sync(path: Path, *, later: bool, how: str) -> None:
    """Open, write and sync; ``later``: only the sync may fail, else only the open."""
    fd = os.open(path, os.O_RDWR)
    assert later, "the open had to fail"
    try:
        if how == "msync":
            with mmap.mmap(fd, 4096) as mapping:
                mapping[:4] = b"lost"
                mapping.flush()
        else:
            assert os.pwrite(fd, b"lost", 0) == 4
            if how == "fsync":
                os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)


def test_writes_beyond_the_space(
    root: None, area: Path, session: str, filesystem: Callable[..., Path]
) -> None:
    """A full upper reports ENOSPC for writes, keeps earlier data, and has space after a removal."""
    small = filesystem("tmpfs", 4 * MIB)
    (area / "lower").mkdir()
    for name in ("upper", "work"):
        (small / name).mkdir()
    with mounted(
        area, lowers=[area / "lower"], upper=small / "upper", work=small / "work", session=session
    ) as mount:
        top = mount.mountpoint
        _write_synced(top / "kept", b"k" * 1000)

        def fill(at: Callable[[int], None]) -> None:
            fd = os.open(top / "f", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                for _ in range(16):
                    view = memoryview(b"x" * MIB)
                    while view:
                        view = view[os.write(fd, view) :]
            except OSError:
                assert not _writes_later(session), "write(2) asks nobody"
                os.close(fd)
                raise
            at(fd)

        def syncing(fd: int) -> None:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        for at in (syncing, os.close):
            assert errno_of(fill, at) == errno.ENOSPC
            assert (top / "kept").read_bytes() == b"k" * 1000
            stored = (small / "upper/f").read_bytes()
            assert stored == b"x" * len(stored)
            assert len(stored) < 4 * MIB
            (top / "f").unlink()
            # The kernel reports the end of the last use some milliseconds later.
            assert _eventually(lambda: os.statvfs(top).f_bavail * os.statvfs(top).f_frsize >= 3 * MIB)
        (top / "g").write_bytes(b"x" * MIB)
        assert (top / "g").stat().st_size == MIB
    assert (small / "upper/g").read_bytes() == b"x" * MIB


def test_sparse_holes_are_kept(world: MakeWorld, session: str) -> None:
    """Copy-up of a file with holes takes no more blocks than the original, and the same content."""

    def build(root: Path) -> None:
        with (root / "sparse").open("wb") as file:
            file.write(b"head" * 1024)
            file.seek(100 * MIB)
            file.write(b"middle" * 1000)
            file.truncate(200 * MIB)
        with (root / "hole").open("wb") as file:
            file.truncate(50 * MIB)

    made = world(build)

    def calls(root: Path) -> list[object]:
        for name in ("sparse", "hole"):
            fd = os.open(root / name, os.O_RDWR)
            if _writes_later(session):
                if root == made.union:
                    assert not (made.upper / name).exists()  # nothing has changed yet
                os.pwrite(fd, b"head" if name == "sparse" else b"\0", 0)
                os.fsync(fd)
            os.close(fd)
        return [(root / name).stat().st_size for name in ("sparse", "hole")]

    made.as_native(calls)
    for name in ("sparse", "hole"):
        assert (made.upper / name).stat().st_blocks <= (made.lower / name).stat().st_blocks + 16
    tree, lower = (snapshot.take(path, xattrs=False) for path in (made.upper, made.lower))
    assert all(tree[name].content == lower[name].content for name in (b"sparse", b"hole"))


def test_copy_up_keeps_everything(world: MakeWorld) -> None:
    """A copy has the owner, mode, times, xattrs and ACL of the original, and the parent keeps its mtime."""

    def build(root: Path) -> None:
        (root / "p/q").mkdir(parents=True)
        for name in ("f", "fifo", "link"):
            path = root / "p/q" / name
            if name == "fifo":
                os.mkfifo(path)
            elif name == "link":
                path.symlink_to("f")
            else:
                path.write_bytes(b"data")
                os.chmod(path, 0o6754)
                os.setxattr(path, "user.x", b"1")
                os.setxattr(path, "trusted.y", b"2")
                os.setxattr(path, "security.z", b"3")
            os.chown(path, 1234, 4321, follow_symlinks=False)
            if name == "f":
                os.chmod(path, 0o6754)
                os.setxattr(path, "security.capability", struct.pack("<5I", 0x02000001, 1024, 0, 0, 0))
            os.utime(path, ns=(10**18 + 1, 10**18 + 123456789), follow_symlinks=False)
        os.setxattr(root / "p", "user.dir", b"d")
        os.chmod(root / "p/q", 0o3771)
        os.chown(root / "p", 5, 6)
        for path in (root / "p/q", root / "p", root):
            os.utime(path, ns=(10**18 + 1, 10**18 + 987654321))

    made = world(build)

    def calls(root: Path) -> list[object]:
        os.link(root / "p/q/f", root / "l1")
        os.unlink(root / "l1")
        for name in ("fifo", "link"):
            os.link(root / "p/q" / name, root / "l2", follow_symlinks=False)
            os.unlink(root / "l2")
        return [_describe(root / name) for name in ("p", "p/q", "p/q/f", "p/q/fifo", "p/q/link")]

    made.as_kernel(calls)
    for name in ("p/q/f", "p/q/fifo", "p/q/link", "p/q"):
        assert _describe(made.upper / name)[:6] == _describe(made.lower / name)[:6]


def _describe(path: Path) -> list[Any]:
    info = path.lstat()
    xattrs = {
        name: value
        for name, value in snapshot.read_xattrs(str(path)).items()
        if not name.startswith("trusted.overlay.")
    }
    return [
        oct(info.st_mode), info.st_uid, info.st_gid, info.st_size if not stat.S_ISDIR(info.st_mode) else 0,
        info.st_mtime_ns, xattrs,
    ]  # fmt: skip


@pytest.mark.parametrize("has", ["nothing", "an owner", "xattrs", "an ACL"])
def test_the_first_change_is_of_the_mode(world: MakeWorld, has: str) -> None:
    """A file copied up for a mode change has the new mode, and the other attributes of the original."""
    modes = [0, 0o400, 0o640, 0o777, 0o4755, 0o2755, 0o1777, 0o6711]
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in [(1, 6, 2**32 - 1), (2, 7, 7), (4, 4, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)]
    )

    def build(root: Path) -> None:
        for before in modes:
            for after in modes:
                path = root / f"{before:o}-{after:o}"
                path.write_bytes(b"data")
                if has == "an owner":
                    os.chown(path, 1234, 4321)
                elif has == "xattrs":
                    os.setxattr(path, "user.x", b"1")
                    os.setxattr(path, "security.z", b"3")
                elif has == "an ACL":
                    os.setxattr(path, "system.posix_acl_access", acl)
                path.chmod(before)
                os.utime(path, ns=(10**18 + 1, 10**18 + 123456789))

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for before in modes:
            for after in modes:
                path = root / f"{before:o}-{after:o}"
                path.chmod(after)
                found.append((path.name, *_describe(path), path.read_bytes()))
        return found

    made.as_native(calls)
    made.as_kernel(calls)
    assert os.listdir(made.upper.parent / "work/work") == []


def test_ctime_of_a_file_that_an_open_copied_up(world: MakeWorld, session: str) -> None:
    """The kernel's cached attributes of the lower's file expire: the copy's ctime is shown."""
    if _writes_later(session):
        pytest.skip("an open copies nothing up there")

    def build(root: Path) -> None:
        (root / "f").write_bytes(b"data")
        os.utime(root / "f", ns=(10**18, 10**18))

    def calls(root: Path) -> list[object]:
        before = (root / "f").stat()
        with (root / "f").open("rb+"):
            after = (root / "f").stat()
        return [after.st_ctime_ns > before.st_ctime_ns, after.st_mtime_ns]

    made = world(build)
    made.as_kernel(calls)
    assert (made.union / "f").stat().st_ctime_ns == (made.upper / "f").stat().st_ctime_ns


def test_the_upper_is_whole_when_the_call_returns(world: MakeWorld) -> None:
    """Including the directory's time, for readers of the upper now, and after a crash now."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        for number in range(200):
            (root / f"d/{number}").write_bytes(b"data")
        os.utime(root / "d", ns=(10**18, 10**18 + 5))

    made = world(build)

    def calls(root: Path) -> list[object]:
        above = made.upper / "d" if root == made.union else root / "d"
        found: list[object] = []
        for number in range(200):
            os.chmod(root / f"d/{number}", 0o640)
            mode = stat.S_IMODE(os.stat(above / f"{number}").st_mode)
            found.append((os.stat(above).st_mtime_ns, mode))
        return found

    made.as_native(calls)


def test_copy_up_leaves_the_directory_as_it_was(world: MakeWorld) -> None:
    """A copy-up within a directory changes none of its times; a creation or change in it does."""

    def build(root: Path) -> None:
        (root / "d/sub").mkdir(parents=True)
        for name in ("a", "b", "sub/c"):
            (root / "d" / name).write_bytes(b"data")
        os.symlink("a", root / "d/link")

    made = world(build)

    def times(path: Path) -> tuple[int, int]:
        info = path.stat()
        return info.st_mtime_ns, info.st_ctime_ns

    def calls(root: Path) -> list[object]:
        first = times(root / "d")
        steps: list[Callable[[], object]] = [
            lambda: (root / "d/a").chmod(0o600),
            lambda: (root / "d/b").open("r+b").close(),
            lambda: os.chown(root / "d/link", 1, 1, follow_symlinks=False),
            lambda: (root / "d/sub/c").chmod(0o600),
            lambda: (root / "d/new").touch(),
            lambda: (root / "d").chmod(0o700),
            lambda: os.setxattr(root / "d", "user.x", b"1"),
            lambda: (root / "d/a").unlink(),
        ]
        found: list[object] = []
        for step in steps:
            time.sleep(0.02)  # a file's times advance by up to 10 ms
            step()
            now = times(root / "d")
            found.append((now[0] == first[0], now[1] == first[1]))
            first = now
        return found

    with snapshot.held(made.union):  # after the kernel has forgotten it, a directory shows its real ctime
        made.as_native(calls)


@pytest.mark.parametrize("kind", ["tmpfs", "btrfs"])
def test_the_size_of_a_directory(
    kernel_overlay: None, area: Path, session: str, filesystem: Callable[..., Path], kind: str
) -> None:
    """Each copy-up enlarges the upper's directory on filesystems with such sizes, and stat shows it soon."""
    for number in range(6):
        (area / f"lower/d/f{number}").parent.mkdir(parents=True, exist_ok=True)
        (area / f"lower/d/f{number}").write_text("f")
    place = filesystem(kind)

    def seen(root: Path) -> list[int]:
        (root / "d/new").touch()
        sizes = [(root / "d").stat().st_size]
        for number in range(6):
            (root / f"d/f{number}").chmod(0o600)
            _eventually(lambda: (root / "d").stat().st_size != sizes[-1])
            sizes.append((root / "d").stat().st_size)
        return sizes

    found = []
    for name, mounting in (("union", mounted), ("kernel", kernel_mounted)):
        for layer in ("upper", "work"):
            (place / name / layer).mkdir(parents=True)
        extra = {"session": session} if name == "union" else {}
        upper, work = place / name / "upper", place / name / "work"
        with mounting(area / name, lowers=[area / "lower"], upper=upper, work=work, **extra) as mount:
            found.append(seen(mount.mountpoint))
    assert found[0] == found[1]
    assert len(set(found[0])) == 7
