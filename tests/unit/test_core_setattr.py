"""SETATTR, and OPEN of the upper's files, in the compiled core: as a native filesystem changes them."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_core_answers import UNIQUE, Modes, Mount, in_upper, looked_up, released
from tests.unit.test_core_answers import mount as mount
from tests.unit.test_union_bundles import Sample, failing_after, on_disk
from tests.unit.union_support import ME, copy_up, get
from tests.unit.union_support import open_union as open_union
from unionfs.core.files import Handle
from unionfs.core.iomodes import IoModes
from unionfs.core.node import Node
from unionfs.fuse.protocol import FOREVER, Opcode, encode
from unionfs.fuse.protocol import flags as fl
from unionfs.union.copyup import CopyUp

IS_ROOT = os.geteuid() == 0
FUTURE, PAST = 4 * 10**18, -(10**18) - 7
OK = b"".join(encode.ok(UNIQUE))

Native = Callable[[Path], None]


def setattr_body(
    valid: int, *, fh: int = 0, size: int = 0, owner: tuple[int, int] = (0, 0), mode: int = 0
) -> bytes:
    """struct fuse_setattr_in; times are `FUTURE` and `PAST`."""
    (atime, atime_ns), (mtime, mtime_ns) = divmod(FUTURE, 10**9), divmod(PAST, 10**9)
    return struct.pack(
        "=IIQQQqqQIIIIIIII",
        valid, 0, fh, size, 0, atime, mtime, 0, atime_ns, mtime_ns, 0, mode, 0, *owner, 0,
    )  # fmt: skip


def times(path: Path, *, atime: bool, mtime: bool) -> None:
    st = path.stat()
    os.utime(path, ns=(FUTURE if atime else st.st_atime_ns, PAST if mtime else st.st_mtime_ns))


CHANGES: list[tuple[bytes, Native]] = [
    (setattr_body(fl.FATTR_MODE, mode=0o100600), lambda path: path.chmod(0o600)),
    (setattr_body(fl.FATTR_MODE | fl.FATTR_FH, fh=99, mode=0o4711), lambda path: path.chmod(0o4711)),
    (setattr_body(fl.FATTR_MTIME | fl.FATTR_CTIME), lambda path: times(path, atime=False, mtime=True)),
    (
        setattr_body(fl.FATTR_ATIME | fl.FATTR_MTIME | 0x180),  # to the present ones, which are sent
        lambda path: times(path, atime=True, mtime=True),
    ),
    (setattr_body(fl.FATTR_UID, owner=(os.geteuid(), 9)), lambda path: os.chown(path, os.geteuid(), -1)),
]
if IS_ROOT:

    def give(path: Path) -> None:
        os.chown(path, 7, 8)
        path.chmod(0o6755)

    BOTH = fl.FATTR_UID | fl.FATTR_GID
    KILLS = BOTH | fl.FATTR_KILL_SUIDGID  # as the kernel says of each chown
    CHANGES.append((setattr_body(BOTH | fl.FATTR_MODE, owner=(7, 8), mode=0o6755), give))
    CHANGES.append((setattr_body(KILLS, owner=(7, 8)), lambda path: os.chown(path, 7, 8)))


def attributes(mount: Mount, node: Node) -> bytes:
    return b"".join(encode.attr(UNIQUE, FOREVER, mount.union.attributes(node).packed()))


def in_lower(mount: Mount, tmp_path: Path) -> tuple[Node, Path]:
    """A file of the lower, in a directory that is in the upper, and the same one natively."""
    native = tmp_path / "native"
    for path in (tmp_path / "l0/d/sample", native):
        Sample().make(path)
    native.write_bytes((tmp_path / "l0/d/sample").read_bytes())
    os.utime(native, ns=Sample().times)
    CopyUp(mount.union).directory(get(mount.union, "d"))
    return looked_up(mount, "d/sample"), native


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["lower", "upper", "open"])
def test_changed_as_natively(mount: Mount, tmp_path: Path, change: tuple[bytes, Native], where: str) -> None:
    body, natively = change
    node, native = in_lower(mount, tmp_path)
    if where != "lower":
        copy_up(mount.union, node)
    if where == "open":
        assert mount.ask(Opcode.OPEN, node.id, struct.pack("=II", os.O_RDWR, 0))
    fds = len(os.listdir("/proc/self/fd"))
    answer = mount.ask(Opcode.SETATTR, node.id, body)
    natively(native)
    assert on_disk(tmp_path / "upper/d/sample") == on_disk(native)
    assert answer == attributes(mount, node)
    assert len(os.listdir("/proc/self/fd")) == fds
    # The answer contains the attributes of the copy, but not those of its directory.
    assert mount.told == ([None, node.parent] if where == "lower" else [])
    assert mount.answers.counts()[int(Opcode.SETATTR)] == 1


def test_a_directory_and_a_removed_file(mount: Mount, tmp_path: Path) -> None:
    parent = in_upper(mount)
    answer = mount.ask(Opcode.SETATTR, parent.id, setattr_body(fl.FATTR_MODE, mode=0o41711))
    assert answer == attributes(mount, parent)
    assert stat.S_IMODE((tmp_path / "upper/made").stat().st_mode) == 0o1711
    node = mount.changes.mknod(parent, b"f", stat.S_IFREG | 0o600, 0, ME)[0]
    node.looked_up()
    mount.changes.unlink(parent, b"f")
    answer = mount.ask(Opcode.SETATTR, node.id, setattr_body(fl.FATTR_MODE, mode=0o640))
    assert answer == attributes(mount, node)
    assert stat.S_IMODE(os.stat(node.held).st_mode) == 0o640


def test_a_chown_that_clears_set_id_bits(mount: Mount, tmp_path: Path, root: None) -> None:
    node, native = in_lower(mount, tmp_path)
    copy_up(mount.union, node)
    for path in (native, tmp_path / "upper/d/sample"):
        path.chmod(0o6755)
    kills = fl.FATTR_UID | fl.FATTR_KILL_SUIDGID
    assert mount.ask(Opcode.SETATTR, node.id, setattr_body(kills, owner=(7, 0))) == attributes(mount, node)
    os.chown(native, 7, -1)
    assert on_disk(tmp_path / "upper/d/sample") == on_disk(native)
    not_by_root = struct.pack("=IIQQIIIHH", 40 + 88, int(Opcode.SETATTR), UNIQUE, node.id, 7, 7, 1, 0, 0)
    assert not mount.answers.take(not_by_root + setattr_body(kills, owner=(7, 0)))


@pytest.mark.parametrize("size", [0, 2, 5000])
def test_truncated(mount: Mount, tmp_path: Path, size: int) -> None:
    """A file that is open for writing; another one is opened by Python."""
    node, native = in_lower(mount, tmp_path)
    copy_up(mount.union, node)
    body = setattr_body(fl.FATTR_SIZE, size=size)
    assert mount.ask(Opcode.SETATTR, node.id, body) is None
    assert mount.ask(Opcode.OPEN, node.id, struct.pack("=II", os.O_RDONLY, 0))
    assert mount.ask(Opcode.SETATTR, node.id, body) is None
    assert mount.ask(Opcode.OPEN, node.id, struct.pack("=II", os.O_WRONLY, 0))
    assert mount.ask(Opcode.SETATTR, node.id, body) == attributes(mount, node)
    os.truncate(native, size)
    assert (tmp_path / "upper/d/sample").read_bytes() == native.read_bytes()
    assert node.use is not None
    assert node.use.resized
    for number in (1, 2):
        assert mount.ask(Opcode.RELEASE, node.id, released(number)) == OK


@pytest.mark.parametrize(
    "body",
    [
        b"", setattr_body(0), setattr_body(fl.FATTR_FH), setattr_body(fl.FATTR_CTIME),
        setattr_body(fl.FATTR_MTIME | fl.FATTR_KILL_SUIDGID), setattr_body(fl.FATTR_SIZE),
        setattr_body(fl.FATTR_UID | fl.FATTR_SIZE | fl.FATTR_KILL_SUIDGID),
        setattr_body(1 << 31 | fl.FATTR_MODE), setattr_body(fl.FATTR_MODE)[:-1],
    ],
)  # fmt: skip
def test_what_python_changes(mount: Mount, tmp_path: Path, body: bytes) -> None:
    node, _ = in_lower(mount, tmp_path)
    before = on_disk(tmp_path / "l0/d/sample")
    for _ in range(2):
        assert mount.ask(Opcode.SETATTR, node.id, body) is None
        if not node.in_place:
            copy_up(mount.union, node)
    assert on_disk(tmp_path / "upper/d/sample") == before


def test_what_is_not_changed_now(mount: Mount, tmp_path: Path) -> None:
    """A file whose directory is not in the upper, one that a thread copies up, one of a node that was
    superseded, and one that is protected."""
    chmod = setattr_body(fl.FATTR_MODE, mode=0o600)
    assert mount.ask(Opcode.SETATTR, looked_up(mount, "d/f").id, chmod) is None
    node, _ = in_lower(mount, tmp_path)
    mount.running[node] = None
    assert mount.ask(Opcode.SETATTR, node.id, chmod) is None
    mount.running.clear()
    mount.union.nodes.supersede(node)
    assert mount.ask(Opcode.SETATTR, node.id, chmod) is None
    assert os.listdir(tmp_path / "upper/d") == []
    made = mount.changes.mknod(in_upper(mount), b"f", stat.S_IFREG | 0o600, 0, ME)[0]
    made.looked_up()
    mount.union.flags.store(b"%b/upper/made/f" % os.fsencode(tmp_path), 0x10)
    made.know_flags(None)
    assert mount.ask(Opcode.SETATTR, made.id, chmod) is None
    assert made.flags == 0x10
    assert mount.ask(Opcode.SETATTR, 99, chmod) is None


def test_a_failure_after_the_copy_has_appeared(mount: Mount, tmp_path: Path) -> None:
    """Python makes the change again, on the copy: it reports a failure after the notice about the copy."""
    node, native = in_lower(mount, tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    body = setattr_body(fl.FATTR_MTIME)
    with failing_after(8) as steps:
        assert mount.ask(Opcode.SETATTR, node.id, body) is None
    assert steps[-1] in ("appear", "set")
    assert node in mount.told
    assert (tmp_path / "upper/d/sample").exists()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert mount.ask(Opcode.SETATTR, node.id, body) == attributes(mount, node)
    times(native, atime=False, mtime=True)
    assert on_disk(tmp_path / "upper/d/sample") == on_disk(native)


def test_a_change_that_fails(mount: Mount, tmp_path: Path, root: None) -> None:
    """Python makes it again, and reports the error: another process has made the file immutable."""
    node, _ = in_lower(mount, tmp_path)
    copy_up(mount.union, node)
    path = tmp_path / "upper/d/sample"
    chmod = setattr_body(fl.FATTR_MODE, mode=0o600)
    assert mount.ask(Opcode.SETATTR, node.id, chmod) == attributes(mount, node)
    done = subprocess.run(["chattr", "+i", path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"chattr +i: {done.stderr.strip()}")
    try:
        with pytest.raises(PermissionError):
            path.chmod(0o644)
        fds = len(os.listdir("/proc/self/fd"))
        assert mount.ask(Opcode.SETATTR, node.id, setattr_body(fl.FATTR_MODE, mode=0o644)) is None
        assert len(os.listdir("/proc/self/fd")) == fds
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


# -- opening ----------------------------------------------------------------------------------------------


def written(mount: Mount, tmp_path: Path) -> tuple[Node, Path]:
    node = mount.changes.mknod(in_upper(mount), b"f", stat.S_IFREG | 0o600, 0, ME)[0]
    node.looked_up()
    path = tmp_path / "upper/made/f"
    path.write_bytes(b"data")
    return node, path


def asked(flags: int, more: int = 0) -> bytes:
    return struct.pack("=II", flags, more)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND])
def test_an_open_of_an_upper_s_file(mount: Mount, tmp_path: Path, flags: int) -> None:
    node, path = written(mount, tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    assert mount.ask(Opcode.OPEN, node.id, asked(flags)) == b"".join(encode.opened(UNIQUE, 1, 2))
    handle = mount.handles.get(1)
    assert handle is not None
    writes = flags != os.O_RDONLY
    assert (handle.writes, handle.file.writable) == (writes, writes)
    assert handle.maps == (flags & os.O_ACCMODE == os.O_RDWR)
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_RDWR)) == b"".join(encode.opened(UNIQUE, 2, 2))
    other = mount.handles.get(2)
    assert other is not None
    assert other.file.writable
    assert (other.file is handle.file) == writes
    other.file.write(b"new", 0)
    assert path.read_bytes() == b"newa"
    for number in (1, 2):
        assert mount.ask(Opcode.RELEASE, node.id, released(number)) == OK
    assert len(os.listdir("/proc/self/fd")) == fds


def test_an_open_that_truncates(mount: Mount, tmp_path: Path) -> None:
    node, path = written(mount, tmp_path)
    kills = fl.OPEN_KILL_SUIDGID
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_WRONLY | os.O_TRUNC, kills)) is None
    assert path.read_bytes() == b"data"
    answer = mount.ask(Opcode.OPEN, node.id, asked(os.O_WRONLY | os.O_TRUNC))
    assert answer == b"".join(encode.opened(UNIQUE, 1, 2))
    assert path.read_bytes() == b""


def test_what_python_opens_of_the_upper(mount: Mount, tmp_path: Path) -> None:
    """A file that a thread copies, one whose data is in a lower, and one that is protected, for writing."""
    node, path = written(mount, tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    mount.running[node] = None
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_RDONLY)) is None
    mount.running.clear()
    os.setxattr(path, "user.overlay.metacopy", b"")
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_RDONLY)) is None
    os.removexattr(path, "user.overlay.metacopy")
    mount.union.flags.store(os.fsencode(path), 0x10)
    node.know_flags(None)
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_WRONLY)) is None
    assert len(os.listdir("/proc/self/fd")) == fds
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_RDONLY)) is not None


def test_an_open_that_cannot_be_registered(mount: Mount, tmp_path: Path) -> None:
    """It fails; but where the kernel refuses passthrough, the file uses the page cache."""
    node, _ = written(mount, tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    mount.serve(Modes([], OSError(errno.EFAULT, "")))
    answer = mount.ask(Opcode.OPEN, node.id, asked(os.O_RDWR))
    assert answer == b"".join(encode.error(UNIQUE, errno.EFAULT))
    assert (len(mount.handles), len(os.listdir("/proc/self/fd"))) == (0, fds)
    mount.serve(IoModes(-1, uppers=True, keeps=False, through_flags=0, cached_flags=2))
    answer = mount.ask(Opcode.OPEN, node.id, asked(os.O_RDWR))
    assert answer == b"".join(encode.error(UNIQUE, errno.EBADF))
    assert (len(mount.handles), len(os.listdir("/proc/self/fd"))) == (0, fds)
    with open(os.devnull, "wb") as no_device:
        modes = IoModes(no_device.fileno(), uppers=True, keeps=False, through_flags=0, cached_flags=2)
        mount.serve(modes)
        assert mount.ask(Opcode.OPEN, node.id, asked(os.O_RDWR)) == b"".join(encode.opened(UNIQUE, 3, 2))
        assert mount.ask(Opcode.RELEASE, node.id, released(3)) == OK
    assert (modes.refused, modes.registered, modes.passed_through) == (1, 0, 0)


class Unregistered(IoModes):
    """Backing files cannot be unregistered."""

    def __init__(self) -> None:
        super().__init__(-1, uppers=False, keeps=False, through_flags=0, cached_flags=2)

    def released(self, handle: Handle) -> int:
        raise OSError(errno.EBADF, "")


def test_a_close_whose_backing_file_stays_registered(mount: Mount, tmp_path: Path) -> None:
    """The kernel reports a close only once, so the file is closed."""
    node, _ = written(mount, tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    mount.serve(Unregistered())
    assert mount.ask(Opcode.OPEN, node.id, asked(os.O_RDWR))
    answer = mount.ask(Opcode.RELEASE, node.id, released(1))
    assert answer == b"".join(encode.error(UNIQUE, errno.EBADF))
    assert (len(mount.handles), len(os.listdir("/proc/self/fd"))) == (0, fds)


# -- flags --------------------------------------------------------------------------------------------------


def test_a_lower_s_file_is_removed_without_python(mount: Mount, tmp_path: Path) -> None:
    """Its flags are read first; a protected one is not removed."""
    node, _ = in_lower(mount, tmp_path)
    assert node.flags is None
    directory = looked_up(mount, "d")
    assert mount.ask(Opcode.UNLINK, directory.id, b"sample\0") == OK
    assert node.flags == 0
    assert (tmp_path / "upper/d/sample").is_char_device()
    mount.union.flags.store(os.fsencode(tmp_path / "upper/d"), 0x20)
    directory.know_flags(None)
    other = looked_up(mount, "d/f")
    assert mount.ask(Opcode.UNLINK, directory.id, b"f\0") is None
    assert (other.flags, directory.flags, other.unlinked) == (0, 0x20, False)
