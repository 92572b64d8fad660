"""`unionfs plugin serve` over its socket: the protocol, bad requests, concurrency, other users, restarts."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, refused, succeed, unionfs
from tests.support import areas
from tests.volumes.conftest import Store
from tests.volumes.served import PODMAN_ID, Plugin, Refused, ask, served
from unionfs.sys.asuser import run_as

_LONG = b" " * (2 << 20)


@pytest.fixture
def plugin(area: Path, store: Store) -> Iterator[Plugin]:
    with served(Plugin(area / "run" / "unionfs.sock", store.root)) as server:
        yield server


def _mounted(path: Path) -> bool:
    return any(where == str(path) for _, where, _ in areas.mounts_below(path))


def _error(plugin: Plugin, request: str, name: str | None = None, **values: object) -> str:
    with pytest.raises(Refused) as found:
        plugin(request, name, **values)
    assert found.value.status == 500
    return str(found.value)


class TestProtocol:
    def test_the_life_of_a_volume(self, plugin: Plugin, store: Store) -> None:
        assert ask(plugin.path, "Plugin.Activate") == {"Implements": ["VolumeDriver"]}
        assert plugin("Capabilities") == {"Capabilities": {"Scope": "local"}}
        assert plugin("List") == {"Volumes": [], "Err": ""}
        assert "there is no volume data" in _error(plugin, "Get", "data")
        assert plugin("Create", "data", Opts=None) == {"Err": ""}
        assert plugin("Create", "data") == {"Err": ""}
        path = store.data("data")
        assert plugin("Path", "data") == {"Mountpoint": str(path), "Err": ""}
        found = plugin("Get", "data")["Volume"]
        assert (found["Name"], found["Mountpoint"]) == ("data", str(path))
        assert found["CreatedAt"].endswith("Z")
        assert found["Status"] == {"driver": "local", "users": []}
        assert plugin.mount("data", "one") == path
        assert plugin("Get", "data")["Volume"]["Status"]["users"] != []
        assert plugin("Unmount", "data", ID="one") == {"Err": ""}
        assert plugin("Unmount", "data", ID="one") == {"Err": ""}
        assert store.ok("ls", "-q") == "data\n"
        assert plugin("Remove", "data") == {"Err": ""}
        assert plugin.names() == []
        assert not path.exists()

    def test_options_are_those_of_volume_create(self, plugin: Plugin, store: Store, area: Path) -> None:
        (area / "base").mkdir()
        plugin("Create", "view", Opts={"driver": "union", "lower": str(area / "base")})
        plugin("Create", "shared", Opts={"driver": "union", "lower": str(area / "base"), "shared": ""})
        drivers = {volume.name: volume.driver for volume in store.volumes().all()}
        assert drivers == {"view": "union", "shared": "union"}

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"size": "banana"}, "banana"),
            ({"colour": "red"}, "colour"),
            ({"driver": "nowhere"}, "nowhere"),
            ({"driver": "unionfs"}, "name the driver of the volume itself"),
            ({"driver": "union"}, "lower"),
            ({"driver": "union", "lower": "relative"}, "relative"),
            ({"tmpfs": "size=banana"}, "banana"),
            ({"tmpfs": "", "device": "/dev/sda"}, "exclude each other"),
            ({"type": "nfs"}, "device"),
            ({"size": 5}, "strings"),
            (["size"], "strings"),
            ({"type": "none", "o": "bind", "device": "/\0"}, "bytes"),
        ],
    )
    def test_bad_options_are_refused_with_a_sentence(
        self, plugin: Plugin, options: object, word: str
    ) -> None:
        sentence = _error(plugin, "Create", "data", Opts=options)
        assert word in sentence
        assert sentence.endswith(".")
        assert plugin.names() == []

    @pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 300, "a\nb", "\ud800\ud800", 7, None])
    def test_bad_names_are_refused_with_a_sentence(self, plugin: Plugin, name: object) -> None:
        for request in ("Create", "Get", "Mount", "Unmount", "Remove", "Path"):
            with pytest.raises(Refused) as found:
                ask(plugin.path, f"VolumeDriver.{request}", {"Name": name, "ID": "x"})
            assert found.value.status == 500
            assert str(found.value).endswith(".")
        assert plugin.names() == []

    def test_an_unreadable_volume_hides_no_other(self, plugin: Plugin, store: Store) -> None:
        plugin("Create", "good")
        plugin("Create", "bad")
        record = store.root / "volumes/bad/volume.json"
        record.write_text('{"version": 99}')
        assert plugin.names() == ["good"]
        assert plugin("Get", "good")["Volume"]["Name"] == "good"
        # podman asks for each volume it knows, and shows none if one is missing
        assert "version 99" in plugin("Get", "bad")["Volume"]["Status"]["error"]

    def test_volumes_with_a_missing_driver_are_shown(self, plugin: Plugin, store: Store) -> None:
        plugin("Create", "data")
        record = store.root / "volumes/data/volume.json"
        record.write_text(record.read_text().replace('"local"', '"gone"', 1))
        assert plugin.names() == ["data"]
        assert "gone" in plugin("Get", "data")["Volume"]["Status"]["error"]
        assert "gone" in _error(plugin, "Mount", "data", ID="one")


class TestHttp:
    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"GET /VolumeDriver.List HTTP/1.1\r\nHost: x\r\n\r\n", 405),
            (b"POST /Nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 404),
            (b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]", 500),
            (b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{", 500),
            (b"nonsense\r\n\r\n", 400),
            (b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70000, 431),
            (b"POST /Plugin.Activate HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n" + _LONG, 413),
        ],
    )
    def test_bad_requests(self, plugin: Plugin, sent: bytes, status: int) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(plugin.path))
            client.sendall(sent)
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b'{"Err": "' in answer
        assert plugin.names() == []

    def test_a_request_in_pieces_and_chunks(self, plugin: Plugin) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(plugin.path))
            for byte in (
                b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                b'8\r\n{"Name":\r\n8\r\n "data"}\r\n0\r\n\r\n'
            ):
                client.sendall(bytes([byte]))
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert plugin.names() == ["data"]

    def test_clients_that_wait_keep_nobody_waiting(self, plugin: Plugin) -> None:
        slow = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(300)]
        for client in slow:
            client.connect(str(plugin.path))
            client.sendall(b"POST /VolumeDriver.List HTTP/1.1\r\n")
        assert plugin.names() == []
        for client in slow:
            client.close()
        assert plugin.names() == []

    def test_an_engine_that_ends_before_its_mount_is_made_holds_nothing(
        self, plugin: Plugin, store: Store
    ) -> None:
        plugin("Create", "data")
        lock = store.volumes()
        with lock.still("data", "held"), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(plugin.path))
            body = b'{"Name": "data", "ID": "one"}'
            client.sendall(
                b"POST /VolumeDriver.Mount HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            # This process lives on, so nothing but the end of the connection says that it gave up.
        said = plugin.end()
        assert "undone" in said
        assert store.volumes().users("data") == []


class TestMany:
    def test_a_hundred_calls_at_once(self, plugin: Plugin, area: Path, as_root: None) -> None:
        (area / "base").mkdir()
        (area / "base/file").write_text("base\n")
        plugin("Create", "view", Opts={"driver": "union", "lower": str(area / "base"), "shared": "true"})
        plugin("Create", "memory", Opts={"tmpfs": "", "size": "1m"})

        def work(number: int) -> None:
            name = ("view", "memory", f"own{number}")[number % 3]
            plugin("Create", name, Opts=None)
            path = plugin.mount(name, f"id{number}")
            (path / str(number)).write_text("x")
            assert name in plugin.names()
            plugin("Get", name)
            plugin("Unmount", name, ID=f"id{number}")

        with ThreadPoolExecutor(100) as pool:
            list(pool.map(work, range(100)))
        assert len(plugin.names()) == 2 + 33
        assert areas.mounts_below(area) == []
        with ThreadPoolExecutor(100) as pool:
            list(pool.map(lambda name: plugin("Remove", name), plugin.names()))
        assert plugin.names() == []

    def test_one_name_is_created_once(self, plugin: Plugin, store: Store) -> None:
        with ThreadPoolExecutor(100) as pool:
            assert list(pool.map(lambda _: plugin("Create", "data"), range(100))) == [{"Err": ""}] * 100
        assert os.listdir(store.root / "volumes") == ["data"]


class TestSocket:
    def test_only_its_owner_may_connect(self, plugin: Plugin, as_root: None) -> None:
        status = os.stat(plugin.path)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert run_as(1000, lambda: _answered(plugin.path)) == errno.EACCES
        plugin.path.parent.chmod(0o755)
        assert run_as(1000, lambda: _answered(plugin.path)) == errno.EACCES
        plugin.path.chmod(0o666)
        assert run_as(1000, lambda: _answered(plugin.path)) == 0
        assert run_as(0, lambda: _answered(plugin.path)) == 1
        assert plugin.names() == []

    def test_it_is_removed_at_the_end(self, plugin: Plugin) -> None:
        assert plugin.end().count("\n") == 1
        assert not plugin.path.exists()
        assert os.listdir(plugin.path.parent) == []

    def test_a_socket_left_by_a_killed_server_is_replaced(self, plugin: Plugin) -> None:
        plugin("Create", "data")
        plugin.kill()
        assert plugin.path.is_socket()
        plugin.start()
        assert plugin.names() == ["data"]

    def test_a_second_server_is_refused(self, plugin: Plugin, store: Store) -> None:
        refused(
            unionfs("plugin", "serve", "--socket", plugin.path, "--root", store.root), "listens", "already"
        )
        assert plugin.names() == []

    @pytest.mark.parametrize("kind", ["file", "open", "long"])
    def test_bad_places_are_refused(self, area: Path, store: Store, kind: str) -> None:
        place = area / "place"
        place.mkdir()
        path = place / "socket"
        if kind == "file":
            path.write_text("mine")
        elif kind == "open":
            place.chmod(0o777)
        else:
            path = place / ("x" * 120)
        word = {"file": "not a socket", "open": "writable", "long": "107 bytes"}[kind]
        refused(unionfs("plugin", "serve", "--socket", path, "--root", store.root), word)
        assert os.listdir(place) == (["socket"] if kind == "file" else [])

    def test_the_socket_that_systemd_passes(self, area: Path, store: Store) -> None:
        path = area / "passed.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            activated = (
                "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
                "os.execv(sys.argv[2], sys.argv[2:])"
            )
            os.set_inheritable(listener.fileno(), True)
            with subprocess.Popen(
                [sys.executable, "-c", activated, str(listener.fileno()), sys.executable, "-m", "unionfs",
                 "plugin", "serve", "--root", str(store.root)],
                env={**os.environ, "LISTEN_FDS": "1", "PYTHONPATH": str(REPOSITORY)}, close_fds=False,
            ) as child:  # fmt: skip
                # systemd's socket holds the connection until the server has started.
                assert ask(path, "VolumeDriver.List") == {"Volumes": [], "Err": ""}
                child.terminate()
            assert child.returncode == 0
            assert path.is_socket()

    def test_other_passed_files_are_refused(self, store: Store) -> None:
        activated = (
            "import os, sys; os.dup2(os.open('/dev/null', os.O_RDWR), 3);"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        done = subprocess.run(
            [sys.executable, "-c", activated, sys.executable, "-m", "unionfs", "plugin", "serve",
             "--root", str(store.root)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        )  # fmt: skip
        refused(done, "ListenStream")


def _answered(path: Path) -> int:
    """How many bytes of an answer come, at most one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        try:
            client.sendall(b"POST /VolumeDriver.List HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            return len(client.recv(1))
        except (BrokenPipeError, ConnectionResetError):
            return 0


class TestRestart:
    def test_mounts_outlive_the_server(
        self, plugin: Plugin, store: Store, area: Path, as_root: None
    ) -> None:
        (area / "base").mkdir()
        plugin("Create", "view", Opts={"driver": "union", "lower": str(area / "base")})
        plugin("Create", "memory", Opts={"tmpfs": "", "size": "1m"})
        paths = {name: plugin.mount(name, "one") for name in ("view", "memory")}
        for path in paths.values():
            (path / "file").write_text("kept")
        plugin.kill()
        plugin.start()
        for path in paths.values():
            assert (path / "file").read_text() == "kept"
        refused(store("rm", "memory"), "in use")
        plugin.end()
        plugin.start()
        for name, path in paths.items():
            assert plugin("Path", name)["Mountpoint"] == str(path)
            plugin("Unmount", name, ID="one")
            assert not _mounted(path)
            plugin("Remove", name)

    @pytest.mark.slow
    def test_killed_under_load(self, plugin: Plugin, store: Store, area: Path, as_root: None) -> None:
        """What a request has left half done keeps no volume from being used or removed."""
        (area / "base").mkdir()
        (area / "base/file").write_text("base\n")
        for number in range(8):
            union = {"driver": "union", "lower": str(area / "base"), **({"shared": ""} if number % 3 else {})}
            plugin("Create", f"data{number}", Opts=union if number % 2 else {"tmpfs": ""})
        ending = threading.Event()

        def work(number: int) -> int:
            done = 0
            while not ending.is_set():
                for request in ("Mount", "Unmount"):
                    with suppress(OSError, http.client.HTTPException, Refused):
                        plugin(request, f"data{number % 8}", ID=f"id{number}")
                        done += 1
            return done

        with ThreadPoolExecutor(16) as pool:
            working = [pool.submit(work, number) for number in range(16)]
            for _ in range(5):
                before = time.monotonic()
                while time.monotonic() < before + 0.5:
                    plugin("List")
                plugin.kill()
                plugin.start()
            ending.set()
            assert min(item.result() for item in working) > 0
        for name in plugin.names():
            path = plugin.mount(name, "last")
            assert os.listdir(path) == ([] if name[-1] in "0246" else ["file"])
            plugin("Unmount", name, ID="last")
            plugin("Remove", name)
        assert areas.mounts_below(area) == []
        assert os.listdir(store.root / "volumes") == []

    def test_its_volumes_are_those_of_the_command_line(self, plugin: Plugin, store: Store) -> None:
        plugin("Create", "data")
        plugin.mount("data", PODMAN_ID)
        assert json_users(store) == [f"containers of {_own_name()} (ID 2f73349cfc46)"]
        refused(store("rm", "data"), "in use by containers of")
        plugin("Unmount", "data", ID=PODMAN_ID)
        assert succeed(store("rm", "data")) == "data\n"


def json_users(store: Store) -> list[str]:
    return [str(user) for user in store.volumes().users("data")]


def _own_name() -> str:
    return Path("/proc/self/comm").read_text().strip()
