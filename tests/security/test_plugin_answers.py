"""Misbehaving Docker volume plugins: endless answers, slow ones, invalid ones, or none at all."""

from __future__ import annotations

import gzip
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import refused
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage.drivers import plugin

Script = Callable[[socket.socket], None]
"""A server's handling of a connection after reading its request."""

_GOOD: dict[str, Any] = {
    "Plugin.Activate": {"Implements": ["VolumeDriver"]},
    "VolumeDriver.Capabilities": {"Capabilities": {"Scope": "local"}},
    "VolumeDriver.Create": {"Err": ""},
    "VolumeDriver.Remove": {"Err": ""},
    "VolumeDriver.Unmount": {"Err": ""},
    "VolumeDriver.Get": {"Volume": {"Name": "data"}, "Err": ""},
    "VolumeDriver.Path": {"Mountpoint": "", "Err": ""},
    "VolumeDriver.Mount": {"Mountpoint": "/", "Err": ""},
}

_SLOW = [
    pytest.param(request, marks=pytest.mark.slow)
    for request in ("VolumeDriver.Remove", "VolumeDriver.Unmount")
]


def _response(content: bytes, *headers: str) -> bytes:
    head = "".join(line + "\r\n" for line in ("HTTP/1.1 200 OK", *headers, f"Content-Length: {len(content)}"))
    return head.encode() + b"\r\n" + content


def says(values: Any) -> Script:
    """An answer with this JSON, or these bytes."""
    content = values if isinstance(values, bytes) else json.dumps(values).encode()
    return lambda connection: connection.sendall(_response(content))


def sends(data: bytes) -> Script:
    """These bytes, then the end of the connection."""
    return lambda connection: connection.sendall(data)


def repeats(first: bytes, piece: bytes, pause: float = 0.0) -> Script:
    """A prefix, then the same piece endlessly."""

    def script(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return script


def hangs(connection: socket.socket) -> None:
    """No answer until the client gives up."""
    connection.recv(1)


class Hostile:
    """A plugin with scripted answers to some requests; `*` matches all."""

    def __init__(self, path: Path) -> None:
        self.scripts: dict[str, Script] = {}
        self.requests: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            request = head.split()[1].decode().lstrip("/")
            self.requests.append(request)
            script = self.scripts.get("*") or self.scripts.get(request) or says(_GOOD[request])
            script(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def hostile(area: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    directory = area / "plugins"
    directory.mkdir()
    monkeypatch.setenv(plugin.ENVIRONMENT, str(directory))
    monkeypatch.setattr(plugin, "_silent_until", {})
    store.env[plugin.ENVIRONMENT] = str(directory)
    server = Hostile(directory / "p.sock")
    yield server
    server.close()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    began = time.monotonic()
    found = call()
    assert time.monotonic() - began < seconds
    return found


_HEAD = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_ENDLESS = {
    "body of no length": repeats(_HEAD + b"\r\n", b" " * 65536),
    "body of a huge length": repeats(_HEAD + b"Content-Length: 999999999999\r\n\r\n", b" " * 65536),
    "chunks": repeats(_CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "chunks of a byte": repeats(_CHUNKED, b"1\r\n \r\n" * 1000),
    "chunk extensions": repeats(_CHUNKED, b"1;" + b"x" * 65536),
    "trailers": repeats(_CHUNKED + b"0\r\n", b"X: y\r\n" * 1000),
    "headers": repeats(_HEAD, b"X-Header: value\r\n" * 1000),
    "one header": repeats(_HEAD + b"X: ", b"x" * 65536),
    "a first line": repeats(b"HTTP/1.1 200 ", b"x" * 65536),
    "interim answers": repeats(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000),
}


class TestLimits:
    @pytest.mark.parametrize("script", _ENDLESS.values(), ids=_ENDLESS.keys())
    def test_answers_without_end(self, store: Store, hostile: Hostile, script: Script) -> None:
        hostile.scripts["VolumeDriver.Create"] = script
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = _within(10, lambda: store("create", "-d", "p", "data"))
        refused(done, "the volume plugin p at unix://", "more than 1048576 bytes")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
        assert list((store.root / "volumes").iterdir()) == []

    @pytest.mark.parametrize(
        "script",
        [
            hangs,
            repeats(b"", b"H", 0.3),
            repeats(_HEAD, b"X: y\r\n", 0.3),
            repeats(_HEAD + b"Content-Length: 1000\r\n\r\n", b" ", 0.3),
            repeats(_CHUNKED, b"1\r\n \r\n", 0.3),
            repeats(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.3),
        ],
        ids=["silence", "first line", "headers", "body", "chunks", "interim answers"],
    )
    def test_one_deadline_for_all_of_it(
        self, store: Store, hostile: Hostile, script: Script, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plugin, "_LONG_SECONDS", 1.0)
        hostile.scripts["VolumeDriver.Create"] = script
        done = _within(4, lambda: store("create", "-d", "p", "data"))
        refused(done, "the volume plugin p at", "VolumeDriver.Create", "within 1 s")

    def test_docker_waits_no_longer(self) -> None:
        assert (plugin._LONG_SECONDS, plugin._SHORT_SECONDS) == (120, 60)  # moby volume/drivers/proxy.go
        assert (plugin._STATUS_SECONDS, plugin._HURRIED_SECONDS) == (5, 10)

    def test_one_that_does_not_accept(self, store: Store, hostile: Hostile) -> None:
        os.unlink(Path(store.env[plugin.ENVIRONMENT]) / "p.sock")
        with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
            full.bind(store.env[plugin.ENVIRONMENT] + "/p.sock")
            full.listen(0)
            first.connect(store.env[plugin.ENVIRONMENT] + "/p.sock")
            with pytest.raises(UserError, match="cannot be used"):
                _within(12, lambda: store.volumes().create("data", driver="p"))

    def test_bombs(self, store: Store, hostile: Hostile) -> None:
        bomb = gzip.compress(b" " * 100_000_000)
        hostile.scripts["VolumeDriver.Create"] = sends(_response(bomb, "Content-Encoding: gzip"))
        refused(store("create", "-d", "p", "data"), "compressed")

    @pytest.mark.parametrize(
        "data",
        [b"", b"x", b"\0" * 1000, b"HTTP/1.1 200\r\n",
         b"\xff" * 4096 + b"\r\n\r\n",
         b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
         b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", _CHUNKED + b"zz\r\n",
         b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
         b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
         b"HTTP/1.1 204 No Content\r\n\r\n"],
    )  # fmt: skip
    def test_what_is_not_http(self, store: Store, hostile: Hostile, data: bytes) -> None:
        hostile.scripts["VolumeDriver.Create"] = sends(data)
        refused(_within(10, lambda: store("create", "-d", "p", "data")), "volume plugin p")


class TestWhoWaits:
    """Commands that must end within seconds though a plugin hangs."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What they wait, in less time."""
        monkeypatch.setattr(plugin, "_STATUS_SECONDS", 1.0)
        monkeypatch.setattr(plugin, "_HURRIED_SECONDS", 2.0)

    @pytest.mark.parametrize("request_", ["*", "VolumeDriver.Get"])
    def test_inspect_and_ls(self, store: Store, hostile: Hostile, request_: str) -> None:
        for name in ("one", "two", "three"):
            store.ok("create", "-d", "p", name)
        hostile.scripts[request_] = hangs
        found = json.loads(_within(4, lambda: store.ok("inspect", "one", "two", "three")))
        assert "within 1 s" in found[0]["Status"]["error"]
        assert "did not answer a moment ago" in found[2]["Status"]["error"]
        assert _within(3, lambda: store.ok("ls", "-q")) == "one\nthree\ntwo\n"

    @pytest.mark.parametrize("request_", ["*", *_SLOW])
    def test_rm_force(self, store: Store, hostile: Hostile, request_: str) -> None:
        names = ["one", "two", "three"]
        for name in names:
            store.ok("create", "-d", "p", name)
            for index in range(3):  # users that are gone
                store.volumes().attach(name, f"mount:{os.getpid()}:{index + 1}:/gone")
        hostile.scripts[request_] = hangs
        done = _within(5, lambda: store("rm", "-f", *names))
        assert (done.returncode, done.stdout) == (0, "one\ntwo\nthree\n")
        assert "Traceback" not in done.stderr
        assert store.ok("ls", "-q") == ""

    @pytest.mark.slow
    @pytest.mark.parametrize("request_", ["*", "VolumeDriver.Remove", "VolumeDriver.Unmount"])
    def test_prune(self, store: Store, hostile: Hostile, request_: str) -> None:
        for name in ("one", "two", "three"):
            store.ok("create", "-d", "p", name)
            store.volumes().attach(name, f"mount:{os.getpid()}:1:/gone")
        store.ok("create", "other")
        hostile.scripts[request_] = hangs
        done = _within(5, lambda: store("prune", "-af"))
        assert done.returncode == 1
        assert "cannot be used" in done.stderr
        assert "other" in done.stdout
        assert store.ok("ls", "-q") == "one\nthree\ntwo\n"

    @pytest.mark.slow
    def test_rm_without_force(self, store: Store, hostile: Hostile) -> None:
        store.ok("create", "-d", "p", "data")
        hostile.scripts["*"] = hangs
        refused(_within(13, lambda: store("rm", "data")), "within 10 s")
        assert store.ok("ls", "-q") == "data\n"

    def test_one_that_recovers_is_asked_again(
        self, store: Store, hostile: Hostile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plugin, "_SILENT_SECONDS", 0.5)
        store.ok("create", "-d", "p", "data")
        hostile.scripts["VolumeDriver.Get"] = hangs
        assert "error" in json.loads(store.ok("inspect", "data"))[0]["Status"]
        hostile.scripts.clear()
        time.sleep(0.6)
        assert "Status" not in json.loads(store.ok("inspect", "data"))[0]


_DEEP = 100_000
_ODD_CONTENT = {
    "deep lists": b"[" * _DEEP,
    "deep objects": b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "deep in a key": b'{"Volume":' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of many digits": b'{"x":' + b"9" * 500_000 + b"}",
    "a number beyond all": b'{"x": 1e999}',
    "NaN": b'{"x": NaN}',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "half a character": b'{"Err": "\xc3"}',
    "NUL bytes": b"\0\0\0\0",
    "half": b'{"Err": ""',
}


class TestContent:
    @pytest.mark.parametrize("content", _ODD_CONTENT.values(), ids=_ODD_CONTENT.keys())
    @pytest.mark.parametrize("request_", ["Plugin.Activate", "VolumeDriver.Create", "VolumeDriver.Get"])
    def test_odd_json(
        self, store: Store, hostile: Hostile, content: bytes, request_: str
    ) -> None:
        hostile.scripts[request_] = says(content)
        refused(store("create", "-d", "p", "data"), request_, "no JSON object", "p")

    @pytest.mark.parametrize("request_", [*_GOOD])
    @pytest.mark.parametrize("value", [7, True, ["x"], {"x": "y"}, 1.5, "x" * 100_000, "\x1b[2J\n\r\x07 bad"])
    def test_odd_errors(self, store: Store, hostile: Hostile, request_: str, value: Any) -> None:
        store.ok("create", "-d", "p", "data")
        hostile.scripts[request_] = says({"Err": value})
        for call in (("create", "-d", "p", "two"), ("inspect", "data"), ("rm", "data")):
            done = store(*call)
            assert "Traceback" not in done.stderr
            assert len(done.stderr) < 1000
            assert all(char.isprintable() or char == "\n" for char in done.stderr)
        with suppress(UserError):
            store.volumes().attach("data", "user")

    @pytest.mark.parametrize("value", [7, True, ["x"], "x", 1.5, [{}]])
    def test_objects_of_other_types(self, store: Store, hostile: Hostile, value: Any) -> None:
        hostile.scripts["VolumeDriver.Capabilities"] = says({"Capabilities": value})
        store.ok("create", "-d", "p", "data")
        hostile.scripts["VolumeDriver.Get"] = says({"Volume": value})
        (found,) = json.loads(store.ok("inspect", "data"))
        assert "a Volume that is not an object" in found["Status"]["error"]
        refused(store("create", "-d", "p", "two"), "a Volume that is not an object")
        hostile.scripts["VolumeDriver.Get"] = says({"Volume": {"Status": value}})
        (found,) = json.loads(store.ok("inspect", "data"))
        assert "a Status that is not an object" in found["Status"]["error"]
        hostile.scripts["Plugin.Activate"] = says({"Implements": value})
        refused(store("create", "-d", "p", "two"), "not a volume plugin")

    @pytest.mark.parametrize(
        "path",
        [7, True, ["/"], {"/": 1}, "relative", ".", "../x", "/../etc", "/a/../../b", "/a/..", "/\0", "/a\0/b",
         "/" + "x" * 900_000, "/x" * 2100, "/\ud800", "/none", "/dev/null"],
        ids=lambda path: repr(path)[:20],
    )  # fmt: skip
    def test_odd_mountpoints(self, store: Store, hostile: Hostile, path: Any) -> None:
        store.ok("create", "-d", "p", "data")
        cause = "no such file or directory" if path == "/none" else "Mountpoint"
        cause = "no directory here" if path == "/dev/null" else cause
        for request, answer in (
            ("VolumeDriver.Mount", {"Mountpoint": path}), ("VolumeDriver.Path", {"Mountpoint": path}),
        ):  # fmt: skip
            hostile.scripts = {"VolumeDriver.Mount": says({"Mountpoint": ""}), request: says(answer)}
            with pytest.raises(UserError) as found:
                store.volumes().attach("data", "user")
            sentence = str(found.value)
            assert len(sentence) < 1000
            assert sentence.isprintable()
            assert cause in sentence
            assert hostile.requests[-1] == "VolumeDriver.Unmount"
            assert store.volumes().users("data") == []
        hostile.scripts = {"VolumeDriver.Get": says({"Volume": {"Mountpoint": path}})}
        if cause == "Mountpoint":
            refused(store("create", "-d", "p", "two"), "VolumeDriver.Get with")

    def test_in_a_thread(self, store: Store, hostile: Hostile) -> None:
        """As in a daemon, whose main thread runs an event loop."""
        import trio

        store.ok("create", "-d", "p", "data")

        async def main() -> str:
            return await trio.to_thread.run_sync(store.volumes().attach, "data", "user")

        assert trio.run(main) == "/"
