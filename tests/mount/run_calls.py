"""Calls of `unionfs run`: from pipes, and on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, wait_for
from tests.support import areas, mounting
from tests.support.patience import patient
from unionfs.daemon import live

BUSYBOX = next((path for path in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(path)), None)


PROGRAMS = {"bubblewrap": "bwrap", "crun": "crun"}
"""The programs of the runtimes."""

_Box = TypeVar("_Box", bound="Containers")
_Life = TypeVar("_Life", bound="Life")


class Containers:
    """A root filesystem with one busybox, a storage root, and calls of `unionfs run`."""

    def __init__(self, area: Path, runtime: str) -> None:
        assert BUSYBOX is not None
        self.area, self.runtime = area, runtime
        self.base = area / "base"
        for name in ("bin", "etc", "tmp", "root", "data"):
            (self.base / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.base / "bin/busybox")
        for name in (
            "sh", "cat", "echo", "ls", "id", "hostname", "sleep", "kill", "env", "touch", "rm", "stty", "tty",
            "df", "mount", "ip", "dd", "true", "seq", "mkdir", "mknod", "head", "chmod", "chown", "ln", "mv",
            "umount", "test", "grep",
        ):  # fmt: skip
            (self.base / "bin" / name).symlink_to("busybox")
        (self.base / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (self.base / "data/seed").write_text("seed\n")
        self.root = area / "storage"
        self.host = area / "host"
        self.host.mkdir()

    def environment(self, **more: str) -> dict[str, str]:
        return {"UNIONFS_ROOT": str(self.root), **more}

    def words(self, *arguments: str | Path, lower: bool = True) -> list[str | Path]:
        return ["run", "--runtime", self.runtime, *(["-l", self.base] if lower else []), *arguments]

    def run(self, *arguments: str | Path, lower: bool = True, **more: str) -> Done:
        """Run a command to its end."""
        words = self.words(*arguments, lower=lower)
        return cli_calls.unionfs(*words, env=self.environment(**more))

    def say(self, *arguments: str | Path, lower: bool = True) -> str:
        """The output of a command, which must succeed."""
        done = self.run(*arguments, lower=lower)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def start(self, *arguments: str | Path, prefix: Sequence[str] = (), **more: str) -> subprocess.Popen[str]:
        """Start a command; its output comes through a pipe.

        No signal is ignored, unless by a `prefix`: pytest may have been started by nohup(1).
        """
        return subprocess.Popen(
            ["env", "--default-signal", *prefix, *mounting.command(), *map(str, self.words(*arguments))],
            cwd="/", text=True,
            env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), **self.environment(**more)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def system(self) -> list[str]:
        """Options that mount the host's programs and libraries, read-only."""
        paths = [path for path in ("/usr", "/lib", "/lib64") if os.path.exists(path)]
        return [f"--mount=type=bind,src={path},dst={path},readonly" for path in paths]

    def kept(self) -> list[str]:
        """The names of the existing containers."""
        path = self.root / "containers"
        return sorted(os.listdir(path)) if path.is_dir() else []

    def is_over(self) -> bool:
        """Whether no union is mounted any more."""
        return areas.mounts_below(self.area) == []


class Life(Containers):
    """Detached containers, and what is done with them."""

    def call(self, *words: str | Path, **more: str) -> Done:
        if words[0] == "run":
            words = ("run", "--runtime", self.runtime, *words[1:])
        return cli_calls.unionfs(*words, env=self.environment(**more))

    def ok(self, *words: str | Path) -> str:
        return cli_calls.succeed(self.call(*words))

    def detached(self, name: str, script: str) -> None:
        assert self.ok("run", "-d", "--name", name, "-l", self.base, "--", "sh", "-c", script) == f"{name}\n"

    def state(self, name: str) -> dict[str, object]:
        (found,) = [one for one in json.loads(self.ok("ps", "-a", "--json")) if one["name"] == name]
        return dict(found)

    def said(self, name: str, text: str) -> bool:
        return text in self.ok("logs", name)


@contextmanager
def containers(kind: type[_Box], area: Path, runtime: str) -> Iterator[_Box]:
    """Containers of that class, which are ended; skips the test without busybox or the runtime."""
    if BUSYBOX is None or shutil.which(PROGRAMS[runtime]) is None:
        pytest.skip(f"busybox or {PROGRAMS[runtime]} is not installed")
    found = kind(area, runtime)
    with cleaned(area):
        yield found


@contextmanager
def lives(kind: type[_Life], area: Path, runtime: str) -> Iterator[_Life]:
    """The same for detached ones, which are removed."""
    with containers(kind, area, runtime) as found:
        yield found
        for name in found.kept():
            found.call("rm", "-f", name)


@contextmanager
def cleaned(area: Path) -> Iterator[None]:
    """End daemons below an area, like `cli_calls.place`."""
    try:
        yield
    finally:
        daemons = [e for e in live.entries() if e.settings.mountpoint.startswith(f"{area}/")]
        areas.detach(area)
        for entry in daemons:
            if not wait_for(lambda entry=entry: not entry.is_alive(), 3):
                os.kill(entry.pid, signal.SIGKILL)


class Terminal:
    """A command on a separate terminal with 31 lines of 97 characters."""

    def __init__(self, box: Containers, *arguments: str | Path, shell: str | None = None) -> None:
        """`shell`: a bash script around the call, which is its `"$@"`."""
        words = ["env", "--default-signal", *mounting.command(), *map(str, box.words(*arguments))]
        if shell is not None:
            words = ["bash", "--norc", "--noprofile", "-c", shell, "bash", *words]
        environment = {**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), **box.environment()}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                self.resize(31, 97, fd=0)
                os.chdir("/")
                os.execvpe(words[0], words, environment)
            finally:
                os._exit(99)
        self.seen = b""

    def resize(self, lines: int, columns: int, fd: int | None = None) -> None:
        """Set another size."""
        size = struct.pack("HHHH", lines, columns, 0, 0)  # struct winsize
        fcntl.ioctl(self.fd if fd is None else fd, termios.TIOCSWINSZ, size)

    def settings(self) -> list[object]:
        """The terminal's settings."""
        return termios.tcgetattr(self.fd)

    def wait_for(self, text: bytes, seconds: float = 20) -> bytes:
        """Read until the text appears, and drop it; returns the text before it."""
        deadline = time.monotonic() + patient(seconds)
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    break
        assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def runs(self, name: str) -> bool:
        """Whether a process of that name is in the foreground of the container's terminal."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                command, _, rest = path.read_text().partition("(")[2].rpartition(")")
                found[int(path.parent.name)] = command, *map(int, rest.split()[1:6])  # proc_pid_stat(5)
        for command, parent, group, _, terminal, foreground in found.values():
            if command == name and terminal and group == foreground:
                while parent in found and parent != self.pid:
                    parent = found[parent][1]
                if parent == self.pid:
                    return True
        return False

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + patient(20)
        while time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.05)[0]:
                with suppress(OSError):
                    self.seen += os.read(self.fd, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"it does not end: {self.seen!r}")
