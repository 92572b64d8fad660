"""Plugins that name a directory on a filesystem that never answers, or whose server is dead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused
from tests.security.serving import serving
from tests.security.test_plugin_answers import Hostile, says
from tests.security.test_plugin_answers import hostile as hostile
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage.drivers import looking, plugin, plugin_search

SERVER = Path(__file__).with_name("hanging.py")


@pytest.fixture
def hanging(root: None, area: Path) -> Iterator[Path]:
    """The filesystem, mounted."""
    place = area / "hanging"
    with serving(SERVER, place):
        yield place


@pytest.fixture
def dead(root: None, area: Path) -> Iterator[Path]:
    """A mount whose server has ended."""
    place = area / "dead"
    with serving(SERVER, place) as child:
        child.kill()
        child.wait()
        yield place


@pytest.mark.parametrize("below", ["", "/below"])
def test_backup(
    store: Store, hostile: Hostile, hanging: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_LOOK_SECONDS", 1.0)
    store.ok("create", "-d", "p", "data")
    hostile.scripts["VolumeDriver.Mount"] = says({"Mountpoint": f"{hanging}{below}"})
    began = time.monotonic()
    done = store("backup", "data", "-o", hanging.parent / "b.tar")
    assert time.monotonic() - began < 8
    refused(done, f"plugin p names the directory {hanging}{below}", "has not answered within 1 s")
    assert hostile.requests[-1] == "VolumeDriver.Unmount"
    assert store.volumes().users("data") == []


def test_a_command_ends_though_its_child_does_not(store: Store, hostile: Hostile, hanging: Path) -> None:
    """Also for a caller that waits for the end of all holders of its output, and its locks are released."""
    store.ok("create", "-d", "p", "data")
    hostile.scripts["VolumeDriver.Mount"] = says({"Mountpoint": str(hanging)})
    began = time.monotonic()
    refused(store("backup", "data", "-o", hanging.parent / "b.tar", env={"PYTHONPATH": ""}), str(hanging))
    assert time.monotonic() - began < 20
    store.ok("rm", "data")


def test_a_dead_one(store: Store, hostile: Hostile, dead: Path) -> None:
    store.ok("create", "-d", "p", "data")
    hostile.scripts["VolumeDriver.Mount"] = says({"Mountpoint": str(dead)})
    done = store("backup", "data", "-o", dead.parent / "b.tar")
    refused(done, str(dead), "transport endpoint is not connected")


def test_one_of_a_managed_plugin(hostile: Hostile, hanging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_LOOK_SECONDS", 1.0)
    hostile.scripts["VolumeDriver.Path"] = says({"Mountpoint": "/hanging/x"})
    base = str(hanging.parent)
    found = plugin.Plugin(plugin_search.Address("p", f"unix://{base}/plugins/p.sock", None, base))
    with pytest.raises(UserError, match="has not answered within 1 s"):
        found._told_by_path(plugin.Volume("data", "p", "", False))


def test_looking() -> None:
    assert looking.look(lambda: 7, 5) == 7
    assert looking.look(lambda: os.listdir("/nowhere") and 0, 5) == 2
    assert looking.look(lambda: time.sleep(60) or 0, 0.2) is None
