"""Open files: without a name, across copy-up, truncating, mapped, locked."""

from __future__ import annotations

import errno
import fcntl
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

from tests.support import actions, snapshot
from tests.support.mounting import Mount, mounted
from tests.support.worker import Worker
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]
MIB = 1 << 20


def _files(root: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (root / name).write_bytes(b"lower " * 100)
        os.setxattr(root / name, "user.x", b"1")
        os.utime(root / name, ns=(10**18, 10**18 + 7))


def _own(root: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (root / name).write_bytes(b"lower " * 100)


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("how", ["unlink", "rename over"])
def test_open_file_without_a_name(world: MakeWorld, where: str, how: str) -> None:
    """An open file that lost its name goes on working, with st_nlink 0, and opens again through /proc."""
    made = world(_files if where == "lower" else lambda root: None)

    def calls(root: Path) -> list[object]:
        if where == "upper":
            _own(root)
        readonly = os.open(root / "a", os.O_RDONLY)
        both = os.open(root / "b", os.O_RDWR)
        found: list[object] = []
        try:
            for name in ("a", "b"):
                if how == "unlink":
                    os.unlink(root / name)
                else:
                    os.rename(root / ("c" if name == "a" else "d"), root / name)
            for fd in (readonly, both):
                found += [
                    os.fstat(fd).st_nlink,
                    os.fstat(fd).st_size,
                    os.pread(fd, 12, 6),
                    errno_of(os.fchmod, fd, 0o640),
                    errno_of(os.fchown, fd, 1000, 1000),
                    errno_of(os.utime, fd, ns=(1, 10**17)),
                    errno_of(os.setxattr, fd, "user.new", b"2"),
                    outcome(lambda _, fd=fd: os.getxattr(fd, "user.new"), root),  # type: ignore[misc]
                    oct(os.fstat(fd).st_mode),
                    os.fstat(fd).st_uid,
                    os.fstat(fd).st_mtime_ns,
                    errno_of(os.fsync, fd),
                ]
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                found += [os.pwrite(again, b"NEW", 0), os.pread(fd, 8, 0), os.fstat(fd).st_nlink]
                os.ftruncate(again, 4)
                found += [os.fstat(fd).st_size, os.pread(fd, 100, 0)]
                os.close(again)
                found.append(errno_of(os.close, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_TRUNC)))
                found.append(os.fstat(fd).st_size)
            found += [os.pwrite(both, b"x" * 10000, 5), os.fstat(both).st_size, sorted(os.listdir(root))]
            (root / "a").write_bytes(b"another")
            found += [os.fstat(readonly).st_size, (root / "a").read_bytes()]
        finally:
            os.close(readonly)
            os.close(both)
        return found

    found = made.as_native(calls)
    assert found[0] == 0


def test_many_opens_of_a_removed_lower_file_share_it(world: MakeWorld) -> None:
    """Several readers and a later writer of a removed lower file see one content."""
    made = world(_files)

    def calls(root: Path) -> list[object]:
        first, second = os.open(root / "a", os.O_RDONLY), os.open(root / "a", os.O_RDONLY)
        os.unlink(root / "a")
        writer = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
        os.pwrite(writer, b"written", 0)
        found: list[object] = [os.pread(fd, 7, 0) for fd in (first, second, writer)]
        found.append(len({os.fstat(fd).st_ino for fd in (first, second, writer)}))
        for fd in (first, second, writer):
            os.close(fd)
        return found

    made.as_native(calls)


def test_old_reader_sees_the_copy(world: MakeWorld) -> None:
    """A descriptor opened before copy-up reads what is written after it, and fstat says the new size."""
    made = world(_files)

    def calls(root: Path) -> list[object]:
        old = os.open(root / "a", os.O_RDONLY)
        before = os.pread(old, 5, 0)
        ino = os.fstat(old).st_ino
        with (root / "a").open("r+b") as file:
            file.write(b"NEW DATA")
            file.truncate(5000)
        found: list[object] = [
            before,
            os.pread(old, 8, 0),
            os.fstat(old).st_size,
            os.fstat(old).st_ino == ino,
        ]
        (root / "a").write_bytes(b"shorter")
        found += [os.pread(old, 100, 0), os.fstat(old).st_size]
        os.chmod(root / "a", 0o600)
        found.append(oct(os.fstat(old).st_mode))
        os.rename(root / "a", root / "z")
        found += [os.fstat(old).st_nlink, os.pread(old, 100, 0)]
        os.close(old)
        return found

    made.as_native(calls)


def test_locks_meet_across_copy_up(world: MakeWorld, user: Worker) -> None:
    """flock and POSIX locks taken through an old descriptor bind one opened after copy-up."""
    made = world(_files)

    def calls(root: Path) -> list[object]:
        os.chmod(root / "b", 0o666)
        found: list[object] = []
        old = os.open(root / "a", os.O_RDONLY)
        fcntl.flock(old, fcntl.LOCK_EX)
        new = os.open(root / "a", os.O_RDWR)
        found.append(errno_of(fcntl.flock, new, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.flock(old, fcntl.LOCK_UN)
        found.append(errno_of(fcntl.flock, new, fcntl.LOCK_EX | fcntl.LOCK_NB))
        os.close(old)
        os.close(new)
        old = os.open(root / "c", os.O_RDONLY)
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(old, fcntl.F_SETLK, lock)
        os.chmod(root / "c", 0o666)
        found.append(user.errno(actions.try_lock, str(root / "c")))
        os.close(old)
        found.append(user.errno(actions.try_lock, str(root / "c")))
        return found

    found = made.as_native(calls)
    assert found == [errno.EAGAIN, 0, errno.EAGAIN, 0]


def test_shared_mapping(world: MakeWorld) -> None:
    """Writes through a shared mapping reach the file, its readers and the upper."""
    made = world(lambda root: (root / "m").write_bytes(b"0123456789" * 1000))

    def calls(root: Path) -> list[object]:
        with (root / "m").open("r+b") as file:
            with mmap.mmap(file.fileno(), 0) as mapped:
                mapped[0:4] = b"MMAP"
                mapped[9000:9004] = b"TAIL"
                mapped.flush()
                first = (root / "m").read_bytes()
                mapped[1:2] = b"!"
            os.fsync(file.fileno())
        return [first[:10], first[9000:9004], (root / "m").read_bytes()[:4], (root / "m").stat().st_size]

    made.as_native(calls)
    assert (made.upper / "m").read_bytes() == (made.union / "m").read_bytes()
    assert (made.lower / "m").read_bytes()[:4] == b"0123"


def test_append_by_two_writers(union: Mount) -> None:
    """O_APPEND writes of several processes all arrive."""
    path = union.mountpoint / "log"
    path.touch()
    with Worker() as one, Worker() as two:
        for worker in (one, two):
            worker.start(actions.append_lines, str(path), worker.pid, 300)
        for worker in (one, two):
            worker.finish()
    lines = path.read_text().splitlines()
    assert len(lines) == 600
    assert {len(line) for line in lines} == {19}


# -- copy-up


def test_truncating_opens_copy_no_data(root: None, area: Path, session: str) -> None:
    """O_TRUNC, truncate(0) and truncate(n) of a lower file copy nothing, nothing, and n bytes."""
    _layers(area, lambda lower: [(lower / name).write_bytes(os.urandom(8 * MIB)) for name in "abc"])
    with _union(area, session) as mount:
        base = mount.figure("copied_bytes")
        (mount.mountpoint / "a").open("wb").close()
        os.truncate(mount.mountpoint / "b", 0)
        assert mount.figure("copied_bytes") == base
        os.truncate(mount.mountpoint / "c", 5000)
        assert mount.figure("copied_bytes") - base <= 8192
        assert mount.figure("copy_ups") == 3
        assert [(mount.mountpoint / name).stat().st_size for name in "abc"] == [0, 0, 5000]
        assert (mount.mountpoint / "c").read_bytes() == (area / "lower/c").read_bytes()[:5000]


def test_two_writers_cause_one_copy_up(root: None, area: Path, session: str) -> None:
    """Many opens for writing at the same time wait for one copy."""
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
    """While 300 MiB are copied up, other requests are answered and the parent can be listed and changed."""
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
    """ENOSPC during copy-up reaches the caller; upper and work are as before, and the file stays readable."""
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
        (top / "own").write_bytes(b"own")
        reader = os.open(top / "d/big", os.O_RDONLY)
        for call in (
            lambda: os.open(top / "d/big", os.O_RDWR),
            lambda: os.chmod(top / "d/big", 0o600),
            lambda: os.rename(top / "d/big", top / "moved"),
            lambda: os.link(top / "d/big", top / "linked"),
            lambda: os.setxattr(top / "d/big", "user.x", b"1"),
            lambda: os.truncate(top / "d/big", 12 * MIB),
        ):
            assert errno_of(call) == errno.ENOSPC
        assert os.pread(reader, 100, 5 * MIB) == data[5 * MIB : 5 * MIB + 100]
        os.close(reader)
        assert (top / "d/big").read_bytes() == data
        files = [path for path in (small / "upper").rglob("*") if not path.is_dir()]
        assert files == [small / "upper/own"]
        assert os.listdir(small / "work/work") == []
        assert sorted(os.listdir(top)) == ["d", "own"]
        # what fits still works, and there is space again for it
        (top / "d/little").write_bytes(b"bigger than before")
        os.truncate(top / "d/big", MIB)
        assert (top / "d/big").read_bytes() == data[:MIB]


def test_writes_beyond_the_space(
    root: None, area: Path, session: str, filesystem: Callable[..., Path]
) -> None:
    """A full upper answers ENOSPC to write, create and mkdir, and goes on after something was removed."""
    small = filesystem("tmpfs", 4 * MIB)
    (area / "lower").mkdir()
    for name in ("upper", "work"):
        (small / name).mkdir()
    with mounted(
        area, lowers=[area / "lower"], upper=small / "upper", work=small / "work", session=session
    ) as mount:

        def fill() -> None:
            with (mount.mountpoint / "f").open("wb", buffering=0) as file:
                for _ in range(64):
                    view = memoryview(b"x" * MIB)
                    while view:
                        view = view[file.write(view) :]

        assert errno_of(fill) == errno.ENOSPC
        (mount.mountpoint / "f").unlink()
        (mount.mountpoint / "g").write_bytes(b"x" * MIB)
        assert (mount.mountpoint / "g").stat().st_size == MIB


def test_sparse_holes_are_kept(world: MakeWorld) -> None:
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
            os.close(os.open(root / name, os.O_RDWR))
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


def test_fsync_everywhere(world: MakeWorld) -> None:
    """fsync and fdatasync of files and directories, of the lower and of the upper."""
    made = world(lambda root: ((root / "d").mkdir(), (root / "f").write_bytes(b"x")))

    def calls(root: Path) -> list[object]:
        (root / "own").mkdir()
        (root / "own/f").write_bytes(b"y")
        found: list[object] = []
        for name in (".", "d", "f", "own", "own/f"):
            fd = os.open(root / name, os.O_RDONLY)
            found += [errno_of(os.fsync, fd), errno_of(os.fdatasync, fd)]
            os.close(fd)
        os.sync()
        return found

    made.as_native(calls)


def _layers(area: Path, build: Callable[[Path], object]) -> None:
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    build(area / "lower")


def _union(area: Path, session: str) -> Any:
    return mounted(area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session)
