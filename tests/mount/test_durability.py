"""Calls that make data durable, and their order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, gone, succeed, unionfs, wait_for
from tests.mount.user_calls import UID, Host
from tests.support.mounting import mounted
from tests.support.tracing import RENAMES, SYNCS, Trace, in_order, traced

ALL = f"{SYNCS},{RENAMES}"
_COPY_UP = ("fsync", "work/work/#"), ("rename", "work/work>, \"#")


def _layers(area: Path) -> dict[str, Path]:
    for name in ("lower/d", "upper", "work"):
        (area / name).mkdir(parents=True)
    for name in ("f", "d/g"):
        (area / "lower" / name).write_bytes(b"data")
    return {"upper": area / "upper", "work": area / "work"}


def _sync(path: Path, flags: int, sync: Callable[[int], None]) -> None:
    fd = os.open(path, flags)
    try:
        if flags & os.O_RDWR:
            os.pwrite(fd, b"more", 0)
        sync(fd)
    finally:
        os.close(fd)


def _syncs(trace: Trace, part: str) -> list[str]:
    """The names of the syncing calls with this text in their arguments."""
    return [call.name for call in trace.take() if "sync" in call.name and part in call.arguments]


def test_requests(root: None, area: Path, session: str) -> None:
    """fsync(2) and fdatasync(2) reach the upper's files and directories, never a lower's; a copy-up is on
    disk before it appears."""
    with mounted(area, lowers=[area / "lower"], session=session, **_layers(area)) as mount:  # type: ignore[arg-type]
        top = mount.mountpoint
        with traced(mount.pid, area / "trace", ALL) as trace:
            _sync(top / "f", os.O_RDONLY, os.fsync)
            _sync(top / "d", os.O_RDONLY, os.fsync)
            assert trace.take() == []
            _sync(top / "f", os.O_RDWR, os.fsync)
            calls = trace.take()
            assert in_order(calls, *_COPY_UP, ("fsync", "upper/f>")), calls
            _sync(top / "f", os.O_RDWR, os.fdatasync)
            assert _syncs(trace, "upper/f>") == ["fdatasync"]
            _sync(top / "f", os.O_RDONLY, os.fsync)
            assert _syncs(trace, "upper/f>") == ["fsync"]
            os.chmod(top / "d/g", 0o600)
            assert in_order(trace.take(), *_COPY_UP)
            _sync(top / "d", os.O_RDONLY, os.fsync)
            assert _syncs(trace, "upper/d>") == ["fsync"]
            _sync(top, os.O_RDONLY, os.fsync)
            assert _syncs(trace, "upper>") == ["fsync"]


@pytest.mark.parametrize("end", ["umount", "SIGTERM", "SIGTERM in use"])
def test_the_end(place: Place, end: str) -> None:
    """The daemon itself syncs the upper's filesystem, also when it disconnects its users."""
    pid = place.mount()
    (place.merged / "new").write_bytes(b"data")
    with traced(pid, place.root / "trace", SYNCS) as trace:
        if end == "umount":
            succeed(unionfs("umount", place.merged))
        else:
            with (place.merged / "new" if "use" in end else place.upper / "new").open("rb"):
                os.kill(pid, signal.SIGTERM)
                assert wait_for(lambda: gone(pid))
        assert in_order(trace.take(), ("syncfs", "upper>"))


def test_volatile(place: Place) -> None:
    """Requests, copy-ups and the end do not wait for a disk."""
    pid = place.mount("-o", "volatile")
    with traced(pid, place.root / "trace", SYNCS) as trace:
        _sync(place.merged / "base", os.O_RDWR, os.fsync)
        _sync(place.merged, os.O_RDONLY, os.fsync)
        succeed(unionfs("umount", place.merged))
        assert trace.take() == []


@pytest.mark.parametrize("loop", ["direct", "pyfuse3"])
def test_bound_storage_of_a_volatile_union(host: Host, place: Place, loop: str) -> None:
    """Only the upper is volatile: bound storage is not the union's."""
    shared = place.root / "shared"
    (shared / "d").mkdir(parents=True)
    (shared / "f").write_bytes(b"data")
    for path in (place.root, shared, shared / "d", shared / "f"):
        os.chown(path, UID, UID)
    pid = host.mount("--session", loop, "-o", "volatile", "-v", f"{shared}:/data")
    with traced(pid, place.root / "trace", SYNCS) as trace:
        script = (
            "import os, sys\n"
            "for name, flags in (('f', os.O_RDWR), ('d', os.O_RDONLY)):\n"
            "    fd = os.open(f'{sys.argv[1]}/{name}', flags)\n"
            "    os.fsync(fd)\n"
        )
        succeed(host.run(host.command[0], "-c", script, place.merged / "data"))
        assert [call.name for call in trace.take()] == ["fsync", "fsync"]
        succeed(host.run(host.command[0], "-c", "import os, sys; os.mknod(sys.argv[1]); "
                         "os.fsync(os.open(sys.argv[1], 1))", place.merged / "new"))  # fmt: skip
        assert trace.take() == []
    succeed(host.unionfs("umount", place.merged))
