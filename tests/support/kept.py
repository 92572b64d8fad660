"""A tree with real attributes, its form with attributes in xattrs, and changes of both by several users."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

from tests.support.actions import make_file, write_at
from tests.support.worker import Worker
from tests.support.world import errno_of

CONTAINERS = "user.containers.override_stat"
USER = "user.fuseoverlayfs.override_stat"
PRIVILEGED = "security.fuseoverlayfs.override_stat"
#: Name, type and mode, owner and group.
TREE = [
    ("", stat.S_IFDIR | 0o755, 0, 0),
    ("bin", stat.S_IFDIR | 0o755, 0, 0),
    ("bin/su", stat.S_IFREG | 0o4755, 0, 0),
    ("bin/wall", stat.S_IFREG | 0o2755, 0, 5),
    ("home", stat.S_IFDIR | 0o755, 0, 0),
    ("home/user", stat.S_IFDIR | 0o700, 1000, 1000),
    ("home/user/open", stat.S_IFREG | 0o666, 1000, 1000),
    ("home/user/mine", stat.S_IFREG | 0o600, 1000, 1000),
    ("home/user/suid", stat.S_IFREG | 0o6755, 1000, 1001),
    ("home/user/dir", stat.S_IFDIR | 0o750, 1000, 1000),
    ("home/user/dir/file", stat.S_IFREG | 0o640, 1000, 1000),
    ("secret", stat.S_IFREG | 0o000, 0, 0),
    ("shared", stat.S_IFDIR | 0o2777, 0, 1001),
    ("shared/suid", stat.S_IFREG | 0o4777, 0, 1001),
    ("shared/cap", stat.S_IFREG | 0o777, 0, 1001),
    ("tmp", stat.S_IFDIR | 0o1777, 0, 0),
    ("tmp/gone", stat.S_IFDIR | 0o777, 0, 0),
    ("tmp/gone/file", stat.S_IFREG | 0o644, 7, 8),
    ("tmp/old", stat.S_IFREG | 0o644, 1000, 1000),
]  # fmt: skip
CAPABILITY = "security.capability"
#: cap_net_raw=ep, struct vfs_cap_data of revision 2
CAPABILITIES = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"


def build(root: Path, xattr: str | None = None, *, mask: int = 0o700, owner: int = 0) -> Path:
    """The tree with real attributes, or as containers/storage unpacks it with a force mask: in ``xattr``."""
    for name, mode, uid, gid in TREE:
        path = root / name
        if stat.S_ISDIR(mode):
            path.mkdir(exist_ok=True, parents=True)
        else:
            path.write_text(name)
        if xattr is None:
            os.chown(path, uid, gid)
            path.chmod(stat.S_IMODE(mode))
        else:
            kind = "dir" if stat.S_ISDIR(mode) else "file"
            os.setxattr(path, xattr, f"{uid}:{gid}:0{stat.S_IMODE(mode):o}:{kind}".encode())
            path.chmod(mask)
            os.chown(path, owner, owner)
    return root


def seen(root: Path) -> dict[str, tuple[Any, ...]]:
    """Type, mode, owner, device number, content and capabilities of every name."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        st = path.lstat()
        data: Any = ""
        if stat.S_ISREG(st.st_mode):
            data = path.read_bytes()
        elif path.is_symlink():
            data = os.readlink(path)
        capability = None
        with contextlib.suppress(OSError):
            capability = os.getxattr(path, CAPABILITY, follow_symlinks=False)
        mode = stat.filemode(st.st_mode)
        found[str(path.relative_to(root))] = mode, st.st_uid, st.st_gid, st.st_rdev, data, capability
    return found


def rights(top: Path, user: Worker) -> list[int]:
    """What a user may read."""
    paths = [str(top / name) for name in ("secret", "home/user/mine", "bin/su", "home/user/dir/file")]
    results = [user.errno(os.getxattr, path, "user.none") for path in paths]
    results.append(user.errno(os.listdir, str(top / "home/user")))
    return [*results, user.errno(write_at, str(top / "bin/wall"), b"", 0)]


def change(top: Path, user: Worker, other: Worker) -> list[Any]:
    """Changes by root, uid 1000 (groups 1000, 1001) and uid 2000, and their errors."""
    home, shared, tmp = top / "home/user", top / "shared", top / "tmp"
    run, stranger = user.errno, other.errno
    results: list[Any] = [
        *rights(top, user), *rights(top, other),
        run(make_file, str(home / "new"), 0o640, 0), run(os.mkdir, str(home / "newdir"), 0o711),
        run(make_file, str(home / "newdir/inner"), 0o4755, 0o022),
        run(os.symlink, "mine", str(home / "link")),
        run(os.mkfifo, str(home / "fifo"), 0o622),
        stranger(make_file, str(home / "refused"), 0o600, 0o022),
        run(make_file, str(shared / "grouped"), 0o664, 0o022), run(os.mkdir, str(shared / "groupdir"), 0o755),
        stranger(make_file, str(shared / "strange"), 0o2775, 0o022),
        run(os.chmod, str(home / "mine"), 0o604), stranger(os.chmod, str(home / "mine"), 0o777),
        run(os.chown, str(home / "open"), -1, 1001), run(os.chown, str(home / "open"), 0, 0),
        run(os.chown, str(home / "suid"), 1000, 1000), run(os.chmod, str(home / "dir/file"), 0o4711),
        run(os.chmod, str(home / "dir"), 0o2755),
        stranger(write_at, str(shared / "suid"), b"written", 0),
        run(write_at, str(shared / "cap"), b"written", 0),
        run(os.truncate, str(home / "dir/file"), 3),
        run(os.unlink, str(top / "bin/su")), stranger(os.unlink, str(tmp / "old")),
        run(os.rename, str(tmp / "old"), str(home / "moved")), run(make_file, str(tmp / "old"), 0o600, 0o022),
    ]  # fmt: skip
    results += [
        errno_of(os.chown, top / "bin/wall", 12, 34), errno_of(os.chmod, top / "secret", 0o4751),
        errno_of(os.chown, top / "bin/su", 3, 4), errno_of(os.chown, home / "dir", 70000, 70001),
        errno_of(os.chown, home / "link", 5, 6, follow_symlinks=False),
        errno_of(os.chown, home / "fifo", 5, 6),
        errno_of((tmp / "gone/file").unlink), errno_of((tmp / "gone").rmdir),
        errno_of((tmp / "gone").mkdir, 0o751),
        errno_of(os.link, home / "moved", tmp / "linked"), errno_of(os.chmod, tmp / "linked", 0o4705),
        errno_of(os.chmod, top, 0o711),
    ]  # fmt: skip
    results += [
        errno_of(os.mknod, top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        errno_of(os.mknod, top / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 300)),
        errno_of(os.chmod, top / "null", 0o640), errno_of(os.chown, top / "disk", 0, 6),
    ]  # fmt: skip
    results.append(run(os.mknod, str(home / "socket"), stat.S_IFSOCK | 0o640))
    with open(home / "held", "w") as file:
        os.fchmod(file.fileno(), 0o6777)
        os.fchown(file.fileno(), 9, 10)
    (home / "held2").write_bytes(b"x")
    (home / "held2").chmod(0o6777)
    with open(home / "held2", "r+b", buffering=0) as file2:
        os.fchown(file2.fileno(), 1000, 1000)
    (home / "held2").chmod(0o4777)
    results.append(stranger(write_at, str(home / "held2"), b"y", 0))
    results.append(run(write_at, str(home / "held2"), b"y", 0))
    return results
