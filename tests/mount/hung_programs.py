"""Lowers on filesystems of real programs: sshfs, rclone and glusterfs, with servers on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.hung_calls import wait_until
from tests.support.mounting import is_mounted
from unionfs.sys.process import children_of

_SSHD = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {where}/host
AuthorizedKeysFile {where}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""
_BRICK = """\
volume posix
  type storage/posix
  option directory {brick}
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume index
  type features/index
  option index-base {brick}/.glusterfs/indices
  subvolumes locks
end-volume
volume brick
  type performance/io-threads
  subvolumes index
end-volume
volume server
  type protocol/server
  option transport-type socket
  option transport.address-family unix
  option transport.socket.listen-path {brick}.sock
  option auth.addr.brick.allow *
  option auth-path brick
  subvolumes brick
end-volume
"""
_CLIENT = """\
volume client{number}
  type protocol/client
  option transport-type socket
  option transport.address-family unix
  option transport.socket.connect-path {brick}.sock
  option remote-host localhost
  option remote-subvolume brick
  option ping-timeout {patience}
end-volume
"""
_REPLICATED = """\
volume replicated
  type cluster/replicate
  option afr-pending-xattr first,second
  subvolumes client0 client1
end-volume
"""


def need(*programs: str) -> None:
    """Skip the test where one of them is missing."""
    for program in programs:
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{program} is not installed")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _below(pid: int) -> Iterator[int]:
    """A process and those that it has started."""
    yield pid
    for child in children_of(pid):
        yield from _below(child)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    for pid in (*_below(process.pid),):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


class _Remote:
    """A filesystem of a program. ``process``: that program; ``servers``: what it asks."""

    def __init__(self, target: Path, log: Path) -> None:
        self.target = target
        self.log = log
        self.servers: list[subprocess.Popen[bytes]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._stopped: list[int] = []

    def run(self, *command: str | Path) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")

    def mount(self, *command: str | Path) -> None:
        self.process = self.run(*command)
        wait_until(lambda: is_mounted(self.target) or self.process.poll() is not None, "it is not mounted")  # type: ignore[union-attr]
        assert is_mounted(self.target), self.log.read_text()

    def stopped_ones(self) -> list[subprocess.Popen[bytes]]:
        """What :meth:`stop` stops."""
        raise NotImplementedError

    def stop(self) -> None:
        for one in self.stopped_ones():
            self._stopped += _below(one.pid)
        for pid in self._stopped:
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        while self._stopped:
            with suppress(ProcessLookupError):
                os.kill(self._stopped.pop(), signal.SIGCONT)

    def end(self) -> None:
        subprocess.run(["umount", "-l", self.target], check=False, stderr=subprocess.DEVNULL)
        for one in (self.process, *self.servers):
            if one is not None:
                _kill(one)


class Sshfs(_Remote):
    """sshfs, whose server or which itself can be stopped."""

    def __init__(self, source: Path, target: Path, *, itself: bool = False) -> None:
        need("sshfs", "sshd", "ssh-keygen")
        where = source.parent / "ssh"
        where.mkdir()
        super().__init__(target, where / "log")
        self._itself = itself
        for name in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", where / name], check=True)
        self._port = _free_port()
        (where / "sshd_config").write_text(_SSHD.format(port=self._port, where=where))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # which sshd wants to exist
        self._sshd = [shutil.which("sshd", path="/usr/sbin"), "-D", "-e", "-f", where / "sshd_config"]
        self.begin()
        options = (
            f"port={self._port},IdentityFile={where}/key,UserKnownHostsFile={where}/known,reconnect,"
            "StrictHostKeyChecking=no,dir_cache=no,allow_other,default_permissions"
        )
        self.mount("sshfs", "-f", "-F", "/dev/null", "-o", options, f"root@127.0.0.1:{source}", target)

    def begin(self) -> None:
        """Start the server."""
        self.servers.append(self.run(*self._sshd))
        wait_until(lambda: _answers(self._port), "sshd does not answer")

    def stopped_ones(self) -> list[subprocess.Popen[bytes]]:
        assert self.process is not None
        return [self.process] if self._itself else self.servers

    def kill(self) -> None:
        """End the server and its connections."""
        _kill(self.servers.pop())


class Rclone(_Remote):
    """rclone, whose server over HTTP or which itself can be stopped. ``caches``: as it does by default."""

    def __init__(
        self, source: Path, target: Path, *, itself: bool = False, caches: bool = False
    ) -> None:
        need("rclone", "fusermount3")
        where = source.parent / "rclone"
        where.mkdir()
        super().__init__(target, where / "log")
        self._itself = itself
        port, rclone = _free_port(), ("rclone", "--config", "/dev/null", "--cache-dir", where)
        self.servers.append(self.run(*rclone, "serve", "webdav", "--addr", f"127.0.0.1:{port}", source))
        wait_until(lambda: _answers(port), "rclone does not serve")
        caching = () if caches else ("--dir-cache-time", "0s", "--attr-timeout", "0s")
        self.mount(
            *rclone, "-v", "mount", "--allow-other", "--read-only", *caching,
            f":webdav,url='http://127.0.0.1:{port}':", target,
        )  # fmt: skip

    def stopped_ones(self) -> list[subprocess.Popen[bytes]]:
        assert self.process is not None
        return [self.process] if self._itself else self.servers


class Glusterfs(_Remote):
    """A volume of two bricks with the same files; its client asks them over sockets. ``patience``: how many
    seconds it waits for a brick until it goes on without it, 0: for ever. ``count``: how many are stopped."""

    def __init__(self, source: Path, target: Path, *, patience: int = 0, count: int = 2) -> None:
        need("glusterfs", "glusterfsd")
        where = source.parent / "gluster"
        where.mkdir()
        super().__init__(target, where / "log")
        self._count = count
        clients = ""
        for number in range(2):
            brick = where / f"brick{number}"
            (brick / ".glusterfs").mkdir(parents=True)
            volfile = where / f"brick{number}.vol"
            volfile.write_text(_BRICK.format(brick=brick))
            clients += _CLIENT.format(number=number, brick=brick, patience=patience)
            self.servers.append(
                self.run("glusterfsd", "-N", "-f", volfile, "-l", where / f"brick{number}.log")
            )
        for number in range(2):
            wait_until((where / f"brick{number}.sock").exists, "a brick does not listen")
        (where / "client.vol").write_text(clients + _REPLICATED)
        self.mount(
            "glusterfs", "-N", "-f", where / "client.vol", "-l", where / "client.log", "--entry-timeout=0",
            "--attribute-timeout=0", target,
        )  # fmt: skip
        shutil.copytree(source, target, dirs_exist_ok=True)

    def stopped_ones(self) -> list[subprocess.Popen[bytes]]:
        return self.servers[: self._count]
