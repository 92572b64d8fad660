"""Layers on NFS: what the client cannot do (exchange names, leave a whiteout, O_TMPFILE) is done in steps."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount import direct_calls as dc
from tests.support import snapshot, syscalls
from tests.support.mounting import Mount, MountFailed, kernel_mounted, mounted
from tests.support.world import errno_of
from tests.vm.nfs import Export
from unionfs.sys import calls

DATA = bytes(range(256)) * 2000


def build(lower: Path) -> None:
    """What the tests begin with; names say what happens to it."""
    for name in ("d", "emptied", "emptied-upper", "hidden", "replaced", "gone", "moves", "later", "x"):
        (lower / name).mkdir(parents=True)
        (lower / name / "below").write_text(name)
    for name in (
        "read", "written", "appended", "mapped", "truncated", "removed", "again", "directory-again", "linked",
        "renamed", "over", "target", "to-link", "open", "owned", "d/one", "d/two", "d/three",
    ):  # fmt: skip
        (lower / name).write_bytes(name.encode() + DATA)
    os.chmod(lower / "written", 0o4751)
    os.chown(lower / "owned", 1000, 1001)
    os.symlink("read", lower / "symlink")
    os.symlink("nowhere", lower / "symlink-gone")
    os.mkfifo(lower / "fifo")
    with (lower / "sparse").open("wb") as file:
        file.truncate(5 << 20)
        file.seek(1 << 20)
        file.write(b"middle")


def _files(top: Path) -> None:
    """Create, write, copy up."""
    assert (top / "read").read_bytes() == b"read" + DATA
    with dc.opened(top / "written", os.O_RDWR) as fd, dc.opened(top / "written") as reader:
        os.pwrite(fd, b"WRITTEN", 1000)
        os.fsync(fd)
        assert os.pread(reader, 7, 1000) == b"WRITTEN"
    with (top / "appended").open("ab") as file:
        file.write(b"at the end")
    with dc.opened(top / "mapped", os.O_RDWR) as fd, mmap.mmap(fd, len(DATA)) as mapped:
        mapped[5000:5006] = b"MAPPED"
        mapped.flush()
    os.truncate(top / "truncated", 77)
    with (top / "sparse").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"more")
    os.chown(top / "owned", 1001, 1000)
    os.chmod(top / "owned", 0o640)
    os.chmod(top / "d/one", 0o600)
    os.utime(top / "symlink", ns=(5, 5), follow_symlinks=False)
    os.chmod(top / "fifo", 0o604)
    (top / "new").write_bytes(DATA)
    (top / "new").chmod(0o444)
    os.mknod(top / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with dc.opened(top / "open") as held:
        os.unlink(top / "open")
        assert os.pread(held, 4, 0) == b"open"
    for name in ("removed-open", "replaced-open"):
        (top / name).write_bytes(DATA)
        with dc.opened(top / name, os.O_RDWR) as held:
            if name == "removed-open":
                os.unlink(top / name)
            else:
                (top / "other").write_bytes(b"other")
                os.rename(top / "other", top / name)
            os.pwrite(held, b"NEW", 100)
            os.fsync(held)
            assert os.pread(held, 7, 98) == DATA[98:100] + b"NEW" + DATA[103:105]
            assert os.fstat(held).st_size == len(DATA)


def _names(top: Path) -> None:
    """Unlink, whiteouts, what comes over them, opaque directories, links."""
    for name in ("removed", "again", "directory-again", "symlink-gone", "to-link"):
        os.unlink(top / name)
        assert errno_of(os.stat, top / name) == errno.ENOENT
    (top / "again").write_text("again")
    (top / "directory-again").mkdir()
    (top / "directory-again/in").write_text("in")
    for name in ("emptied", "emptied-upper", "hidden", "replaced", "gone", "later"):
        os.unlink(top / name / "below")
    os.mkdir(top / "emptied-upper/in")
    os.rmdir(top / "emptied-upper/in")
    os.rmdir(top / "emptied-upper")  # it is in the upper, holds a whiteout, and hides one of the lower
    for name in ("hidden", "replaced", "gone"):
        os.rmdir(top / name)
    os.mkdir(top / "hidden", 0o2750)  # opaque
    (top / "hidden/mine").write_text("mine")
    assert os.listdir(top / "hidden") == ["mine"]
    os.link(top / "linked", top / "link-1")
    os.link(top / "link-1", top / "d/link-2")
    os.link(top / "link-1", top / "to-link")  # over a whiteout
    with (top / "d/link-2").open("r+b") as file:
        file.write(b"BY A LINK")
    assert (top / "linked").read_bytes()[:9] == b"BY A LINK"
    os.link(top / "symlink", top / "d/linked-symlink", follow_symlinks=False)
    os.unlink(top / "link-1")


def _renames(top: Path) -> None:
    """Each leaves a whiteout or does not, and comes over nothing, a whiteout, a file, or a directory."""
    os.rename(top / "renamed", top / "renamed-to")
    assert errno_of(os.stat, top / "renamed") == errno.ENOENT
    os.rename(top / "over", top / "target")
    assert (top / "target").read_bytes() == b"over" + DATA
    os.rename(top / "d/two", top / "removed")  # a whiteout was there
    os.rename(top / "symlink", top / "d/symlink")
    os.rename(top / "fifo", top / "symlink-gone")
    (top / "mine/deep").mkdir(parents=True)
    (top / "mine/deep/file").write_text("deep")
    os.rename(top / "mine", top / "replaced")  # of a directory of the lower is a whiteout there
    assert os.listdir(top / "replaced") == ["deep"]
    os.rename(top / "replaced", top / "replaced-again")  # leaves a whiteout
    assert errno_of(os.stat, top / "replaced") == errno.ENOENT
    os.rename(top / "replaced-again", top / "later")  # over a directory that holds only a whiteout
    assert sorted(os.listdir(top / "later")) == ["deep"]
    os.rename(top / "hidden", top / "gone")  # from one of the lower's names to another
    assert os.listdir(top / "gone") == ["mine"]
    os.rename(top / "target", top / "d/target")
    os.rename(top / "d/target", top / "d/three")
    os.rename(top / "again", top / "x/again")
    os.unlink(top / "x/below")
    os.unlink(top / "x/again")
    os.rmdir(top / "x")


STEPS: list[Callable[[Path], None]] = [_files, _names, _renames]


def value(top: Path) -> dict[bytes, tuple[object, ...]]:
    """A tree, but for times, numbers, and how a filesystem counts a directory's size and links."""
    return {
        path: (
            oct(e.mode), e.uid, e.gid, e.rdev, e.content, e.names,
            None if stat.S_ISDIR(e.mode) else (e.size, e.nlink),
        )
        for path, e in snapshot.take(top, xattrs=False).items()
    }  # fmt: skip


@contextlib.contextmanager
def _bound(source: Path, where: Path) -> Iterator[None]:
    where.mkdir()
    syscalls.mount(str(source), where, "none", syscalls.MS_BIND)
    try:
        yield
    finally:
        syscalls.umount(where)


@contextlib.contextmanager
def _union(area: Path, session: str, lowers: list[Path], writable: Path) -> Iterator[Mount]:
    for name in ("upper", "work"):
        (writable / name).mkdir(exist_ok=True)
    with mounted(
        area, lowers=lowers, upper=writable / "upper", work=writable / "work", session=session,
        options=["userxattr"],
    ) as mount:  # fmt: skip
        yield mount


def _check(area: Path, session: str, lower: Path, writable: Path, there: Path) -> dict[bytes, Any]:
    """Every step, on a union and on a plain directory; gives what there is at the end."""
    build(area / "plain")
    before = snapshot.manifest(there)
    with _union(area, session, [lower], writable) as mount:
        assert value(mount.mountpoint) == value(area / "plain")
        for step in STEPS:
            step(area / "plain")
            step(mount.mountpoint)
            # what was removed while open has a name on NFS until it is closed, and that is told later
            assert dc.wait_for(lambda: not list((writable / "upper").rglob(".nfs*")))
            assert value(mount.mountpoint) == value(area / "plain")
    assert snapshot.manifest(there) == before
    after = value(area / "plain")
    with _union(area, session, [lower], writable) as mount:
        assert value(mount.mountpoint) == after
        assert os.listdir(writable / "work/work") == []
    return after


def test_lower_on_nfs(root: None, area: Path, session: str, export: Export) -> None:
    """The upper is on a disk; the server's directory stays as it is."""
    build(export.there / "lower")
    _check(area, session, export.here / "lower", area, export.there / "lower")


def test_all_layers_on_nfs(
    root: None, area: Path, session: str, server: Any, export: Export
) -> None:
    """The upper too, with user.* xattrs; and the kernel reads on the server what was written there."""
    build(export.there / "lower")
    with server.export() as writable:
        after = _check(area, session, export.here / "lower", writable.here, export.there / "lower")
        os.sync()
        with kernel_mounted(
            area, lowers=[export.there / "lower"], upper=writable.there / "upper",
            work=writable.there / "work", options=["userxattr"],
        ) as kernel:  # fmt: skip
            assert value(kernel.mountpoint) == after


def test_exchange_and_tmpfile_are_as_on_nfs(root: None, area: Path, session: str, export: Export) -> None:
    """What NFS itself refuses is refused."""
    for name in ("lower", "plain"):
        (export.here / name).mkdir()
    with _union(area, session, [export.here / "lower"], export.here) as mount:
        for top in (export.here / "plain", mount.mountpoint):
            for name in ("one", "other"):
                (top / name).write_text(name)

        def exchanged(top: Path) -> int:
            with dc.opened(top) as fd:
                return errno_of(calls.renameat2, fd, b"one", fd, b"other", calls.RENAME_EXCHANGE)

        assert exchanged(mount.mountpoint) == exchanged(export.here / "plain") == errno.EINVAL
        assert (mount.mountpoint / "one").read_text() == "one"

        def unnamed(top: Path) -> int:
            return errno_of(lambda: os.close(os.open(top, os.O_TMPFILE | os.O_RDWR)))

        assert unnamed(mount.mountpoint) == unnamed(export.here / "plain") == errno.EOPNOTSUPP


def test_an_upper_that_cannot_be(root: None, area: Path, session: str, server: Any) -> None:
    """Without userxattr, and where the version of NFS has no xattrs: one sentence, nothing made."""
    (area / "lower").mkdir()
    for options, chosen, part in (
        ("vers=4.2", [], "userxattr may work there"),
        ("vers=4.1", ["userxattr"], "without user.* xattrs"),
    ):
        with server.export(options) as export:
            for name in ("upper", "work"):
                (export.here / name).mkdir()
            with (
                pytest.raises(MountFailed) as failure,
                mounted(
                    area, lowers=[area / "lower"], upper=export.here / "upper", work=export.here / "work",
                    session=session, options=chosen,
                ),
            ):  # fmt: skip
                pass
            assert part in str(failure.value)
            assert "Traceback" not in str(failure.value)
            assert os.listdir(export.there / "work") == []


def test_a_directory_of_an_open_file_that_was_removed(
    root: None, area: Path, session: str, export: Export
) -> None:
    """On NFS it could not be removed, as the file has another name there; here it goes, the file stays."""
    (export.here / "lower").mkdir()
    with _union(area, session, [export.here / "lower"], export.here) as mount:
        top = mount.mountpoint
        for number in range(3):
            (top / "dir").mkdir()
            (top / "dir/file").write_bytes(DATA)
            with dc.opened(top / "dir/file", os.O_RDWR) as held:
                os.unlink(top / "dir/file")
                assert os.listdir(top / "dir") == []
                os.rmdir(top / "dir")
                os.pwrite(held, b"%03d" % number, 100)
                os.fsync(held)
                assert os.pread(held, 5, 99) == DATA[99:100] + b"%03d" % number + DATA[103:104]
        assert os.listdir(top) == []
    with _union(area, session, [export.here / "lower"], export.here) as mount:
        assert os.listdir(mount.mountpoint) == os.listdir(export.there / "work/work") == []


def test_what_a_lost_client_left_in_work(root: None, area: Path, session: str, export: Export) -> None:
    """A file that was removed while open has a name until it is closed: no hindrance to the next mount."""
    for name in ("lower", "upper", "work/work"):
        (export.there / name).mkdir(parents=True)
    (export.there / "work/work/.nfs000000000000abcd00000001").write_text("left")
    with _union(area, session, [export.here / "lower"], export.here) as mount:
        (mount.mountpoint / "f").write_text("x")
        assert os.listdir(export.here / "work/work") == []


def test_two_mounts_of_one_directory(root: None, area: Path, session: str, export: Export) -> None:
    """Upper and work through two mounts are refused: a rename from one to the other is EXDEV."""
    for name in ("lower", "upper", "work"):
        (export.here / name).mkdir()
    with (
        _bound(export.here, area / "second"),
        pytest.raises(MountFailed, match="two mounts of one filesystem"),
        mounted(
            area, lowers=[export.here / "lower"], upper=export.here / "upper", work=area / "second/work",
            session=session, options=["userxattr"],
        ),
    ):  # fmt: skip
        pass
