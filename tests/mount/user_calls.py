"""Calling the command line as an ordinary user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import SECONDS, Done, Place, call, gone, listed, succeed, wait_for

# fusermount3 requires a user with a name; every Debian has this one
UID = pwd.getpwnam("nobody").pw_uid

_pythons: list[str] = []
"""The one that this user may run, when it has been found."""


class Host:
    """An ordinary user in a mount namespace where he may open /dev/fuse, whatever its mode on this host."""

    def __init__(self, place: Place) -> None:
        self.place = place
        device = place.root / "fuse"
        os.mknod(device, stat.S_IFCHR, os.makedev(10, 229))
        device.chmod(0o666)
        self.device = device
        self.runtime = place.root / "runtime"
        self.runtime.mkdir()
        for path in (self.runtime, place.lower, place.lower2, place.upper, place.work, place.merged):
            os.chown(path, UID, UID)
        for path in (place.lower / "base", place.lower2 / "deep"):
            os.chown(path, UID, UID)
        self.holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 300"],
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None
        self.holder.stdout.readline()
        self.root("mount", "--bind", device, "/dev/fuse")
        self.command: tuple[str, ...] = ()

    def find_python(self) -> bool:
        """Find a Python that the user may run; a virtual environment's may be in root's home."""
        if not _pythons:
            for python in (sys.executable, "/usr/bin/python3"):
                if self.run("sh", "-c", f"{python} -c 'import pyfuse3, unionfs.cli.main'").returncode == 0:
                    _pythons.append(python)
                    break
        self.command = (*_pythons, "-m", "unionfs")
        return bool(_pythons)

    def root(self, *command: str | Path, check: bool = True) -> Done:
        """Run a command as root in the namespace."""
        done = call(("nsenter", "-t", str(self.holder.pid), "-m"), *command)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def run(self, *command: str | Path, cwd: Path | None = None, timeout: float = SECONDS) -> Done:
        """Run a command as the user."""
        return call(
            ("nsenter", "-t", str(self.holder.pid), "-m", f"--wd={cwd or '/'}",
             "setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--"),
            *command,
            timeout=timeout,
            env={
                "XDG_RUNTIME_DIR": str(self.runtime),
                "PYTHONPATH": f"{cli_calls.REPOSITORY}:{sysconfig.get_path('purelib')}",
            },
        )  # fmt: skip

    def unionfs(self, *arguments: str | Path, cwd: Path | None = None) -> Done:
        """Run `unionfs` as the user."""
        return self.run(*self.command, *arguments, cwd=cwd)

    def mount(self, *extra: str) -> int:
        """Mount the place; returns the daemon's pid."""
        succeed(self.unionfs("mount", *self.place.layers, *extra, self.place.merged))
        (mine,) = listed(self.unionfs("ls", "--json"))
        return int(mine["pid"])

    def options(self) -> set[str]:
        """The options of the mount in the mount table."""
        line = self.root("grep", f" {self.place.merged} ", "/proc/mounts").stdout
        return set(line.split()[3].split(","))


@contextmanager
def ordinary_user(place: Place) -> Iterator[Host]:
    """An ordinary user of this host, whose mount is removed at the end. Skips the test, with the reason, if
    he cannot mount.
    """
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    if not os.path.exists("/etc/mtab"):
        pytest.skip("fusermount3 wants /etc/mtab (a link to /proc/self/mounts), which is not there")
    found = Host(place)
    pids: list[int] = []
    try:
        if not found.find_python():
            pytest.skip("an ordinary user cannot read this repository, or no Python with pyfuse3")
        yield found
        if any((found.runtime / "unionfs").glob("*.json")):
            pids = [int(one["pid"]) for one in listed(found.unionfs("ls", "--json"))]
    finally:
        found.root("umount", "-l", str(place.merged), check=False)
        for pid in pids:
            if not wait_for(lambda pid=pid: gone(pid), 5):
                os.kill(pid, signal.SIGKILL)
        found.holder.kill()
        found.holder.communicate()
