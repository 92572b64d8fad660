"""podman, buildah and docker with private stores, on kernel overlayfs, fuse-overlayfs and this mount program.

A store has its own graphroot, runroot and configuration; nothing of the host's is read or written. Containers
have the host's network, and no registry is asked.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.rooms import Done, Room
from tests.support.patience import patient

OURS = "fuse-unionfs"
THEIRS = "fuse-overlayfs"
KERNEL = "overlay"

_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{graph}"
rootless_storage_path = "{graph}"
runroot = "{run}"
[storage.options.overlay]
{options}
"""
_CONTAINERS = """\
[containers]
netns = "host"
default_sysctls = []
default_ulimits = []
{cgroups}
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "{runtime}"
tmp_dir = "{tmp}"
"""
#: The applets of busybox that the images have, as hard links.
APPLETS = (
    "sh", "ls", "cat", "rm", "rmdir", "mkdir", "mv", "cp", "ln", "chmod", "chown", "touch", "stat", "find",
    "echo", "sleep", "id", "test", "true", "dd", "readlink", "md5sum",
)  # fmt: skip


def need(*programs: str) -> None:
    """Skip the test, with the reason, if one of the programs is missing."""
    missing = [name for name in programs if _found(name) is None]
    if missing:
        names = ", ".join(missing)
        pytest.skip(f"not installed: {names}; scripts/test --clients installs what these tests need")


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def mount_program(name: str) -> Path | None:
    """The path of a mount program; None for the kernel's overlayfs."""
    if name == KERNEL:
        return None
    if name == THEIRS:
        need(THEIRS)
        return Path(_found(THEIRS) or "")
    program = Path(sys.executable).with_name(OURS)
    if not program.exists():
        pytest.skip(f"{program} is missing: install the package into the environment that runs the tests")
    return program


class Store:
    """A store of podman's and buildah's; ``program`` mounts, with ``extra`` before its arguments."""

    def __init__(
        self, room: Room, root: Path, program: str = OURS, *, extra: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        need("podman", "buildah", "busybox", "runc", "crun")
        self.room, self.root = room, root
        root.mkdir()
        self.options = list(options)
        # podman refuses a runroot of more than 50 characters
        self.runtime = Path("/run") / root.name
        room.as_root("install", "-d", "-m", "0700", "-o", str(room.uid), self.runtime)
        (root / "tmp").mkdir()
        self.graph = root / "graph"
        self.use(program, extra)
        runtime, cgroups = ("crun", 'cgroups = "disabled"') if room.uid else ("runc", "")
        (root / "containers.conf").write_text(
            _CONTAINERS.format(runtime=runtime, cgroups=cgroups, tmp=self.runtime / "t")
        )
        if room.uid:
            for place in (root, *root.iterdir()):
                os.chown(place, room.uid, room.uid)

    def use(self, program: str, extra: Sequence[str] = ()) -> None:
        """From now on ``program`` mounts; nothing may be mounted now."""
        self.program = program
        path = mount_program(program)
        lines = list(self.options)
        if path is not None:
            if extra:
                words = " ".join(f"'{word}'" for word in (path, *extra))
                path = self.root / program
                path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
                path.chmod(0o755)
            lines.append(f'mount_program = "{path}"')
        (self.root / "storage.conf").write_text(
            _STORAGE.format(graph=self.graph, run=self.runtime / "c", options="\n".join(lines))
        )

    def environment(self) -> dict[str, str]:
        """What podman and buildah find the store by."""
        return {
            "CONTAINERS_STORAGE_CONF": str(self.root / "storage.conf"),
            "CONTAINERS_CONF": str(self.root / "containers.conf"),
            "TMPDIR": str(self.root / "tmp"),
            "XDG_RUNTIME_DIR": str(self.runtime),
            **({"BUILDAH_ISOLATION": "chroot"} if self.room.uid else {}),
        }

    def call(self, *command: str | Path, data: bytes | None = None) -> Done:
        """Run a command with this store, whatever its exit code."""
        return self.room.call(*command, env=self.environment(), data=data)

    def run(self, *command: str | Path, data: bytes | None = None) -> str:
        """The output of a command with this store, which must succeed."""
        done = self.call(*command, data=data)
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def podman(self, *words: str | Path, data: bytes | None = None) -> str:
        """The output of podman."""
        return self.run("podman", *words, data=data)

    def buildah(self, *words: str | Path) -> str:
        """The output of buildah."""
        return self.run("buildah", *words)

    def build(self, name: str, containerfile: str, *words: str | Path, context: Path | None = None) -> str:
        """Build an image with a layer a step; returns the output. ``context`` is empty by default."""
        if context is None:
            context = self.root / "context"
            context.mkdir(exist_ok=True)
        file = self.root / f"{name}.containerfile"
        file.write_text(containerfile)
        return self.podman(
            "build", "--layers", "--force-rm=false", "-q", "-t", name, "-f", file, *words, context
        )

    def import_busybox(self, name: str = "busybox") -> None:
        """Make the image of busybox."""
        self.podman("import", "-", name, data=busybox_tar())

    @contextmanager
    def mounted_image(self, name: str) -> Iterator[Path]:
        """The tree of an image, as this process reaches it; root's stores only."""
        where = self.podman("image", "mount", name).strip()
        try:
            yield self.room.path(where)
        finally:
            self.podman("image", "unmount", name)

    def upper_of(self, container: str) -> Path:
        """The upper directory of a container."""
        shown = self.podman("inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", container)
        return Path(shown.strip())

    def layers(self, image: str) -> list[str]:
        """The ids of an image's layers, the lowest first."""
        return self.podman("inspect", "--format", '{{join .RootFS.Layers "\\n"}}', image).split()


@functools.cache
def busybox_tar() -> bytes:
    """A tar of a root directory with busybox in it, whose applets are hard links."""
    need("busybox")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777)):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, mode
            tar.addfile(member)
        content = Path(_found("busybox") or "").read_bytes()
        member = tarfile.TarInfo("bin/busybox")
        member.mode, member.size = 0o755, len(content)
        tar.addfile(member, io.BytesIO(content))
        for applet in APPLETS:
            member = tarfile.TarInfo(f"bin/{applet}")
            member.type, member.linkname, member.mode = tarfile.LNKTYPE, "bin/busybox", 0o755
            tar.addfile(member)
        for name, text in (("etc/passwd", "root:x:0:0::/root:/bin/sh\n"), ("etc/group", "root:x:0:\n"),
                           ("etc/issue", "busybox\n")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


class Docker:
    """A docker daemon with a private root. ``path``: what comes first in its PATH."""

    def __init__(self, room: Room, root: Path, driver: str, *, first_in_path: Path | None = None) -> None:
        need("dockerd", "docker", "containerd", "busybox")
        self.room, self.root = room, root
        root.mkdir()
        (root / "daemon.json").write_text("{}")
        self.socket = f"unix://{root}/docker.sock"
        environment = room.environment()
        if first_in_path is not None:
            environment["PATH"] = f"{first_in_path}:{environment['PATH']}"
        self.log = root / "log"
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(
                room.command(
                    "dockerd", "--config-file", root / "daemon.json", "--data-root", root / "data",
                    "--exec-root", root / "exec", "--pidfile", root / "pid", "-H", self.socket,
                    "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver", driver,
                ),
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + patient(60)
        while self.call("version").returncode != 0:
            text = self.log.read_text(errors="replace")
            assert self.daemon.poll() is None, text[-4000:]
            assert time.monotonic() < deadline, text[-4000:]
            time.sleep(0.1)

    def call(self, *words: str | Path, data: bytes | None = None) -> Done:
        """Run docker, whatever its exit code."""
        return self.room.call("docker", "-H", self.socket, *words, data=data, env={"DOCKER_BUILDKIT": "0"})

    def run(self, *words: str | Path, data: bytes | None = None) -> str:
        """The output of docker, which must succeed."""
        done = self.call(*words, data=data)
        if done.returncode != 0:
            log = self.log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"docker {words}: {done.stdout}\n{done.stderr}\n{log}")
        return done.stdout

    def close(self) -> None:
        """End the daemon in order."""
        self.daemon.terminate()
        try:
            self.daemon.wait(patient(30))
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
