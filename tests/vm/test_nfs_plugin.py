"""The volume plugin serves volumes of `type=nfs`: mounted for their first container until their last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm.nfs import ADDRESS, Server
from tests.volumes.served import Plugin, Refused, served


def _options(server: Server, exported: Path) -> dict[str, str]:
    return {
        "type": "nfs", "o": f"addr={ADDRESS},rw,nfsvers=4.2", "device": server.device(exported),
    }  # fmt: skip


def _is_nfs(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) and " - nfs4 " in line for line in lines)


@pytest.fixture
def plugin(root: None, area: Path) -> Plugin:
    return Plugin(area / "unionfs.sock", area / "root")


def test_its_life(plugin: Plugin, server: Server, exported: Path) -> None:
    (exported / "there").write_text("there\n")
    with served(plugin):
        assert plugin("Create", "media", Opts=_options(server, exported)) == {"Err": ""}
        assert plugin.names() == ["media"]
        path = plugin.mount("media", "one")
        assert _is_nfs(path)
        assert (path / "there").read_text() == "there\n"
        (path / "new").write_text("new\n")
        assert (exported / "new").read_text() == "new\n"
        assert plugin.mount("media", "two") == path
        plugin("Unmount", "media", ID="one")
        plugin.kill()
        assert (path / "new").read_text() == "new\n"
        plugin.start()
        assert (path / "new").read_text() == "new\n"
        plugin("Unmount", "media", ID="two")
        assert not _is_nfs(path)
        plugin("Remove", "media")
        assert plugin.names() == []
    assert sorted(os.listdir(exported)) == ["new", "there"]


def test_a_server_that_refuses(plugin: Plugin, server: Server, exported: Path) -> None:
    """One sentence, and the volume can be removed."""
    with served(plugin):
        plugin("Create", "media", Opts=_options(server, exported))
        exported.rmdir()
        with pytest.raises(Refused, match="No such file or directory") as refusal:
            plugin.mount("media", "one")
        assert str(refusal.value).startswith("volume media cannot be mounted")
        plugin("Remove", "media")
        exported.mkdir()
