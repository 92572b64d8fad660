"""Owners shown other than stored: the same ids as with fuse-overlayfs, in the mount and in the upper."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import Place, succeed
from tests.mount.user_calls import UID, Host
from tests.support import acl
from tests.support.mounting import Mount, mounted
from tests.support.worker import Worker
from tests.support.world import errno_of
from unionfs.sys import calls
from unionfs.sys.fds import Owned

MAPPED = "uidmapping=:0:100000:65536,gidmapping=:0:200000:65536"
KEPT = "uidmapping=:0:1:1001:1001:0:1:1002:1002:64535,gidmapping=:0:1:1001:1001:0:1:1002:1002:64535"
OPTIONS = [
    MAPPED, KEPT, "squash_to_uid=100000,squash_to_gid=200000", "squash_to_root", "squash_to_uid=7",
    f"squash_to_gid=9,{MAPPED}", "uidmapping=0:100000:10:5:300000:1",
]  # fmt: skip
OWNERS = [(0, 0), (1, 5), (1000, 1000), (5, 9), (70000, 70000), (1001, 1001)]


def build(home: Path) -> None:
    for name in ("lower", "upper", "work"):
        (home / name).mkdir(parents=True)
    for uid, gid in OWNERS:
        for name in (f"file{uid}", f"dir{uid}/file", f"link{uid}"):
            path = home / "lower" / name
            path.parent.mkdir(exist_ok=True)
            if name.startswith("link"):
                path.symlink_to("target")
            else:
                path.write_text(name)
            os.chown(path, uid, gid, follow_symlinks=False)
        os.chown(home / f"lower/dir{uid}", uid, gid)
        (home / f"lower/file{uid}").chmod(0o666)
    (home / "lower").chmod(0o777)
    (home / "upper").chmod(0o777)


def owners(root: Path) -> dict[str, tuple[int, int]]:
    """The owner and group of every name, without whiteouts."""
    paths = [path for path in [root, *root.rglob("*")] if not path.name.startswith(".wh.")]
    return {str(path.relative_to(root)): (path.lstat().st_uid, path.lstat().st_gid) for path in paths}


def change(top: Path, user: Worker) -> list[Any]:
    """What a user and root do; no copy-up of symlinks, where fuse-overlayfs loses the owner."""
    results: list[Any] = [
        user.errno(os.mkdir, str(top / "new")), user.errno(os.mknod, str(top / "new/file")),
        user.errno(os.symlink, "x", str(top / "new/link")), user.errno(os.mkfifo, str(top / "pipe")),
    ]  # fmt: skip
    for uid, _ in OWNERS:
        results.append(errno_of(os.utime, top / f"file{uid}"))
        results.append(errno_of(os.utime, top / f"dir{uid}/file"))
    shown = (top / "file1").lstat()
    results.append(errno_of(os.chown, top / "file0", shown.st_uid, shown.st_gid))
    results.append(errno_of(os.chown, top / "dir5/file", shown.st_uid, -1))
    results.append(errno_of(os.chown, top / "dir1000", -1, shown.st_gid))
    (top / "file1000").unlink()
    results.append(user.errno(os.mknod, str(top / "file1000")))
    return results


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.skipif(shutil.which("fuse-overlayfs") is None, reason="fuse-overlayfs is not installed")
def test_as_with_fuse_overlayfs(root: None, area: Path, session: str, options: str) -> None:
    results = {}
    for program in ("fuse-overlayfs", session):
        home = area / program
        build(home)
        with (
            mounted(
                home, lowers=[home / "lower"], upper=home / "upper", work=home / "work", session=program,
                options=options.split(","),
            ) as mount,
            Worker(100000, 200000) as user,
        ):  # fmt: skip
            top = mount.mountpoint
            results[program] = [owners(top), change(top, user), owners(top), owners(home / "upper")]
    for ours, theirs in zip(results[session], results["fuse-overlayfs"], strict=True):
        assert _items(ours) ^ _items(theirs) == set()
        if "squash_to_gid=9," in options and ours is results[session][2]:
            break  # it stores 65534 for a chown that changes nothing


def _items(result: Any) -> set[Any]:
    return set(result.items() if isinstance(result, dict) else enumerate(result))


@pytest.fixture
def mapped(root: None, area: Path, session: str) -> Any:
    build(area)
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session,
        options=MAPPED.split(","),
    ) as mount:  # fmt: skip
        yield mount


def test_an_id_without_a_range(mapped: Mount) -> None:
    """It is never stored by chown(2)."""
    assert errno_of(os.chown, mapped.mountpoint / "file1", 5, 5) == 22
    assert os.listdir(mapped.upper or "") == []


def test_acls_are_mapped_too(mapped: Mount) -> None:
    """Otherwise they would grant rights to others."""
    file = mapped.mountpoint / "file1"
    os.setxattr(file, acl.ACCESS, acl.simple(6, 0, 0, users={100007: 6}))
    assert mapped.upper is not None
    assert (acl.USER, 6, 7) in acl.decode(os.getxattr(mapped.upper / "file1", acl.ACCESS))
    assert (acl.USER, 6, 100007) in acl.decode(os.getxattr(file, acl.ACCESS))
    with Worker(100007, 100007) as granted, Worker(7, 7) as other:
        assert granted.errno(os.truncate, str(file), 0) == 0
        assert other.errno(os.truncate, str(file), 0) == 13


def test_static_nlink_and_noacl(root: None, area: Path, session: str) -> None:
    build(area)
    (area / "lower/dir0/sub").mkdir()
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session,
        options=["static_nlink", "noacl"],
    ) as mount:  # fmt: skip
        assert (mount.mountpoint / "dir0").stat().st_nlink == 1
        assert errno_of(os.setxattr, mount.mountpoint / "dir0", acl.ACCESS, acl.simple(7, 5, 5)) == 95


class _MountAttr(ctypes.Structure):
    """struct mount_attr, include/uapi/linux/mount.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


@contextmanager
def idmapped(path: Path) -> Iterator[None]:
    """Mount the directory over itself with ids mapped as in MAPPED; mount_setattr(2), MOUNT_ATTR_IDMAP."""
    holder = subprocess.Popen(["unshare", "-U", "sh", "-c", "echo; exec sleep 100"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        Path(f"/proc/{holder.pid}/uid_map").write_text("0 100000 65536")
        Path(f"/proc/{holder.pid}/gid_map").write_text("0 200000 65536")
        with Owned(os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)) as userns:
            fd = calls.libc.syscall(428, -100, os.fsencode(path), 1 | os.O_CLOEXEC)  # open_tree, a clone
            attributes = _MountAttr(0x00100000, 0, 0, userns)
            size = ctypes.sizeof(attributes)
            if calls.libc.syscall(442, fd, b"", 0x1000, ctypes.byref(attributes), size) != 0:
                pytest.skip("this filesystem has no idmapped mounts")
            assert calls.libc.syscall(429, fd, b"", -100, os.fsencode(path), 0x4) == 0  # move_mount
            os.close(fd)
        yield
    finally:
        holder.kill()
        holder.communicate()
        subprocess.run(["umount", path], check=False)


def test_a_layer_with_mapped_ids(root: None, area: Path, session: str) -> None:
    """As podman passes them: ids are not mapped twice, and a copy stores the ids of the layer."""
    build(area)
    with (
        idmapped(area / "lower"),
        mounted(
            area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session,
            options=MAPPED.split(","),
        ) as mount,
    ):  # fmt: skip
        file = mount.mountpoint / "dir5/file"
        assert (file.stat().st_uid, file.stat().st_gid) == (100005, 200009)
        file.touch()
        os.utime(mount.mountpoint / "link5", follow_symlinks=False)
        assert (file.stat().st_uid, file.stat().st_gid) == (100005, 200009)
    for name in ("dir5", "dir5/file", "link5"):
        st = (area / "upper" / name).lstat()
        assert (st.st_uid, st.st_gid) == (5, 9)


def test_squash_in_a_user_namespace(host: Host, place: Place) -> None:
    """As podman without subordinate ids: foreign files are root's, and a copy is not set-user-id for the
    user.
    """
    (place.lower / "foreign").write_text("x")
    (place.lower / "foreign").chmod(0o4755)
    unionfs = " ".join(host.command)
    mount = f"{unionfs} mount {' '.join(map(str, place.layers))} -o squash_to_root {place.merged}"
    changes = "chmod g+w foreign; touch new; chown 0:0 new; rm base"
    look = "stat -c %u:%g"
    script = (
        f"{mount}; cd {place.merged}; {look} . foreign base; {changes}; {look} foreign new; cd /; "
        f"{unionfs} umount {place.merged}"
    )
    done = host.run("unshare", "-Urm", "sh", "-ec", script)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert succeed(done).split() == ["0:0"] * 5
    for name in ("foreign", "new"):
        st = (place.upper / name).stat()
        assert (st.st_uid, st.st_gid) == (UID, UID)
        assert not st.st_mode & stat.S_ISUID
