"""A PostgreSQL cluster of a lower, copied up as it is used: killed, recovered, and the same as on ext4."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import postgres
from tests.clients.postgres import Cluster, Owner
from tests.clients.rooms import ROOTLESS_UID, Room, room
from tests.clients.support import manifest
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
def union(one: Room, area: Path, session: str) -> Iterator[Path]:
    """The lower with the cluster under an upper, mounted by the room's user; the lower must not change."""
    for name in ("upper", "work", "merged"):
        (area / name).mkdir()
        os.chown(area / name, one.uid, one.uid)
    unionfs = (sys.executable, "-m", "unionfs")
    layers = ("-l", area / "lower", "-u", area / "upper", "-w", area / "work")
    before = manifest(area / "lower")
    done = one.call(*unionfs, "mount", *session_words(session), *layers, area / "merged")
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
