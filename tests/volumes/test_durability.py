"""The data that a backup, a restore and the first use of a volume have on disk before they complete."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, wait_for
from tests.support import tracing
from tests.support.storage import Storage
from tests.support.tracing import RENAMES, SYNCS, Call, in_order
from tests.volumes.conftest import Store
from unionfs.daemon import live

pytestmark = pytest.mark.usefixtures("as_root")


def _calls(root: Path, *arguments: str | Path) -> list[Call]:
    """The syncing, linking and renaming calls of a command, which must succeed."""
    log = root.parent / "trace"
    traced = tracing.command(log, f"{SYNCS},{RENAMES},linkat,unlink,unlinkat")
    words = [*traced, *UNIONFS, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UNIONFS_ROOT": str(root)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return tracing.Trace(log).take()


@pytest.fixture
def archive(store: Store, area: Path) -> Path:
    """A backup of the volume `data`."""
    (store.create("data") / "f").write_text("data")
    store.ok("backup", "data", "-o", area / "backup.tar")
    return area / "backup.tar"


def test_a_backup(store: Store, area: Path) -> None:
    """Its content before its name, and its name before the command ends."""
    (store.create("data") / "f").write_text("data")
    for naming in ("linkat", "rename"):  # a new one, and one in the place of another one
        calls = _calls(store.root, "volume", "backup", "data", "-o", area / "b.tar")
        assert in_order(calls, ("fsync", ""), (naming, "b.tar"), ("fsync", f"{area}>")), calls


def test_a_restore(store: Store, archive: Path) -> None:
    """The new content before it replaces the old, and that before the old is removed."""
    calls = _calls(store.root, "volume", "restore", "data", "-i", archive)
    switch = ("renameat2", "RENAME_EXCHANGE"), ("fsync", "volumes/data>")
    assert in_order(calls, ("syncfs", ".restore-"), *switch, ("unlink", '"f"')), calls


def test_a_restore_in_place(store: Store, area: Path, archive: Path) -> None:
    """Where entries are exchanged one by one: new entries, journal, exchange, its record, removal."""
    (area / "elsewhere").mkdir()
    (area / "elsewhere/old").write_text("old")
    store.create("-o", "type=none", "-o", "o=bind", "-o", f"device={area}/elsewhere", "bound")
    calls = _calls(store.root, "volume", "restore", "bound", "-i", archive)
    record = ("fsync", "volumes/bound/"), ("rename", "volumes/bound/"), ("fsync", "volumes/bound>")
    steps = ("syncfs", ""), *record, ("rename", '"old"'), ("rename", '"f"'), ("fsync", ""), *record
    assert in_order(calls, *steps, ("unlink", '"old"')), calls
    assert (area / "elsewhere/f").read_text() == "data"


def test_the_first_use_of_a_volume(one: Storage) -> None:
    """The copied content is on disk before it appears in the volume."""
    (one.place.lower / "srv").mkdir()
    (one.place.lower / "srv/f").write_text("data")
    log = one.place.root / "trace"
    words = [*tracing.command(log, f"{SYNCS},{RENAMES}"), *UNIONFS, "mount", *map(str, one.place.layers)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UNIONFS_ROOT": str(one.root)}
    # strace ends with the last process, which is the daemon
    process = subprocess.Popen([*words, "-v", "vol:/srv", str(one.merged)], env=environment, cwd="/")
    try:
        assert wait_for(lambda: len(one.mounts()) == 2)
        assert wait_for(lambda: any(e.settings.mountpoint == str(one.merged) for e in live.entries()))
        assert (one.merged / "srv/f").read_text() == "data"
    finally:
        one.umount()
        process.wait()
    calls = tracing.Trace(log).take()
    assert in_order(calls, ("syncfs", ""), ("rename", '"f"')), calls
