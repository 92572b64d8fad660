"""Plugin sockets on which another user listens, or with which a user replaces root's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused
from tests.security import attacks
from tests.security.test_plugin_answers import Hostile
from tests.support import acl
from tests.support.worker import Worker
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage.drivers import plugin, plugin_search

STRANGER = 1001
ROUNDS = 1000


@pytest.fixture
def places(root: None, area: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The search directory for plugins."""
    directory = area / "plugins"
    directory.mkdir()
    store.env[plugin_search.ENVIRONMENT] = str(directory)
    monkeypatch.setenv(plugin_search.ENVIRONMENT, str(directory))
    monkeypatch.setattr(plugin, "_silent_until", {})
    return directory


@pytest.fixture
def his(area: Path) -> Path:
    """A directory of the attacker."""
    directory = area / "his"
    directory.mkdir()
    os.chown(directory, STRANGER, STRANGER)
    return directory


@pytest.fixture
def roots(area: Path) -> Iterator[Hostile]:
    """A plugin of root, at `good/p.sock`."""
    (area / "good").mkdir()
    server = Hostile(area / "good/p.sock")
    yield server
    server.close()


def _describe(path: Path, socket_: Path) -> None:
    url = f"unix://{socket_}"
    path.write_text(json.dumps({"Addr": url}) if path.suffix == ".json" else url)


@pytest.mark.parametrize("ending", ["spec", "json"])
class TestNamed:
    """Sockets named by a description of root."""

    def test_in_a_directory_of_others(
        self, store: Store, places: Path, his: Path, attacker: Worker, ending: str
    ) -> None:
        attacker.call(attacks.listen, str(his / "p.sock"))
        _describe(places / f"p.{ending}", his / "p.sock")
        refused(store("create", "-d", "p", "data"), "p.sock is not trusted", str(his), f"uid {STRANGER}")
        assert attacker.call(attacks.accepted) == 0

    def test_in_a_sticky_directory(
        self, store: Store, places: Path, area: Path, attacker: Worker, ending: str
    ) -> None:
        (area / "tmp").mkdir()
        (area / "tmp").chmod(0o1777)
        attacker.call(attacks.listen, str(area / "tmp/p.sock"))
        _describe(places / f"p.{ending}", area / "tmp/p.sock")
        refused(store("create", "-d", "p", "data"), "p.sock is not trusted", f"it belongs to uid {STRANGER}")
        assert attacker.call(attacks.accepted) == 0

    def test_a_socket_that_was_given_away(
        self, store: Store, places: Path, area: Path, attacker: Worker, ending: str
    ) -> None:
        (area / "tmp").mkdir()
        (area / "tmp").chmod(0o1777)
        attacker.call(attacks.listen, str(area / "tmp/p.sock"))
        os.chown(area / "tmp/p.sock", 0, 0)
        _describe(places / f"p.{ending}", area / "tmp/p.sock")
        refused(store("create", "-d", "p", "data"), f"has uid {STRANGER}")

    def test_one_of_root(self, store: Store, places: Path, area: Path, roots: Hostile, ending: str) -> None:
        """Also by a relative symlink, and below a path longer than a socket address."""
        long = area / ("x" * 200)
        long.mkdir()
        (long / "p.sock").symlink_to("../good/./p.sock")
        _describe(places / f"p.{ending}", long / "p.sock")
        store.ok("create", "-d", "p", "data")


class TestSymlinks:
    @pytest.mark.parametrize("where", ["file", "directory"])
    def test_one_in_a_directory_of_others(
        self, store: Store, places: Path, area: Path, his: Path, roots: Hostile, where: str
    ) -> None:
        """The end of the path is root's, but the attacker may redirect it at any time."""
        if where == "file":
            (his / "link").symlink_to(area / "good/p.sock")
            (places / "p.sock").symlink_to(his / "link")
        else:
            (his / "link").symlink_to(area / "good")
            (places / "p.sock").symlink_to(his / "link/p.sock")
        refused(store("create", "-d", "p", "data"), "is not trusted", str(his), f"uid {STRANGER}")
        assert roots.requests == []

    @pytest.mark.parametrize("ending", ["spec", "json"])
    def test_descriptions(self, store: Store, places: Path, area: Path, his: Path, ending: str) -> None:
        _describe(area / f"good.{ending}", area / "nowhere")
        (his / "link").symlink_to(area / f"good.{ending}")
        (places / f"p.{ending}").symlink_to(his / "link")
        refused(store("create", "-d", "p", "data"), f"p.{ending} is not trusted", str(his))

    @pytest.mark.parametrize("key", ["CAFile", "CertFile", "KeyFile"])
    def test_certificates(self, store: Store, places: Path, his: Path, key: str) -> None:
        (his / "link").symlink_to("/etc/hostname")
        tls = {"CertFile": "/etc/hostname", key: str(his / "link")}
        (places / "p.json").write_text(json.dumps({"Addr": "https://127.0.0.1:1", "TLSConfig": tls}))
        refused(store("create", "-d", "p", "data"), "link is not trusted", str(his))

    def test_loops_and_ways_up(self, places: Path, area: Path, roots: Hostile) -> None:
        (places / "up").symlink_to("..")
        (places / "p.spec").write_text(f"unix://{places}/up/plugins/../good/p.sock")
        found = plugin.find_plugin("p")
        assert found is not None
        assert found.scope == "local"
        assert roots.requests == ["Plugin.Activate", "VolumeDriver.Capabilities"]
        (places / "a").symlink_to("b")
        (places / "b").symlink_to("a")
        (places / "p.spec").write_text(f"unix://{places}/a/p.sock")
        found = plugin.find_plugin("p")
        assert found is not None
        with pytest.raises(UserError, match="ymbolic links"):
            found.remove(plugin.Volume("data", "p", "", False))

    @pytest.mark.parametrize("kind", ["link", "directory"])
    def test_races(
        self, places: Path, area: Path, his: Path, roots: Hostile, attacker: Worker, kind: str
    ) -> None:
        """Root's socket and the attacker's are exchanged continuously."""
        attacker.call(os.mkdir, str(his / "d"))
        attacker.call(attacks.listen, str(his / "d/p.sock"))
        if kind == "link":
            one, other = his / "one", his / "other"
            one.symlink_to(area / "good/p.sock")
            other.symlink_to(his / "d/p.sock")
            (places / "p.sock").symlink_to(one)
        else:
            one, other = his / "p", his / "d"
            one.symlink_to(area / "good")
            (places / "p").symlink_to(one)
        attacker.call(attacks.swap, str(one), str(other))
        end = time.monotonic() + 10
        rounds = 0
        try:
            while rounds < ROUNDS and time.monotonic() < end:
                rounds += 1
                with suppress(UserError):
                    found = plugin.find_plugin("p")
                    if found is not None:
                        found.remove(plugin.Volume("data", "p", "", False))
        finally:
            attacker.call(attacks.stop)
        assert attacker.call(attacks.accepted) == 0


class TestLists:
    @pytest.mark.parametrize("who", [acl.USER, acl.GROUP])
    @pytest.mark.parametrize("where", ["file", "directory"])
    def test_an_acl_lets_others_write(self, store: Store, places: Path, who: int, where: str) -> None:
        """With an ACL the group bits of the mode are its mask, even if the group is root's."""
        (places / "p.spec").write_text("unix:///nowhere")
        place = places / "p.spec" if where == "file" else places
        entries = [(acl.USER_OBJ, 7, 0), (acl.GROUP_OBJ, 5, 0), (acl.MASK, 7, 0), (acl.OTHER, 5, 0)]
        entries.insert(1 if who == acl.USER else 2, (who, 7, STRANGER))
        os.setxattr(place, acl.ACCESS, acl.encode(entries))
        refused(store("create", "-d", "p", "data"), "is not trusted", "can be written by others")
        place.chmod(0o755)
        refused(store("create", "-d", "p", "data"), "cannot be used", "no such file")

    @pytest.mark.parametrize("where", ["root", "above"])
    def test_storage_roots(self, root: None, area: Path, where: str) -> None:
        above = area / "above"
        (above / "root").mkdir(parents=True)
        place = above if where == "above" else above / "root"
        os.setxattr(place, acl.ACCESS, acl.simple(7, 5, 5, users={STRANGER: 7}))
        refused(Store(above / "root")("create", "data"), "writ", "others")
