"""tar and rsync: they store and restore the same as on a native filesystem."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from tests.clients.support import run, union_over
from tests.support import snapshot

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20


def make_tree(root: Path) -> None:
    """Create every type of file with every type of attribute."""
    (root / "plain/sub").mkdir(parents=True)
    (root / "plain/file").write_bytes(os.urandom(100_000))
    (root / "plain/empty").touch()
    (root / "plain/sub/one").write_text("linked")
    os.link(root / "plain/sub/one", root / "plain/two")
    os.link(root / "plain/sub/one", root / "plain/three")
    (root / ("n" * 255)).write_text("a long name")
    (root / "plain/é\n\udcff").write_text("an odd name")
    (root / "relative").symlink_to("plain/file")
    (root / "dangling").symlink_to("/no/such/place/" + "x" * 2000)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "device", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    with (root / "sparse").open("wb") as file:
        file.seek(8 * MIB)
        file.write(b"middle")
        file.truncate(32 * MIB)
    owners = (("plain/file", 0o4755, 3, 4), ("plain/sub", 0o3775, 5, 6), ("fifo", 0o600, 7, 8))
    for name, mode, uid, gid in owners:
        os.chown(root / name, uid, gid)
        os.chmod(root / name, mode)
    os.lchown(root / "relative", 9, 10)
    os.setxattr(root / "plain/file", "user.text", b"value")
    os.setxattr(root / "plain/file", "user.binary", bytes(range(256)))
    os.setxattr(root / "plain/sub", "user.directory", b"")
    os.setxattr(root / "plain/file", "trusted.mine", b"root's")
    # cap_net_bind_service=ep, struct vfs_cap_data of include/uapi/linux/capability.h, revision 2
    capability = bytes.fromhex("01000002" "00040000" "00000000" "00000000" "00000000")
    os.setxattr(root / "plain/empty", "security.capability", capability)
    run("setfacl", "-m", "u:12:rwx,g:13:r,m::rx", root / "plain/file")
    run("setfacl", "-m", "u:12:rwx,d:u:14:rwx,d:g::r", root / "plain/sub")
    dated = ("plain/file", "plain/sub/one", "sparse", "fifo", "relative", "plain/sub", "plain", ".")
    for number, name in enumerate(dated):
        when = 1_000_000_000_123_456_789 + number * 1_000_000_007
        os.utime(root / name, ns=(when, when), follow_symlinks=False)


def contents(root: Path, *, special_times: bool = True) -> dict[bytes, object]:
    """The content that an archive must restore: no inode numbers, change times and sizes of directories.

    Without ``special_times`` the modification times of symlinks, fifos and devices are skipped.
    """
    found: dict[bytes, object] = {}
    groups: dict[tuple[int, int], set[bytes]] = {}
    tree = snapshot.take(root)
    for path, entry in tree.items():
        if not stat.S_ISDIR(entry.mode):
            groups.setdefault((entry.dev, entry.ino), set()).add(path)
    for path, entry in tree.items():
        is_directory = stat.S_ISDIR(entry.mode)
        dated = special_times or is_directory or stat.S_ISREG(entry.mode)
        found[path] = (
            oct(entry.mode), entry.uid, entry.gid, entry.rdev, entry.mtime if dated else None,
            entry.content, entry.xattrs,
            () if is_directory else (entry.size, sorted(groups[entry.dev, entry.ino])),
        )  # fmt: skip
    return found


def check_sparse(path: Path) -> None:
    assert path.stat().st_blocks * 512 <= 2 * MIB, "the holes are gone"


TAR = ("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--sparse",
       "--hole-detection=raw")  # fmt: skip


def test_tar_there_and_back(area: Path, session: str) -> None:
    source = area / "source"
    make_tree(source)
    expected = contents(source)
    (area / "lower").mkdir()
    (area / "back").mkdir()
    run(*TAR, "-cf", area / "in.tar", "-C", source, ".")
    with union_over(area / "lower", area, session) as merged:
        there = merged / "there"
        there.mkdir()
        run(*TAR, "-xpf", area / "in.tar", "-C", there)
        assert contents(there) == expected
        check_sparse(there / "sparse")
        run(*TAR, "--diff", "-f", area / "in.tar", "-C", there)
        run(*TAR, "-cf", merged / "out.tar", "-C", there, ".")
        run(*TAR, "-xpf", merged / "out.tar", "-C", area / "back")
    assert contents(area / "back") == expected
    check_sparse(area / "back/sparse")
    assert contents(area / "upper/there") == expected


def test_tar_of_a_lower(area: Path, session: str) -> None:
    """Read from the lower, and again after a copy-up of everything."""
    make_tree(area / "lower/tree")
    for name in ("plain/two", "plain/three"):
        (area / "lower/tree" / name).unlink()
    expected = contents(area / "lower/tree")
    with union_over(area / "lower", area, session) as merged:
        for name in ("first", "second"):
            (area / name).mkdir()
            run(*TAR, "-cf", area / f"{name}.tar", "-C", merged / "tree", ".")
            run(*TAR, "-xpf", area / f"{name}.tar", "-C", area / name)
            assert contents(area / name) == expected
            # the same times again: a copy-up that changes nothing
            for path in [merged / "tree", *(merged / "tree").rglob("*")]:
                old = path.lstat()
                os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns), follow_symlinks=False)
        check_sparse(merged / "tree/sparse")


def test_unpacking_over_a_lower(area: Path, session: str) -> None:
    """tar replaces existing entries: files, links, and a directory by a symlink."""
    make_tree(area / "source")
    expected = contents(area / "source")
    run(*TAR, "-cf", area / "in.tar", "-C", area / "source", ".")
    make_tree(area / "lower/tree")
    for name in ("plain/file", "sparse", "n" * 255):
        (area / "lower/tree" / name).write_text("another content")
    (area / "lower/tree/relative").unlink()
    (area / "lower/tree/relative/deep/er").mkdir(parents=True)
    with union_over(area / "lower", area, session) as merged:
        run(*TAR, "--recursive-unlink", "-xpf", area / "in.tar", "-C", merged / "tree")
        found = contents(merged / "tree")
    # tar does not set the time of an existing directory
    del found[b"."], expected[b"."]
    assert found == expected


def test_rsync_there_and_back(area: Path, session: str) -> None:
    rsync = ("rsync", "-aHAXS", "--numeric-ids", "--delete", "--devices", "--specials", "--itemize-changes")
    source = area / "source"
    make_tree(source)
    # rsync 3.2 does not set the times of new symlinks, fifos and devices, nor natively
    expected = contents(source, special_times=False)
    (area / "lower/there/plain").mkdir(parents=True)
    (area / "lower/there/plain/file").write_text("old")
    (area / "lower/there/gone/deep").mkdir(parents=True)
    (area / "back").mkdir()
    with union_over(area / "lower", area, session) as merged:
        run(*rsync, f"{source}/", f"{merged}/there/")
        assert contents(merged / "there", special_times=False) == expected
        assert run(*rsync, f"{source}/", f"{merged}/there/") == "", "the second run found differences"
        run(*rsync, f"{merged}/there/", f"{area}/back/")
        check_sparse(merged / "there/sparse")
    assert contents(area / "back", special_times=False) == expected


def test_a_socket_can_be_bound(area: Path, session: str) -> None:
    (area / "lower").mkdir()
    with union_over(area / "lower", area, session) as merged:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(str(merged / "s"))
            server.listen()
            client.connect(str(merged / "s"))
        assert stat.S_ISSOCK((merged / "s").lstat().st_mode)
        (merged / "s").unlink()
