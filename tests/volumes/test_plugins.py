"""Docker's volume plugins: found by .sock, .spec and .json, used by the published protocol, with error
messages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import refused, wait_for
from tests.volumes import trees
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage.drivers import plugin, plugin_search

Start = Callable[..., Path]
SERVER = Path(__file__).with_name("plugin_server.py")


class Plugins:
    """A directory for plugins' descriptions, and running plugins."""

    def __init__(self, area: Path) -> None:
        self.directory = area / "plugins"
        self.directory.mkdir()
        self.area = area
        self.running: list[subprocess.Popen[str]] = []

    def start(self, address: str, *options: str, home: str = "server") -> tuple[Path, str]:
        """Start one; returns its home and its output at the start (the TCP port)."""
        place = self.area / home
        place.mkdir(exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, SERVER, place, address, *options], stdout=subprocess.PIPE, text=True
        )
        self.running.append(child)
        assert child.stdout is not None
        lines = child.stdout.read().split()
        assert lines[-1] == "up"
        return place, lines[0]

    def socket(self, name: str, *options: str) -> Path:
        """Start a plugin that is found by its socket."""
        path = self.directory / f"{name}.sock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.start(str(path), *options)[0]


def _log(home: Path) -> list[Any]:
    return [json.loads(line) for line in (home / "log").read_text().splitlines()]


def _requests(home: Path) -> list[str]:
    return [request for request, _ in _log(home) if request != "Plugin.Activate"]


@pytest.fixture
def plugins(area: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    made = Plugins(area)
    monkeypatch.setenv(plugin.ENVIRONMENT, str(made.directory))
    store.env[plugin.ENVIRONMENT] = str(made.directory)
    yield made
    for child in made.running:
        child.kill()
        child.wait()


def _whole_life(store: Store, area: Path, driver: str, home: Path, *options: str) -> None:
    """Run every operation on a volume."""
    assert store.ok("create", "-d", driver, *options, "data") == "data\n"
    volumes = store.volumes()
    one, two = volumes.attach("data", "one"), volumes.attach("data", "two")
    assert one == two == str(home / "volumes/data")
    (Path(one) / "file").write_text("x")
    volumes.detach("data", "two")
    refused(store("rm", "data"), "in use by one")
    volumes.detach("data", "one")
    store.ok("backup", "data", "-o", area / "b.tar")
    before = trees.value(home / "volumes/data")
    (home / "volumes/data/later").touch()
    store.ok("restore", "data", "-i", area / "b.tar")
    assert trees.value(home / "volumes/data") == before
    assert store.ok("rm", "data") == "data\n"
    assert not (home / "volumes/data").exists()


class TestFound:
    @pytest.mark.parametrize("name", ["simple", "rexray/ebs", "own/own"])
    def test_by_a_socket(self, store: Store, area: Path, plugins: Plugins, name: str) -> None:
        home = plugins.socket(name)
        driver = "own" if name == "own/own" else name  # in a directory of the same name
        _whole_life(store, area, driver, home, "-o", "colour=red")
        requests = _log(home)
        assert requests[0] == ["Plugin.Activate", None]
        assert ["VolumeDriver.Create", {"Name": "data", "Opts": {"colour": "red"}}] in requests
        ids = [values["ID"] for request, values in requests if request == "VolumeDriver.Mount"]
        assert all(len(one) == 64 and set(one) <= set("0123456789abcdef") for one in ids)
        assert len(set(ids)) == len(ids)  # one ID per user
        gone = [values["ID"] for request, values in requests if request == "VolumeDriver.Unmount"]
        assert sorted(gone) == sorted(ids)
        assert driver in plugin.plugin_names()

    @pytest.mark.parametrize(
        "content", ["unix://{path}", "tcp://127.0.0.1:{port}", "http://127.0.0.1:{port}\n"]
    )
    def test_by_a_spec(self, store: Store, area: Path, plugins: Plugins, content: str) -> None:
        path = area / "somewhere.sock"
        home, port = plugins.start(str(path) if "{path}" in content else "0")
        (plugins.directory / "far.spec").write_text(content.format(path=path, port=port))
        _whole_life(store, area, "far", home)

    def test_nobody_listens(self, store: Store, plugins: Plugins) -> None:
        (plugins.directory / "deadtcp.spec").write_text("tcp://127.0.0.1:9")
        said = refused(store("create", "-d", "deadtcp", "data"), "connection refused")
        assert "Errno" not in said
        assert "exception" not in said
        refused(store("create", "-d", "unheard", "data"), str(plugins.directory))

    def test_by_a_json_with_tls(self, store: Store, area: Path, plugins: Plugins) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        cert = area / "cert.pem"
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                area / "key.pem",
                "-out",
                cert,
                "-subj",
                "/CN=127.0.0.1",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-days",
                "2",
            ],
            check=True,
            capture_output=True,
        )
        (area / "both.pem").write_text((area / "key.pem").read_text() + cert.read_text())
        home, port = plugins.start("0", f"cert={area}/both.pem")
        described = {"Name": "far", "Addr": f"https://127.0.0.1:{port}", "TLSConfig": {"CAFile": str(cert)}}
        path = plugins.directory / "far.json"
        path.write_text(json.dumps(described))
        _whole_life(store, area, "far", home)
        path.write_text(json.dumps({**described, "TLSConfig": {"InsecureSkipVerify": True}}))
        _whole_life(store, area, "far", home)
        path.write_text(json.dumps({**described, "TLSConfig": {}}))
        refused(store("create", "-d", "far", "data"), "does not answer", "certificate")
        path.write_text(json.dumps({**described, "TLSConfig": {"CAFile": "/none"}}))
        refused(store("create", "-d", "far", "data"), "certificates", "TLSConfig")

    def test_what_is_misspelt(self, store: Store, plugins: Plugins) -> None:
        for name, content in {
            "a.spec": "ftp://x",
            "b.json": "{",
            "c.json": "{}",
            "d.json": "[]",
            "e.json": '{"Addr": "x"}',
            "f.spec": "",
            "g.json": '{"Addr": "tcp://x", "TLSConfig": 7}',
        }.items():
            (plugins.directory / name).write_text(content)
            refused(store("create", "-d", name[0] + "", "data"), name, "plugin description")
        refused(store("create", "-d", "../x", "data"), "unknown volume driver ../x")

    def test_a_managed_plugin(self, store: Store, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin_search, "_MANAGED", str(area / "managed"))
        monkeypatch.setattr(plugin_search, "_SOCKETS", (str(area / "run"),))
        ident = "0123456789abcdef" * 4
        (area / "managed" / ident / "rootfs").mkdir(parents=True)
        config = {"Interface": {"Socket": "ebs.sock"}, "PropagatedMount": "/var/lib/ebs"}
        (area / "managed" / ident / "config.json").write_text(
            json.dumps({"plugin": {"Name": "rexray/ebs:latest", "Id": ident, "Config": config}})
        )
        with pytest.raises(UserError, match="does not run"):
            plugin.find_plugin("rexray/ebs")
        (area / "run" / ident).mkdir(parents=True)
        trees.add_socket(area / "run" / ident / "ebs.sock")
        found = plugin_search.find_address("rexray/ebs")
        assert found is not None
        assert found.url == f"unix://{area}/run/{ident}/ebs.sock"
        # As in docker's Plugin.ScopedPath
        assert found.host_path("/var/lib/ebs/v") == f"{area}/managed/{ident}/propagated-mount/v"
        assert found.host_path("/data/v") == f"{area}/managed/{ident}/rootfs/data/v"
        assert plugin_search.find_address("rexray/s3") is None


class TestErrors:
    @pytest.mark.parametrize("request_", ["Plugin.Activate", "VolumeDriver.Create", "VolumeDriver.Get"])
    def test_refusals_when_it_is_made(self, store: Store, plugins: Plugins, request_: str) -> None:
        plugins.socket("p", f"refuse={request_}")
        refused(store("create", "-d", "p", "data"), "plugin p refuses", "it was told to refuse; see")
        assert store.ok("ls", "-q") == ""
        assert list((store.root / "volumes").iterdir()) == []

    def test_a_volume_that_could_not_be_entered_is_given_back(self, store: Store, plugins: Plugins) -> None:
        home = plugins.socket("p", "refuse=VolumeDriver.Get")
        refused(store("create", "-d", "p", "data"), "refuses VolumeDriver.Get")
        assert _requests(home)[-1] == "VolumeDriver.Remove"

    @pytest.mark.parametrize("request_", ["VolumeDriver.Mount", "VolumeDriver.Remove"])
    def test_refusals_later(self, store: Store, plugins: Plugins, request_: str) -> None:
        plugins.socket("p", f"refuse={request_}")
        store.ok("create", "-d", "p", "data")
        volumes = store.volumes()
        mounts = request_ == "VolumeDriver.Mount"
        call = (lambda name: volumes.attach(name, "user")) if mounts else volumes.remove
        with pytest.raises(UserError, match=f"refuses {request_}"):
            call("data")
        assert store.volumes().users("data") == []
        assert store.ok("ls", "-q") == "data\n"

    def test_a_restore_that_cannot_be_unmounted(self, store: Store, area: Path, plugins: Plugins) -> None:
        """What was restored is there, so it is no error."""
        home = plugins.socket("p", "refuse=VolumeDriver.Unmount")
        store.ok("create", "source")
        (store.root / "volumes/source/_data/file").write_text("x")
        store.ok("backup", "source", "-o", area / "b.tar")
        store.ok("create", "-d", "p", "data")
        done = store("restore", "data", "-i", area / "b.tar")
        assert done.returncode == 0, done.stderr
        assert "refuses VolumeDriver.Unmount" in done.stderr
        assert (home / "volumes/data/file").read_text() == "x"

    def test_options_are_its_own_affair(self, store: Store, plugins: Plugins) -> None:
        plugins.socket("p")
        refused(
            store("create", "-d", "p", "-o", "size=1g", "data"),
            "refuses VolumeDriver.Create: unknown option size",
        )

    def test_one_of_another_kind(self, store: Store, plugins: Plugins) -> None:
        plugins.socket("p", "no-volume-driver")
        refused(store("create", "-d", "p", "data"), "is not a volume plugin", "NetworkDriver")

    def test_one_that_talks_garbage(self, store: Store, plugins: Plugins) -> None:
        plugins.socket("p", "garbage")
        refused(store("create", "-d", "p", "data"), "no JSON object")

    def test_one_that_is_gone(self, store: Store, plugins: Plugins) -> None:
        plugins.socket("p")
        store.ok("create", "-d", "p", "data")
        plugins.running[0].kill()
        plugins.running[0].wait()
        refused(store("create", "-d", "p", "other"), "does not answer", "start it")
        assert store.ok("ls", "-q") == "data\n"  # a list sends no requests to plugins
        (found,) = json.loads(store.ok("inspect", "data"))
        assert "does not answer" in found["Status"]["error"]
        refused(store("rm", "data"), "does not answer")
        done = store("prune", "-af")
        assert (done.returncode, "does not answer" in done.stderr) == (1, True)
        assert store.ok("ls", "-q") == "data\n"
        done = store("rm", "-f", "data")
        assert (done.returncode, done.stdout) == (0, "data\n")
        assert done.stderr.count("\n") == 1
        assert "does not answer" in done.stderr
        assert store.ok("ls", "-q") == ""
        assert not (store.root / "volumes/data").exists()

    def test_a_user_that_died_on_one_that_is_gone(self, store: Store, plugins: Plugins) -> None:
        plugins.socket("p")
        store.ok("create", "-d", "p", "data")
        store.volumes().attach("data", f"mount:{os.getpid()}:1:/gone")
        plugins.running[0].kill()
        plugins.running[0].wait()
        refused(store("rm", "data"), "does not answer")
        assert store.ok("rm", "-f", "data") == "data\n"

    def test_a_mountpoint_that_only_path_tells(self, store: Store, area: Path, plugins: Plugins) -> None:
        home = plugins.socket("p", "late")
        _whole_life(store, area, "p", home)

    def test_users_that_died_are_unmounted(self, store: Store, plugins: Plugins) -> None:
        home = plugins.socket("p")
        store.ok("create", "-d", "p", "data")
        store.volumes().attach("data", f"mount:{os.getpid()}:1:/gone")
        store.ok("rm", "data")
        assert _requests(home)[-2:] == ["VolumeDriver.Unmount", "VolumeDriver.Remove"]

    def test_inspect_tells_what_it_says(self, store: Store, plugins: Plugins) -> None:
        plugins.socket("p")
        store.ok("create", "-d", "p", "data")
        (found,) = json.loads(store.ok("inspect", "data"))
        assert (found["Scope"], found["Driver"], found["Status"]) == ("global", "p", {"colour": "blue"})


@pytest.mark.usefixtures("as_root")
def test_rclone_serves_as_a_plugin(store: Store, area: Path, plugins: Plugins) -> None:
    """A real plugin, written for docker."""
    if shutil.which("rclone") is None:
        pytest.skip("rclone is not installed")
    (area / "far").mkdir()
    (area / "rclone.conf").write_text(f"[far]\ntype = alias\nremote = {area}/far\n")
    path = plugins.directory / "rclone.sock"
    child = subprocess.Popen(
        [
            "rclone",
            "serve",
            "docker",
            "--socket-addr",
            path,
            "--base-dir",
            area / "mnt",
            "--no-spec",
            "--forget-state",
            "--config",
            area / "rclone.conf",
            "--cache-dir",
            area / "cache",
            "--log-file",
            area / "rclone.log",
        ],
        env={**os.environ, "HOME": str(area)},
    )
    try:
        assert wait_for(path.exists)
        words = ("-d", "rclone.sock-less", "data")
        refused(store("create", *words), "unknown volume driver")
        # rclone is also a driver of ours: the plugin has that name in docker's directory.
        os.rename(path, plugins.directory / "far.sock")
        options = (
            "-o",
            "remote=far:",
            "-o",
            "vfs-cache-mode=writes",
            "-o",
            "vfs-write-back=0",
            "-o",
            "allow-other=true",
        )
        store.ok("create", "-d", "far", *options, "data")
        volumes = store.volumes()
        with volumes.used("data", "test") as where:
            assert where.startswith(f"{area}/mnt")
            (Path(where) / "file").write_text("hello")
            (Path(where) / "dir").mkdir()
            (Path(where) / "dir/more").write_bytes(os.urandom(100_000))
            content = (Path(where) / "dir/more").read_bytes()
        assert (area / "far/file").read_text() == "hello"
        store.ok("backup", "data", "-o", area / "b.tar")
        shutil.rmtree(area / "far/dir")
        (area / "far/file").write_text("worse")
        store.ok("restore", "data", "-i", area / "b.tar")
        assert (area / "far/file").read_text() == "hello"
        assert (area / "far/dir/more").read_bytes() == content
        assert sorted(os.listdir(area / "far")) == ["dir", "file"]
        assert store.ok("rm", "data") == "data\n"
        assert (area / "far/file").exists()
    finally:
        child.terminate()
        child.wait(20)
