"""File handles: name_to_handle_at(2) and open_by_handle_at(2), as a server of NFS uses them.

A handle leads to the file that it was made of, or is ESTALE; never to another file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import syscalls
from tests.support.mounting import Mount, mounted
from tests.support.world import World, outcome

MakeWorld = Callable[..., World]

_MAX_HANDLE = 128
_libc = ctypes.CDLL(None, use_errno=True)


class _Handle(ctypes.Structure):
    """struct file_handle; include/linux/fs.h."""

    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_char * _MAX_HANDLE))


def _handle_of(path: Path) -> _Handle:
    handle = _Handle(bytes=_MAX_HANDLE)
    mount = ctypes.c_int()
    if _libc.name_to_handle_at(-100, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount), 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return handle


def _open(root: Path, handle: _Handle, flags: int = os.O_RDONLY) -> int:
    mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = int(_libc.open_by_handle_at(mount, ctypes.byref(handle), flags))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return fd
    finally:
        os.close(mount)


def _read(root: Path, handle: _Handle) -> bytes:
    fd = _open(root, handle)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def _stale(root: Path, handle: _Handle) -> bool:
    try:
        os.close(_open(root, handle, os.O_PATH))
    except OSError as error:
        return error.errno == errno.ESTALE
    return False


def test_a_handle_opens_its_file(world: MakeWorld) -> None:
    """A lower's file, the upper's, a directory; after a copy-up and a rename, too."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/lower").write_bytes(b"lower")

    made = world(build)

    def calls(root: Path) -> list[object]:
        (root / "d/own").write_bytes(b"own")
        handles = [_handle_of(root / "d/lower"), _handle_of(root / "d/own")]
        found: list[object] = [_read(root, handle) for handle in handles]
        (root / "d/lower").write_bytes(b"changed")
        os.rename(root / "d/own", root / "renamed")
        found += [_read(root, handle) for handle in handles]
        directory = _handle_of(root / "d")
        fd = _open(root, directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found.append(sorted(os.listdir(fd)))
        finally:
            os.close(fd)
        return found

    if made.mount.session == "direct-passthrough":
        pytest.skip("an open for writing makes another node of a file that is open in passthrough")
    made.as_native(calls)


@pytest.mark.parametrize("forgotten", [False, True], ids=["known", "forgotten"])
def test_a_handle_of_a_removed_file_is_stale(world: MakeWorld, forgotten: bool) -> None:
    """Also when other files, and one with its name, are created afterwards: an upper reuses inode numbers."""

    def build(root: Path) -> None:
        for name in ("lower1", "lower2"):
            (root / name).write_bytes(b"lower")
        (root / "d").mkdir()

    made = world(build)

    def states(root: Path, handles: list[_Handle]) -> list[bool]:
        """Which are stale. The kernel keeps an inode without a name while a notification uses it."""
        for _ in range(100):
            stale = [_stale(root, handle) for handle in handles]
            if all(stale[:1] + stale[2:]):
                break
            time.sleep(0.02)
        return stale

    def calls(root: Path) -> list[bool]:
        handles = []
        kept = -1
        for turn in range(10):
            for name in ("own1", "own2"):
                (root / name).write_bytes(b"own")
            (root / "dir").mkdir()
            handles += [_handle_of(root / name) for name in ("own1", "own2", "dir")]
            if turn == 0:
                handles += [_handle_of(root / name) for name in ("lower1", "lower2", "d")]
                (root / "lower1").unlink()
                os.rename(root / "own2", root / "lower2")
                if not forgotten:  # a notification may drop its dentry, and with that the inode
                    kept = os.open(root / "lower2", os.O_PATH)
                (root / "d").rmdir()
                (root / "d").mkdir()
            else:
                (root / "own2").unlink()
            (root / "own1").unlink()
            (root / "dir").rmdir()
            if forgotten:
                syscalls.drop_caches(root)
            for name in ("lower1", "other1", "other2"):
                (root / name).write_bytes(b"another")
            # the file that was renamed over another one lives
            stale = states(root, handles)
            assert stale == [index != 1 for index in range(len(handles))] or (forgotten and all(stale))
            for name in ("lower1", "other1", "other2"):
                (root / name).unlink()
        if kept >= 0:
            os.close(kept)
        return stale

    if not forgotten:
        made.as_native(calls)
    else:
        calls(made.union)


def test_handles_of_an_earlier_mount_are_stale(root: None, area: Path, session: str) -> None:
    """Nodes have other ids in every mount; the same id is no proof of the same file."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    layers = {"lowers": [area / "lower"], "upper": area / "upper", "work": area / "work"}
    (area / "lower/low").write_bytes(b"low")

    def handles_of(mount: Mount) -> list[_Handle]:
        return [_handle_of(mount.mountpoint / name) for name in names]

    names = ["low", *(f"own{number}" for number in range(20))]
    with mounted(area, session=session, **layers) as mount:  # type: ignore[arg-type]
        for name in names[1:]:
            (mount.mountpoint / name).write_bytes(b"own")
        handles = handles_of(mount)
        for name in names[1:10]:
            (mount.mountpoint / name).unlink()
    with mounted(area, session=session, **layers) as mount:  # type: ignore[arg-type]
        for number in range(30):
            (mount.mountpoint / f"new{number}").write_bytes(b"new")
        for name in os.listdir(mount.mountpoint):
            os.stat(mount.mountpoint / name)
        assert all(_stale(mount.mountpoint, handle) for handle in handles)


def _never(root: Path) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_handle_of_a_forgotten_file(world: MakeWorld) -> None:
    """It is stale or leads to its own file, never to another."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        for number in range(20):
            (root / f"d/f{number}").write_bytes(b"%d" % number)

    made = world(build)
    handles = [_handle_of(made.union / f"d/f{number}") for number in range(20)]
    for _ in range(3):
        syscalls.drop_caches(made.union)
        for number, handle in enumerate(handles):
            found = outcome(lambda root, handle=handle: _read(root, handle), made.union)
            assert found in (b"%d" % number, outcome(_never, made.union))
        for number in range(20):
            assert (made.union / f"d/f{number}").read_bytes() == b"%d" % number
