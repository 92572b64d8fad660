"""vite from npm, installed once into the tests' cache."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support import areas

VITE = "5.4.21"
_PROTOCOL = "vite-hmr"


class Unavailable(Exception):
    """Node or npm's registry is not available; the text is the reason for a skip."""


def vite_modules() -> Path:
    """A node_modules directory with vite, installed if missing. Raises Unavailable."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is not installed")
    cache = Path(os.environ.get("UNIONFS_CACHE") or Path.home() / ".cache/unionfs")
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"vite-{VITE}"
    with (cache / "lock-vite").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=cache))
            try:
                _install(partial)
                partial.chmod(0o755)
                partial.rename(target)
            except BaseException:
                areas.remove(partial)
                raise
    return target / "node_modules"


def _install(target: Path) -> None:
    try:
        done = subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--prefix", target, f"vite@{VITE}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, cwd=target,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unavailable("npm install did not end within 150 seconds") from error
    if done.returncode != 0:
        raise Unavailable(f"npm cannot install vite: {done.stderr.strip()[-500:]}")


def free_port() -> int:
    """A currently unused TCP port of the loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class HotUpdates:
    """The browser's end of vite's websocket: the part of RFC 6455 that vite needs."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET / HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {_PROTOCOL}\r\n\r\n".encode()
        )
        self._data = b""
        while b"\r\n\r\n" not in self._data:
            self._data += self._socket.recv(4096)
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head

    def message(self) -> dict[str, Any]:
        """The next message from the server; TimeoutError after 20 seconds without one."""
        while True:
            first, length = self._take(2)
            length &= 0x7F
            if length == 126:
                length = int.from_bytes(self._take(2), "big")
            elif length == 127:
                length = int.from_bytes(self._take(8), "big")
            payload = self._take(length)
            if first & 0x0F == 1:
                found: dict[str, Any] = json.loads(payload)
                return found

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The next message of that type."""
        while (message := self.message())["type"] != kind:
            pass
        return message

    def _take(self, count: int) -> bytes:
        while len(self._data) < count:
            more = self._socket.recv(4096)
            assert more, "the server has closed the connection"
            self._data += more
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def close(self) -> None:
        self._socket.close()
