"""xattr_permissions: owners, modes and types in xattrs, as with fuse-overlayfs and on a native filesystem."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, Place, call, refused, succeed, unionfs
from tests.mount.user_calls import UID, Host
from tests.support import acl, kept
from tests.support.mounting import Mount, mounted
from tests.support.storage import Storage
from tests.support.worker import Worker
from tests.support.world import errno_of
from unionfs.sys.fds import Owned

PASSES = ("direct-hybrid", "direct-passthrough")
Union = Callable[..., contextlib.AbstractContextManager[Mount]]


@pytest.fixture
def storing(root: None, area: Path, session: str) -> Union:
    """Mount lower, upper and work, with `xattr_permissions=` a level."""
    if session in PASSES:
        pytest.skip("refused, see test_no_passthrough")
    for name in ("lower", "upper", "work", "empty"):
        (area / name).mkdir()

    def union(
        level: int = 2, *, options: list[str] | None = None, program: str = session
    ) -> contextlib.AbstractContextManager[Mount]:
        return mounted(
            area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=program,
            options=[f"xattr_permissions={level}", *(options or [])],
        )  # fmt: skip

    return union


@pytest.fixture
def fuse_overlayfs() -> str:
    if shutil.which("fuse-overlayfs") is None:
        pytest.skip("fuse-overlayfs is not installed")
    return "fuse-overlayfs"


def test_as_on_a_native_filesystem(storing: Union, area: Path) -> None:
    kept.build(area / "lower", kept.CONTAINERS)
    native = kept.build(area / "native")
    os.setxattr(native / "shared/cap", kept.CAPABILITY, kept.CAPABILITIES)
    stored = f"user.containers.override_{kept.CAPABILITY}"
    os.setxattr(area / "lower/shared/cap", stored, kept.CAPABILITIES)
    with Worker(1000, 1000, [1001]) as user, Worker(2000, 2000) as other:
        with storing() as mount:
            assert kept.seen(mount.mountpoint) == kept.seen(native)
            expected = kept.change(native, user, other)
            assert kept.change(mount.mountpoint, user, other) == expected
            assert kept.seen(mount.mountpoint) == kept.seen(native)
        with storing() as mount:
            assert kept.seen(mount.mountpoint) == kept.seen(native)


@pytest.mark.parametrize("xattr", [kept.PRIVILEGED, kept.USER, kept.CONTAINERS])
def test_as_with_fuse_overlayfs(storing: Union, area: Path, xattr: str, fuse_overlayfs: str) -> None:
    """Both read what the other wrote, in a lower and in an upper."""
    if xattr == kept.CONTAINERS and _version(fuse_overlayfs) < (1, 14):
        pytest.skip("this fuse-overlayfs does not write user.containers.override_stat")
    level = 1 if xattr == kept.PRIVILEGED else 2
    kept.build(area / "lower", xattr)
    os.setxattr(area / "upper", xattr, b"0:0:755")
    with Worker(1000, 1000, [1001]) as user, Worker(2000, 2000) as other:
        with storing(level, program=fuse_overlayfs) as mount:
            lower = kept.seen(mount.mountpoint)
            kept.change(mount.mountpoint, user, other)
            theirs = kept.seen(mount.mountpoint)
        with storing(level) as mount:
            assert kept.seen(mount.mountpoint) == theirs
            (mount.mountpoint / "bin/wall").chmod(0o1234)
            os.chown(mount.mountpoint / "home", 77, 78)
            (mount.mountpoint / "dir").mkdir(0o700)
            (mount.mountpoint / "dir/ours").write_text("ours")
            os.chown(mount.mountpoint / "dir/ours", 79, 80)
            ours = kept.seen(mount.mountpoint)
        with storing(level, program=fuse_overlayfs) as mount:
            assert kept.seen(mount.mountpoint) == ours
    assert lower != theirs != ours


def test_fuse_overlayfs_reads_a_new_store(storing: Union, area: Path, fuse_overlayfs: str) -> None:
    """Every version reads user.containers.override_stat in lowers."""
    kept.build(area / "lower")
    with Worker(1000, 1000, [1001]) as user, Worker(2000, 2000) as other, storing() as mount:
        kept.change(mount.mountpoint, user, other)
        ours = kept.seen(mount.mountpoint)
    assert kept.CONTAINERS in os.listxattr(area / "upper")
    with mounted(area, lowers=[area / "upper", area / "lower"], session=fuse_overlayfs) as mount:
        theirs = kept.seen(mount.mountpoint)
    if _version(fuse_overlayfs) < (1, 14):  # it does not read the capabilities
        theirs = {name: (*items[:-1], ours[name][-1]) for name, items in theirs.items()}
    assert theirs == ours


def _version(program: str) -> tuple[int, ...]:
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return tuple(map(int, text.split("fuse-overlayfs: version ")[1].split()[0].split(".")))


@pytest.mark.parametrize("io", ["hybrid", "passthrough"])
def test_no_passthrough(place: Place, io: str) -> None:
    """The kernel clears setuid only in the file. `auto` chooses another mode."""
    words = ("mount", "--session", "direct", "-o", "xattr_permissions=2", *place.layers)
    refused(unionfs(*words, "--io", io, place.merged), f"--io {io} cannot be had", "xattr_permissions")
    succeed(unionfs(*words, place.merged))
    assert "cached" in succeed(unionfs("inspect", place.merged))


def test_types(storing: Union, area: Path) -> None:
    """Devices, fifos and sockets are empty files in a store that an ordinary user unpacked."""
    values = {"null": "char-1-3", "disk": "block-8-300", "pipe": "pipe", "socket": "socket"}
    for name, kind in values.items():
        (area / "lower" / name).touch()
        os.setxattr(area / "lower" / name, kept.CONTAINERS, f"0:6:0640:{kind}".encode())
    os.link(area / "lower/pipe", area / "lower/pipe2")
    os.setxattr(area / "lower", kept.CONTAINERS, b"0:0:755")
    modes = {"null": "crw-r-----", "disk": "brw-r-----", "pipe": "prw-r-----", "socket": "srw-r-----"}
    with storing() as mount:
        top = mount.mountpoint
        for name, mode in modes.items():
            assert stat.filemode((top / name).lstat().st_mode) == mode
        kinds = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(top)}
        assert kinds == dict.fromkeys([*values, "pipe2"], False)
        assert os.major((top / "disk").stat().st_rdev) == 8
        assert os.minor((top / "disk").stat().st_rdev) == 300
        assert (top / "null").read_bytes() == b""
        for name in values:
            (top / name).chmod(0o4600)
            os.chown(top / name, 7, -1)
        (top / "pipe2").unlink()
        os.rename(top / "socket", top / "moved")
        seen = kept.seen(top)
    assert (area / "upper/null").is_file()
    assert os.getxattr(area / "upper/null", kept.CONTAINERS) == b"7:6:600:char-1-3"
    assert {name: items[:3] for name, items in seen.items()} == {
        ".": ("drwxr-xr-x", 0, 0), "null": ("crw-------", 7, 6), "disk": ("brw-------", 7, 6),
        "pipe": ("prw-------", 7, 6), "moved": ("srw-------", 7, 6),
    }  # fmt: skip
    with storing() as mount:
        assert kept.seen(mount.mountpoint) == seen


def test_a_device_that_the_daemon_may_not_make(place: Place) -> None:
    """As in an ordinary user's mount that root may use, too."""
    limited = ("setpriv", "--bounding-set", "-mknod", "--inh-caps", "-mknod", "--")
    mount = (sys.executable, "-m", "unionfs", "mount", "-o", "xattr_permissions=2,dev", *place.layers)
    succeed(call(limited, *mount, place.merged, cwd=REPOSITORY))
    os.mknod(place.merged / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (place.merged / "null").chmod(0o666)
    assert (place.merged / "null").read_bytes() == b""
    assert stat.filemode((place.merged / "null").stat().st_mode) == "crw-rw-rw-"
    assert (place.upper / "null").is_file()
    assert os.getxattr(place.upper / "null", kept.CONTAINERS) == b"0:0:666:char-1-3"


def test_bad_values(storing: Union, area: Path) -> None:
    """They are data of a layer: the objects have their own attributes."""
    (area / "lower/dir").mkdir(0o751)
    values = [b"", b"x", b"0:0", b"0:0:9", b"0:0:755:block-1", b"-1:-1:644", b"0:0:755:dir", b"y" * 3000]
    for number, value in enumerate(values):
        (area / f"lower/{number}").write_text("data")
        os.setxattr(area / f"lower/{number}", kept.CONTAINERS, value)
    os.setxattr(area / "lower/dir", kept.CONTAINERS, b"0:0:755:char-1-3")
    os.setxattr(area / "lower", kept.CONTAINERS, b"bad")
    lower = kept.seen(area / "lower")
    lower["5"] = ("-rw-r--r--", 65534, 65534, *lower["5"][3:])
    with storing() as mount:
        assert kept.seen(mount.mountpoint) == lower
        for number in range(len(values)):
            os.chown(mount.mountpoint / str(number), 1, 2)
        os.chown(mount.mountpoint / "dir", 1, 2)
        assert {items[1:3] for items in kept.seen(mount.mountpoint).values()} == {(0, 0), (1, 2)}


def test_hidden_xattrs(storing: Union, area: Path) -> None:
    """A user who could set them would have any owner and mode. Their names are free for the user's own."""
    (area / "lower/file").touch()
    for name in (kept.CONTAINERS, "user.fuseoverlayfs.origin", "user.containers.override_security.x"):
        os.setxattr(area / "lower/file", name, b"3:4:600")
    os.setxattr(area / "lower", kept.CONTAINERS, b"0:0:755")
    names = [kept.CONTAINERS, kept.USER, kept.PRIVILEGED, "user.overlay.opaque", "security.x", "user.plain"]
    with storing() as mount:
        file = mount.mountpoint / "file"
        assert os.listxattr(file) == ["security.x"]
        assert errno_of(os.getxattr, file, kept.CONTAINERS) == errno.ENODATA
        assert errno_of(os.removexattr, file, kept.CONTAINERS) == errno.ENODATA
        for name in names:
            os.setxattr(file, name, b"0:0:4777")
            assert os.getxattr(file, name) == b"0:0:4777"
        assert sorted(os.listxattr(file)) == sorted(names)
        assert (file.stat().st_uid, file.stat().st_mode) == (3, 0o100600)
        for name in names:
            os.removexattr(file, name)
        assert os.listxattr(file) == []
        assert (file.stat().st_uid, file.stat().st_mode) == (3, 0o100600)
        assert errno_of(os.setxattr, file, acl.ACCESS, acl.simple(7, 5, 5)) == errno.EOPNOTSUPP


def test_backing_files_have_no_setuid(storing: Union, area: Path) -> None:
    """They belong to the daemon's user: another user of the host could run them."""
    kept.build(area / "lower", kept.CONTAINERS)
    with storing() as mount:
        (mount.mountpoint / "new").touch()
        (mount.mountpoint / "new").chmod(0o6777)
        (mount.mountpoint / "bin/su").chmod(0o6711)
    for path in ("upper/new", "upper/bin/su"):
        assert (area / path).stat().st_mode & 0o7700 == 0o700


def test_with_ranges_and_redirects(storing: Union, area: Path) -> None:
    """The xattr has the ids that are stored."""
    kept.build(area / "lower", kept.CONTAINERS)
    options = ["uidmapping=0:100000:65536", "gidmapping=0:200000:65536", "redirect_dir=on"]
    for _ in range(2):
        with storing(options=options) as mount:
            top = mount.mountpoint
            home = top / ("home" if (top / "home").exists() else "moved")
            assert (home / "user/mine").stat().st_uid == 101000
            os.chown(home / "user/mine", 101000, 200007)
            os.rename(home, top / "moved")
            assert (top / "moved/user/suid").stat().st_gid == 201001
    assert os.getxattr(area / "upper/moved/user/mine", kept.CONTAINERS) == b"1000:7:600"
    with storing(options=["squash_to_root", "redirect_dir=on"]) as mount:
        assert {items[1:3] for items in kept.seen(mount.mountpoint).values()} == {(0, 0)}


def test_renamed_directories_are_copied(storing: Union, area: Path) -> None:
    """By default, as fuse-overlayfs does not find what is renamed by a redirect."""
    kept.build(area / "lower", kept.CONTAINERS)
    with storing() as mount:
        assert errno_of(os.rename, mount.mountpoint / "home", mount.mountpoint / "moved") == errno.EXDEV


def test_unnamed_and_immutable_files(storing: Union, area: Path, session: str) -> None:
    os.setxattr(area / "lower", kept.CONTAINERS, b"0:5:2777")
    (area / "lower/fixed").touch()
    os.setxattr(area / "lower/fixed", kept.CONTAINERS, b"1:2:640")
    subprocess.run(["chattr", "+i", area / "lower/fixed"], check=True)
    try:
        with storing() as mount:
            top = mount.mountpoint
            assert errno_of((top / "fixed").chmod, 0o600) == errno.EPERM
            assert (top / "fixed").stat().st_uid == 1
            if session == "pyfuse3":
                return  # libfuse has no O_TMPFILE
            fd = os.open(top, os.O_TMPFILE | os.O_RDWR, 0o4604)
            os.fchown(fd, 3, -1)
            assert (os.fstat(fd).st_uid, os.fstat(fd).st_gid, os.fstat(fd).st_mode) == (3, 5, 0o100604)
            with Owned(os.open(top, os.O_PATH)) as here:
                os.link(f"/proc/self/fd/{fd}", "named", dst_dir_fd=here, follow_symlinks=True)
            os.close(fd)
        assert os.getxattr(area / "upper/named", kept.CONTAINERS) == b"3:5:604"
    finally:
        subprocess.run(["chattr", "-i", area / "lower/fixed"], check=True)


def test_a_store_at_rest(storing: Union, area: Path) -> None:
    """`check` finds nothing, and `convert` keeps the xattrs."""
    kept.build(area / "lower", kept.CONTAINERS)
    with Worker(1000, 1000, [1001]) as user, Worker(2000, 2000) as other, storing() as mount:
        kept.change(mount.mountpoint, user, other)
        seen = kept.seen(mount.mountpoint)
    layers: list[str | Path] = ["-l", area / "lower", "-u", area / "upper", "-w", area / "work"]
    succeed(unionfs("check", *layers))
    for form in (["oci"], ["fuse-overlayfs"], ["overlay", "--userxattr"]):
        succeed(unionfs("convert", "-u", area / "upper", "--to", *form))
        with storing(options=["userxattr"] if "overlay" in form else []) as mount:
            assert kept.seen(mount.mountpoint) == seen


WAYS = ("fusermount3", "namespace")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("daemon", ["pyfuse3", "direct"])
def test_an_ordinary_user(host: Host, way: str, daemon: str) -> None:
    """An ordinary user stores any owner and mode in files of that user."""
    place = host.place
    value = "0:0:0755:dir" if way == "namespace" else f"{UID}:{UID}:0755:dir"
    os.setxattr(place.lower, kept.CONTAINERS, value.encode())
    (place.lower / "su").touch()
    os.setxattr(place.lower / "su", kept.CONTAINERS, value.replace("0755:dir", "04711:file").encode())
    for path in (place.lower, place.lower / "su"):
        os.chown(path, UID, UID)
        path.chmod(0o700)
    options = ("--session", daemon, "-o", "xattr_permissions=2")
    words = " ".join(map(str, [*host.command, "mount", *options, *place.layers, place.merged]))
    look = f"cd {place.merged}; stat -c '%n %A %u %g %t:%T' . su new dir dir/file"
    act = (
        f"cd {place.merged}; touch new; chmod 6755 new; mkdir -m 2750 dir; echo data >dir/file; "
        "chmod 000 dir/file; chmod 4701 su"
    )
    end = f"cd /; {' '.join(host.command)} umount {place.merged}"
    space = ("unshare", "-Urm") if way == "namespace" else ()
    done = host.run(*space, "sh", "-ec", f"{words}; {act}; {look}; {end}")
    assert done.returncode == 0, done.stderr
    again = host.run(*space, "sh", "-ec", f"{words}; {look}; {end}")
    assert again.stdout == done.stdout, again.stderr
    uid = "0 0" if way == "namespace" else f"{UID} {UID}"
    assert done.stdout.splitlines() == [
        f". drwxr-xr-x {uid} 0:0", f"su -rws-----x {uid} 0:0", f"new -rwsr-sr-x {uid} 0:0",
        f"dir drwxr-s--- {uid} 0:0", f"dir/file ---------- {uid} 0:0",
    ]  # fmt: skip
    assert {path.lstat().st_uid for path in place.upper.rglob("*")} == {UID}


def test_only_root_sets_the_first_kind(host: Host) -> None:
    done = host.unionfs("mount", "-o", "xattr_permissions=1", *host.place.layers, host.place.merged)
    refused(done, "xattr_permissions=1 is not possible", "write xattr_permissions=2")


def test_a_volume_has_real_attributes(one: Storage) -> None:
    """The one that is filled from such a layer: it shows what it stores."""
    kept.build(one.place.lower, kept.CONTAINERS)
    native = kept.build(one.place.root / "native")
    one.mount("-o", "xattr_permissions=2", "-v", "filled:/home", "-v", "new:/new")
    assert kept.seen(one.merged / "home") == kept.seen(native / "home")
    assert kept.seen(one.volume("filled")) == kept.seen(native / "home")
    assert kept.CONTAINERS not in os.listxattr(one.volume("filled") / "user/mine")
    (one.merged / "home/user/mine").chmod(0o4711)
    assert (one.volume("filled") / "user/mine").stat().st_mode == 0o104711
