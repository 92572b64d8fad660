"""A user who may rename in a layer replaces their object, known to the kernel, with another user's.

The kernel checks permissions with the attributes it received, and the daemon acts as root: so the daemon must
act on the object that the kernel means, or on none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import mounting
from tests.support.mounting import Mount
from tests.support.worker import Worker

ATTACKER = 1001
SECRET = "root:secret\n"


@pytest.fixture
def attacker(root: None) -> Iterator[Worker]:
    with Worker(ATTACKER, ATTACKER, modules=[__name__]) as worker:
        yield worker


@pytest.fixture(params=["lower", "upper"])
def union(request: pytest.FixtureRequest, area: Path, session: str) -> Iterator[tuple[Mount, Path]]:
    """A union, and the attacker's directory in one of its layers, beside an object of root."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    home = area / request.param / "home"
    home.mkdir()
    secret = home / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    (home / "private").mkdir(mode=0o700)
    (home / "private/file").write_text(SECRET)
    os.mkfifo(home / "fifo", 0o600)
    os.chown(home, ATTACKER, ATTACKER)
    with mounting.mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        yield mount, home


def own(home: str, merged: str, kind: str) -> None:
    """Create an object, let the kernel look it up, and replace it with root's."""
    path = f"{home}/own"
    if kind == "directory":
        os.mkdir(path, 0o777)
    else:
        with open(path, "w") as file:
            file.write("mine")
        os.chmod(path, 0o777)
    os.stat(f"{merged}/home/own")
    if kind == "directory":
        os.rmdir(path)  # rename(2) would do so itself, but requires write permission on the moved directory
    with suppress(OSError):
        os.rename(f"{home}/{'private' if kind == 'directory' else kind}", path)


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def append(path: str) -> None:
    with open(path, "a") as file:
        file.write("evil")


def truncate(path: str) -> None:
    with open(path, "w") as file:
        file.write("evil")


def set_id(path: str) -> None:
    os.chmod(path, 0o4755)


def touch(path: str) -> None:
    os.utime(path, (1, 1))


def mark(path: str) -> None:
    os.setxattr(path, "user.evil", b"1")


def first_line(path: str) -> str:
    with open(f"{path}/file") as file:
        return file.read()


def names(path: str) -> list[str]:
    return os.listdir(path)


def make(path: str) -> None:
    with open(f"{path}/made", "w") as file:
        file.write("evil")


pytestmark = pytest.mark.slow_on("pyfuse3", "direct-passthrough")
FILE_ATTACKS = [read, append, truncate, set_id, touch, mark]


@pytest.mark.parametrize("attack", FILE_ATTACKS)
def test_a_file(union: tuple[Mount, Path], attacker: Worker, attack: object) -> None:
    mount, home = union
    before = (home / "secret").stat()
    attacker.call(own, str(home), str(mount.mountpoint), "secret")
    found = None
    with suppress(OSError):
        found = attacker.call(attack, str(mount.mountpoint / "home/own"))
    assert found != SECRET
    _unharmed(home / "own", before)
    if mount.session == "direct-cached" and attack is append:
        return  # the kernel opens and writes it itself, and gets the daemon's refusal too late
    shown = (mount.mountpoint / "home/own").stat()
    assert (shown.st_uid, stat.S_IMODE(shown.st_mode)) == (0, 0o600)
    assert (mount.mountpoint / "home/own").read_text() == SECRET
    with pytest.raises(PermissionError):
        attacker.call(read, str(mount.mountpoint / "home/own"))


def _unharmed(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    assert path.read_text() == SECRET
    assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert os.listxattr(path) == []


@pytest.mark.parametrize("attack", [first_line, names, make, set_id, touch])
def test_a_directory(union: tuple[Mount, Path], attacker: Worker, attack: object) -> None:
    """Its owner cannot move it to another parent; within the attacker's directory root's may be renamed."""
    mount, home = union
    before = (home / "private").stat()
    attacker.call(own, str(home), str(mount.mountpoint), "directory")
    assert (home / "own").is_dir()
    found = None
    with suppress(OSError):
        found = attacker.call(attack, str(mount.mountpoint / "home/own"))
    assert found not in (SECRET, ["file"])
    after = (home / "own").stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_mode, before.st_uid, before.st_mtime_ns,
    )  # fmt: skip
    assert sorted(os.listdir(home / "own")) == ["file"]


def test_an_open_path_to_the_old_object(union: tuple[Mount, Path], attacker: Worker) -> None:
    """Through /proc/self/fd the kernel requests its old node, not the name."""
    mount, home = union
    found = attacker.call(reopen, str(home), str(mount.mountpoint))
    assert found in ("mine", "ESTALE")


def reopen(home: str, merged: str) -> str:
    with open(f"{home}/own", "w") as file:
        file.write("mine")
    os.chmod(f"{home}/own", 0o777)
    fd = os.open(f"{merged}/home/own", os.O_PATH)
    os.rename(f"{home}/secret", f"{home}/own")
    with suppress(OSError):
        os.stat(f"{merged}/home/own")
    try:
        return read(f"/proc/self/fd/{fd}")
    except OSError as error:
        return "ESTALE" if error.errno == 116 else os.strerror(error.errno or 0)
