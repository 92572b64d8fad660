"""Snapshots of a union with a PostgreSQL cluster in use: each recovers by its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import postgres
from tests.clients.postgres import Cluster
from tests.clients.rooms import Room, room
from tests.mount.cli_calls import session_words
from tests.support import areas

pytestmark = [
    pytest.mark.usefixtures("root"), pytest.mark.clients, pytest.mark.timeout(600), pytest.mark.watchdog(550),
]  # fmt: skip


_ROWS = 20


@pytest.fixture(params=["direct-hybrid", "direct-cached"])
def cluster(request: pytest.FixtureRequest) -> Iterator[tuple[Cluster, Path, Room]]:
    """A cluster below a union, and the area."""
    postgres.programs()
    with areas.area() as area, room(area / "home") as one:
        owner = postgres.system_user()
        for name in ("lower", "upper", "work", "merged", "s", "s2", "elsewhere", "u2", "w2"):
            (area / name).mkdir()
        for name in ("s", "s2"):
            os.chown(area / name, owner.uid, owner.gid)
        data = area / "lower/pg"
        data.mkdir(mode=0o700)
        os.chown(data, owner.uid, owner.gid)
        Cluster(one, owner, data, area / "s").make()
        words = session_words(request.param)
        layers = "-l", area / "lower", "-u", area / "upper", "-w", area / "work"
        _unionfs(one, "mount", *words, *layers, area / "merged")
        yield Cluster(one, owner, area / "merged/pg", area / "s"), area, one
        _unionfs(one, "umount", area / "merged")


def _unionfs(one: Room, *words: str | Path) -> str:
    done = one.call(sys.executable, "-m", "unionfs", *words)
    assert (done.returncode, done.stderr) == (0, ""), (words, done.stderr)
    return str(done.stdout)


def test_recovers_by_its_log(cluster: tuple[Cluster, Path, Room]) -> None:
    """A snapshot that is taken under load, mounted elsewhere, starts, is sound, and has all that was
    committed before."""
    running, area, one = cluster
    with running.running():
        running.sql("create table committed (id serial primary key, at timestamptz default now())")
        load = subprocess.Popen(
            running.command("pgbench", "-n", "-c", "4", "-j", "2", "-T", "60"), env=running.environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            for number in range(3):
                time.sleep(1)
                running.sql("insert into committed default values;\n" * _ROWS)
                name = f"snapshot{number}"
                taken = json.loads(_unionfs(one, "snapshot", "create", "--json", area / "merged", name))
                assert taken["stopped"] > 0
                assert taken["files"] == []
                _check(running, area, one, name, _ROWS * (number + 1))
            assert load.poll() is None
        finally:
            load.terminate()
            load.wait(30)
        assert int(running.sql("select count(*) from committed")) == 3 * _ROWS


def _check(running: Cluster, area: Path, one: Room, name: str, committed: int) -> None:
    listed = json.loads(_unionfs(one, "snapshot", "ls", "--json", area / "merged"))
    lowers = next(values["lowers"] for values in listed if values["name"] == name)
    layers = [word for path in lowers for word in ("-l", path)]
    for part in ("u2", "w2"):
        subprocess.run(["rm", "-rf", area / part], check=True)
        (area / part).mkdir()
    _unionfs(one, "mount", *layers, "-u", area / "u2", "-w", area / "w2", area / "elsewhere")
    try:
        one.as_root("rm", area / "elsewhere/pg/postmaster.pid")
        other = Cluster(one, postgres.system_user(), area / "elsewhere/pg", area / "s2")
        with other.running():
            assert int(other.sql("select count(*) from committed")) == committed
            other.check()
            balances, history = (
                "select sum(abalance) from pgbench_accounts",
                "select sum(delta) from pgbench_history",
            )
            assert other.sql(balances) == other.sql(history)
    finally:
        _unionfs(one, "umount", area / "elsewhere")
