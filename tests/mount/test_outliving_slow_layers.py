"""Mounts that outlive their daemons, with a lower on a FUSE filesystem whose server stops and goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mount.cli_calls import Place, succeed, unionfs
from tests.mount.hung_calls import Server
from tests.mount.outliving_calls import MODES, RESENDS, Outliving, fill, kill_next, load, tree
from tests.support import areas

pytestmark = [pytest.mark.watchdog(600), pytest.mark.timeout(1200), RESENDS]


@contextmanager
def served(place: Place, io: str, count: int, seconds: float) -> Iterator[tuple[Server, Outliving]]:
    """A mount of a served lower, with ``count`` directories for a load. The server takes so long per call."""
    source, shown = place.root / "source", place.root / "served"
    source.mkdir()
    shown.mkdir()
    fill(place, count, io, source)
    server = Server(source, shown, seconds)
    try:
        layers = ("-l", shown, "-l", place.lower, "-u", place.upper, "-w", place.work)
        yield server, Outliving(place, "--session", "direct", "--io", io, layers=layers)
    finally:
        server.go_on()
        areas.detach(place.merged)
        server.end()


def storm(mount: Outliving, server: Server, kills: int, seed: int) -> None:
    """Kill daemons at random moments, also while the server is stopped, and those that take over."""
    chosen = random.Random(seed)
    for _ in range(kills):
        entry = mount.entry()
        time.sleep(chosen.random() * 0.2)
        stops = chosen.random() < 0.5
        if stops:
            server.stop()
            time.sleep(chosen.random() * 0.1)
        os.kill(entry.pid, signal.SIGKILL)
        if stops:
            time.sleep(chosen.random() * 0.2)
            server.go_on()
        kill_next(entry, chosen)
    mount.last = mount.entry()


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("seconds", [0, 0.001], ids=["quick", "slow"])
def test_killed_under_load(place: Place, io: str, seconds: float) -> None:
    """No operation fails that succeeds on a native filesystem, and none is done twice."""
    with served(place, io, 2, seconds) as (server, mount):
        for turn in range(int(os.environ.get("TURNS", 1))):
            with load(place, 2, turn) as results:
                storm(mount, server, int(os.environ.get("KILLS", 5)), turn)
            print(io, turn, [(one["count"], one["longest"]) for one in results])
            assert [one["differences"] for one in results] == [[], []], mount.log()
            for number in range(2):
                assert tree(mount.top / f"w{number}") == tree(place.root / f"native/w{number}"), turn
        mount.end()
        assert os.listdir(place.work / "work") == []
        succeed(unionfs("check", *mount.layers))
