"""The resident: when it ends, and what the processes that it forks have in common."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.worker import REPOSITORY
from unionfs.daemon import resident
from unionfs.daemon.rehearsal import rehearse
from unionfs.daemon.resident import SETTING

REHEARSAL = """
import dis, os, sys
from unionfs.daemon import live, preflight, settle
from unionfs.daemon.rehearsal import rehearse
from unionfs.settings.mount import MountSettings

def specialised(function):
    return [
        one.opname for one in dis.get_instructions(function, adaptive=True)
        if one.opname not in dis.opmap and not one.opname.endswith("_ADAPTIVE")
    ]

functions = [
    settle.settle, preflight.check, MountSettings.to_json, MountSettings.from_json.__func__, live.claims_of,
    live.LiveMount.to_json, live.LiveMount.from_json.__func__, live.LiveMount.is_alive, live.LiveMount.mounts,
]
print(*[function.__name__ for function in functions if specialised(function)])
os.makedirs(sys.argv[1] + "/upper/left")
rehearse(sys.argv[1])
print(*[function.__name__ for function in functions if not specialised(function)])
print(os.path.exists(sys.argv[1]))
"""


def test_what_python_learns_is_learnt_before(tmp_path: Path) -> None:
    """The code of a mount is specialised once for all processes that are forked, and its place is removed."""
    done = subprocess.run(
        [sys.executable, "-c", REHEARSAL, tmp_path / "place"], cwd=REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "\n\nFalse\n")


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    """Then nothing is learnt, and that is all."""
    (tmp_path / "file").touch()
    rehearse(str(tmp_path / "file/place"))
    assert os.listdir(tmp_path) == ["file"]


def test_how_long_it_waits_for_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    assert resident._idle_seconds() == 300
    for text, seconds in (("0.5", 0.5), ("10", 10), ("", 300), ("x", 300)):
        monkeypatch.setenv(SETTING, text)
        assert resident._idle_seconds() == seconds


@pytest.mark.parametrize("looks", [False, True])
def test_the_end_of_an_idle_time(monkeypatch: pytest.MonkeyPatch, looks: bool) -> None:
    """After the last call. In a mount namespace of its own it ends sooner when nobody else is left in it."""
    waited: list[int] = []
    alone: list[bool] = []

    class Forking:
        forked = 0

        def next(self, milliseconds: int) -> int:
            waited.append(milliseconds)
            assert len(waited) < 30
            time.sleep(milliseconds / 1000)
            if len(waited) == 2:
                self.forked = 1  # a call
            return resident.IDLE

    monkeypatch.setenv(SETTING, "0.3")
    monkeypatch.setattr(resident, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(resident, "_has_own_mount_namespace", lambda: looks)
    monkeypatch.setattr(resident, "is_alone_in_mount_namespace", lambda: alone == [True])
    one: Any = object.__new__(resident._Resident)
    one._forking = Forking()
    assert one._wait() == resident.IDLE
    if not looks:
        assert waited == [300]
        return
    assert max(waited) == 100
    assert 0.45 <= sum(waited) / 1000 <= 0.55  # 0.2 to the call, 0.3 after it
    waited.clear()
    alone.append(True)
    assert one._wait() == resident.IDLE
    assert waited == [100]


def test_files_that_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced, written or removed: another version is installed."""
    files = resident._files()
    assert {os.path.basename(path) for path in files} >= {"resident.py", "handover.py", "__init__.py"}
    assert all(path.startswith(f"{REPOSITORY}/unionfs/") for path in files)
    assert resident._are_unchanged(files)
    path = tmp_path / "module.py"
    path.touch()
    status = path.stat()
    known = {str(path): (status.st_ino, status.st_mtime_ns)}
    assert resident._are_unchanged({**files, **known})
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    assert not resident._are_unchanged({**files, **known})
    assert not resident._are_unchanged({str(path): (status.st_ino + 1, status.st_mtime_ns + 1)})
    path.unlink()
    assert not resident._are_unchanged({**files, **known})


NAMESPACE = "from unionfs.daemon.resident import _has_own_mount_namespace as has; print(has())"


@pytest.mark.parametrize(
    ("around", "shown"),
    [([], "False"), (["unshare", "-m"], "True"), (["setpriv", "--bounding-set", "-sys_ptrace"], "True")],
    ids=str,
)
def test_whether_its_mount_namespace_may_be_a_short_one(root: None, around: list[str], shown: str) -> None:
    """That of pid 1 is not. Root with fewer capabilities than pid 1 does not see it."""
    shell = ["unshare", "-pfm", "--mount-proc", "sh", "-c", '"$@"; exit "$?"', "sh"]
    done = subprocess.run(
        [*shell, *around, sys.executable, "-c", NAMESPACE], cwd=REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{shown}\n", "")


def test_where_pid_1_cannot_be_seen(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may have made a mount namespace; an ordinary user only within a user namespace."""
    real = os.stat

    def stat(path: str) -> os.stat_result:
        if path == "/proc/1/ns/mnt":
            raise PermissionError(1, "not permitted")
        return real(path)

    monkeypatch.setattr(resident.os, "stat", stat)
    assert resident._has_own_mount_namespace()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not resident._has_own_mount_namespace()
    monkeypatch.setattr(resident, "in_initial_user_namespace", lambda: False)
    assert resident._has_own_mount_namespace()


def test_it_leaves() -> None:
    with pytest.raises(SystemExit) as caught:
        resident._leave()
    assert caught.value.code == 0
