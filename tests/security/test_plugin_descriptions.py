"""Sockets and descriptions of Docker volume plugins: created by another user, unreadable, or endless."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused
from tests.volumes.conftest import Store
from unionfs.storage.drivers import plugin_search

STRANGER = 1001


@pytest.fixture
def places(area: Path, store: Store) -> Iterator[Path]:
    """The search directory for plugins."""
    if os.geteuid() != 0:
        pytest.skip("needs root, whom others mislead")
    directory = area / "plugins"
    directory.mkdir()
    store.env[plugin_search.ENVIRONMENT] = str(directory)
    began = time.monotonic()
    yield directory
    assert time.monotonic() - began < 10


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def _describe(path: Path, url: str = "unix:///nowhere") -> None:
    path.write_text(json.dumps({"Addr": url}) if path.suffix == ".json" else url)


def _create(store: Store, *parts: str) -> None:
    refused(store("create", "-d", "p", "data"), *parts)


class TestTrust:
    @pytest.mark.parametrize("ending", ["sock", "spec", "json"])
    def test_of_another_user(self, store: Store, places: Path, ending: str) -> None:
        path = places / f"p.{ending}"
        with socket.socket(socket.AF_UNIX) as listener:
            if ending == "sock":
                listener.bind(str(path))
            else:
                _describe(path)
            os.chown(path, STRANGER, STRANGER)
            _create(store, f"p.{ending} is not trusted", f"belongs to uid {STRANGER}", "chown")

    @pytest.mark.parametrize("mode", [0o666, 0o646, 0o664])
    def test_written_by_others(self, store: Store, places: Path, mode: int) -> None:
        path = places / "p.spec"
        _describe(path)
        os.chown(path, 0, STRANGER)
        path.chmod(mode)
        _create(store, "is not trusted", "can be written by others", "chmod go-w")
        path.chmod(0o644)
        _create(store, "at unix:///nowhere cannot be used")

    def test_a_socket_may_be_written_by_those_who_talk_to_it(
        self, places: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(plugin_search.ENVIRONMENT, str(places))
        with _listen(places / "p.sock"):
            (places / "p.sock").chmod(0o777)
            assert plugin_search.find_address("p") is not None

    @pytest.mark.parametrize("ending", ["sock", "spec", "json"])
    @pytest.mark.parametrize("what", ["owner", "mode", "above"])
    def test_in_a_directory_of_others(self, store: Store, places: Path, ending: str, what: str) -> None:
        inner = places / "p"
        inner.mkdir()
        path = inner / f"p.{ending}"
        with socket.socket(socket.AF_UNIX) as listener:
            if ending == "sock":
                listener.bind(str(path))
            else:
                _describe(path)
            place = places if what == "above" else inner
            if what == "mode":
                place.chmod(0o777)
            else:
                os.chown(place, STRANGER, STRANGER)
            _create(store, "is not trusted", str(place))

    @pytest.mark.parametrize("ending", ["sock", "spec", "json"])
    def test_symlinks_are_followed_and_their_targets_checked(
        self, store: Store, places: Path, area: Path, ending: str
    ) -> None:
        """Docker follows them."""
        elsewhere = area / "elsewhere"
        elsewhere.mkdir()
        target = elsewhere / f"x.{ending}"
        with socket.socket(socket.AF_UNIX) as listener:
            if ending == "sock":
                listener.bind(str(target))
            else:
                _describe(target)
            (places / f"p.{ending}").symlink_to(target)
            _create(store, "cannot be used")
            os.chown(elsewhere, STRANGER, STRANGER)
            _create(store, "is not trusted", str(elsewhere))

    def test_a_users_own_are_trusted_by_him(self, area: Path) -> None:
        place = area / "his"
        place.mkdir()
        _describe(place / "p.spec")
        os.chown(place, STRANGER, STRANGER)
        os.chown(place / "p.spec", STRANGER, STRANGER)
        child = os.fork()  # the interpreter itself may be readable by root only
        if child == 0:
            code = 1
            try:
                os.setresuid(STRANGER, STRANGER, STRANGER)
                os.environ[plugin_search.ENVIRONMENT] = str(place)
                found = plugin_search.find_address("p")
                code = 0 if found is not None and found.url == "unix:///nowhere" else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestFiles:
    @pytest.mark.parametrize("ending", ["spec", "json"])
    def test_a_fifo(self, store: Store, places: Path, ending: str) -> None:
        os.mkfifo(places / f"p.{ending}")
        _create(store, f"p.{ending}", "is not a regular file")

    @pytest.mark.parametrize("ending", ["spec", "json"])
    @pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "/dev/console", "/proc/kmsg", "/"])
    def test_devices(self, store: Store, places: Path, ending: str, target: str) -> None:
        if not os.path.exists(target):
            pytest.skip(f"there is no {target}")
        (places / f"p.{ending}").symlink_to(target)
        _create(store, f"p.{ending}")

    @pytest.mark.parametrize("ending", ["spec", "json"])
    def test_a_huge_file(self, store: Store, places: Path, ending: str) -> None:
        with (places / f"p.{ending}").open("w") as file:
            file.truncate(1 << 40)
        _create(store, f"p.{ending}", "more than 1048576 bytes")

    @pytest.mark.parametrize("ending", ["sock", "spec", "json"])
    def test_symlinks_that_lead_nowhere(self, store: Store, places: Path, ending: str) -> None:
        (places / f"p.{ending}").symlink_to(f"p.{ending}")
        _create(store, "unknown volume driver p")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("p.spec", b"\xff\xfe"), ("p.spec", b"unix://relative"), ("p.spec", b"tcp://"),
            ("p.spec", b"tcp://[::1"), ("p.spec", b"tcp://x:99999999"), ("p.spec", b"tcp://x:port"),
            ("p.spec", b"unix:///a\0b"), ("p.spec", b"tcp://a b"), ("p.spec", b"unix:///a\nb"),
            ("p.spec", b"tcp://" + b"x" * 900_000), ("p.spec", b"unix:///" + b"x" * 5000),
            ("p.json", b"[" * 100_000), ("p.json", b'{"Addr": 7}'), ("p.json", b'{"Addr": null}'),
            ("p.json", b'{"Addr": "tcp://x", "TLSConfig": {"CAFile": 7}}'),
            ("p.json", b'{"Addr": "tcp://x", "TLSConfig": {"InsecureSkipVerify": "no"}}'),
            ("p.json", b'{"Addr": "https://127.0.0.1:1", "TLSConfig": {"CAFile": "/\\u0000"}}'),
            ("p.json", b'{"Addr": "https://127.0.0.1:1", "TLSConfig": {"CAFile": "/dev/zero"}}'),
            ("p.json", b'{"Addr": "https://127.0.0.1:1", "TLSConfig": {"CertFile": "/etc/hostname"}}'),
        ],
        ids=lambda part: repr(part)[:40],
    )  # fmt: skip
    def test_odd_content(self, store: Store, places: Path, name: str, content: bytes) -> None:
        (places / name).write_bytes(content)
        done = store("create", "-d", "p", "data")
        refused(done)
        assert len(done.stderr) < 6000

    @pytest.mark.parametrize("key", ["CAFile", "CertFile", "KeyFile"])
    def test_certificates_that_would_be_waited_for(
        self, store: Store, places: Path, area: Path, key: str
    ) -> None:
        os.mkfifo(area / "fifo")
        files = {"CertFile": "/etc/hostname", key: str(area / "fifo")}
        (places / "p.json").write_text(json.dumps({"Addr": "https://127.0.0.1:1", "TLSConfig": files}))
        _create(store, "fifo", "TLSConfig", "is not a regular file")

    def test_an_encrypted_key_asks_nobody(self, store: Store, places: Path) -> None:
        key = places / "key.pem"
        made = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:secret", "-keyout", key,
             "-out", places / "cert.pem", "-subj", "/CN=x"], capture_output=True, check=False,
        )  # fmt: skip
        if made.returncode:
            pytest.skip("openssl makes no key here")
        files = {"CertFile": str(places / "cert.pem"), "KeyFile": str(key)}
        (places / "p.json").write_text(json.dumps({"Addr": "https://127.0.0.1:1", "TLSConfig": files}))
        _create(store, "certificates", "TLSConfig")

    def test_names_are_listed_without_loops(self, store: Store, places: Path) -> None:
        (places / "loop").symlink_to(".")
        deep = places / "a/b/c/d/e/f"
        deep.mkdir(parents=True)
        (deep / "p.spec").touch()
        _describe(places / "a/b/q.spec")
        _create(store, "a/b/q", "unknown volume driver p")


class TestManaged:
    def test_a_mountpoint_that_leads_out(self, area: Path) -> None:
        base = area / "id/rootfs"
        (base / "data").mkdir(parents=True)
        (base / "out").symlink_to("/etc")
        address = plugin_search.Address("p", "unix:///x", None, str(base), "/data")
        assert not address.is_beyond(address.host_path("/other"))
        assert address.is_beyond(address.host_path("/out"))
        assert address.host_path("/data/v") == f"{area}/id/propagated-mount/v"
        assert address.host_path("/database") == f"{base}/database"
        assert not address.is_beyond(address.host_path("/data/v"))
        (area / "id/propagated-mount").mkdir()
        (area / "id/propagated-mount/v").symlink_to("/etc")
        assert address.is_beyond(address.host_path("/data/v"))

    @pytest.mark.parametrize("kind", ["fifo", "device", "deep"])
    def test_odd_configurations(self, area: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin_search, "_MANAGED", str(area))
        (area / "id").mkdir()
        path = area / "id/config.json"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.write_text("[" * 100_000)
        began = time.monotonic()
        assert plugin_search._find_managed("p") is None
        assert time.monotonic() - began < 5
