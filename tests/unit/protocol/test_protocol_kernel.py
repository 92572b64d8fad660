"""The bytes, verified by the kernel itself: an in-memory filesystem, mounted, used through system calls.

The server is a separate process (protocol_server.py), which ends with the mount, after a minute, or with the
test; its log shows the requests that the kernel really sent. The decoded values are compared with the offsets
of the header (protocol_abi.py), not with our own tables.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from protocol_abi import NUMBERS, STRUCTS

from unionfs.fuse.protocol import IoMode, decoder, requests
from unionfs.fuse.protocol.request import HEADER_FIELDS
from unionfs.fuse.protocol.requests import InitRequest

SERVER = Path(__file__).with_name("protocol_server.py")
HELLO = "Hello from the other side.\n"
LIBC = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2
RENAME_EXCHANGE = 2
FS_IOC_GETFLAGS = 0x80086601

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse"),
    pytest.mark.timeout(60),
]


@dataclass
class Served:
    """A mount, and the output of its server."""

    path: Path
    log: Path
    process: subprocess.Popen[str]
    io: str = ""

    def messages(self) -> list[dict[str, str]]:
        """Every message so far, in the order of arrival."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def kinds(self) -> list[str]:
        """Their classes' names."""
        return [message["kind"] for message in self.messages()]

    def notify(self, *notifications: list[object]) -> list[object]:
        """Send notifications; returns the result of writev, or an errno's name, for each."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(notifications) + "\n")
        self.process.stdin.flush()
        answer: list[object] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def serve(tmp: Path, *arguments: str) -> Iterator[Served]:
    mountpoint, log = tmp / "mnt", tmp / "log"
    mountpoint.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(mountpoint), str(log), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    served = Served(mountpoint, log, process)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:1] == ["ready"], "the server did not start"
        served.io = words[1]
        yield served
    finally:
        LIBC.umount2(os.fsencode(mountpoint), MNT_DETACH)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
    assert process.returncode == 0


def exercise(root: Path) -> None:
    """Every system call with its own request; asserts that the server's data arrives complete."""
    assert sorted(os.listdir(root))[-1] == "hello"
    assert (root / "hello").read_text() == HELLO
    for name in ("gone", "gone", "none"):
        with pytest.raises(FileNotFoundError):
            (root / name).stat()
    for names in range(300):  # more than one answer of READDIR
        (root / f"file-with-a-longer-name-{names:04}").touch()
    assert len(os.listdir(root)) == len(set(os.listdir(root))) >= 301

    (root / "dir").mkdir(0o750)
    assert (root / "dir").stat().st_mode == 0o40750
    (root / "link").symlink_to("a/target")
    assert os.readlink(root / "link") == "a/target"
    os.mknod(root / "null", 0o20644, os.makedev(1, 300))
    assert (root / "null").lstat().st_rdev == os.makedev(1, 300)
    os.link(root / "hello", root / "hello2")
    assert (root / "hello2").stat().st_nlink == 2

    fd = os.open(root / "new", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
    data = bytes(range(256)) * 8192  # 2 MiB: several WRITEs of the largest size
    assert os.write(fd, data) == len(data)
    os.fsync(fd)
    os.fdatasync(fd)
    assert os.pread(fd, len(data), 0) == data
    os.posix_fallocate(fd, 0, 3 << 20)
    assert os.fstat(fd).st_size == 3 << 20
    assert os.lseek(fd, 5, os.SEEK_DATA) == 5
    os.ftruncate(fd, 1000)
    assert os.fstat(fd).st_size == 1000
    copy = os.open(root / "copy", os.O_RDWR | os.O_CREAT, 0o600)
    assert os.copy_file_range(fd, copy, 500, 100, 7) == 500
    assert os.pread(copy, 600, 7) == data[100:600]
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(copy, fcntl.LOCK_EX)
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_RDLCK, 0, 0, 10, 0))
    assert struct.unpack("hhqqi", answer)[0] in (fcntl.F_UNLCK, fcntl.F_WRLCK)
    assert struct.unpack("I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4))) == (0x10,)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(0) == [(fd, select.POLLIN)]
    os.close(copy)
    os.close(fd)
    unnamed = os.open(root, os.O_TMPFILE | os.O_RDWR, 0o600)
    assert os.fstat(unnamed).st_nlink == 0
    os.close(unnamed)

    os.setxattr(root / "hello", b"user.a/b", b"\0value\xff")
    assert os.getxattr(root / "hello", b"user.a/b") == b"\0value\xff"
    assert os.listxattr(root / "hello") == ["user.a/b"]
    os.removexattr(root / "hello", b"user.a/b")
    os.rename(root / "new", root / "dir" / "new")
    assert LIBC.renameat2(-100, bytes(root / "copy"), -100, bytes(root / "dir" / "new"), RENAME_EXCHANGE) == 0
    assert (root / "copy").stat().st_size == 1000
    os.utime(root / "hello", ns=(-5 * 10**9 + 3, 10**18 + 7))
    st = (root / "hello").stat()
    assert (st.st_atime_ns, st.st_mtime_ns) == (-5 * 10**9 + 3, 10**18 + 7)
    (root / "hello").chmod(0o604)
    os.chown(root / "hello", 4321, 8765)
    st = (root / "hello").stat()
    assert (st.st_mode, st.st_uid, st.st_gid) == (0o100604, 4321, 8765)
    (root / "hello2").unlink()
    (root / "dir" / "new").unlink()
    (root / "dir").rmdir()
    vfs = os.statvfs(root)
    assert (vfs.f_bsize, vfs.f_frsize, vfs.f_blocks, vfs.f_bfree, vfs.f_bavail) == (4096, 512, 111, 99, 88)
    assert (vfs.f_files, vfs.f_ffree, vfs.f_namemax) == (77, 66, 255)
    if hasattr(LIBC, "statx"):
        buffer = ctypes.create_string_buffer(256)
        assert LIBC.statx(-100, bytes(root / "hello"), 0, 0xFFF, buffer) == 0
        assert struct.unpack_from("qI", buffer, 80) == (1234567890, 42)  # stx_btime
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


EVERYWHERE = {
    "InitRequest", "Lookup", "Getattr", "Setattr", "Readlink", "Symlink", "Mknod", "Mkdir", "Unlink", "Rmdir",
    "Rename", "Rename2", "Link", "Open", "Read", "Write", "Statfs", "Fsync", "Setxattr", "Getxattr",
    "Listxattr", "Removexattr", "Opendir", "Readdirplus", "Fsyncdir", "Create", "Ioctl", "Poll", "Fallocate",
    "Lseek", "Tmpfile", "Forget",
}  # fmt: skip


def check_against_header(messages: list[dict[str, str]]) -> set[str]:
    """Decode each message again, and compare every number with the value at the header's offset."""
    decode = decoder()
    seen = set()
    for message in messages:
        raw = bytes.fromhex(message["hex"])
        if len(raw) == 512:  # cut off in the log
            continue
        request = decode(memoryview(raw), len(raw))
        header = STRUCTS["fuse_in_header"]
        for name in ("unique", "nodeid", "uid", "gid", "pid"):
            offset, size = header.fields[name]
            assert getattr(request, name) == int.from_bytes(raw[offset : offset + size], sys.byteorder)
        offset, size = header.fields["opcode"]
        assert request.number == int.from_bytes(raw[offset : offset + size], sys.byteorder)
        if isinstance(request, InitRequest) or request.body is None:
            continue
        own = request[len(HEADER_FIELDS) :]
        names = [
            name
            for name in STRUCTS[request.body].fields
            if not name.startswith(("padding", "unused", "dummy", "reserved"))
        ]
        for value, name in zip(own, names, strict=False):
            offset, size = STRUCTS[request.body].fields[name]
            found = raw[header.size + offset : header.size + offset + size]
            signed = name in ("atime", "mtime", "ctime") or (request.body, name) == (
                "fuse_lseek_in",
                "offset",
            )
            assert value == int.from_bytes(found, sys.byteorder, signed=signed), (request, name)
        seen.add(type(request).__name__)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        ("--io", "hybrid"),
        ("--io", "passthrough"),
        ("--io", "cached"),
        ("--io", "auto", "--unprivileged"),
        ("--io", "auto", "--old-copy"),
    ],
    ids=" ".join,
)
def test_every_request_that_a_system_call_makes(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with serve(tmp_path, *arguments) as served:
        exercise(served.path)
        kinds = set(served.kinds())
    assert kinds >= EVERYWHERE
    assert kinds & {"CopyFileRange", "CopyFileRange64"}
    assert "CopyFileRange" in kinds or "--old-copy" not in arguments
    assert not kinds & {"Unknown", "Access"}
    assert not kinds & {"Getlk", "Setlk", "Setlkw"}
    assert served.kinds().count("Flush") <= 1
    if served.io == IoMode.CACHED:
        assert served.kinds().count("Open") == 1, "ENOSYS is for ever"
        assert "Release" not in kinds
    assert served.kinds().count("Opendir") == 1
    assert len(check_against_header(served.messages())) > 20


def test_passthrough(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"0123456789" * 1000)
    with serve(tmp_path, "--io", "passthrough", "--backing", str(backing)) as served:
        with open(served.path / "backed", "r+b", buffering=0) as file:
            assert file.read(20) == b"01234567890123456789"
            file.write(b"written")
        assert backing.read_bytes()[20:27] == b"written"
        assert not {"Read", "Write"} & set(served.kinds())


def test_notifications(tmp_path: Path) -> None:
    """The kernel accepts each of them (all bytes of it), and has the expected effect."""
    with serve(tmp_path, "--io", "cached") as served:
        root = served.path
        hello = (root / "hello").stat().st_ino
        assert (root / "hello").read_text() == HELLO
        reads = served.kinds().count("Read")
        assert (root / "hello").read_text() == HELLO
        assert served.kinds().count("Read") == reads, "cached"

        assert served.notify(["inval_inode", hello, 0, 0]) == [40]
        assert (root / "hello").read_text() == HELLO
        assert served.kinds().count("Read") == reads + 1

        assert served.notify(["store", hello, 6, "stored text"]) == [40 + 11]
        assert (root / "hello").read_text() == HELLO[:6] + "stored text" + HELLO[17:]

        assert served.notify(["resend"]) == [16]
        assert served.notify(["inval_inode", 999, 0, 0]) == ["ENOENT"]
        assert "Unknown" not in served.kinds()


def test_interrupt(tmp_path: Path) -> None:
    with serve(tmp_path) as served:
        child = subprocess.Popen(
            [sys.executable, "-c", f"import os; os.stat({str(served.path / 'slow')!r})"],
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: served.messages()[-1]["repr"].endswith("name=b'slow')"))
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        wait_for(lambda: served.kinds()[-1] == "Interrupt")


def test_numbers_used_here() -> None:
    assert NUMBERS["FUSE_ROOT_ID"] == 1
    assert errno.ENOSYS == 38
    assert requests.Lookup.opcode == NUMBERS["FUSE_LOOKUP"]


def wait_for(true: object) -> None:
    """Wait until `true()`, for at most 10 s."""
    assert callable(true)
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
