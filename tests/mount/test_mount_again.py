"""A mount where another one was: over a dead one, and after one whose daemon is about to end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import (
    FUSE_UNIONFS,
    UNIONFS,
    Place,
    call,
    files_of,
    gone,
    kill,
    listed,
    mounts_at,
    refused,
    session_words,
    succeed,
    unionfs,
    wait_for,
)
from tests.mount.user_calls import Host
from tests.support import syscalls


class TestMountAgain:
    def test_over_a_dead_mount(self, place: Place, session: str) -> None:
        pid = place.mount(*session_words(session))
        (place.merged / "new").write_text("x")
        kill(pid)
        assert place.mount(*session_words(session)) != pid
        assert mounts_at(place.merged) == ["fuse.unionfs"]
        assert (place.merged / "new").read_text() == "x"
        assert not files_of(pid)

    def test_by_fuse_unionfs(self, place: Place) -> None:
        kill(place.mount())
        succeed(call(FUSE_UNIONFS, "-o", place.data, place.merged))
        assert mounts_at(place.merged) == ["fuse.unionfs"]
        assert (place.merged / "base").read_text() == "base\n"

    def test_over_its_own_lower(self, place: Place) -> None:
        succeed(unionfs("mount", "-l", place.lower, "-u", place.upper, "-w", place.work, place.lower))
        (pid,) = (
            one["pid"] for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(place.lower)
        )
        kill(pid)
        succeed(unionfs("mount", "-l", place.lower, "-u", place.upper, "-w", place.work, place.lower))
        assert mounts_at(place.lower) == ["fuse.unionfs"]
        assert (place.lower / "base").read_text() == "base\n"

    def test_the_same_upper_elsewhere(self, place: Place, session: str) -> None:
        pid = place.mount(*session_words(session))
        (place.merged / "new").write_text("x")
        kill(pid)
        elsewhere = place.root / "elsewhere"
        elsewhere.mkdir()
        succeed(unionfs("mount", *session_words(session), *place.layers, elsewhere))
        assert (elsewhere / "new").read_text() == "x"

    def test_a_user_over_a_dead_mount(self, host: Host) -> None:
        pid = host.mount()
        kill(pid)
        assert host.mount() != pid

    def test_a_user_over_a_dead_mount_of_root(self, host: Host, place: Place) -> None:
        host.root("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run/unionfs")
        environment = f"PYTHONPATH={Path(__file__).parents[2]}"
        host.root("env", environment, *UNIONFS, "mount", "-l", place.lower, place.merged)
        (name,) = (n for n in host.root("ls", "/run/unionfs").stdout.split() if n.endswith(".json"))
        kill(int(name.partition("-")[0]))
        refused(host.unionfs("mount", *place.layers, place.merged), str(place.merged))
        assert f" {place.merged} fuse.unionfs" in host.root("cat", "/proc/mounts").stdout


class TestEndingDaemons:
    @pytest.mark.slow_on("direct-passthrough", "direct-cached")
    @pytest.mark.parametrize("command", [["umount"], ["umount", "-l"]])
    def test_umount_and_mount(self, place: Place, session: str, command: list[str]) -> None:
        """umount(2) returns before the daemon has closed the layers."""
        for number in range(3):
            place.mount(*session_words(session))
            (place.merged / f"new{number}").write_text("x")
            subprocess.run([*command, place.merged], check=True)
        place.mount(*session_words(session))
        assert len(os.listdir(place.merged)) == 5

    def test_a_daemon_that_notices_late(self, place: Place, session: str) -> None:
        pid = place.mount(*session_words(session))
        os.kill(pid, signal.SIGSTOP)
        syscalls.umount(place.merged)
        waiting = subprocess.Popen([*UNIONFS, "mount", *map(str, place.layers), str(place.merged)])
        try:
            # It waits for the daemon, so it has a pidfd of it.
            assert wait_for(lambda: waits_for(pid))
            assert waiting.poll() is None
        finally:
            os.kill(pid, signal.SIGCONT)
        assert waiting.wait(20) == 0
        assert mounts_at(place.merged) == ["fuse.unionfs"]

    @pytest.mark.slow_on("direct-passthrough", "direct-cached")
    def test_a_daemon_that_was_told_to_end(self, place: Place, session: str) -> None:
        """Elsewhere or at the same place: the mount is still there when the next one begins."""
        elsewhere = place.root / "elsewhere"
        elsewhere.mkdir()
        pid = place.mount(*session_words(session))
        for where in (place.merged, elsewhere, elsewhere):
            os.kill(pid, signal.SIGTERM)
            succeed(unionfs("mount", *session_words(session), *place.layers, where))
            assert mounts_at(where) == ["fuse.unionfs"]
            assert gone(pid)
            (pid,) = (
                one["pid"] for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(where)
            )

    def test_a_daemon_that_serves_on(self, place: Place) -> None:
        elsewhere = place.root / "elsewhere"
        elsewhere.mkdir()
        pid = place.mount()
        refused(unionfs("mount", *place.layers, elsewhere), "is in use by the active mount", f"(pid {pid})")
        with (place.merged / "base").open():
            subprocess.run(["umount", "-l", place.merged], check=True)
            refused(
                unionfs("mount", *place.layers, elsewhere),
                f"upper {place.upper} is still in use",
                f"(pid {pid}) goes on",
            )
        succeed(unionfs("mount", *place.layers, elsewhere))
        shutil.copy(elsewhere / "base", elsewhere / "copy")
        assert (place.upper / "copy").exists()


def waits_for(pid: int) -> bool:
    """Whether another process has a pidfd of this one."""
    for fd in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with suppress(OSError):
            if f"\nPid:\t{pid}\n" in fd.read_text():
                return True
    return False
