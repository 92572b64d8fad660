"""What root believes of other users' daemons: the kernel's mount table, and of their answers what fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.worker import REPOSITORY
from unionfs.daemon import others
from unionfs.daemon.live import abstract_name, entry_name
from unionfs.daemon.settle import settle
from unionfs.sys.mountinfo import MountEntry, parse_mountinfo
from unionfs.sys.process import start_time

UID = 1001


def _table(*lines: str) -> list[MountEntry]:
    return list(parse_mountinfo("".join(f"{line}\n" for line in lines).encode()))


THEIRS = f"30 27 0:39 / /theirs rw - fuse.unionfs src rw,user_id={UID},group_id={UID}"
LATER = f"33 27 0:39 / /later rw - fuse.unionfs src rw,user_id={UID},group_id={UID}"
ROOTS = "31 27 0:40 / /roots rw - fuse.unionfs src rw,user_id=0,group_id=0"
ANOTHERS = f"32 27 0:41 / /anothers rw - fuse.unionfs src rw,user_id={UID + 1},group_id=0"


def test_owners(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FUSE mounts, for root of the host alone."""
    tables = _table(
        THEIRS, ROOTS, "32 27 0:41 / /x rw - fuse.other s rw,user_id=7", "33 27 0:42 / /y rw - fuse s rw",
        f"34 27 0:43 / /z rw - tmpfs s rw,user_id={UID}",
    )  # fmt: skip
    assert [others.owner_of(one) for one in tables] == [UID, None, 7, None, None]
    monkeypatch.setattr(others, "is_host_root", lambda: False)
    assert {others.owner_of(one) for one in tables} == {None}
    assert others.mounts_of_others() == others.Others((), ())


DAEMON = others._Daemon(os.getpid(), 5, UID)


def _answer(**changes: Any) -> dict[str, Any]:
    settings = settle("/claimed", lowers=["/l"], upper="/u", work="/w", trusted_xattrs=True).to_json()
    found: dict[str, Any] = json.loads(json.dumps({"device": "0:39", "since": 7, "settings": settings}))
    return {**found, **changes}


def test_an_answer_that_fits(root: None) -> None:
    """The mountpoint is the kernel's, of the newest mount."""
    found = others._confirmed(DAEMON, _answer(), _table(THEIRS, ROOTS))
    assert found is not None
    assert (found.settings.mountpoint, found.settings.lowers) == ("/theirs", ("/l",))
    assert (found.pid, found.started, found.uid, found.device, found.since) == (
        os.getpid(),
        5,
        UID,
        "0:39",
        7.0,
    )
    assert (found.claims, found.directory) == ((), "")
    found = others._confirmed(DAEMON, _answer(since=2.5), _table(THEIRS, LATER))
    assert found is not None
    assert (found.settings.mountpoint, found.since) == ("/later", 2.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": 3}, {"device": None}, {"device": "0:40"}, {"device": "0:41"}, {"device": "0:99"},
        {"since": "1"}, {"since": None}, {"since": -1}, {"since": 1 << 33}, {"settings": None},
        {"settings": []}, {"settings": {}},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_does_not(root: None, changes: dict[str, Any]) -> None:
    """Another's mount, none at all, or values of other types."""
    assert others._confirmed(DAEMON, _answer(**changes), _table(THEIRS, ROOTS, ANOTHERS)) is None


def test_the_limits_of_since(root: None) -> None:
    for since in (0, (1 << 33) - 1):
        assert others._confirmed(DAEMON, _answer(since=since), _table(THEIRS)) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("lowers", "/l"), ("lowers", [1]), ("flags", None), ("security", [None]), ("upper", 1), ("work", []),
     ("read_only", 1), ("allow_other", "x"), ("session", None), ("io", 2), ("fsname", None),
     ("log_level", 1), ("mounted_by", "0"), ("volatile", None)],
)  # fmt: skip
def test_settings_of_other_types(name: str, value: object) -> None:
    values = _answer()["settings"]
    assert others._settings(values, "/m") is not None
    assert others._settings({**values, name: value}, "/m") is None
    del values[name]
    is_optional = name in ("upper", "work")
    assert (others._settings(values, "/m") is not None) == is_optional


def test_a_mount_in_another_namespace(root: None) -> None:
    """Of a process that has one of its own: its FUSE mounts count, and not ours."""
    proc = next(
        one for one in parse_mountinfo(Path("/proc/self/mountinfo").read_bytes()) if one.fstype == "proc"
    )
    assert others._elsewhere(os.getpid(), proc.device) is None
    assert others._elsewhere(2**22 + 1, proc.device) is None
    with subprocess.Popen(["unshare", "-m", "sh", "-c", "echo; sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert others._elsewhere(process.pid, proc.device) is None
        process.kill()


def test_where_a_user_has_runtime_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the daemon's environment says."""
    for value in (None, "/run/x", "/run/\udcff"):
        environment = {"A_XDG_RUNTIME_DIR": "/other", "PATH": os.environ["PATH"]}
        if value is not None:
            environment["XDG_RUNTIME_DIR"] = value
        with subprocess.Popen(
            ["sh", "-c", "echo; read x"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            found = others.runtime_parent(process.pid)
            process.kill()
        assert found == ({} if value is None else {"XDG_RUNTIME_DIR": value})
    assert others.runtime_parent(2**22 + 1) == {}


LISTENER = """
import os, socket, sys
from unionfs.sys.process import start_time
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
sockets = []
pid, start = str(os.getpid()), str(start_time(os.getpid()))
for name in sys.argv[2:]:
    one = socket.socket(socket.AF_UNIX)
    one.bind("\\0unionfs/" + name.replace("PID", pid).replace("START", start))
    one.listen()
    sockets.append(one)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listeners(root: None) -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def _listen(running: list[subprocess.Popen[str]], uid: int, *names: str) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(uid), *names], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    running.append(process)
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_which_daemons_are_asked(listeners: list[subprocess.Popen[str]]) -> None:
    """Those of other users whose names are of a living process."""
    theirs = _listen(
        listeners, UID, "PID-START", "PID-1", "PID-", "-START", "x-START", "PID-START-x" + "y" * 60
    )
    roots = _listen(listeners, 0, "PID-START")
    found = {one.pid: (address, one) for address, one in others._daemons().items()}
    address, daemon = found[theirs]
    started = start_time(theirs)
    assert started is not None
    assert address == "\0" + abstract_name(entry_name(theirs, started))
    assert (daemon.started, daemon.uid) == (started, UID)
    assert roots not in found
    assert len([one for one in others._daemons().values() if one.pid == theirs]) == 1


def test_how_many_daemons_of_one_user_are_asked(
    listeners: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "_MOST_DAEMONS", 1)
    for uid in (UID + 50, UID + 50, UID + 51):
        _listen(listeners, uid, "PID-START")
    uids = [one.uid for one in others._daemons().values()]
    assert [uids.count(uid) for uid in (UID + 50, UID + 51)] == [1, 1]
