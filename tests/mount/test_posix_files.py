"""Open files: without a name, shared and locked across copy-up, mapped, appended to, synced."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import actions
from tests.support.mounting import Mount
from tests.support.worker import Worker
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]
LOWER_DATA = b"lower " * 100


def _keeps_old_readers(session: str) -> bool:
    """Whether an open lower file stays on the lower after its copy-up (docs/compliance.md)."""
    return session == "direct-passthrough"


def _files(root: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (root / name).write_bytes(LOWER_DATA)
        os.setxattr(root / name, "user.x", b"1")
        os.utime(root / name, ns=(10**18, 10**18 + 7))


def _own(root: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (root / name).write_bytes(LOWER_DATA)


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("how", ["unlink", "rename over"])
def test_open_file_without_a_name(world: MakeWorld, session: str, where: str, how: str) -> None:
    """An open file that lost its name still works, with st_nlink 0, and can be reopened through /proc.

    With passthrough a lower file open for reading cannot be reopened after its copy-up.
    """
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
                if fd == readonly and where == "lower" and _keeps_old_readers(session):
                    if root == made.union:
                        for flags in (os.O_RDWR, os.O_RDONLY, os.O_RDONLY | os.O_TRUNC):
                            assert errno_of(os.open, f"/proc/self/fd/{fd}", flags) == errno.ESTALE
                        assert os.pread(fd, 1000, 0) == LOWER_DATA
                        assert os.fstat(fd).st_size == len(LOWER_DATA)
                    continue
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                found += [os.pwrite(again, b"NEW", 0), os.pread(fd, 8, 0), os.fstat(fd).st_nlink]
                os.ftruncate(again, 4)
                found += [os.fstat(fd).st_size, os.pread(fd, 100, 0)]
                os.close(again)
                found.append(errno_of(os.close, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_TRUNC)))
                found.append(os.fstat(fd).st_size)
            found += [os.pwrite(both, b"x" * 10000, 5), os.fstat(both).st_size, sorted(os.listdir(root))]
            (root / "a").write_bytes(b"another")
            found += [os.fstat(readonly).st_nlink, (root / "a").read_bytes()]
        finally:
            os.close(readonly)
            os.close(both)
        return found

    found = made.as_native(calls)
    assert found[0] == 0


def test_many_opens_of_a_removed_lower_file_share_it(world: MakeWorld, session: str) -> None:
    """Several readers and a later writer of a removed lower file see one content.

    With passthrough a later writer is refused, and has no effect.
    """
    made = world(_files)

    def calls(root: Path) -> list[object]:
        first, second = os.open(root / "a", os.O_RDONLY), os.open(root / "a", os.O_RDONLY)
        os.unlink(root / "a")
        if _keeps_old_readers(session) and root == made.union:
            for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
                assert errno_of(os.open, f"/proc/self/fd/{first}", flags) == errno.ESTALE
            return _closed(
                [
                    [os.pread(fd, 1000, 0) for fd in (first, second)],
                    os.fstat(first).st_size,
                    len({os.fstat(fd).st_ino for fd in (first, second)}),
                ],
                first,
                second,
            )
        writer = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
        os.pwrite(writer, b"written", 0)
        found: list[object] = [os.pread(fd, 7, 0) for fd in (first, second, writer)]
        found.append(len({os.fstat(fd).st_ino for fd in (first, second, writer)}))
        return _closed(found, first, second, writer)

    if _keeps_old_readers(session):
        assert calls(made.union) == [[LOWER_DATA, LOWER_DATA], len(LOWER_DATA), 1]
    else:
        made.as_native(calls)


def _closed(found: list[object], *fds: int) -> list[object]:
    for fd in fds:
        os.close(fd)
    return found


def test_a_refused_open_changes_nothing(world: MakeWorld, session: str) -> None:
    """Truncating through a reader's descriptor empties the file, or fails and leaves it unchanged."""
    made = world(_files)

    def calls(root: Path) -> list[object]:
        reader = os.open(root / "a", os.O_RDONLY)
        code = errno_of(lambda: os.close(os.open(f"/proc/self/fd/{reader}", os.O_WRONLY | os.O_TRUNC)))
        found: list[object] = [code, (root / "a").read_bytes(), os.fstat(reader).st_size]
        return _closed(found, reader)

    if _keeps_old_readers(session):
        assert calls(made.union) == [errno.ESTALE, LOWER_DATA, len(LOWER_DATA)]
        assert (made.union / "a").read_bytes() == LOWER_DATA
        (made.union / "a").write_bytes(b"by its name")
        assert (made.upper / "a").read_bytes() == b"by its name"
    else:
        assert made.as_native(calls) == [0, b"", 0]


def test_old_reader_sees_the_copy(world: MakeWorld, session: str) -> None:
    """A descriptor opened before copy-up reads later writes, and fstat returns the new size.

    With passthrough it reads the old data; fstat returns new values there too.
    """
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

    if not _keeps_old_readers(session):
        made.as_native(calls)
        return
    expected = calls(made.native)
    expected[1], expected[4], expected[8] = LOWER_DATA[:8], LOWER_DATA[:100], LOWER_DATA[:100]
    assert calls(made.union) == expected
    assert (made.union / "z").read_bytes() == b"shorter"


def test_locks_meet_across_copy_up(world: MakeWorld, session: str, user: Worker) -> None:
    """flock and POSIX locks through an old descriptor conflict with one opened after copy-up.

    With passthrough they do not, as the kernel has two inodes for old and new; new ones conflict.
    """
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
        first, second = (os.open(root / "a", os.O_RDWR) for _ in range(2))
        fcntl.flock(first, fcntl.LOCK_EX)
        found.append(errno_of(fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.lockf(first, fcntl.LOCK_EX)
        os.chmod(root / "a", 0o666)
        found.append(user.errno(actions.try_lock, str(root / "a")))
        return _closed(found, first, second)

    if _keeps_old_readers(session):
        assert calls(made.union) == [0, 0, 0, 0, errno.EAGAIN, errno.EAGAIN]
    else:
        assert made.as_native(calls) == [errno.EAGAIN, 0, errno.EAGAIN, 0, errno.EAGAIN, errno.EAGAIN]


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
