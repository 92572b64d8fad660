"""The resident's socket and the launcher, against another user."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, mounts_at, succeed, unionfs
from tests.mount.launcher_calls import LAUNCHER, end_residents, launch, need_launcher, residents
from tests.security import attacks
from tests.support.worker import Worker

pytestmark = pytest.mark.xdist_group("launcher")
RUNTIME = Path("/run/unionfs")


@pytest.fixture(autouse=True)
def _launcher() -> Iterator[None]:
    need_launcher()
    end_residents()
    yield
    end_residents()


def _mount(place: Place) -> None:
    assert succeed(launch("-o", place.data, place.merged)) == ""
    assert mounts_at(place.merged) == ["fuse.unionfs"]
    succeed(unionfs("umount", place.merged))


def _resident() -> tuple[int, Path, bytes]:
    """The pid of the resident, its socket, and the identity of its launcher."""
    (pid,) = residents()
    name, identity = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-3:-1]
    return pid, RUNTIME / f"{os.fsdecode(name)}.sock", identity


def _call(place: Place, identity: bytes) -> bytes:
    """What a launcher of this identity sends for a mount."""
    words = [os.fsencode(word) for word in (LAUNCHER, "-o", place.data, place.merged)]
    text = b"".join(word + b"\0" for word in (identity, *words, b"PATH=/usr/bin:/bin"))
    return struct.pack("=5I", 0x31534655, len(text), len(words), 1, 0o022) + text


@pytest.mark.parametrize("message", ["a call", "nothing", "nonsense"])
def test_a_call_of_another_user(place: Place, attacker: Worker, message: str) -> None:
    """It is not answered, also where permissions would let it pass."""
    _mount(place)
    pid, path, identity = _resident()
    sent = {"a call": _call(place, identity), "nothing": b"", "nonsense": os.urandom(4096)}[message]
    with pytest.raises(PermissionError):
        attacker.call(attacks.call_resident, str(path), sent)
    RUNTIME.chmod(0o711)
    path.chmod(0o666)
    assert attacker.call(attacks.call_resident, str(path), sent) == b""
    assert mounts_at(place.merged) == []
    assert residents() == {pid}
    _mount(place)
    assert residents() == {pid}
    assert RUNTIME.stat().st_mode & 0o777 == 0o700


def test_a_socket_of_another_user(place: Place, attacker: Worker) -> None:
    """The launcher sends nothing to it, and starts a resident in its place."""
    _mount(place)
    _, path, _ = _resident()
    end_residents(signal.SIGKILL)
    RUNTIME.chmod(0o711)
    theirs = RUNTIME / "theirs"
    theirs.mkdir()
    os.chown(theirs, attacker.uid, attacker.uid)
    attacker.call(attacks.listen, str(theirs / "socket"))
    os.rename(theirs / "socket", path)
    theirs.rmdir()
    _mount(place)
    assert attacker.call(attacks.accepted) == 0
    assert path.stat().st_uid == os.geteuid()
    assert len(residents()) == 1
