"""podman and docker use volumes through `unionfs plugin serve`, each with a private store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import rooms
from tests.clients.engines import KERNEL, OURS, Docker, Store, busybox_tar, need
from tests.clients.rooms import Room
from tests.support.patience import patient
from tests.volumes.served import PODMAN_ID, Plugin, Refused, ask, listener_of, served

SOCKET = "/run/docker/plugins/unionfs.sock"


@pytest.fixture
def room(area: Path, as_root: None) -> Iterator[Room]:
    with rooms.room(area / "room") as made:
        yield made


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def plugin(room: Room) -> Iterator[Plugin]:
    """The plugin at the engines' usual place, in their namespaces."""
    with served(_plugin_in(room, SOCKET)) as server:
        yield server


def _plugin_in(room: Room, socket: str) -> Plugin:
    root, environment = room.home / "volumes-root", room.environment()
    return Plugin(room.path(socket), root, room.command(), inside=socket, environment=environment)


@pytest.fixture
def podman(room: Room, plugin: Plugin) -> Store:
    store = Store(room, room.home / "store", KERNEL)
    _configure(store, SOCKET)
    store.import_busybox()
    return store


def _configure(podman: Store, socket: str) -> None:
    with (podman.root / "containers.conf").open("a") as file:
        file.write(f'[engine.volume_plugins]\nunionfs = "{socket}"\n')


@pytest.fixture
def base(room: Room) -> Path:
    """A data set that no container may change."""
    made = room.home / "base"
    made.mkdir()
    (made / "table").write_text("golden\n")
    return made


def _mounts(room: Room, plugin: Plugin) -> list[str]:
    """The mountpoints of volumes in the room."""
    return [line.split()[4] for line in room.mounts().splitlines() if f" {plugin.root}/" in line]


def test_podman(room: Room, podman: Store, plugin: Plugin, base: Path) -> None:
    """create, ls, inspect, run -v, shared by containers, rm, prune; errors as sentences."""
    for name, options in (
        ("plain", []),
        ("sized", ["-o", "size=20m"]),
        ("memory", ["-o", "tmpfs", "-o", "size=2m"]),
        ("view", ["-o", "driver=union", "-o", f"lower={base}"]),
    ):
        podman.podman("volume", "create", "--driver", "unionfs", *options, name)
    done = podman.call("podman", "volume", "create", "--driver", "unionfs", "-o", "size=banana", "bad")
    assert done.returncode != 0
    assert "banana" in done.stderr
    assert podman.podman("volume", "ls", "-q").split() == ["memory", "plain", "sized", "view"]
    (shown,) = json.loads(podman.podman("volume", "inspect", "sized"))
    assert shown["Driver"] == "unionfs"
    assert shown["Options"] == {"size": "20m"}
    volumes = [word for name in ("plain", "sized", "memory", "view") for word in ("-v", f"{name}:/{name}")]
    for name in ("one", "two"):
        podman.podman("run", "-d", "--name", name, *volumes, "busybox", "/bin/sleep", "1000")
    write = "for d in plain sized memory view; do echo $d > /$d/file; done; echo changed > /view/table"
    podman.podman("exec", "one", "/bin/sh", "-c", write)
    read = ("/bin/cat", "/plain/file", "/sized/file", "/memory/file", "/view/file", "/view/table")
    assert podman.podman("exec", "two", *read).split() == ["plain", "sized", "memory", "view", "changed"]
    assert (base / "table").read_text() == "golden\n"
    assert os.listdir(base) == ["table"]
    with pytest.raises(Refused, match="in use by containers of podman"):
        plugin("Remove", "plain")
    podman.podman("rm", "-f", "-t0", "one")
    assert podman.podman("exec", "two", *read).split() == ["plain", "sized", "memory", "view", "changed"]
    podman.podman("rm", "-f", "-t0", "two")
    assert _mounts(room, plugin) == []
    # What is kept, and what goes with the last container.
    script = "cat /plain/file /sized/file; ls /memory /view; cat /view/table"
    kept = podman.podman("run", "--rm", *volumes, "busybox", "/bin/sh", "-c", script)
    assert kept.split() == ["plain", "sized", "/memory:", "/view:", "table", "golden"]
    podman.podman("volume", "rm", "plain")
    podman.podman("volume", "prune", "-f")
    assert plugin.names() == []
    assert _mounts(room, plugin) == []


@pytest.mark.clients
def test_podman_ten_at_once(room: Room, podman: Store, plugin: Plugin) -> None:
    podman.podman("volume", "create", "--driver", "unionfs", "-o", "size=20m", "shared")

    def work(number: int) -> None:
        script = f"echo {number} > /v/{number}; ls /v"
        shown = podman.podman("run", "--rm", "-v", "shared:/v", "busybox", "/bin/sh", "-c", script)
        assert str(number) in shown.split()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(work, range(10)))
    assert _mounts(room, plugin) == []
    shown = podman.podman("run", "--rm", "-v", "shared:/v", "busybox", "/bin/ls", "/v")
    assert sorted(shown.split()) == [str(number) for number in range(10)]


@pytest.mark.clients
def test_podman_while_the_plugin_restarts(room: Room, podman: Store, plugin: Plugin) -> None:
    podman.podman("volume", "create", "--driver", "unionfs", "-o", "tmpfs", "data")
    podman.podman("run", "-d", "--name", "one", "-v", "data:/v", "busybox", "/bin/sleep", "1000")
    podman.podman("exec", "one", "/bin/sh", "-c", "echo kept > /v/file")
    plugin.kill()
    assert podman.podman("exec", "one", "/bin/cat", "/v/file") == "kept\n"
    plugin.start()
    podman.podman("run", "-d", "--name", "two", "-v", "data:/v", "busybox", "/bin/sleep", "1000")
    assert podman.podman("exec", "two", "/bin/cat", "/v/file") == "kept\n"
    podman.podman("rm", "-f", "-t0", "one", "two")
    assert _mounts(room, plugin) == []
    podman.podman("volume", "rm", "data")
    assert plugin.names() == []


@pytest.mark.clients
def test_podman_killed_after_its_mount(room: Room, podman: Store, plugin: Plugin) -> None:
    """It never unmounts by this ID, and mounts by the same one again."""
    podman.podman("volume", "create", "--driver", "unionfs", "-o", "tmpfs", "data")
    request = json.dumps({"Name": "data", "ID": PODMAN_ID})
    ended = (
        "import http.client, socket, sys; c = http.client.HTTPConnection('x');"
        "c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(sys.argv[1]);"
        "c.request('POST', '/VolumeDriver.Mount', sys.argv[2]); assert c.getresponse().status == 200"
    )
    room.as_root("python3", "-c", ended, SOCKET, request)
    assert len(_mounts(room, plugin)) == 1
    podman.podman("run", "--rm", "-v", "data:/v", "busybox", "/bin/true")
    assert _mounts(room, plugin) == []
    room.as_root("python3", "-c", ended, SOCKET, request)
    podman.podman("volume", "rm", "data")
    assert _mounts(room, plugin) == []


@contextmanager
def _docker(room: Room, name: str = "docker") -> Iterator[Docker]:
    docker = Docker(room, room.home / name, "overlay2")
    try:
        docker.run("import", "-", "busybox", data=busybox_tar())
        yield docker
    finally:
        docker.close()


@pytest.mark.clients
@pytest.mark.parametrize("propagation", ["shared", "private"])
def test_rootless_podman(area: Path, as_root: None, propagation: str) -> None:
    """The mounts of a union propagate into its mount namespace, or the command fails with a sentence."""
    socket = "/run/unionfs.sock"
    with rooms.room(area / "room", rootless=True) as room:
        room.as_root("mount", f"--make-r{propagation}", "/")
        base = room.home / "base"
        base.mkdir()
        (base / "table").write_text("golden\n")
        with served(_plugin_in(room, socket)) as plugin:
            podman = Store(room, room.home / "store", OURS)
            _configure(podman, socket)
            podman.import_busybox()
            podman.podman("volume", "create", "--driver", "unionfs", "plain")
            union = ("-o", "driver=union", "-o", f"lower={base}")
            podman.podman("volume", "create", "--driver", "unionfs", *union, "view")
            run = ("run", "--rm", "-v", "plain:/v", "busybox")
            podman.podman(*run, "/bin/sh", "-c", "echo kept > /v/file")
            assert podman.podman(*run, "/bin/cat", "/v/file") == "kept\n"
            done = podman.call("podman", "run", "--rm", "-v", "view:/v", "busybox", "/bin/cat", "/v/table")
            if propagation == "shared":
                assert done.stdout == "golden\n"
            else:
                assert done.returncode != 0
                assert "does not reach podman" in done.stderr
            podman.podman("volume", "rm", "plain", "view")
            assert plugin.names() == []


def _socket_of(docker: Docker) -> Path:
    return Path(docker.socket.removeprefix("unix://"))


def _kill(docker: Docker) -> None:
    os.kill(listener_of(_socket_of(docker)), signal.SIGKILL)
    docker.daemon.wait()


def _start_again(docker: Docker, *, live_restore: bool) -> None:
    """Start a killed daemon with its command; returns when it answers."""
    (docker.root / "pid").unlink()
    words = [*docker.daemon.args, *(["--live-restore"] if live_restore else [])]  # type: ignore[misc]
    with docker.log.open("ab") as log:
        docker.daemon = subprocess.Popen(
            words, env=docker.room.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    deadline = time.monotonic() + patient(60)
    while docker.call("version").returncode != 0:
        assert docker.daemon.poll() is None, docker.log.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.clients
def test_docker(room: Room, plugin: Plugin, base: Path) -> None:
    """create, ls, inspect, run -v, cp; a view of the union for each container."""
    with _docker(room) as docker:
        docker.run("volume", "create", "-d", "unionfs", "-o", "size=20m", "sized")
        docker.run("volume", "create", "-d", "unionfs", "-o", "driver=union", "-o", f"lower={base}", "view")
        done = docker.call("volume", "create", "-d", "unionfs", "-o", "size=banana", "bad")
        assert done.returncode != 0
        assert "banana" in done.stderr
        assert docker.run("volume", "ls", "-q").split() == ["sized", "view"]
        (shown,) = json.loads(docker.run("volume", "inspect", "sized"))
        assert shown["Status"] == {"driver": "local", "users": []}
        words = ("--network", "none", "-v", "sized:/sized", "-v", "view:/view")
        for name in ("one", "two"):
            docker.run("run", "-d", "--name", name, *words, "busybox", "/bin/sleep", "1000")
        docker.run("exec", "one", "/bin/sh", "-c", "echo one > /view/table; echo one > /sized/file")
        assert docker.run("exec", "two", "/bin/cat", "/view/table", "/sized/file") == "golden\none\n"
        # docker mounts by the same ID once more for this, and unmounts it.
        (room.home / "copied").write_text("copied\n")
        docker.run("cp", room.home / "copied", "one:/view/copied")
        assert docker.run("exec", "one", "/bin/cat", "/view/copied", "/view/table") == "copied\none\n"
        assert docker.call("volume", "rm", "sized").returncode != 0
        docker.run("rm", "-f", "one")
        assert docker.run("exec", "two", "/bin/cat", "/view/table", "/sized/file") == "golden\none\n"
        docker.run("rm", "-f", "two")
        assert _mounts(room, plugin) == []
        assert (base / "table").read_text() == "golden\n"
        anonymous = ("run", "--rm", "--network", "none", "--volume-driver", "unionfs", "-v", "/anonymous")
        docker.run(*anonymous, "busybox", "/bin/sh", "-c", "echo x > /anonymous/file")
        docker.run("volume", "prune", "-f")  # which has only volumes of docker's own driver
        assert plugin.names() == ["sized", "view"]
        docker.run("volume", "rm", "sized", "view")
        assert plugin.names() == []


@pytest.mark.clients
@pytest.mark.parametrize("live_restore", [False, True])
def test_docker_killed(room: Room, plugin: Plugin, base: Path, live_restore: bool) -> None:
    """It forgets the IDs of its mounts, or of its containers that live on."""
    with _docker(room) as docker:
        docker.run("volume", "create", "-d", "unionfs", "-o", "size=20m", "sized")
        docker.run("volume", "create", "-d", "unionfs", "-o", "driver=union", "-o", f"lower={base}", "view")
        words = ("--network", "none", "-v", "sized:/sized", "-v", "view:/view")
        for name in ("one", "two"):
            docker.run("run", "-d", "--name", name, *words, "busybox", "/bin/sleep", "1000")
        docker.run("exec", "one", "/bin/sh", "-c", "echo one > /view/table; echo one > /sized/file")
        _kill(docker)
        with pytest.raises(Refused, match="in use by containers of dockerd"):
            plugin("Remove", "sized")
        assert len(_mounts(room, plugin)) == 3
        _start_again(docker, live_restore=live_restore)
        if live_restore:
            assert docker.run("exec", "one", "/bin/cat", "/view/table", "/sized/file") == "one\none\n"
        else:
            assert docker.run("ps", "-q") == ""
        docker.run("run", "--rm", *words, "busybox", "/bin/true")
        if live_restore:
            assert docker.run("exec", "one", "/bin/cat", "/view/table", "/sized/file") == "one\none\n"
        else:
            assert _mounts(room, plugin) == []
        docker.run("rm", "-f", "one", "two")
        docker.run("volume", "rm", "sized", "view")
        assert plugin.names() == []
        assert _mounts(room, plugin) == []


@pytest.mark.clients
def test_the_answers_have_the_form_of_those_of_rclone(room: Room, plugin: Plugin, base: Path) -> None:
    """`rclone serve docker` is another volume plugin."""
    need("rclone")
    socket = room.home / "rclone.sock"
    words = ("--socket-addr", socket, "--base-dir", room.home / "rclone", "--no-spec",
             "--config", "/dev/null", "--cache-dir", room.home / "cache")  # fmt: skip
    (room.home / "rclone").mkdir()
    with subprocess.Popen(
        room.command("rclone", "serve", "docker", *words), env=room.environment(), stderr=subprocess.DEVNULL
    ):
        deadline = time.monotonic() + patient(30)
        while not socket.is_socket():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        try:
            theirs = _forms(socket, {"remote": str(base)})
        finally:
            os.kill(listener_of(socket), signal.SIGKILL)
    assert _forms(plugin.path, {}) == theirs


def _forms(socket: Path, options: dict[str, str]) -> list[object]:
    """The forms of the answers to all requests."""
    found = []
    for request, values in (
        ("Plugin.Activate", None),
        ("VolumeDriver.Capabilities", {}),
        ("VolumeDriver.Create", {"Name": "data", "Opts": options}),
        ("VolumeDriver.Get", {"Name": "data"}),
        ("VolumeDriver.Get", {"Name": "other"}),
        ("VolumeDriver.List", {}),
        ("VolumeDriver.Mount", {"Name": "data", "ID": "one"}),
        ("VolumeDriver.Path", {"Name": "data"}),
        ("VolumeDriver.Unmount", {"Name": "data", "ID": "one"}),
        ("VolumeDriver.Remove", {"Name": "data"}),
        ("VolumeDriver.Remove", {"Name": "data"}),
    ):
        try:
            found.append((request, _form(ask(socket, request, values))))
        except Refused as error:
            found.append((request, str(error.status)))
    return found


def _form(value: object) -> object:
    """The keys and types of a value. A Status has keys of a plugin's own; an empty Err may be missing."""
    if isinstance(value, dict):
        return {key: _form(part) for key, part in sorted(value.items()) if key != "Status" and part != ""}
    return [_form(part) for part in value] if isinstance(value, list) else type(value)
