"""Features of the direct session only: O_TMPFILE, birth times, file flags, xattr flags, umask and ACLs."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount import direct_calls as dc
from tests.support import acl, actions, syscalls
from tests.support.mounting import Mount
from tests.support.worker import Worker
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]
RW_TMPFILE = os.O_RDWR | os.O_TMPFILE


# -- O_TMPFILE


def test_file_without_a_name(world: MakeWorld, session: str) -> None:
    """Written, read, truncated, mapped attributes, opened again, given a name, or closed and gone."""
    dc.need_direct(session, "O_TMPFILE")
    made = world(lambda root: (root / "d").mkdir())

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        with dc.opened(root / "d", RW_TMPFILE, 0o640) as fd:
            found += [os.fstat(fd).st_nlink, oct(os.fstat(fd).st_mode), os.listdir(root / "d")]
            found += [os.pwrite(fd, b"0123456789", 5), os.fstat(fd).st_size, os.pread(fd, 100, 0)]
            os.ftruncate(fd, 8)
            os.fchmod(fd, 0o604)
            os.setxattr(fd, "user.t", b"v")
            os.fsync(fd)
            with dc.opened(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
                found += [os.pread(again, 100, 0), os.pwrite(again, b"AGAIN", 0), os.pread(fd, 100, 0)]
            inode = os.fstat(fd).st_ino
            dc.link_fd(fd, root / "d/name")
            found += [os.fstat(fd).st_nlink, (root / "d/name").read_bytes(), os.listdir(root / "d")]
            found += [os.stat(root / "d/name").st_ino == inode, os.getxattr(root / "d/name", "user.t")]
            found.append(errno_of(dc.link_fd, fd, root / "d/name"))
            dc.link_fd(fd, root / "other")
            found.append(os.fstat(fd).st_nlink)
            os.unlink(root / "d/name")
            os.unlink(root / "other")
            found += [os.fstat(fd).st_nlink, os.pread(fd, 100, 0)]
        with dc.opened(root, RW_TMPFILE | os.O_EXCL, 0o600) as fd:
            os.write(fd, b"never")
            found += [errno_of(dc.link_fd, fd, root / "never"), sorted(os.listdir(root))]
        with dc.opened(root, os.O_WRONLY | os.O_TMPFILE, 0o600) as fd:
            os.write(fd, b"written only")
            found += [errno_of(os.read, fd, 1), os.fstat(fd).st_size]
            dc.link_fd(fd, root / "only")
        found += [(root / "only").read_bytes(), dc.open_errno(root, os.O_RDONLY | os.O_TMPFILE)]
        found.append(dc.open_errno(root / "only", RW_TMPFILE))
        return found

    assert dc.natively(made, calls)[0] == 0
    assert sorted(path.name for path in made.upper.rglob("*")) == ["d", "only"]


def test_many_files_without_a_name_are_given_back(world: MakeWorld, session: str) -> None:
    """Each uses an fd of the daemon while it is open, and no longer."""
    dc.need_direct(session, "O_TMPFILE")
    made = world()
    if not made.mount.is_ours:
        pytest.skip("there is no daemon to look at")
    base = dc.descriptors(made.mount)
    fds = [os.open(made.union, RW_TMPFILE, 0o600) for _ in range(100)]
    for number, fd in enumerate(fds):
        os.write(fd, b"%d" % number)
    assert [os.pread(fd, 10, 0) for fd in fds] == [b"%d" % number for number in range(100)]
    assert len({os.fstat(fd).st_ino for fd in fds}) == 100
    for fd in fds:
        os.close(fd)
    assert dc.wait_for(lambda: dc.descriptors(made.mount) <= base + 2)
    assert dc.wait_for(lambda: made.mount.figure("open_files") == 0)
    assert list(made.upper.iterdir()) == []


def _tmpfile(root: str, mask: int, mode: int) -> tuple[Any, ...]:
    os.umask(mask)
    fd = os.open(root, RW_TMPFILE, mode)
    try:
        found = os.fstat(fd)
        names = sorted(os.listxattr(fd))
        return oct(found.st_mode), found.st_uid, found.st_gid, names, os.getxattr(fd, acl.ACCESS)
    except OSError as error:
        return oct(found.st_mode), found.st_uid, found.st_gid, names, error.errno
    finally:
        os.close(fd)


def test_owner_mode_and_acl_of_a_file_without_a_name(world: MakeWorld, session: str) -> None:
    """The umask, the default ACL and the setgid bit of the directory apply, as for a file with a name."""
    dc.need_direct(session, "O_TMPFILE")

    def build(root: Path) -> None:
        for name in ("plain", "acl", "group"):
            (root / name).mkdir()
            os.chmod(root / name, 0o777)
        os.setxattr(root / "acl", acl.DEFAULT, acl.simple(7, 5, 1, users={1234: 6}))
        os.chown(root / "group", 0, 4321)
        os.chmod(root / "group", 0o2777)

    made = world(build)

    def calls(root: Path) -> list[object]:
        with Worker(1000, 1000, [1001], modules=[__name__]) as user:
            return [
                user.call(_tmpfile, str(root / name), mask, mode)
                for name in ("plain", "acl", "group")
                for mask in (0o022, 0o077)
                for mode in (0o666, 0o600, 0o2775)
            ]

    dc.natively(made, calls)


def test_umask_while_a_default_acl_comes_and_goes(world: MakeWorld, session: str) -> None:
    """Each file gets the rules at its creation: in a new directory, one of the lower, and over whiteouts."""
    dc.need_direct(session, "umask apart from the mode")

    def build(root: Path) -> None:
        (root / "old").mkdir()
        for number in range(4):
            (root / "old" / f"gone{number}").write_bytes(b"")

    made = world(build)

    def calls(root: Path) -> list[object]:
        (root / "new").mkdir()
        found: list[object] = []
        for base in (root / "old", root / "new"):
            steps = (
                lambda path: None,
                lambda path: os.setxattr(path, acl.DEFAULT, acl.simple(7, 7, 5, users={1234: 7})),
                lambda path: os.setxattr(path, acl.DEFAULT, acl.simple(6, 5, 0)),
                lambda path: os.removexattr(path, acl.DEFAULT),
            )
            for number, step in enumerate(steps):
                step(base)
                (base / f"gone{number}").unlink(missing_ok=True)
                for name in (f"gone{number}", f"never{number}"):
                    actions.make_file(str(base / name), 0o666, 0o027)
                    path = base / name
                    values = {key: os.getxattr(path, key) for key in os.listxattr(path)}
                    found.append((name, oct(path.stat().st_mode), values))
        os.umask(0o022)
        return found

    dc.natively(made, calls)


def test_umask_is_nothing_under_a_default_acl(world: MakeWorld, session: str) -> None:
    """A default ACL replaces the umask (acl(5)): files, directories, fifos."""
    dc.need_direct(session, "umask apart from the mode")

    def build(root: Path) -> None:
        os.chmod(root, 0o777)
        for name in ("acl", "plain"):
            (root / name).mkdir()
            os.chmod(root / name, 0o777)
        os.setxattr(root / "acl", acl.DEFAULT, acl.simple(7, 7, 5, users={1234: 7}))

    made = world(build)

    def calls(root: Path) -> list[object]:
        with Worker(1000, 1000) as user:
            for name in ("acl", "plain"):
                for mask in (0o027, 0o777, 0):
                    base = f"{root}/{name}/{mask:o}"
                    user.call(actions.make_file, base + "f", 0o666, mask)
                    user.call(actions.make_directory, base + "d", 0o777, mask)
                    user.call(actions.make_node, base + "p", stat.S_IFIFO | 0o666, mask)
        return [
            (
                path.name,
                oct(path.lstat().st_mode),
                {key: os.getxattr(path, key) for key in os.listxattr(path)},
            )
            for name in ("acl", "plain")
            for path in sorted((root / name).iterdir())
        ]

    dc.natively(made, calls)


# -- statx


def test_birth_time_and_agreement_of_stat_and_statx(world: MakeWorld, session: str) -> None:
    """statx returns the layer's birth time, and the same numbers as stat; links count in both."""
    dc.need_direct(session, "STATX")

    def build(root: Path) -> None:
        (root / "d").mkdir()
        (root / "f").write_bytes(b"x" * 1234)
        (root / "one").write_bytes(b"1")
        (root / "link").symlink_to("f")

    made = world(build)
    top = made.union
    assert dc.statx(top / "f").btime == dc.statx(made.lower / "f").btime
    (top / "new").write_bytes(b"new")
    os.link(top / "new", top / "newer")
    os.chmod(top / "one", 0o600)
    for name in ("", "d", "f", "one", "link", "new", "newer"):
        path = top / name
        seen = dc.statx(path, flags=syscalls.AT_SYMLINK_NOFOLLOW)
        plain = path.lstat()
        assert seen.mask & dc.STATX_BTIME, name
        assert seen.btime[0] > 0
        assert (seen.nlink, seen.ino, seen.mode, seen.size, seen.uid, seen.gid) == (
            plain.st_nlink, plain.st_ino, plain.st_mode, plain.st_size, plain.st_uid, plain.st_gid,
        ), name  # fmt: skip
        assert seen.mtime[0] * 10**9 + seen.mtime[1] == plain.st_mtime_ns
    assert dc.statx(top / "newer").nlink == 2
    with dc.opened(top / "new") as fd:
        os.unlink(top / "new")
        assert (dc.statx(fd=fd).nlink, os.fstat(fd).st_nlink) == (1, 1)
        os.unlink(top / "newer")
        assert (dc.statx(fd=fd).nlink, os.fstat(fd).st_nlink) == (0, 0)
    with dc.opened(top / "f") as fd:
        os.unlink(top / "f")
        assert (dc.statx(fd=fd).nlink, os.fstat(fd).st_nlink) == (0, 0)
    with dc.opened(top / "one", os.O_WRONLY) as fd:
        os.write(fd, b"longer")
        assert dc.statx(fd=fd).size == os.fstat(fd).st_size == 6
        os.ftruncate(fd, 3)
        assert dc.statx(top / "one").size == 3


# -- ioctl

GETFLAGS, SETFLAGS, FSGETXATTR, FSSETXATTR = 0x80086601, 0x40086602, 0x801C581F, 0x401C5820
SYNC, APPEND, NODUMP, NOATIME, IMMUTABLE = 0x8, 0x20, 0x40, 0x80, 0x10  # FS_*_FL of linux/fs.h
KEPT = SYNC | APPEND | NODUMP | NOATIME | IMMUTABLE


def _flags(path: Path) -> int:
    with dc.opened(path) as fd:
        value = bytearray(8)
        fcntl.ioctl(fd, GETFLAGS, value)
        return int(struct.unpack("=i", value[:4])[0]) & KEPT


def _set_flags(path: Path, change: int) -> None:
    with dc.opened(path) as fd:
        value = bytearray(8)
        fcntl.ioctl(fd, GETFLAGS, value)
        fcntl.ioctl(fd, SETFLAGS, struct.pack("=i4x", struct.unpack("=i", value[:4])[0] | change))


def _xflags(path: Path) -> int:
    with dc.opened(path) as fd:
        value = bytearray(28)
        fcntl.ioctl(fd, FSGETXATTR, value)
        return int(struct.unpack_from("=I", value)[0]) & 0x68  # FS_XFLAG_NOATIME, NODUMP, SYNC


def test_file_flags(world: MakeWorld, session: str) -> None:
    """GETFLAGS, SETFLAGS and FSGETXATTR of lower files, which are copied up, of new ones, of directories."""
    dc.need_direct(session, "IOCTL")

    def build(root: Path) -> None:
        (root / "d").mkdir()
        for name in ("f", "chattr", "untouched"):
            (root / name).write_bytes(b"data")

    made = world(build)

    def calls(root: Path) -> list[object]:
        (root / "new").write_bytes(b"new")
        found: list[object] = [(_flags(root / name), _xflags(root / name)) for name in ("f", "d", "new")]
        for name in ("f", "new"):
            _set_flags(root / name, NODUMP | NOATIME)
            found += [_flags(root / name), _xflags(root / name), (root / name).read_bytes()]
        subprocess.run(["chattr", "+d", str(root / "chattr")], check=True)
        found.append(_flags(root / "chattr"))
        subprocess.run(["chattr", "-d", str(root / "chattr")], check=True)
        found.append(_flags(root / "chattr"))
        listed = subprocess.run(["lsattr", str(root / "f")], capture_output=True, text=True, check=True)
        found.append("d" in listed.stdout.split()[0])
        with dc.opened(root / "f") as fd:
            found.append(outcome(lambda _: fcntl.ioctl(fd, 0x5413, bytes(8)), root))  # TIOCGWINSZ
        (root / "f").write_bytes(b"written after")
        found.append(_flags(root / "f"))
        return found

    dc.natively(made, calls)
    assert (made.upper / "f").exists()
    assert not (made.upper / "untouched").exists()
    assert _flags(made.lower / "f") == 0


def _write_through(path: Path) -> None:
    with dc.opened(path, os.O_WRONLY) as fd:
        os.write(fd, b"lost")
        os.fsync(fd)


def test_append_only_and_immutable(world: MakeWorld, session: str) -> None:
    """The flags apply: writing, unlink and chmod are refused until the flag is cleared."""
    dc.need_direct(session, "IOCTL")
    made = world(lambda root: [(root / name).write_bytes(b"data") for name in ("i", "a")])

    def calls(root: Path) -> list[object]:
        try:
            _set_flags(root / "i", IMMUTABLE)
            _set_flags(root / "a", APPEND)
            return [
                _flags(root / "i"),
                _flags(root / "a"),
                # the daemon cannot refuse an open that is not reported to it: the write then fails
                errno_of(_write_through, root / "i"),
                errno_of(os.chmod, root / "i", 0o600),
                errno_of(os.unlink, root / "i"),
                errno_of(os.truncate, root / "a", 0),
                # lost pages leave the cache after the error was reported
                dc.wait_for(lambda: (root / "i").read_bytes() == b"data"),
            ]
        finally:
            for name in ("i", "a"):
                subprocess.run(["chattr", "-ia", str(root / name)], check=True)
                os.unlink(root / name)

    dc.natively(made, calls)
    assert os.listdir(made.union) == []


def test_flags_are_for_the_owner(world: MakeWorld, user: Worker, session: str) -> None:
    """Another user may not set them, an ordinary owner not the privileged ones."""
    dc.need_direct(session, "IOCTL")

    def build(root: Path) -> None:
        os.chmod(root, 0o777)
        for name, owner in (("mine", 1000), ("theirs", 0)):
            (root / name).write_bytes(b"data")
            os.chown(root / name, owner, owner)
            os.chmod(root / name, 0o666)

    made = world(build)

    def calls(root: Path) -> list[object]:
        with Worker(1000, 1000, modules=[__name__]) as user:
            return [
                user.errno(_set_flags, root / "mine", NODUMP),
                user.errno(_set_flags, root / "theirs", NODUMP),
                user.errno(_set_flags, root / "mine", IMMUTABLE),
                user.errno(_set_flags, root / "mine", APPEND),
                *(_flags(root / name) for name in ("mine", "theirs")),
            ]

    dc.natively(made, calls)
    assert not (made.upper / "theirs").exists()


# -- xattr flags, renames


def test_xattr_create_and_replace(world: MakeWorld, session: str) -> None:
    """XATTR_CREATE and XATTR_REPLACE on lower and upper objects; an error does not copy up."""
    made = world(_two_with_xattrs)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for path in (root / "a", root / "b", root / "new"):
            if path.name == "new":
                _with_xattr(path)
            found += [
                errno_of(os.setxattr, path, "user.x", b"2", os.XATTR_CREATE),
                errno_of(os.setxattr, path, "user.none", b"2", os.XATTR_REPLACE),
                os.getxattr(path, "user.x"),
                errno_of(os.setxattr, path, "user.x", b"3", os.XATTR_REPLACE),
                errno_of(os.setxattr, path, "user.new", b"4", os.XATTR_CREATE),
                errno_of(os.setxattr, path, "user.new", b"5", os.XATTR_CREATE | os.XATTR_REPLACE),
                sorted((key, os.getxattr(path, key)) for key in os.listxattr(path) if key.startswith("user")),
                errno_of(os.removexattr, path, "user.none"),
            ]
        return found

    assert dc.natively(made, calls)[0] == errno.EEXIST
    assert os.getxattr(made.lower / "a", "user.x") == b"1"


def _two_with_xattrs(root: Path) -> None:
    for name in ("a", "b"):
        _with_xattr(root / name)


def _with_xattr(path: Path) -> None:
    path.write_bytes(b"data")
    os.setxattr(path, "user.x", b"1")


def test_much_data_takes_few_requests(union: Mount, session: str) -> None:
    """Each has about 1 MiB, if no page cache is between. A file with a backing file needs none."""
    dc.need_direct(session, "its own size of requests")
    size = 8 << 20
    (union.lowers[0] / "large").write_bytes(os.urandom(size))

    def requests(kind: str) -> int:
        return int(union.inspect()["figures"]["requests"].get(kind, 0))

    with mmap.mmap(-1, size) as data:
        before = requests("read"), requests("write")
        with dc.opened(union.mountpoint / "large", os.O_RDONLY | os.O_DIRECT) as fd:
            assert os.preadv(fd, [data], 0) == size
        with dc.opened(union.mountpoint / "new", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600) as fd:
            assert os.pwritev(fd, [data], 0) == size
        reads, writes = requests("read") - before[0], requests("write") - before[1]
    assert reads == 0 if session == "direct-passthrough" else 8 <= reads <= 12
    assert 8 <= writes <= 12 if session == "direct-cached" else writes == 0
    assert (union.mountpoint / "new").read_bytes() == (union.lowers[0] / "large").read_bytes()


def test_renameat2_of_open_files(world: MakeWorld) -> None:
    """NOREPLACE and EXCHANGE with open files; WHITEOUT and invalid flags are EINVAL."""
    made = world(lambda root: [(root / name).write_bytes(name.encode()) for name in ("a", "b", "c")])

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        with dc.opened(root / "a", os.O_RDWR) as a, dc.opened(root / "b") as b:
            (root / "own").write_bytes(b"own")
            for old, new, flags in (
                ("a", "b", syscalls.RENAME_NOREPLACE),
                ("a", "b", syscalls.RENAME_EXCHANGE),
                ("own", "c", syscalls.RENAME_EXCHANGE),
                ("a", "none", syscalls.RENAME_EXCHANGE),
                ("c", "d", syscalls.RENAME_NOREPLACE),
                ("a", "b", syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE),
                ("a", "z", 0x80),
            ):
                found.append(errno_of(syscalls.renameat2, str(root / old), str(root / new), flags))
                found.append({path.name: path.read_bytes() for path in root.iterdir()})
                found += [os.pread(a, 10, 0), os.pread(b, 10, 0), os.fstat(a).st_nlink, os.fstat(b).st_nlink]
            os.pwrite(a, b"A", 0)
            found.append((root / "b").read_bytes())
            found.append([os.fstat(a).st_ino == (root / "b").stat().st_ino, os.fstat(b).st_size])
        return found

    dc.natively(made, calls)
    assert (made.lower / "a").read_bytes() == b"a"
