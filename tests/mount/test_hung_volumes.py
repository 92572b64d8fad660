"""A volume of a plugin whose storage does not answer any more: what does not need it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import Done, succeed, unionfs
from tests.mount.hung_calls import Server
from tests.support import areas
from tests.support.mounting import is_mounted
from tests.support.patience import patient
from tests.volumes.test_plugins import SERVER
from unionfs.storage.drivers import plugin


class Host:
    """Two unions, one with a plugin's volume `far`, one with a local volume `near`."""

    def __init__(self, area: Path) -> None:
        self.area = area
        self.env = {"UNIONFS_ROOT": str(area / "root"), plugin.ENVIRONMENT: str(area / "plugins")}
        for name in ("source/far", "home", "lower", "plugins"):
            (area / name).mkdir(parents=True)
        (area / "source/far/file").write_text("far")
        (area / "lower/file").write_text("of the lower")
        self.plugin = subprocess.Popen(
            [sys.executable, SERVER, area / "home", area / "plugins/p.sock"], stdout=subprocess.PIPE
        )
        assert self.plugin.stdout is not None
        self.plugin.stdout.read()  # until it listens
        succeed(self("volume", "create", "-d", "p", "far"))
        succeed(self("volume", "create", "near"))
        self.server = Server(area / "source", area / "home/volumes")
        self.caller: subprocess.Popen[bytes] | None = None

    def __call__(self, *words: str | Path) -> Done:
        return unionfs(*words, env=self.env)

    def union(self, name: str, volume: str) -> Path:
        """Mount a union with a volume."""
        top = self.area / name
        for made in (name, f"{name}-upper", f"{name}-work"):
            (self.area / made).mkdir()
        upper, work = f"{top}-upper", f"{top}-work"
        layers = ("-l", self.area / "lower", "-u", upper, "-w", work)
        succeed(self("mount", *layers, "-v", f"{volume}:/data", top))
        return top

    def end(self) -> None:
        self.server.go_on()
        if self.caller is not None:
            self.caller.kill()
            self.caller.wait()
        for name in ("one", "two"):
            areas.detach(self.area / name)
        self.plugin.kill()
        self.plugin.communicate()
        self.server.end()


@pytest.fixture
def host(root: None, area: Path) -> Iterator[Host]:
    found = Host(area)
    try:
        yield found
    finally:
        found.end()


def _answers(host: Host, one: Path, two: Path) -> None:
    """All commands about volumes and mounts."""
    listed = host("volume", "ls").stdout
    assert "far" in listed
    assert "near" in listed
    for words in (
        ["volume", "inspect", "near"], ["volume", "inspect", "far"], ["ls"], ["ls", "--json"],
        ["inspect", one], ["inspect", two], ["stats", one],
        ["volume", "backup", "near", "-o", host.area / "b.tar"],
    ):  # fmt: skip
        done = host(*words)
        assert done.returncode == 0, done.stderr


def test_stopped(host: Host) -> None:
    """Commands answer, also about that volume; the other union and the rest of this one go on."""
    one, two = host.union("one", "far"), host.union("two", "near")
    assert (one / "data/file").read_text() == "far"
    host.server.stop()
    host.caller = subprocess.Popen(["cat", one / "data/missing"], stderr=subprocess.DEVNULL, cwd="/")
    assert (one / "file").read_text() == "of the lower"
    (one / "new").write_text("new")
    (two / "data/file").write_text("near")
    _answers(host, one, two)
    succeed(host("umount", two))
    succeed(host("volume", "rm", "near"))
    assert not is_mounted(two)
    host.server.go_on()
    assert host.caller.wait(patient(20)) == 1
    assert (one / "data/file").read_text() == "far"
    succeed(host("umount", one))


@pytest.mark.parametrize("how", [[], ["--lazy"], ["--force"]], ids=["idle", "lazy", "force"])
def test_umount(host: Host, how: list[str]) -> None:
    """It ends, with or without callers that wait for the volume."""
    one = host.union("one", "far")
    host.server.stop()
    if how:
        host.caller = subprocess.Popen(["cat", one / "data/missing"], stderr=subprocess.DEVNULL, cwd="/")
    succeed(host("umount", *how, one))
    assert not is_mounted(one)
    assert os.listdir(one) == []


@pytest.mark.slow
def test_a_plugin_that_is_stopped(host: Host) -> None:
    """Its volume in use stays usable, and is unmounted without it."""
    one, two = host.union("one", "far"), host.union("two", "near")
    host.plugin.send_signal(signal.SIGSTOP)
    try:
        _answers(host, one, two)
        assert (one / "data/file").read_text() == "far"
        succeed(host("umount", two))
        host("umount", one)
        assert not is_mounted(one)
    finally:
        host.plugin.send_signal(signal.SIGCONT)
