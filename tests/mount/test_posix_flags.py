"""Flags of files and directories (chattr(1)), beside kernel overlayfs over copies of the same layers."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.mounting import Mount, kernel_mounted, mounted
from tests.support.snapshot import read_xattrs
from tests.support.world import outcome

GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
FSGETXATTR = 0x801C581F
SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME = 0x8, 0x10, 0x20, 0x40, 0x80
PROTATTR = "trusted.overlay.protattr"
CAP_LINUX_IMMUTABLE = 9

Call = Callable[[Path], object]


def get_flags(path: Path, command: int = GETFLAGS) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        value = bytearray(28)
        fcntl.ioctl(fd, command, value)
        return int.from_bytes(value[:4], "little")
    finally:
        os.close(fd)


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, SETFLAGS, flags.to_bytes(8, "little"))
    finally:
        os.close(fd)


def toggle(name: str, root: Path) -> None:
    set_flags(root / name, get_flags(root / name) ^ IMMUTABLE)


def build(lower: Path) -> None:
    for name in ("i", "a", "sa", "plain", "other"):
        (lower / name).write_bytes(name.encode())
    for name in ("di", "da", "dplain"):
        (lower / name / "below").mkdir(parents=True)
        (lower / name / "x").write_bytes(b"x")
    os.chmod(lower / "i", 0o666)
    for name, flags in (
        ("i", IMMUTABLE), ("a", APPEND), ("sa", SYNC | NOATIME), ("di", IMMUTABLE), ("da", APPEND)
    ):  # fmt: skip
        set_flags(lower / name, get_flags(lower / name) | flags)


class Both:
    """The union's layers and those of kernel overlayfs."""

    def __init__(self, area: Path, session: str) -> None:
        self.area, self.session = area, session
        for side in ("union", "kernel"):
            for name in ("lower", "upper", "work"):
                (area / side / name).mkdir(parents=True)
            build(area / side / "lower")

    @contextlib.contextmanager
    def mount(self, side: str, *, by: str = "") -> Iterator[Mount]:
        """One side's layers, mounted ``by`` the union or the kernel, by default its own."""
        home = self.area / side
        layers = {"lowers": [home / "lower"], "upper": home / "upper", "work": home / "work"}
        with (
            mounted(home, session=self.session, **layers)  # type: ignore[arg-type]
            if (by or side) == "union"
            else kernel_mounted(home, **layers)  # type: ignore[arg-type]
        ) as mount:
            yield mount

    def protected(self, side: str) -> dict[str, bytes]:
        """The xattr ``protattr`` of each object in an upper that has it."""
        upper = self.area / side / "upper"
        return {
            str(path.relative_to(upper)): xattrs[PROTATTR]
            for path in sorted(upper.rglob("*"))
            if PROTATTR in (xattrs := read_xattrs(str(path)))
        }

    def clear(self) -> None:
        """Let everything be removed again."""
        for path in [*self.area.rglob("*")]:
            if path.is_dir() or (path.is_file() and not path.is_symlink()):
                with contextlib.suppress(OSError):
                    set_flags(path, get_flags(path) & ~(IMMUTABLE | APPEND))


@pytest.fixture
def both(kernel_overlay: None, filesystem: Callable[..., Path], session: str) -> Iterator[Both]:
    """On ext4, which has all flags."""
    made = Both(filesystem("ext4", 64 << 20), session)
    try:
        yield made
    finally:
        made.clear()


def opens(name: str, flags: int) -> Call:
    return lambda root: os.close(os.open(root / name, flags))


def creates(name: str) -> Call:
    return lambda root: os.close(os.open(root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def of_objects(name: str) -> dict[str, Call]:
    """Changes of one object, none of which an immutable one permits."""
    return {
        "chmod": lambda root: os.chmod(root / name, 0o600),
        "chown": lambda root: os.chown(root / name, 1, 1),
        "utime": lambda root: os.utime(root / name, (1, 1)),
        "touch": lambda root: os.utime(root / name),
        "setxattr": lambda root: os.setxattr(root / name, "user.x", b"1"),
        "removexattr": lambda root: os.removexattr(root / name, "user.missing"),
        "acl": lambda root: os.setxattr(root / name, "system.posix_acl_access", ACL),
        "rename": lambda root: os.rename(root / name, root / "renamed"),
        "rename_below": lambda root: os.rename(root / name, root / "dplain/renamed"),
    }


ACL = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000500ffffffff")


def of_files(name: str) -> dict[str, Call]:
    return {
        **of_objects(name),
        "read": lambda root: (root / name).read_bytes(),
        "truncate": lambda root: os.truncate(root / name, 0),
        "extend": lambda root: os.truncate(root / name, 100),
        "truncating": opens(name, os.O_WRONLY | os.O_TRUNC),
        "truncating_append": opens(name, os.O_WRONLY | os.O_TRUNC | os.O_APPEND),
        "truncating_read": opens(name, os.O_RDONLY | os.O_TRUNC),
        "link": lambda root: os.link(root / name, root / "linked"),
        "replace": lambda root: os.rename(root / "other", root / name),
        "unlink": lambda root: os.unlink(root / name),
    }


def unseen(name: str) -> dict[str, Call]:
    """Calls that reach the daemon only with --io cached's first write."""
    return {
        "writing": opens(name, os.O_WRONLY),
        "reading_and_writing": opens(name, os.O_RDWR),
        "appending": opens(name, os.O_WRONLY | os.O_APPEND),
    }


def of_directories(name: str) -> dict[str, Call]:
    return {
        **of_objects(name),
        "create": creates(f"{name}/new"),
        "mkdir": lambda root: os.mkdir(root / name / "newdir"),
        "mknod": lambda root: os.mkfifo(root / name / "fifo"),
        "symlink": lambda root: os.symlink("x", root / name / "symlink"),
        "link_into": lambda root: os.link(root / "plain", root / name / "link"),
        "move_into": lambda root: os.rename(root / "plain", root / name / "moved"),
        "tmpfile": lambda root: os.close(os.open(root / name, os.O_TMPFILE | os.O_WRONLY)),
        "unlink_below": lambda root: os.unlink(root / name / "x"),
        "rmdir_below": lambda root: os.rmdir(root / name / "below"),
        "move_out": lambda root: os.rename(root / name / "x", root / "out"),
        "rename_in": lambda root: os.rename(root / name / "x", root / name / "y"),
        "rmdir": lambda root: os.rmdir(root / name),
        "chmod_below": lambda root: os.chmod(root / name / "x", 0o600),
        "write_below": lambda root: (root / name / "x").write_bytes(b"written"),
    }


CALLS = {
    f"{name}-{call}": function
    for name, of in (("i", of_files), ("a", of_files), ("di", of_directories), ("da", of_directories))
    for call, function in of(name).items()
}
UNSEEN = {f"{name}-{call}": function for name in ("i", "a") for call, function in unseen(name).items()}


def test_what_flags_of_a_lower_forbid(both: Both, session: str) -> None:
    """Each call on the same objects, in order: those that are permitted too."""
    calls = CALLS if session == "direct-cached" else {**UNSEEN, **CALLS}
    # A file without a name cannot be made by every session.
    skipped = {"di-tmpfile", "da-tmpfile"} if session == "pyfuse3" else set()
    found: dict[str, dict[str, object]] = {}
    for side in ("union", "kernel"):
        with both.mount(side) as mount:
            found[side] = {
                name: outcome(call, mount.mountpoint) for name, call in calls.items() if name not in skipped
            }
    assert found["union"] == found["kernel"]
    assert both.protected("union") == both.protected("kernel")


def test_the_lower_is_unchanged_and_the_upper_continues(both: Both) -> None:
    """What one wrote is forbidden by the other as well."""
    for side in ("union", "kernel"):
        with both.mount(side) as mount, (mount.mountpoint / "a").open("ab") as appended:
            appended.write(b" more")
        with both.mount(side) as mount:
            (mount.mountpoint / "da/new").write_bytes(b"new")
            (mount.mountpoint / "di/x").write_bytes(b"changed")
    assert both.protected("union") == both.protected("kernel") == {"a": b"a", "da": b"a", "di": b"i"}
    calls = {name: call for name, call in CALLS.items() if not name.startswith("i") and "tmpfile" not in name}
    found = []
    for side, by in (("union", "kernel"), ("kernel", "union")):
        with both.mount(side, by=by) as mount:
            found.append({name: outcome(call, mount.mountpoint) for name, call in calls.items()})
            assert (mount.mountpoint / "a").read_bytes() == b"a more"
    assert found[0] == found[1]


def test_append_only_data_stays(both: Both, session: str) -> None:
    """Also where the kernel reports neither the open nor O_APPEND."""
    with both.mount("union") as mount:
        path = mount.mountpoint / "a"
        with path.open("ab", buffering=0) as file:
            for word in (b"one", b"two"):
                file.write(word)
                os.fsync(file.fileno())
        if session == "direct-cached":
            fd = os.open(path, os.O_RDWR)
            try:
                os.pwrite(fd, b"X", 0)
                with pytest.raises(PermissionError):
                    os.fsync(fd)
            finally:
                os.close(fd)
    assert (both.area / "union/upper/a").read_bytes() == b"aonetwo"


def test_cached_writes_to_an_immutable_file_fail_with_the_sync(both: Both, session: str) -> None:
    if session != "direct-cached":
        pytest.skip("an open for writing fails")
    with both.mount("union") as mount:
        fd = os.open(mount.mountpoint / "i", os.O_WRONLY)
        try:
            os.write(fd, b"X")
            with pytest.raises(PermissionError):
                os.fsync(fd)
        finally:
            with contextlib.suppress(PermissionError):
                os.close(fd)
    assert not (both.area / "union/upper/i").exists()


def need_ioctl(session: str) -> None:
    if session == "pyfuse3":
        pytest.skip("pyfuse3 has no ioctl")


def test_flags_that_survive_a_copy_up(both: Both, session: str) -> None:
    """S and A are set on the copy too, and shown."""
    for side in ("union", "kernel"):
        with both.mount(side) as mount, (mount.mountpoint / "sa").open("r+b") as file:
            file.write(b"!")
    flags = {side: get_flags(both.area / side / "upper/sa") for side in ("union", "kernel")}
    assert flags["union"] == flags["kernel"]
    assert flags["union"] & (SYNC | NOATIME) == SYNC | NOATIME


def test_listing_and_changing_them(both: Both, session: str) -> None:
    """lsattr(1) and chattr(1), on lowers, copies and new files; and what the other reads afterwards."""
    need_ioctl(session)

    def steps(root: Path) -> list[object]:
        (root / "new").write_bytes(b"new")
        names = ("i", "a", "sa", "di", "da", "plain", "dplain", "new")
        found: list[object] = [(get_flags(root / name), get_flags(root / name, FSGETXATTR)) for name in names]
        for name, flags in (("plain", IMMUTABLE | APPEND), ("i", 0), ("sa", SYNC), ("dplain", APPEND)):
            base = get_flags(root / name) & ~(IMMUTABLE | APPEND | SYNC | NOATIME)
            set_flags(root / name, base | flags)
            found.append(get_flags(root / name))
        found.append(outcome(lambda at: os.unlink(at / "plain"), root))
        found.append(outcome(lambda at: os.unlink(at / "dplain/x"), root))
        found.append(outcome(lambda at: os.chmod(at / "i", 0o640), root))
        set_flags(root / "plain", get_flags(root / "plain") & ~IMMUTABLE)
        found.append(outcome(lambda at: os.chmod(at / "plain", 0o640), root))
        return found

    found = []
    for side in ("union", "kernel"):
        with both.mount(side) as mount:
            found.append(steps(mount.mountpoint))
    assert found[0] == found[1]
    assert both.protected("union") == both.protected("kernel") == {"dplain": b"a", "plain": b"a"}
    for side, by in (("union", "kernel"), ("kernel", "union")):
        with both.mount(side, by=by) as mount:
            root = mount.mountpoint
            found = [get_flags(root / name) & (IMMUTABLE | APPEND) for name in ("plain", "dplain", "i", "di")]
            assert found == [APPEND, APPEND, 0, IMMUTABLE]
            set_flags(root / "plain", get_flags(root / "plain") & ~APPEND)
            os.unlink(root / "plain")


def test_the_ctime_after_a_change_of_them(both: Both, session: str) -> None:
    """Of lowers, copies, new files and directories; and it is the one on disk."""
    need_ioctl(session)
    names = ("plain", "copy", "new", "dplain", "dnew")
    if session == "direct-cached":  # the kernel keeps the times of files
        names = ("dplain", "dnew")

    def steps(root: Path) -> list[object]:
        (root / "new").write_bytes(b"new")
        (root / "dnew").mkdir()
        os.rename(root / "other", root / "copy")
        found = []
        for flag in (NODUMP, APPEND):
            for name in names:
                before = os.stat(root / name).st_ctime_ns
                time.sleep(0.02)  # until Linux 6.13 a ctime is that of the last tick
                set_flags(root / name, get_flags(root / name) ^ flag)
                after = os.stat(root / name).st_ctime_ns
                found.append((name, flag, after > before))
        return found

    found = []
    for side in ("union", "kernel"):
        with both.mount(side) as mount:
            found.append(steps(mount.mountpoint))
            shown = {name: os.stat(mount.mountpoint / name).st_ctime_ns for name in names}
            stored = {name: os.stat(both.area / side / "upper" / name).st_ctime_ns for name in names}
        assert shown == stored
    assert found[0] == found[1]


def test_without_privilege(both: Both, session: str) -> None:
    """Without CAP_LINUX_IMMUTABLE the flags cannot be changed, not even by root."""
    need_ioctl(session)
    found = []
    for side in ("union", "kernel"):
        with both.mount(side) as mount:
            root, read, write = mount.mountpoint, *os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    ctypes.CDLL(None).prctl(24, CAP_LINUX_IMMUTABLE, 0, 0, 0)  # PR_CAPBSET_DROP
                    _drop_effective(CAP_LINUX_IMMUTABLE)
                    results = [
                        outcome(partial(toggle, name), root)
                        for name in ("plain", "i")
                    ]
                    os.write(write, repr(results).encode())
                finally:
                    os._exit(0)
            os.close(write)
            found.append(os.read(read, 10_000))
            os.close(read)
            os.waitpid(child, 0)
    assert found[0] == found[1]
    assert str(errno.EPERM).encode() in found[0]


def _drop_effective(capability: int) -> None:
    """capset(2) without one capability, for this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << capability)
    assert libc.capset(header, data) == 0


@pytest.mark.parametrize(("value", "held"), [(b"ia", True), (b"i?", False), (b"", False), (b"i" * 33, False)])
def test_odd_values(both: Both, value: bytes, held: bool) -> None:
    """An xattr that is no list of letters protects nothing, and stops nothing."""
    upper = both.area / "kernel/upper/odd"
    upper.write_bytes(b"odd")
    os.setxattr(upper, PROTATTR, value)
    found = []
    for by in ("kernel", "union"):
        with both.mount("kernel", by=by) as mount:
            found.append(outcome(lambda root: os.chmod(root / "odd", 0o640), mount.mountpoint))
    assert found[0] == found[1]
    assert (found[0] == outcome(lambda root: os.chmod(root / "missing", 0), both.area)) is False
    assert upper.exists()
    assert (upper.stat().st_mode & 0o777 == 0o640) is not held
