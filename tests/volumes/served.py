"""A running `unionfs plugin serve`, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.mount.cli_calls import REPOSITORY
from tests.support.patience import patient
from unionfs.sys.peers import peer_of

PODMAN_ID = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2"
"""The ID of every mount by podman (libpod, pseudoCtrID)."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("plugin", timeout=patient(60))
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Refused(Exception):
    """The plugin answered with another status than 200; the text is its Err."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def ask(path: Path, request: str, values: object = None) -> dict[str, Any]:
    """The answer to a request. Raises Refused."""
    body = b"" if values is None else json.dumps(values).encode() + b"\n"
    connection = _Connection(path)
    connection.request("POST", f"/{request}", body)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        assert list(found) == ["Err"]
        raise Refused(answer.status, found["Err"])
    assert isinstance(found, dict)
    return found


def listener_of(path: Path) -> int:
    """The pid of the process that listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        return peer_of(client).pid


class Plugin:
    """A server at a socket. ``prefix`` runs it, such as nsenter(1); there the socket is at ``inside``."""

    def __init__(
        self, path: Path, root: Path, prefix: Sequence[str] = (), *, inside: str = "",
        environment: Mapping[str, str] = os.environ,
    ) -> None:  # fmt: skip
        self.path, self.root = path, root
        self._command = [
            *prefix, sys.executable, "-m", "unionfs", "plugin", "serve", "--root", str(root),
            "--socket", inside or str(path),
        ]  # fmt: skip
        self._environment = environment
        self.child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it; returns when it has told that it is ready, as systemd waits for that."""
        notices = self.root.parent / f"notices-{os.getpid()}"
        notices.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(notices))
            notices.chmod(0o666)  # the server may be another user's
            told.settimeout(patient(60))
            self.child = subprocess.Popen(
                self._command,
                env={**self._environment, "PYTHONPATH": str(REPOSITORY), "NOTIFY_SOCKET": str(notices)},
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert told.recv(100) == b"READY=1"
        notices.unlink()

    def end(self) -> str:
        """End it in order; returns what it wrote to stderr."""
        said = self._signal(signal.SIGTERM)
        assert self.child is not None
        assert self.child.returncode == 0, said
        return said

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> str:
        assert self.child is not None
        os.kill(listener_of(self.path), number)  # the child may be a program that has started the server
        _, said = self.child.communicate(timeout=patient(60))
        return said

    def __call__(self, request: str, name: str | None = None, **values: object) -> dict[str, Any]:
        """The answer to `VolumeDriver.REQUEST`. Raises Refused."""
        return ask(self.path, f"VolumeDriver.{request}", {"Name": name, **values} if name else None)

    def mount(self, name: str, mount_id: str) -> Path:
        """Mount a volume; returns its path."""
        answer = self("Mount", name, ID=mount_id)
        assert answer["Err"] == ""
        return Path(answer["Mountpoint"])

    def names(self) -> list[str]:
        """The names of all volumes."""
        return [volume["Name"] for volume in self("List")["Volumes"]]


@contextmanager
def served(plugin: Plugin) -> Iterator[Plugin]:
    """A server that is gone at the end."""
    try:
        plugin.start()
        yield plugin
    finally:
        if plugin.child is not None and plugin.child.poll() is None:
            plugin.kill()
