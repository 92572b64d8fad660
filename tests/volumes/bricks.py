"""A GlusterFS volume of one brick, served from this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import wait_for
from tests.support import areas
from tests.support.patience import patient
from tests.support.turns import only_one


def need(*programs: str) -> None:
    """Skip the test without these programs."""
    for program in programs:
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/lib/openssh") is None:
            pytest.skip(f"{program} is not installed")


class Brick:
    """The volume and its servers. Their state in fixed places is on private mounts in another namespace."""

    name = "gv0"

    def __init__(self, area: Path) -> None:
        self._home = area / "glusterd"
        self._mounts: list[Path] = []
        for name in ("state", "log", "run", "brick"):
            (self._home / name).mkdir(parents=True)
        hide = " && ".join(
            f"mkdir -p {there} && mount --bind {self._home}/{here} {there}"
            for here, there in (
                ("state", "/var/lib/glusterd"),
                ("log", "/var/log/glusterfs"),
                ("run", "/var/run/gluster"),
            )
        )
        inside = ["unshare", "-m", "--propagation", "private", "sh", "-c"]
        log = self._home / "log/glusterd.log"
        self._daemon = subprocess.Popen(
            [*inside, f"{hide} && exec glusterd -N --log-level WARNING --log-file {log}"],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def call(self, *words: str) -> bool:
        """Whether a gluster command succeeds."""
        command = ["nsenter", "-t", str(self._daemon.pid), "-m", "gluster", "--mode=script", *words]
        return subprocess.run(command, capture_output=True, timeout=patient(60), check=False).returncode == 0

    def begin(self) -> None:
        """Make and start the volume."""
        if not wait_for(lambda: self.call("volume", "list"), 20):
            pytest.skip("glusterd does not come up here")
        # gluster refuses a brick on localhost.
        shown = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
        if not any(
            self.call("volume", "create", self.name, f"{one}:{self._home}/brick", "force")
            for one in shown.stdout.split()
        ):
            pytest.skip("gluster makes no volume here: this machine has no address but localhost")
        self.start()

    def start(self) -> None:
        """Start the server of the files."""
        assert self.call("volume", "start", self.name, "force")

    def stop(self) -> None:
        """Kill the server of the files."""
        for pid in self._servers(b"glusterfsd"):
            os.kill(pid, signal.SIGKILL)

    def mount(self, at: Path) -> None:
        """Mount the volume, by a client of its own."""
        at.mkdir()
        log = self._home / f"log/{at.name}.log"
        words = ["glusterfs", "--volfile-server=127.0.0.1", f"--volfile-id={self.name}", f"--log-file={log}"]
        subprocess.run([*words, at], check=True, timeout=patient(60))
        self._mounts.append(at)

    def end(self) -> None:
        for at in self._mounts:
            areas.detach(at)
        self.call("volume", "stop", self.name, "force")
        for pid in self._servers(b"gluster"):
            os.kill(pid, signal.SIGKILL)
        self._daemon.kill()
        self._daemon.wait()

    def _servers(self, program: bytes) -> list[int]:
        """The processes whose command lines begin with a program and contain this test's directory."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            first = os.path.basename(words.split(b"\0")[0])
            if os.fsencode(self._home) in words and first.startswith(program):
                found.append(int(path.parent.name))
        return found


@contextmanager
def served(area: Path) -> Iterator[Brick]:
    """A volume that is started."""
    need("glusterd", "gluster", "glusterfs")
    if Path("/var/lib/glusterd").is_dir() and any(Path("/var/lib/glusterd/vols").glob("*")):
        pytest.skip("this machine has GlusterFS volumes of its own")
    with only_one("gluster"):  # its port
        brick = Brick(area)
        try:
            brick.begin()
            yield brick
        finally:
            brick.end()
