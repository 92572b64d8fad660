"""Two hosts with unions on one GlusterFS volume: shared lowers, a shared volume, an upper of one of them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed, unionfs, wait_for
from tests.support import areas
from tests.support.patience import patient
from tests.volumes.bricks import Brick

pytestmark = pytest.mark.usefixtures("root")

ENVIRONMENT = {"UNIONFS_LEASE_SECONDS": str(patient(3.0))}


class Client:
    """One host: a mount of the volume, a storage root, an upper of its own."""

    def __init__(self, brick: Brick, home: Path) -> None:
        self.home = home
        home.mkdir()
        self.shared, self.merged = home / "shared", home / "merged"
        brick.mount(self.shared)
        for name in ("upper", "work", "merged"):
            (home / name).mkdir()

    def unionfs(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**ENVIRONMENT, "UNIONFS_ROOT": str(self.home / "root")}
        return unionfs(*words, env=environment, timeout=patient(60))

    def mount(self, *words: str | Path) -> None:
        succeed(self.unionfs("mount", *words, self.merged))

    def umount(self) -> None:
        succeed(self.unionfs("umount", self.merged))


@pytest.fixture
def two(brick: Brick, area: Path) -> Iterator[list[Client]]:
    clients = [Client(brick, area / name) for name in ("one", "two")]
    lower = clients[0].shared / "lower"
    (lower / "data").mkdir(parents=True)
    (lower / "base").write_text("base\n")
    yield clients
    for one in clients:
        areas.detach(one.merged)


def test_shared_lowers_and_a_shared_volume(two: list[Client], brick: Brick) -> None:
    """Also while the server is killed and started again."""
    for one in two:
        words = ("-o", "servers=127.0.0.1", "-o", f"volname={brick.name}")
        succeed(one.unionfs("volume", "create", "-d", "glusterfs", *words, "media"))
        own = ("-u", one.home / "upper", "-w", one.home / "work")
        one.mount("-l", one.shared / "lower", *own, "-v", "media:/data")
    first, second = (one.merged for one in two)
    (first / "base").write_text("of the first\n")
    assert (second / "base").read_text() == "base\n"
    (first / "data/from-first").write_text("1")
    (second / "data/from-second").write_text("2")
    for top in (first, second):
        assert wait_for(lambda top=top: {"from-first", "from-second"} <= set(os.listdir(top / "data")))
    assert (second / "data/from-first").read_text() == "1"
    brick.stop()
    (first / "base").write_text("the upper is on a disk\n")
    brick.start()
    assert wait_for(lambda: _is_written(second / "data/from-first", "changed"), 30)
    assert wait_for(lambda: _text(first / "data/from-first") == "changed", 30)
    for one in two:
        one.umount()
    assert (two[0].shared / "lower/base").read_text() == "base\n"
    assert not os.path.exists(two[0].home / "upper.lease")


def _is_written(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False  # the client has not connected again
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        return str(error)  # the client has not connected again


def test_an_upper_is_one_hosts(two: list[Client], brick: Brick) -> None:
    """It is kept while the server is killed and started again."""
    one, other = two
    for name in ("upper", "work"):
        (one.shared / name).mkdir()
    one.mount("-l", one.shared / "lower", "-u", one.shared / "upper", "-w", one.shared / "work")
    (one.merged / "base").write_text("changed\n")
    there = other.shared
    words = ("-l", there / "lower", "-u", there / "upper", "-w", there / "work", other.merged)
    refused(other.unionfs("mount", *words), "unmount it there")
    brick.stop()
    assert wait_for(lambda: _lease(one)["waits"] is True, 30)
    brick.start()
    assert wait_for(lambda: _lease(one)["waits"] is False, 60)
    assert _lease(one)["lost_because"] is None
    refused(other.unionfs("mount", *words), "unmount it there")
    (one.merged / "more").write_text("more\n")
    one.umount()
    assert sorted(os.listdir(one.shared)) == ["lower", "upper", "work"]
    other.mount(*words[:-1])
    assert (other.merged / "base").read_text() == "changed\n"
    assert (other.merged / "more").read_text() == "more\n"
    other.umount()


def _lease(one: Client) -> dict[str, object]:
    shown = json.loads(succeed(one.unionfs("inspect", "--json", one.merged)))
    found: dict[str, object] = shown["figures"]["lease"]
    return found
