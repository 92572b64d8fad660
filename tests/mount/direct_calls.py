"""System calls of the direct session's tests, and simple checks of a daemon."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.mounting import Mount
from tests.support.patience import patient
from tests.support.world import World

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
"""FALLOC_FL_* of include/uapi/linux/falloc.h."""

STATX_BASIC, STATX_BTIME = 0x7FF, 0x800
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_FOLLOW = 0x400
AT_FDCWD = -100
MIB = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Statx(NamedTuple):
    """Some of struct statx (include/uapi/linux/stat.h); times are (seconds, nanoseconds)."""

    mask: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    btime: tuple[int, int]
    mtime: tuple[int, int]


def statx(
    path: Path | None = None, *, fd: int = AT_FDCWD, mask: int = STATX_BASIC | STATX_BTIME, flags: int = 0
) -> Statx:
    """statx(2) of a path, or of a descriptor."""
    buffer = ctypes.create_string_buffer(256)
    name = b"" if path is None else os.fsencode(path)
    if path is None:
        flags |= AT_EMPTY_PATH
    if _libc.statx(fd, name, flags, ctypes.c_uint(mask), buffer) != 0:
        _raise()
    raw = buffer.raw
    got, _, _, nlink, uid, gid, mode = struct.unpack_from("=IIQIIIH", raw)
    ino, size, blocks = struct.unpack_from("=QQQ", raw, 32)
    btime, mtime = struct.unpack_from("=qI", raw, 80), struct.unpack_from("=qI", raw, 112)
    return Statx(got, nlink, uid, gid, mode, ino, size, blocks, btime, mtime)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes."""
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def link_fd(fd: int, path: Path) -> None:
    """Give an open file a name, as in linkat(2) for O_TMPFILE (os.link never follows a symlink here)."""
    source = b"/proc/self/fd/%d" % fd
    _check(_libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW))


def open_errno(path: Path | str, flags: int) -> int:
    """The errno of an open(2); closes the file."""
    try:
        os.close(os.open(path, flags, 0o600))
    except OSError as error:
        return error.errno or 0
    return 0


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """An open file, closed even if the test fails: it would keep the mount busy."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def open_stream(path: Path) -> ctypes.c_void_p:
    """opendir(3)."""
    _libc.opendir.restype = ctypes.c_void_p
    stream = _libc.opendir(os.fsencode(path))
    if not stream:
        _raise()
    return ctypes.c_void_p(stream)


def close_stream(stream: ctypes.c_void_p) -> None:
    """closedir(3)."""
    _check(_libc.closedir(stream))


def seek_stream(stream: ctypes.c_void_p, where: int) -> None:
    """seekdir(3)."""
    _libc.seekdir(stream, ctypes.c_long(where))


def read_stream(stream: ctypes.c_void_p, limit: int | None = None) -> list[tuple[bytes, int]]:
    """(name, telldir(3) after it) of the next entries of a directory stream."""
    _libc.readdir.restype = ctypes.c_void_p
    _libc.telldir.restype = ctypes.c_long
    found: list[tuple[bytes, int]] = []
    while limit is None or len(found) < limit:
        entry = _libc.readdir(stream)
        if not entry:
            break
        found.append((ctypes.string_at(entry + 19), _libc.telldir(stream)))
    return found


def _check(result: int) -> None:
    if result != 0:
        _raise()


def _raise() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


def natively(made: World, calls: Callable[[Path], list[Any]]) -> list[Any]:
    """The results of the calls on the union, which must equal the native ones and must not be errors."""
    found = made.as_native(calls)
    assert isinstance(found, list), f"the calls themselves fail: {found}"
    return found


# -- features of a session, and resources of its daemon


def is_direct(session: str) -> bool:
    """Whether it speaks the kernel's protocol itself, or is not FUSE (kernel overlayfs as replacement)."""
    return session.startswith("direct") or session == "overlay"


def need_direct(session: str, what: str) -> None:
    """Skip a session that does not support a request."""
    if not is_direct(session):
        pytest.skip(f"{session} carries no {what}")


def passes_through(session: str, *, lower: bool = False) -> bool:
    """Whether upper (or lower) files are opened with a backing file."""
    return session == "direct-passthrough" or (session == "direct-hybrid" and not lower)


def descriptors(mount: Mount) -> int:
    """The number of open fds of the daemon."""
    return len(os.listdir(f"/proc/{mount.pid}/fd"))


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition becomes true in time: the kernel sends RELEASE and FORGET at any time."""
    end = time.monotonic() + patient(seconds)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def many_open_files(count: int) -> Iterator[None]:
    """Raise this process's limit of open files: the default is 1024."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], max(before[0], count)), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def mapped(fd: int, size: int) -> Iterator[int]:
    """The address of a shared mapping of a file. Unlike Python's mmap it holds no other fd of it open."""
    _libc.mmap.restype = ctypes.c_void_p
    arguments = ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, ctypes.c_long(0)
    address = _libc.mmap(None, *arguments)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        yield address
    finally:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def msync(address: int, size: int) -> None:
    """msync(2) of a mapping, MS_SYNC."""
    if _libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(size), 4) != 0:
        raise OSError(ctypes.get_errno(), "msync")


def shared_bytes(path: Path) -> int:
    """The bytes of a file in blocks shared with another file: FIEMAP, as shown by filefrag(8)."""
    done = subprocess.run(["filefrag", "-v", "-b1", "-s", path], capture_output=True, text=True, check=True)
    return sum(
        int(line.split(":")[3]) for line in done.stdout.splitlines() if "shared" in line.rpartition(":")[2]
    )


def can_reflink(path: Path) -> bool:
    """Whether the filesystem shares extents between files (FICLONE)."""
    one, other = path / ".one", path / ".other"
    try:
        one.write_bytes(b"x" * 4096)
        with one.open("rb") as source, other.open("wb") as target:
            fcntl.ioctl(target, 0x40049409, source.fileno())
    except OSError:
        return False
    else:
        return True
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
