"""A PostgreSQL cluster of a lower, copied up as it is used: killed, recovered, and the same as on ext4.

So also while the daemons of the mount are killed, which the server and its clients do not notice.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import postgres
from tests.clients.postgres import Cluster, Owner
from tests.clients.rooms import ROOTLESS_UID, Room, room
from tests.clients.support import manifest
from tests.faults.deaths import resends
from tests.mount.cli_calls import session_words
from tests.support import areas

pytestmark = [
    pytest.mark.usefixtures("root"), pytest.mark.clients, pytest.mark.timeout(600), pytest.mark.watchdog(550),
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Path, bytes]]:
    """A filled cluster of the package's user, and its content after the work on ext4."""
    postgres.programs()
    with areas.area() as area, room(area / "home") as one:
        owner = postgres.system_user()
        sockets = _directory(area / "s", owner)
        template = Cluster(one, owner, _directory(area / "pg", owner), sockets)
        template.make()
        copy = Cluster(one, owner, area / "native", sockets)
        one.as_root("cp", "-a", template.data, copy.data)
        with copy.running():
            copy.work()
            content = copy.content()
        yield template.data, content


def _directory(path: Path, owner: Owner) -> Path:
    path.mkdir()
    os.chown(path, owner.uid, owner.gid)
    path.chmod(0o700)
    return path


@contextmanager
def union(one: Room, area: Path, session: str, *options: str) -> Iterator[Path]:
    """The lower with the cluster under an upper, mounted by the room's user; the lower must not change."""
    for name in ("upper", "work", "merged"):
        (area / name).mkdir()
        os.chown(area / name, one.uid, one.uid)
    unionfs = (sys.executable, "-m", "unionfs")
    layers = ("-l", area / "lower", "-u", area / "upper", "-w", area / "work")
    before = manifest(area / "lower")
    words = (*session_words(session), *options, *layers, area / "merged")
    done = one.call(*unionfs, "mount", *words, env={"UNIONFS_DEATHS": "0"})  # they may be any number
    assert (done.returncode, done.stderr) == (0, "")
    yield area / "merged"
    done = one.call(*unionfs, "umount", area / "merged")
    assert (done.returncode, done.stderr) == (0, "")
    assert manifest(area / "lower") == before


@pytest.mark.parametrize("rootless", [False, True], ids=["root", "rootless"])
@pytest.mark.usefixtures("kernel_overlay")
def test_killed_and_recovered(
    cluster: tuple[Path, bytes], area: Path, session: str, rootless: bool
) -> None:
    if rootless and session in ("direct-hybrid", "direct-passthrough"):
        pytest.skip("passthrough needs root")
    template, expected = cluster
    with room(area / "home", rootless=rootless) as one:
        owner = Owner(ROOTLESS_UID, ROOTLESS_UID) if rootless else postgres.system_user()
        one.as_root("cp", "-a", template, _directory(area / "lower", Owner(one.uid, one.uid)) / "pg")
        if rootless:
            one.as_root("chown", "-R", f"{owner.uid}:{owner.gid}", area / "lower")
        else:
            (area / "lower").chmod(0o755)
        with union(one, area, session) as merged:
            # The room has processes of its own, which see the mount.
            database = Cluster(one, owner, merged / "pg", _directory(area / "sockets", owner))
            with database.running():
                database.work()
                assert database.content() == expected
                last = database.kill_at_work()
            with database.running():
                kept = database.sql(f"select count(*) from acknowledged where id <= {last}")
                assert int(kept) == last
                assert database.content() == expected
                database.check()
            database.check_pages()
        # What is on disk is the whole cluster, as kernel overlayfs shows it.
        data = f"lowerdir={area}/lower,upperdir={area}/upper,workdir={area}/work"
        more = ",userxattr" if rootless else ""
        one.as_root("mount", "-t", "overlay", "-o", data + more, "overlay", area / "merged")
        database.check_pages()
        with database.running():
            assert database.content() == expected


@pytest.mark.slow
@pytest.mark.skipif(not resends(), reason="FUSE_NOTIFY_RESEND needs Linux 6.9")
@pytest.mark.parametrize("io", ["direct-hybrid", "direct-passthrough", "direct-cached"])
def test_daemons_that_die(cluster: tuple[Path, bytes], area: Path, io: str) -> None:
    """No client gets an error, and nothing is lost."""
    template, expected = cluster
    with room(area / "home") as one:
        owner = postgres.system_user()
        one.as_root("cp", "-a", template, _directory(area / "lower", Owner(0, 0)) / "pg")
        (area / "lower").chmod(0o755)
        with union(one, area, io, "-o", "outlive") as merged:
            database = Cluster(one, owner, merged / "pg", _directory(area / "sockets", owner))
            with database.running():
                with _deaths(one) as killed:
                    database.work()
                    last = database.insert(5000)
                assert len(killed) > 10
                assert database.content() == expected
                kept = database.sql(f"select count(*) from acknowledged where id <= {last}")
                assert int(kept) == last == 5000
                database.check()
            database.check_pages()


@contextmanager
def _deaths(one: Room) -> Iterator[list[int]]:
    """Kill the daemons of a room's mount, one after the other; yields their pids."""
    ends, killed, chosen = threading.Event(), list[int](), random.Random(3)

    def kill() -> None:
        while not ends.is_set():
            time.sleep(chosen.random() * 0.3)
            listed = json.loads(one.as_root(sys.executable, "-m", "unionfs", "ls", "--json"))
            for pid in {int(entry["pid"]) for entry in listed} - set(killed):
                one.as_root("kill", "-9", str(pid))
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        ends.set()
        killer.join()
