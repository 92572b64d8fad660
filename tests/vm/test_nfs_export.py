"""A union exported by the kernel's NFS server: the same as a directory on ext4 that it exports."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mount import direct_calls as dc
from tests.support import snapshot
from tests.support.mounting import Mount, mounted
from tests.support.world import errno_of
from tests.vm.nfs import Export, Server
from tests.vm.test_nfs import STEPS, build, value


@contextmanager
def _union(area: Path, session: str, home: Path) -> Iterator[Mount]:
    """Mounted below the server's root, with its layers elsewhere."""
    for name in ("upper", "work"):
        (area / name).mkdir(exist_ok=True)
    with mounted(
        home, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        yield mount


def _drop_caches() -> None:
    """The kernel forgets inodes that nothing uses: the union's, and those of the NFS client."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def test_every_step(
    root: None, area: Path, session: str, server: Server, export: Export, exported: Path
) -> None:
    """Through the client; seen on the server; and after the caches are dropped."""
    build(area / "lower")
    before = snapshot.manifest(area / "lower")
    build(export.there)
    with _union(area, session, exported) as mount:
        with server.exporting(mount.mountpoint) as here:
            assert value(here) == value(export.here)
            for step in STEPS:
                step(export.here)
                step(here)
                assert value(here) == value(export.here)
                _drop_caches()
                assert value(here) == value(export.here)
            assert value(mount.mountpoint) == value(export.there)
        after = value(mount.mountpoint)
    assert snapshot.manifest(area / "lower") == before
    with _union(area, session, exported) as mount:
        assert value(mount.mountpoint) == after
        assert os.listdir(area / "work/work") == []


def test_changes_on_the_server(
    root: None, area: Path, session: str, server: Server, exported: Path
) -> None:
    """A client sees them when it opens a file (close-to-open, nfs(5))."""
    build(area / "lower")
    with _union(area, session, exported) as mount, server.exporting(mount.mountpoint) as here:
        assert (here / "read").read_bytes()[:4] == b"read"
        (mount.mountpoint / "read").write_bytes(b"changed")
        assert dc.wait_for(lambda: (here / "read").read_bytes() == b"changed")
        (mount.mountpoint / "d/new").write_bytes(b"new")
        assert dc.wait_for(lambda: "new" in os.listdir(here / "d"))
        (here / "d/new").write_bytes(b"by the client")
        assert (mount.mountpoint / "d/new").read_bytes() == b"by the client"


def test_handles_are_never_of_another_file(
    root: None, area: Path, session: str, server: Server, exported: Path
) -> None:
    """Those of removed files are stale."""
    build(area / "lower")
    names = ["read", "written", "d/one", "made"]
    with _union(area, session, exported) as mount:
        (mount.mountpoint / "made").write_bytes(b"made")
        with server.exporting(mount.mountpoint) as here:
            opened = {name: os.open(here / name, os.O_PATH) for name in names}
            try:
                for name in names:
                    os.unlink(mount.mountpoint / name)
                    (mount.mountpoint / f"{name}-other").write_bytes(b"other")
                _drop_caches()
                for name, fd in opened.items():
                    assert errno_of(os.truncate, f"/proc/self/fd/{fd}", 0) == errno.ESTALE
                    assert (here / f"{name}-other").read_bytes() == b"other"
            finally:
                for fd in opened.values():
                    os.close(fd)


def test_daemon_started_again(root: None, area: Path, session: str, server: Server, exported: Path) -> None:
    """The client mounts it again."""
    build(area / "lower")
    with _union(area, session, exported) as mount, server.exporting(mount.mountpoint) as here:
        before = value(here)
    with _union(area, session, exported) as mount, server.exporting(mount.mountpoint) as here:
        assert value(here) == before
