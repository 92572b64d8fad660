"""Volumes held by container engines: counted by ID, kept after the process, dropped when forgotten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed
from tests.support import areas
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage import records
from unionfs.storage.holds import Engine
from unionfs.storage.model import VolumeUser
from unionfs.sys.mountspaces import is_seen_by, is_shown_elsewhere

ONE, TWO = VolumeUser.of_engine("one"), VolumeUser.of_engine("t:1:2")


@contextmanager
def _engine(area: Path, name: str = "dockerd") -> Iterator[Engine]:
    """A process of that name, which ends with the block."""
    program = area / name
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "1000"], stdout=subprocess.DEVNULL) as child:
        while Path(f"/proc/{child.pid}/comm").read_text().strip() != name:  # until its execve
            os.sched_yield()
        yield Engine.of_process(child.pid)
        child.kill()


@contextmanager
def _container(source: Path, target: Path) -> Iterator[int]:
    """A process in a mount namespace that shows a directory elsewhere, until the block ends."""
    target.mkdir(exist_ok=True)
    script = 'mount --bind "$0" "$1"; echo; exec sleep 1000'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-ec", script, str(source), str(target)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        yield child.pid
        child.kill()


def _fill(directory: Path) -> None:
    """Leave no space on a filesystem."""
    with open(directory / "filler", "wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    assert os.statvfs(directory).f_bavail == 0


def _texts(store: Store, name: str = "data") -> list[str]:
    return [user.text for user in store.volumes().users(name)]


def _is_mounted(path: str) -> bool:
    return any(where == path for _, where, _ in areas.mounts_below(Path(path)))


@pytest.fixture
def tmpfs(store: Store, as_root: None) -> Store:
    store.create("-o", "tmpfs", "-o", "size=1m", "data")
    return store


def test_a_hold_is_counted_by_its_id(tmpfs: Store, area: Path) -> None:
    with _engine(area) as engine:
        paths = {tmpfs.volumes().attach("data", text, engine=engine) for text in (ONE, ONE, TWO)}
        assert len(paths) == 1
        (path,) = paths
        for text, left in ((ONE, [ONE, TWO]), (ONE, [TWO]), (ONE, [TWO]), (TWO, [])):
            tmpfs.volumes().detach("data", text)
            assert _texts(tmpfs) == left
            assert _is_mounted(path) == bool(left)


def test_the_words_for_a_hold(tmpfs: Store, area: Path) -> None:
    with _engine(area) as engine:
        tmpfs.volumes().attach("data", TWO, engine=engine)
        refused(tmpfs("rm", "data"), "in use by containers of dockerd (ID t:1:2)")
        tmpfs.volumes().detach("data", TWO)


def test_versions_without_holds_see_a_user_that_stays(tmpfs: Store, area: Path) -> None:
    """They read two texts, and the process of neither has ended."""
    with _engine(area) as engine:
        tmpfs.volumes().attach("data", ONE, engine=engine)
    (file,) = (tmpfs.root / "volumes/data").glob(".user-*")
    text, path = json.loads(file.read_text())
    assert not VolumeUser(text, path).is_gone
    assert _texts(tmpfs) == []


@pytest.mark.parametrize("name", ["dockerd", "podman"])
def test_a_container_keeps_the_hold_of_an_engine_that_ended(tmpfs: Store, area: Path, name: str) -> None:
    with _engine(area, name) as engine:
        path = tmpfs.volumes().attach("data", ONE, engine=engine)
    with _container(Path(path), area / "container"), _engine(area, "another") as other:
        assert is_shown_elsewhere(path)
        tmpfs.volumes().attach("data", TWO, engine=other)
        assert _texts(tmpfs) == [ONE, TWO]
        refused(tmpfs("rm", "data"), f"containers of {name}")
        tmpfs.volumes().detach("data", TWO)
        assert _is_mounted(path)
    assert not is_shown_elsewhere(path)
    # Only an explicit removal ends the hold of podman, whose container may be between two runs.
    assert _texts(tmpfs) == ([] if name == "dockerd" else [ONE])
    assert succeed(tmpfs("rm", "data")) == "data\n"
    assert not _is_mounted(path)


def test_the_next_mount_drops_what_dockerd_forgot(store: Store, area: Path, as_root: None) -> None:
    (area / "base").mkdir()
    store.ok("create", "-d", "union", "-o", f"lower={area}/base", "data")
    with _engine(area) as engine:
        old = store.volumes().attach("data", ONE, engine=engine)
    with _engine(area, "another") as engine:
        new = store.volumes().attach("data", TWO, engine=engine)
        assert new != old
        assert not Path(old).exists()
        store.volumes().detach("data", TWO)


def test_an_id_mounted_anew_counts_from_one(tmpfs: Store, area: Path) -> None:
    """podman was killed between its mount and the note that it made it."""
    with _engine(area, "podman") as engine:
        tmpfs.volumes().attach("data", ONE, engine=engine)
    with _engine(area, "podman") as engine:
        path = tmpfs.volumes().attach("data", ONE, engine=engine)
    tmpfs.volumes().detach("data", ONE)
    assert not _is_mounted(path)


def test_a_hold_of_an_earlier_boot_is_void(tmpfs: Store, area: Path) -> None:
    with _engine(area, "podman") as engine:
        path = tmpfs.volumes().attach("data", ONE, engine=engine)
        (user,) = records.users(str(tmpfs.root / "volumes/data"))
        file = next((tmpfs.root / "volumes/data").glob(".user-*"))
        file.write_text(file.read_text().replace(engine.boot, engine.boot[::-1]))
        assert _texts(tmpfs) == []
        assert user.hold is not None
        assert succeed(tmpfs("rm", "data")) == "data\n"
        assert not _is_mounted(path)


def test_a_busy_storage_is_unmounted_by_the_next_caller(tmpfs: Store, area: Path) -> None:
    with _engine(area) as engine:
        path = tmpfs.volumes().attach("data", ONE, engine=engine)
        with open(f"{path}/open", "w"):
            with pytest.raises(UserError, match="busy"):
                tmpfs.volumes().detach("data", ONE)
            assert _texts(tmpfs) == []
            # and keeps nobody from using the volume
            assert tmpfs.volumes().attach("data", TWO, engine=engine) == path
        tmpfs.volumes().detach("data", TWO)
        assert not _is_mounted(path)


def test_a_full_disk_takes_a_hold(
    area: Path, filesystem: Callable[..., Path], as_root: None
) -> None:
    place = filesystem("ext4", 32 << 20)
    store = Store(place / "root")
    store.create("data")
    with _engine(area) as engine:
        _fill(place)
        store.volumes().attach("data", ONE, engine=engine)
        store.volumes().detach("data", ONE)
        assert _texts(store) == []


def test_copies_of_the_mount_are_no_use(tmpfs: Store, area: Path) -> None:
    """A namespace made by unshare(2), as services have, and a monitor that sees the host below a path."""
    with _engine(area) as engine:
        path = tmpfs.volumes().attach("data", ONE, engine=engine)
    with _container(area, area / "host"):
        assert not is_shown_elsewhere(path)
    script = 'mount --rbind / "$0"; echo; exec sleep 1000'
    (area / "monitor").mkdir()
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-ec", script, str(area / "monitor")], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert not is_shown_elsewhere(path)
        child.kill()
    assert succeed(tmpfs("rm", "data")) == "data\n"


def test_a_part_of_a_plain_volume_is_a_use(store: Store, area: Path, as_root: None) -> None:
    data = store.create("data")
    (data / "part").mkdir()
    assert not is_shown_elsewhere(str(data))
    with _container(data / "part", area / "container"):
        assert is_shown_elsewhere(str(data))
    with _container(data.parent, area / "container"):
        assert not is_shown_elsewhere(str(data))
    assert not is_shown_elsewhere(str(area / "missing"))


def test_whether_an_engine_sees_a_mount(tmpfs: Store, area: Path) -> None:
    with _engine(area) as engine:
        with _container(area, area / "container") as early:  # a namespace from before the mount
            path = tmpfs.volumes().attach("data", ONE, engine=engine)
            assert not is_seen_by(path, early)
        assert is_seen_by(path, os.getpid())
        with _container(area, area / "container") as late:
            assert is_seen_by(path, late)
        assert is_seen_by(str(area), 2**22 + 1)
        tmpfs.volumes().detach("data", ONE)
