"""Mounts that outlive their daemons, with volumes, bind mounts and tmpfs in them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import gone, refused, succeed, unionfs, wait_for
from tests.mount.outliving_calls import RESENDS, Outliving
from tests.support.storage import Storage, storage, unmounted

pytestmark = [pytest.mark.watchdog(600), pytest.mark.timeout(1200), RESENDS]


@pytest.fixture
def stored(root: None, area: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """The same storage root for all commands."""
    with storage(area) as found:
        monkeypatch.setenv("UNIONFS_ROOT", str(found.root))
        yield found


def _mount(stored: Storage, *options: str) -> Outliving:
    kinds = ("-v", "db:/data", "-v", "/anonymous", "-v", f"{stored.host}:/host", "--tmpfs", "/t")
    return Outliving(stored.place, *kinds, *options)


def _guardian(mount: Outliving) -> int:
    assert mount.entry().guardian is not None
    return mount.entry().guardian[0]


@pytest.mark.parametrize("how", ["kill", "upgrade"])
def test_storage_stays(stored: Storage, how: str) -> None:
    """Files that are open in it, its mounts, what `ls` and `volume ls` say, and the order of the end."""
    mount = _mount(stored)
    top, before = mount.top, stored.mounts()
    guardian = _guardian(mount)
    names = ("data/new", "anonymous/new", "host/new", "t/new", "new")
    files = [open(top / name, "w+") for name in names]  # noqa: SIM115
    for number in range(3):
        if how == "kill":
            mount.kill()
        else:
            succeed(unionfs("upgrade", top))
        for file in files:
            file.write(f"{number}\n")
            file.flush()
        assert stored.mounts() == before
        for name in names:
            assert (top / name).read_text() == "".join(f"{count}\n" for count in range(number + 1))
        refused(unionfs("volume", "rm", "db"), "in use", str(top))
        assert _guardian(mount) == guardian
        assert len(stored.volumes()) == 2
    for file in files:
        file.close()
    assert (stored.volume("db") / "new").read_text() == "0\n1\n2\n"
    mount.end()
    assert stored.mounts() == []
    assert wait_for(lambda: gone(guardian))
    assert succeed(unionfs("volume", "rm", "db")) == "db\n"


def test_all_processes_are_killed(stored: Storage) -> None:
    """The guardian unmounts everything and releases the volumes."""
    mount = _mount(stored)
    mount.kill()
    guardian = _guardian(mount)
    for pid in reversed(mount.processes()):
        os.kill(pid, signal.SIGKILL)
    assert unmounted(stored)
    assert wait_for(lambda: gone(guardian))
    assert not stored.is_listed()
    assert succeed(unionfs("volume", "rm", "db")) == "db\n"


def test_a_killed_guardian(stored: Storage) -> None:
    """The mount goes on, and ends as ever."""
    mount = _mount(stored)
    os.kill(_guardian(mount), signal.SIGKILL)
    mount.kill()
    (mount.top / "data/new").write_text("new")
    mount.end()
    assert stored.mounts() == []
    assert (stored.volume("db") / "new").read_text() == "new"
    assert succeed(unionfs("volume", "rm", "db")) == "db\n"
