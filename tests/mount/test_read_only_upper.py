"""Uppers whose filesystem becomes read-only while they are mounted, as ext4 does after an error."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, refused, session_words, succeed, unionfs, wait_for
from tests.mount.outliving_calls import MODES, RESENDS, Outliving
from tests.support import acl
from unionfs.daemon import live

pytestmark = [pytest.mark.watchdog(600), pytest.mark.timeout(1200)]


@contextmanager
def _failing_disk(place: Place) -> Iterator[Callable[[], None]]:
    """Upper and work on a disk of their own; yields what makes that read-only."""
    disk, image = place.root / "disk", place.root / "image"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, disk], check=True)
    source = subprocess.run(["findmnt", "-no", "SOURCE", disk], check=True, capture_output=True, text=True)
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        yield lambda: _fail(Path(source.stdout.strip()).name)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def _layers(place: Place) -> tuple[str | Path, ...]:
    disk = place.root / "disk"
    return "-l", place.lower, "-u", disk / "upper", "-w", disk / "work"


def _fail(device: str) -> None:
    Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")


@RESENDS
@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("features", ["index=on", "metacopy=on,index=on,redirect_dir=on"])
def test_an_upper_that_became_read_only(place: Place, io: str, features: str) -> None:
    """What can be read is read, by the next daemons, too."""
    (place.lower / "a").write_text("a")
    os.link(place.lower / "a", place.lower / "b")
    with _failing_disk(place) as fail:
        disk = place.root / "disk"
        os.setxattr(disk / "work", acl.DEFAULT, acl.simple(7, 7, 7, users={1: 7}))
        mount = Outliving(place, "--session", "direct", "--io", io, "-o", features, layers=_layers(place))
        top = mount.top
        (top / "new").write_text("new")
        with open(top / "a", "a") as file:
            file.write("more")
        with open(top / "new") as new, open(top / "base") as base:
            fail()
            for _ in range(2):
                mount.kill()
                assert (new.read(), base.read()) == ("new", "base\n")
                new.seek(0)
                base.seek(0)
                assert os.stat(top / "b").st_ino == os.stat(top / "a").st_ino
                assert (top / "a").read_text() == "amore"
                with pytest.raises(OSError, match="Read-only"):
                    os.mkdir(top / "d")
                with pytest.raises(OSError, match="Read-only"):
                    os.chmod(top / "base", 0o600)
                with pytest.raises(OSError, match="Read-only"):
                    os.unlink(top / "new")
        mount.end()


def test_the_end_of_a_volatile_mount(place: Place, session: str) -> None:
    """Its mark stays, which the log says, and nothing else of the mount."""
    with _failing_disk(place) as fail:
        words = _layers(place)
        succeed(unionfs("mount", *words, *session_words(session), "-o", "volatile", place.merged))
        (place.merged / "new").write_text("new")
        log = Path(json.loads(succeed(unionfs("inspect", "--json", place.merged)))["log"])
        before = log.stat().st_size
        fail()
        assert (place.merged / "new").read_text() == "new"
        succeed(unionfs("umount", place.merged))
        assert wait_for(lambda: not [e for e in live.entries() if e.settings.mountpoint == str(place.merged)])
        said = log.read_bytes()[before:].decode()
        assert "Traceback" not in said
        assert "the mark of a volatile mount cannot be removed: read-only file system" in said
        refused(unionfs("mount", *words, place.merged), "work")
