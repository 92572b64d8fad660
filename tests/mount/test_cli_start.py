"""The start of a mount: interference before it is usable, and failures."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, Place, mounts_at, succeed, unionfs, wait_for
from tests.support import tracing
from tests.support.patience import patient
from unionfs.daemon import live
from unionfs.sys.process import children_of


@contextmanager
def _held(place: Place, call: str, *layers: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`unionfs mount`, whose daemon pauses after it returns from this system call."""
    log = place.root / f"trace-{len(os.listdir(place.root))}"
    words = [*tracing.command(log, call, delay=1), *UNIONFS, "mount", "--session", "direct"]
    with subprocess.Popen(
        [*words, *map(str, layers), str(place.merged)], cwd="/", text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()  # strace, if it has not ended with the daemon


def _daemon(process: subprocess.Popen[str]) -> int:
    """The pid of the daemon started by a held `unionfs mount`: the child of strace's child."""
    pid = process.pid
    for _ in range(2):
        pid = children_of(pid)[0]
    return pid


def test_a_daemon_that_dies_before_the_mount_can_be_used(place: Place) -> None:
    """Its dead mount is removed, and the command reports how it ended."""
    with _held(place, "move_mount", *place.layers) as process:
        assert wait_for(lambda: mounts_at(place.merged) != [])
        os.kill(_daemon(process), signal.SIGKILL)
        assert process.wait(patient(20)) == 1
        assert process.stderr is not None
        assert "ended by signal 9 before the mount was usable" in process.stderr.read()
    assert mounts_at(place.merged) == []


def test_unmounted_before_it_can_be_used(place: Place) -> None:
    """By somebody else, while the daemon has not answered the kernel's first request yet."""
    with _held(place, "move_mount", *place.layers) as process:
        assert wait_for(lambda: mounts_at(place.merged) != [])
        subprocess.run(["umount", "--lazy", place.merged], check=True)
        assert process.wait(patient(20)) == 1
        assert process.stderr is not None
        assert "the mount was gone before it could be used" in process.stderr.read()
    assert mounts_at(place.merged) == []


def test_two_at_once(place: Place) -> None:
    """Neither finds a mount there yet: one of them is refused, and covers nothing."""
    for name in ("upper", "work"):
        (place.root / "other" / name).mkdir(parents=True)
    other = place.root / "other"
    with (
        _held(place, "fsopen", *place.layers) as one,
        _held(place, "fsopen", "-l", place.lower, "-u", other / "upper", "-w", other / "work") as two,
    ):
        assert wait_for(lambda: one.poll() is not None or two.poll() is not None)
        loser, winner = (one, two) if one.poll() is not None else (two, one)
        assert loser.returncode == 1
        assert loser.stderr is not None
        assert "another process is just mounting there" in loser.stderr.read()
        assert wait_for(lambda: any(e.settings.mountpoint == str(place.merged) for e in live.entries()))
        assert len(mounts_at(place.merged)) == 1
        succeed(unionfs("umount", place.merged))
        assert winner.wait(patient(20)) == 0


def test_a_lower_cannot_be_written_through_the_daemon(place: Place) -> None:
    """The daemon's own fd refers to a read-only mount, so a bug causes EROFS, not damage."""
    pid = place.mount()
    wanted = place.lower.stat()
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        st = fd.stat()
        if stat.S_ISDIR(st.st_mode) and os.path.samestat(st, wanted):
            found.append(fd)
            assert os.statvfs(fd).f_flag & os.ST_RDONLY
            for change in (
                lambda fd=fd: (fd / "new").touch(),
                lambda fd=fd: (fd / "base").write_text("x"),
                lambda fd=fd: (fd / "base").unlink(),
                lambda fd=fd: os.chmod(fd / "base", 0o600),
            ):
                with pytest.raises(OSError, match="Read-only file system"):
                    change()
    assert found
    assert (place.lower / "base").read_text() == "base\n"
    succeed(unionfs("umount", place.merged))
