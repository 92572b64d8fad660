"""Calls that make data durable, and their order."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.cli_calls import UNIONFS, Place, gone, mounts_at, refused, succeed, unionfs, wait_for
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
            # The daemon may still be writing its entry in the registry.
            assert [call for call in trace.take() if str(area) in call.arguments] == []
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


def test_sync_command(filesystem: Callable[..., Path], area: Path, session: str) -> None:
    """`unionfs sync` returns when data that only the kernel's cache had is on the disk."""
    disk = filesystem("ext4", 64 << 20)
    for name in ("upper", "work"):
        (disk / name).mkdir()
    (area / "lower").mkdir()
    (area / "lower/f").write_bytes(b"low" * 5000)
    device = next(
        Path(line.split()[0]) for line in Path("/proc/mounts").read_text().splitlines() if str(disk) in line
    )
    new, copied = secrets.token_bytes(4096), secrets.token_bytes(4096)
    layers = {"lowers": [area / "lower"], "upper": disk / "upper", "work": disk / "work"}
    with mounted(area, session=session, **layers) as mount:  # type: ignore[arg-type]
        (mount.mountpoint / "new").write_bytes(new)
        with (mount.mountpoint / "f").open("r+b") as file:
            file.write(copied)
            file.flush()
            before = _on_disk(device)
            assert new not in before
            assert copied not in before
            succeed(unionfs("sync", mount.mountpoint))
            after = _on_disk(device)
            assert new in after
            assert copied in after


def _on_disk(device: Path) -> bytes:
    """What a disk holds, and not its filesystem's cache."""
    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, 64 << 20, 0)
    finally:
        os.close(fd)


def test_sync_command_of_what_is_no_live_mount(place: Place) -> None:
    refused(unionfs("sync", place.merged), "is not an active unionfs mount")
    pid = place.mount()
    (place.merged / "new").write_bytes(b"data")
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    refused(unionfs("sync", place.merged), "has died", "unionfs cleanup")
    succeed(unionfs("umount", place.merged))


def test_sync_command_while_the_daemon_is_killed(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, signal.SIGSTOP)
    asking = subprocess.Popen([*UNIONFS, "sync", str(place.merged)], stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(1)
        assert asking.poll() is None
        os.kill(pid, signal.SIGKILL)
        _, text = asking.communicate(timeout=20)
        assert asking.returncode == 1
        assert f"its daemon (pid {pid}) ended" in text
    finally:
        asking.kill()
        asking.wait()
        unionfs("umount", place.merged)


def test_sync_command_of_a_user(host: Host, place: Place) -> None:
    host.mount()
    succeed(host.run("sh", "-c", f"echo data > {place.merged}/new"))
    succeed(host.unionfs("sync", place.merged))
    succeed(host.unionfs("umount", place.merged))


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
                if "use" in end:
                    assert wait_for(lambda: mounts_at(place.merged) == [])
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


@pytest.mark.parametrize("again", [(), ("-o", "volatile"), ("-o", "ro")])
def test_a_volatile_upper_is_refused_after_a_crash(place: Place, again: tuple[str, ...]) -> None:
    """By overlayfs, too; but not after an orderly end."""
    for end in ("umount", "SIGTERM"):
        pid = place.mount("-o", "volatile")
        (place.merged / end).touch()
        assert os.path.isfile(place.work / "work/incompat/volatile/dirty")
        if end == "umount":
            succeed(unionfs("umount", place.merged))
        else:
            os.kill(pid, signal.SIGTERM)
        assert wait_for(lambda pid=pid: gone(pid))
        assert os.listdir(place.work / "work") == []
    pid = place.mount("-o", "volatile")
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    succeed(unionfs("umount", place.merged))
    before = place.snapshot()
    refused(
        unionfs("mount", *place.layers, *again, place.merged),
        "was left by a volatile mount that did not end cleanly", f"remove {place.work}/work/incompat",
    )  # fmt: skip
    assert place.snapshot() == before
    kernel = ["mount", "-t", "overlay", "overlay", "-o", place.data, str(place.merged)]
    assert subprocess.run(kernel, capture_output=True).returncode != 0
    shutil.rmtree(place.work / "work/incompat")
    place.mount()
    assert sorted(os.listdir(place.upper)) == ["SIGTERM", "umount"]


def test_a_volatile_mount_that_fails_leaves_no_mark(place: Place) -> None:
    refused(unionfs("mount", *place.layers, "-o", "volatile,context=nonsense", place.merged))
    assert sorted(os.listdir(place.work / "work")) == []


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
