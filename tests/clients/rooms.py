"""A room: mount and PID namespaces in which container engines run, as root or as an ordinary user.

Nothing in it is shared with the host's engines (/run, /dev/shm), and when it closes, the kernel ends all its
processes and with them their mounts: engines leave monitors, daemons and mounts behind.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.patience import patient
from tests.support.worker import REPOSITORY
from unionfs.sys.process import children_of

SECONDS = patient(500.0)
Done = subprocess.CompletedProcess[str]

ROOTLESS_UID = 1234
ROOTLESS_NAME = "unionfs-rootless"
SUBORDINATE_UID, SUBORDINATE_GID, SUBORDINATES = 200_000, 300_000, 65_536
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# The first process of the PID namespace inherits orphans; with SIGCHLD ignored none stays a zombie.
_INIT = "echo; exec env --ignore-signal=CHLD sleep infinity"
# What closes the way to a directory is covered by an empty filesystem, except for that directory.
_OPEN_WAY = """
mount --bind "$1" /mnt
mount -t tmpfs -o mode=755 none "$0"
mkdir -p "$1"
mount --move /mnt "$1"
"""


class Room:
    """One room; commands run as root, or as a user with subordinate ids and the directory ``home``."""

    def __init__(self, home: Path, *, rootless: bool = False) -> None:
        self.home = home
        home.mkdir(parents=True)
        self.uid = ROOTLESS_UID if rootless else 0
        self.holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc",
             "--propagation", "private", "sh", "-c", _INIT],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.holder.stdout is not None
        self.holder.stdout.readline()
        self.holder.stdout.close()
        self.init = children_of(self.holder.pid)[0]
        try:
            self._furnish(rootless=rootless)
        except BaseException:
            self.close()
            raise

    def _furnish(self, *, rootless: bool) -> None:
        # Copies of others' mounts would keep their daemons alive.
        self.as_root("sh", "-c", "umount -a -l -t fuse.unionfs,fuse.fuse-overlayfs || true")
        for path in ("/run", "/dev/shm", "/var/lib/containers"):
            if Path(path).is_dir():
                self.as_root("mount", "-t", "tmpfs", "-o", "mode=1777", "none", path)
        if not rootless:
            return
        files = self.home / "etc"
        files.mkdir()
        taken = any(one.pw_uid == self.uid for one in pwd.getpwall())
        if taken or any(one.gr_gid == self.uid for one in grp.getgrall()):
            pytest.skip(f"the id {self.uid}, which these tests use, is somebody's on this host")
        user, group = (Path(path).read_text() for path in ("/etc/passwd", "/etc/group"))
        (files / "passwd").write_text(
            f"{user}{ROOTLESS_NAME}:x:{self.uid}:{self.uid}::{self.home}:/bin/sh\n"
        )
        (files / "group").write_text(f"{group}{ROOTLESS_NAME}:x:{self.uid}:\n")
        (files / "subuid").write_text(f"{ROOTLESS_NAME}:{SUBORDINATE_UID}:{SUBORDINATES}\n")
        (files / "subgid").write_text(f"{ROOTLESS_NAME}:{SUBORDINATE_GID}:{SUBORDINATES}\n")
        for path in files.iterdir():
            if not Path("/etc", path.name).exists():
                pytest.skip(f"/etc/{path.name} is missing: install the package uidmap")
            self.as_root("mount", "--bind", path, f"/etc/{path.name}")
        os.mknod(files / "fuse", stat.S_IFCHR, os.makedev(10, 229))
        (files / "fuse").chmod(0o666)
        self.as_root("mount", "--bind", files / "fuse", "/dev/fuse")
        self.as_root("sh", "-c", "! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified")
        os.chown(self.home, self.uid, self.uid)
        for path in {Path(sys.prefix), Path(sys.base_prefix), REPOSITORY}:
            closed = [one for one in reversed(path.parents) if not one.stat().st_mode & stat.S_IXOTH]
            if closed:
                self.as_root("sh", "-ec", _OPEN_WAY, closed[0], path)

    def command(self, *command: str | Path, root: bool = False) -> list[str]:
        """The command line that runs a command in the room."""
        enter = ["nsenter", "-t", str(self.init), "-m", "-p", f"--wd={self.home}", "--"]
        if self.uid and not root:
            enter += ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups", "--"]
        return [*enter, *map(str, command)]

    def environment(self) -> dict[str, str]:
        """The environment of commands in the room."""
        return {
            **os.environ, "PATH": _PATH, "HOME": str(self.home), "LC_ALL": "C.UTF-8",
            "XDG_RUNTIME_DIR": "/run", "TMPDIR": str(self.home),
            "DBUS_SESSION_BUS_ADDRESS": "/dev/null",
        }  # fmt: skip

    def call(
        self, *command: str | Path, env: Mapping[str, str] | None = None, data: bytes | None = None,
        root: bool = False,
    ) -> Done:  # fmt: skip
        """Run a command to its end; ``data`` is its input.

        Its output goes to files: the monitors and daemons that it leaves keep what it had.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            done = subprocess.run(
                self.command(*command, root=root), env={**self.environment(), **(env or {})},
                input=data or b"", stdout=out, stderr=err, timeout=SECONDS,
            )  # fmt: skip
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="surrogateescape"))
        return Done(done.args, done.returncode, *texts)

    def as_root(self, *command: str | Path) -> str:
        """The output of a command that root runs in the room, which must succeed."""
        done = self.call(*command, root=True)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def path(self, path: str | Path) -> Path:
        """A path of the room as this process reaches it, with what is mounted there in the room."""
        return Path(f"/proc/{self.init}/root") / str(path).lstrip("/")

    def mounts(self) -> str:
        """mountinfo(5) of the room."""
        return Path(f"/proc/{self.init}/mountinfo").read_text(errors="surrogateescape")

    def close(self) -> None:
        """End all processes and mounts of the room; does nothing more if called again."""
        self.holder.kill()  # --kill-child: the first process of the PID namespace ends with it
        self.holder.wait()


@contextmanager
def room(home: Path, *, rootless: bool = False) -> Iterator[Room]:
    """A room that is closed at the end."""
    made = Room(home, rootless=rootless)
    try:
        yield made
    finally:
        made.close()
