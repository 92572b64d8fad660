"""The markers of the disk format; test_posix_layers.py compares them with kernel overlayfs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.world import errno_of
from unionfs.union.markers import Markers

MARKERS = Markers(b"user.overlay.")
#: XATTR_NAME_MAX of include/uapi/linux/limits.h
LONGEST = 255


@pytest.fixture
def fd(area: Path) -> Iterator[int]:
    """A directory."""
    fd = os.open(area, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_names_of_xattrs() -> None:
    """As ovl_own_xattr_list and ovl_xattr_escape_name (fs/overlayfs/xattrs.c)."""
    assert MARKERS.is_private(b"user.overlay.opaque")
    assert not MARKERS.is_private(b"user.overlay.overlay.opaque")
    assert not MARKERS.is_private(b"user.other")
    assert MARKERS.stored_name(b"user.other") == b"user.other"
    assert MARKERS.stored_name(b"user.overlay.mine") == b"user.overlay.overlay.mine"
    stored = [b"user.overlay.opaque", b"user.overlay.overlay.mine", b"user.other"]
    assert MARKERS.shown_names(stored) == [b"user.overlay.mine", b"user.other"]


def test_who_may_redirect() -> None:
    """Any user can set user.* xattrs (fs/overlayfs/params.c: userxattr turns redirects off)."""
    assert not MARKERS.follows_redirects
    assert Markers(b"trusted.overlay.").follows_redirects


def test_files_without_data(area: Path) -> None:
    (area / "whole").touch()
    whole, link = os.fsencode(area / "whole"), os.fsencode(area / "link")
    assert MARKERS.metacopy_value(whole) is None
    os.setxattr(whole, MARKERS.metacopy, b"")
    os.symlink(whole, link)
    assert MARKERS.metacopy_value(whole) == MARKERS.metacopy_value(link, follow=True) == b""
    assert MARKERS.metacopy_value(link) is None
    os.setxattr(whole, MARKERS.metacopy, b"\0\x03\0")
    assert errno_of(MARKERS.metacopy_value, whole) == errno.EIO


def test_names_that_cannot_be_stored() -> None:
    fits = b"user.overlay." + b"x" * (LONGEST - len(b"user.overlay.overlay."))
    assert len(MARKERS.stored_name(fits)) == LONGEST
    assert errno_of(MARKERS.stored_name, fits + b"x") == errno.EOPNOTSUPP
    assert errno_of(MARKERS.stored_name, b"user.overlay.") == errno.EINVAL


def _is_whiteout(fd: int, name: bytes, markers: Markers = MARKERS) -> bool:
    return markers.is_whiteout(os.stat(name, dir_fd=fd, follow_symlinks=False), fd, name)


def test_what_is_a_whiteout(root: None, area: Path, fd: int) -> None:
    """A character device 0/0, or an empty file with the xattr; no other file."""
    os.mknod(area / "device", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(area / "null", stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(area / "block", stat.S_IFBLK, os.makedev(0, 0))
    for name, content in (("marked", b""), ("full", b"x"), ("empty", b"")):
        (area / name).write_bytes(content)
    (area / "dir").mkdir()
    (area / "link").symlink_to("marked")
    os.mkfifo(area / "fifo")
    markers = Markers(b"trusted.overlay.")
    for name in ("marked", "full", "dir", "fifo"):
        os.setxattr(area / name, markers.whiteout, b"y")
    names = (b"device", b"null", b"block", b"marked", b"full", b"empty", b"dir", b"link", b"fifo")
    assert [name for name in names if _is_whiteout(fd, name, markers)] == [b"device", b"marked"]


def test_opaque_and_redirect(area: Path, fd: int) -> None:
    """``x`` is not opaque, but allows xattr whiteouts; ``y`` stays ``y``."""
    assert MARKERS.directory(fd)[:2] == (False, None)
    os.setxattr(area, "user.other", b"1")
    assert MARKERS.directory(fd)[:2] == (False, None)
    MARKERS.allow_xattr_whiteouts(fd)
    assert MARKERS.opaque_value(fd) == b"x"
    assert MARKERS.directory(fd)[:2] == (False, None)
    MARKERS.set_opaque(fd)
    os.setxattr(area, MARKERS.redirect, b"/elsewhere")
    assert MARKERS.directory(fd)[:2] == (True, b"/elsewhere")
    MARKERS.allow_xattr_whiteouts(fd)
    assert MARKERS.opaque_value(fd) == b"y"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EACCES, errno.E2BIG])
def test_xattrs_that_cannot_be_listed(fd: int, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A filesystem without xattrs has no markers; with too many (listxattr(2), E2BIG) each is read."""
    MARKERS.set_opaque(fd)
    os.setxattr(b"/proc/self/fd/%d" % fd, MARKERS.redirect, b"r")

    def fails(*_: object, **__: object) -> list[str]:
        raise OSError(code, "")

    monkeypatch.setattr(os, "listxattr", fails)
    assert MARKERS.directory(fd)[:2] == ((True, b"r") if code == errno.E2BIG else (False, None))


@pytest.mark.parametrize("code", [errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EIO])
def test_xattrs_that_cannot_be_read(
    area: Path, fd: int, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """An unreadable whiteout xattr is an error; opaque counts as none (ovl_get_dir_xattr_val)."""
    (area / "empty").touch()
    MARKERS.set_opaque(fd)

    def fails(*_: object, **__: object) -> bytes:
        raise OSError(code, "")

    monkeypatch.setattr(os, "getxattr", fails)
    assert MARKERS.opaque_value(fd) is None
    if code == errno.EIO:
        assert errno_of(_is_whiteout, fd, b"empty") == errno.EIO
    else:
        assert not _is_whiteout(fd, b"empty")


def test_making_whiteouts(root: None, area: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device where permitted, else an empty file that its owner may read; never over another object."""
    MARKERS.make_whiteout(fd, b"device", [fd])
    assert _is_whiteout(fd, b"device")
    assert stat.S_ISCHR((area / "device").lstat().st_mode)
    assert MARKERS.opaque_value(fd) is None
    assert errno_of(MARKERS.make_whiteout, fd, b"device", [fd]) == errno.EEXIST

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "")

    monkeypatch.setattr(os, "mknod", refused)
    MARKERS.make_whiteout(fd, b"file", [fd])
    assert MARKERS.opaque_value(fd) == b"x"
    st = (area / "file").lstat()
    assert (st.st_size, st.st_mode) == (0, stat.S_IFREG | 0o600)
    assert _is_whiteout(fd, b"file")
    assert os.getxattr(area / "file", MARKERS.whiteout) == b"y"
    assert errno_of(MARKERS.make_whiteout, fd, b"file", [fd]) == errno.EEXIST
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "setxattr", refused)
    assert errno_of(MARKERS.make_whiteout, fd, b"no-xattrs", [fd]) == errno.EPERM
    assert not (area / "no-xattrs").exists()
    assert len(os.listdir("/proc/self/fd")) == before
