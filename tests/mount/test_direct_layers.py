"""Layers on every filesystem, including stacked ones: where the kernel refuses backing files, it works
without."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support import snapshot
from tests.support.mounting import Mount, MountFailed, kernel_mounted, mounted, session_reason
from tests.support.world import errno_of

DATA = bytes(range(256)) * 2000
PAIRS = [("tmpfs", "tmpfs"), ("xfs", "xfs"), ("btrfs", "btrfs"), ("xfs", "tmpfs"), ("tmpfs", "ext4")]


def _build(lower: Path) -> None:
    lower.mkdir(parents=True, exist_ok=True)
    (lower / "d").mkdir()
    for name in ("read", "written", "mapped", "renamed", "d/removed", "truncated"):
        (lower / name).write_bytes(DATA)
    os.chmod(lower / "written", 0o600)
    os.setxattr(lower / "written", "trusted.x", b"1")  # user.* on tmpfs came with Linux 6.6


def _use(top: Path) -> None:
    """Read, write, copy up, map, rename, remove; all as on a native filesystem."""
    assert (top / "read").read_bytes() == DATA
    with dc.opened(top / "written", os.O_RDWR) as fd, dc.opened(top / "written") as reader:
        os.pwrite(fd, b"WRITTEN", 1000)
        assert os.pread(reader, 10, 999) == DATA[999:1000] + b"WRITTEN" + DATA[1007:1009]
        os.fsync(fd)
    assert stat.S_IMODE((top / "written").stat().st_mode) == 0o600
    with dc.opened(top / "mapped", os.O_RDWR) as fd, mmap.mmap(fd, len(DATA)) as mapped:
        assert mapped[5000:5100] == DATA[5000:5100]
        mapped[5000:5006] = b"MAPPED"
        mapped.flush()
        assert os.pread(fd, 6, 5000) == b"MAPPED"
    os.rename(top / "renamed", top / "d/renamed")
    assert (top / "d/renamed").read_bytes() == DATA
    assert errno_of(os.stat, top / "renamed") == 2
    os.unlink(top / "d/removed")
    with dc.opened(top / "truncated", os.O_RDWR | os.O_TRUNC) as fd:
        os.write(fd, b"short")
    assert (top / "truncated").read_bytes() == b"short"
    (top / "new").write_bytes(DATA)
    with dc.opened(top / "new", os.O_RDWR) as fd:
        os.ftruncate(fd, 1000)
        os.pwrite(fd, b"more", 2000)
    assert (top / "new").read_bytes() == DATA[:1000] + bytes(1000) + b"more"
    os.rename(top / "new", top / "written")
    assert (top / "written").stat().st_size == 2004
    assert sorted(os.listdir(top)) == ["d", "mapped", "read", "truncated", "written"]
    assert os.listdir(top / "d") == ["renamed"]


@contextlib.contextmanager
def _union(area: Path, session: str, lower: Path, writable: Path) -> Iterator[Mount]:
    for name in ("upper", "work"):
        (writable / name).mkdir(parents=True, exist_ok=True)
    with mounted(
        area, lowers=[lower], upper=writable / "upper", work=writable / "work", session=session
    ) as mount:
        yield mount


def _refused(mount: Mount) -> int:
    return mount.figure("backing_files_refused")


@pytest.mark.parametrize(("lower", "upper"), PAIRS)
def test_disk_filesystems(
    root: None, area: Path, session: str, filesystem: Callable[..., Path], lower: str, upper: str
) -> None:
    """Lower and upper on one filesystem, and on two."""
    below = filesystem(lower)
    above = below if lower == upper else filesystem(upper)
    _build(below / "lower")
    before = snapshot.manifest(below / "lower")
    with _union(area, session, below / "lower", above) as mount:
        _use(mount.mountpoint)
        if session.startswith("direct"):
            assert _refused(mount) == 0
            assert (mount.figure("opened_with_backing_file") > 0) == dc.passes_through(session)
    assert snapshot.manifest(below / "lower") == before


def test_lower_on_kernel_overlayfs(kernel_overlay: None, area: Path, session: str) -> None:
    """The lower is the merged tree of an overlayfs, as in a container's image."""
    _build(area / "ground")
    for name in ("over", "overwork"):
        (area / name).mkdir()
    with kernel_mounted(
        area, lowers=[area / "ground"], upper=area / "over", work=area / "overwork", name="stacked"
    ) as stacked:
        before = snapshot.manifest(stacked.mountpoint)
        with _union(area, session, stacked.mountpoint, area) as mount:
            _use(mount.mountpoint)
            if session.startswith("direct"):
                assert _refused(mount) == 0  # the agreed depth is then 2
        assert snapshot.manifest(stacked.mountpoint) == before


@pytest.mark.parametrize("inner", ["direct-passthrough", "direct-cached"])
def test_lower_on_another_union(root: None, area: Path, session: str, inner: str) -> None:
    """The lower is another union, in any I/O mode: files of one with passthrough cannot be backing files, and
    are read normally."""
    if reason := session_reason(inner):
        pytest.skip(reason)
    _build(area / "ground")
    (area / "ground/own").write_bytes(DATA)
    with _union(area / "inner", inner, area / "ground", area / "inner") as below:
        os.chmod(below.mountpoint / "own", 0o640)  # now in the upper of the inner one
        with _union(area, session, below.mountpoint, area) as mount:
            assert (mount.mountpoint / "own").read_bytes() == DATA
            with dc.opened(mount.mountpoint / "own", os.O_RDWR) as fd:
                os.pwrite(fd, b"OUTER", 0)
            assert (mount.mountpoint / "own").read_bytes()[:6] == b"OUTER" + DATA[5:6]
            os.unlink(mount.mountpoint / "own")
            _use(mount.mountpoint)
        assert (below.mountpoint / "own").read_bytes() == DATA
        assert (below.mountpoint / "written").read_bytes() == DATA
        assert not (area / "inner/upper/written").exists()


def test_upper_on_another_union(root: None, area: Path, session: str) -> None:
    """It works, or the mount is refused with a sentence about the reason."""
    _build(area / "ground")
    inner = "direct-cached" if session_reason("direct-hybrid") else "direct-hybrid"
    with _union(area / "inner", inner, area / "ground", area / "inner") as below:
        (below.mountpoint / "place").mkdir()
        _build(area / "lower")
        refusal = ""
        try:
            with _union(area, session, area / "lower", below.mountpoint / "place") as mount:
                _use(mount.mountpoint)
        except MountFailed as failure:
            refusal = str(failure)
        assert not refusal or ("the daemon ended with 1" in refusal and "Traceback" not in refusal)


def test_files_that_cannot_back_fall_back(kernel_overlay: None, area: Path, session: str) -> None:
    """A lower on too deep a stack: counted, read and written normally, repeatedly."""
    if not dc.passes_through(session, lower=True) or session == "overlay":
        pytest.skip("lower files have no backing files here")
    _build(area / "ground")
    for name in ("o1", "w1", "lower2", "o2", "w2"):
        (area / name).mkdir()
    (area / "flat").mkdir()
    (area / "flat/plain").write_bytes(DATA)
    with (
        kernel_mounted(area, lowers=[area / "ground"], upper=area / "o1", work=area / "w1", name="k1") as one,
        kernel_mounted(area, lowers=[one.mountpoint], upper=area / "o2", work=area / "w2", name="k2") as two,
    ):
        for name in ("upper", "work"):
            (area / name).mkdir()
        with mounted(
            area, lowers=[two.mountpoint, area / "flat"], upper=area / "upper", work=area / "work",
            session=session,
        ) as mount:  # fmt: skip
            for _ in range(3):
                assert (mount.mountpoint / "read").read_bytes() == DATA
            refused = _refused(mount)
            assert refused >= 1
            assert (mount.mountpoint / "plain").read_bytes() == DATA
            assert _refused(mount) == refused  # that file is on a plain filesystem
            with dc.opened(mount.mountpoint / "read") as old:
                with dc.opened(mount.mountpoint / "read", os.O_RDWR) as fd:
                    os.pwrite(fd, b"NEW", 0)
                assert os.pread(old, 3, 0) == b"NEW"
            os.unlink(mount.mountpoint / "plain")
            _use(mount.mountpoint) if (mount.mountpoint / "read").read_bytes() == DATA else None
            assert (mount.mountpoint / "read").read_bytes()[:3] == b"NEW"
            assert dc.wait_for(lambda: mount.figure("open_files") == 0)
            assert mount.figure("backing_files") == 0
