"""An attacker's container: `unionfs run` with the host's programs in it, as root and as a user.

A successful attack must not harm the machine of the tests: it opens for writing without writing, sets the
mode that a file already has, and works on copies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount import cli_calls, user_calls
from tests.mount.cli_calls import UNIONFS, Done
from tests.mount.run_calls import PROGRAMS, Containers, cleaned

PYTHON = "/usr/bin/python3"


class Prison:
    """Calls of `unionfs run`. `area` is a directory of the host that must stay unchanged."""

    def __init__(self, area: Path, runtime: str, host: user_calls.Host | None = None) -> None:
        self.area = area
        self.box = Containers(area / "prison", runtime)
        self.host = host
        self.path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.is_root = host is None
        if host is not None:
            for path in (self.box.base, *self.box.base.rglob("*"), self.box.host, self.box.area):
                os.chown(path, user_calls.UID, user_calls.UID, follow_symlinks=False)

    def words(self, *arguments: str | Path) -> list[str | Path]:
        """The call's arguments, with the host's programs mounted."""
        words = ["run", "--runtime", self.box.runtime, "--root", self.box.root, "-l", self.box.base]
        return [*words, *self.box.system(), *arguments]

    def call(self, *arguments: str | Path) -> Done:
        """Run `unionfs run` with these arguments."""
        return self.unionfs(*self.words(*arguments))

    def unionfs(self, *words: str | Path) -> Done:
        """Run `unionfs` with these arguments."""
        if self.host is None:
            return cli_calls.unionfs(*words, env={"PATH": self.path})
        return self.host.run("env", f"PATH={self.path}", *self.host.command, *map(str, words))

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start `unionfs run` with these arguments; its output comes through a pipe."""
        words = [*UNIONFS, *map(str, self.words(*arguments))]
        environment = {**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), "PATH": self.path}
        if self.host is not None:
            uid = str(user_calls.UID)
            words = ["nsenter", "-t", str(self.host.holder.pid), "-m", "setpriv", "--reuid", uid, "--regid",
                     uid, "--clear-groups", *self.host.command, *words[len(UNIONFS) :]]  # fmt: skip
            environment["XDG_RUNTIME_DIR"] = str(self.host.runtime)
            environment["PYTHONPATH"] += f":{sysconfig.get_path('purelib')}"
        return subprocess.Popen(
            words, cwd="/", env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    @property
    def is_bubblewrap(self) -> bool:
        return self.box.runtime == "bubblewrap"

    def copy_runtime(self) -> Path:
        """Let `unionfs run` use a copy of the runtime that belongs to its caller."""
        copy = self.box.host / PROGRAMS[self.box.runtime]
        shutil.copy(shutil.which(copy.name) or "", copy)
        if not self.is_root:
            os.chown(copy, user_calls.UID, user_calls.UID)
        self.path = f"{self.box.host}:{self.path}"
        return copy

    def sh(self, script: str, *options: str | Path) -> Done:
        """Run a shell script in a temporary container."""
        return self.call("--rm", *options, "--", "/usr/bin/bash", "-c", script)

    def python(self, script: str, *options: str | Path) -> Done:
        """Run a Python script in a temporary container."""
        return self.call("--rm", *options, "--", PYTHON, "-c", script)

    def out(self, done: Done) -> str:
        """The output of a call, which must have succeeded."""
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return done.stdout


@contextmanager
def prison(area: Path, who: str, runtime: str) -> Iterator[Prison]:
    """A prison whose inmate is `root` or `user`."""
    for program in (PROGRAMS[runtime], "busybox"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    (area / "prison").mkdir()
    if who == "root":
        with cleaned(area):
            yield Prison(area, runtime)
        return
    if shutil.which("fusermount3") is None or not os.path.exists("/etc/mtab"):
        pytest.skip("an ordinary user cannot mount here")
    with cli_calls.place(area) as place:
        host = user_calls.Host(place)
        try:
            if not host.find_python():
                pytest.skip("an ordinary user cannot read this repository, or no Python with pyfuse3")
            yield Prison(area, runtime, host)
        finally:
            host.holder.kill()
            host.holder.communicate()
