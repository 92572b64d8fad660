"""A lower on a FUSE filesystem whose server stops: only those who need it wait, and they can be killed."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import unionfs
from tests.mount.hung_calls import (
    CALLS,
    Place,
    Server,
    ends_while_it_hangs,
    is_named,
    others_go_on,
    standing,
    stopped,
    tree,
    usable_again,
)  # fmt: skip
from tests.support.mounting import command, is_mounted, mounted
from tests.support.patience import patient
from tests.support.snapshot import take
from unionfs.sys.process import status_field

KILLED = [call for call in CALLS if call != "count"]  # which the topmost layer answers


def _shown(top: Path) -> dict[bytes, tuple[int, int, bytes, dict[str, bytes]]]:
    """Mode, size, content and xattrs of everything."""
    return {
        path: (one.mode, 0 if stat.S_ISDIR(one.mode) else one.size, one.content, one.xattrs)
        for path, one in take(top).items()
    }


@pytest.fixture
def place(root: None, area: Path, session: str) -> Iterator[Place]:
    with standing(area, session) as found:
        yield found


def test_others_go_on(place: Place) -> None:
    """Also while more requests wait for the hung layer than there are threads for it."""
    stopped(place)
    others_go_on(place.top)
    waiting = [place.call(f"os.stat(p + '/only/missing{number}')") for number in range(20)]
    for caller in waiting:
        place.waits(caller)
    others_go_on(place.top)
    with (place.top / "both/mine").open() as file:
        assert file.read() == "of the upper"
    place.server.go_on()
    for caller in waiting:
        assert caller.wait(patient(20)) == 1
        assert caller.stderr is not None
        assert b"FileNotFoundError" in caller.stderr.read()


@pytest.mark.slow_on("direct-passthrough")
@pytest.mark.parametrize("call", KILLED)
def test_a_caller_can_be_killed(place: Place, call: str) -> None:
    """It ends while the layer hangs; afterwards its call was made or not."""
    stopped(place)
    caller = place.call(CALLS[call])
    place.waits(caller)
    caller.kill()
    caller.wait(patient(20))
    others_go_on(place.top)
    place.server.go_on()
    names = sorted(os.listdir(place.top / "only"))
    natively = sorted(os.listdir(place.area / "source/only"))
    changed = {"remove": {"remove"}, "make": {"new"}, "rename": {"rename", "renamed"}}.get(call, set())
    assert set(names) ^ set(natively) <= changed
    assert (place.top / "only/read").read_bytes() == b"read" * 20_000


@pytest.mark.slow_on("direct-passthrough")
@pytest.mark.parametrize("call", ["look a name up", "read", "chmod"])
def test_a_caller_that_handled_a_signal_can_be_killed(place: Place, call: str) -> None:
    """The kernel tells a filesystem of the first signal only."""
    stopped(place)
    caller = place.call(f"import signal\nsignal.signal(signal.SIGUSR1, lambda *_: 0)\n{CALLS[call]}")
    deadline = time.monotonic() + patient(20)
    while not int(status_field("SigCgt", caller.pid), 16) >> (signal.SIGUSR1 - 1) & 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    place.waits(caller)
    caller.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert caller.poll() is None
    caller.kill()
    caller.wait(patient(20))
    others_go_on(place.top)


def test_a_reader_whose_opener_has_ended(place: Place) -> None:
    """It reads, and is not told of a signal that it did not get."""
    opened: list[int] = []

    def open_it() -> None:
        opened.append(os.open(place.top / "only/read", os.O_RDONLY))
        opened.append(os.open(place.top / "only", os.O_RDONLY | os.O_DIRECTORY))

    thread = threading.Thread(target=open_it)
    thread.start()
    thread.join()
    file, directory = opened
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = ctypes.create_string_buffer(9)
        # os.read would call it again after EINTR
        assert ctypes.CDLL(None, use_errno=True).pread(file, buffer, 8, 40_000) == 8
        assert buffer.value == b"readread"
        assert sorted(os.listdir(directory)) == sorted(os.listdir(place.area / "source/only"))
    finally:
        os.close(file)
        os.close(directory)


def test_a_listing_after_many_removals(root: None, area: Path, session: str) -> None:
    """Names that are hidden take no place in an answer; one without any would be the end."""
    with standing(area, session) as place:
        names = [f"file{number:03}" for number in range(200)]
        for name in names:
            (area / "source/late" / name).touch()
        for name in names[:190]:
            (place.top / "late" / name).unlink()
        assert sorted(os.listdir(place.top / "late")) == ["file", *names[190:]]


def test_waiting_requests_end_well(place: Place) -> None:
    """When the server goes on, so do they: all as on an ordinary directory."""
    copy = place.area / "natively"
    shutil.copytree(place.area / "source", copy, symlinks=True)
    stopped(place)
    bodies = [body for call, body in CALLS.items() if call not in ("list", "count")]
    waiting = [place.call(body) for body in bodies]
    for caller in waiting:
        place.waits(caller)
    time.sleep(0.2)
    place.server.go_on()
    for body, caller in zip(bodies, waiting, strict=True):
        natively = subprocess.run(
            [sys.executable, "-c", f"import os, sys\np = sys.argv[1]\n{body}", copy], capture_output=True
        )
        assert caller.wait(patient(20)) == natively.returncode, body
        assert caller.stderr is not None
        of_error = [text.strip().splitlines()[-1:] for text in (caller.stderr.read(), natively.stderr)]
        assert of_error[0] == [line.replace(bytes(copy), bytes(place.top)) for line in of_error[1]]
    assert _shown(place.top / "only") == _shown(copy / "only")


def test_a_copy_up_that_needs_the_layer_late(place: Place) -> None:
    """The file is of the other lower, and copied in a thread; then its directory must be copied up, too."""
    stopped(place)
    caller = place.call("os.chmod(p + '/late/file', 0o604)")
    place.waits(caller)
    others_go_on(place.top)
    place.server.go_on()
    assert caller.wait(patient(20)) == 0
    found = place.area / "upper/late"
    assert stat.S_IMODE(found.stat().st_mode) == 0o751
    assert stat.S_IMODE((found / "file").stat().st_mode) == 0o604
    assert (found / "file").read_bytes() == bytes(1 << 20)
    assert place.mount.work is not None
    assert os.listdir(place.mount.work / "work") == []


def test_a_large_copy_up_that_hangs(root: None, area: Path, session: str) -> None:
    """Its data is copied in a thread, which cannot be stopped."""
    if session == "pyfuse3":
        pytest.skip("with this session a copy-up of a large file ends with its thread")
    with standing(area, session, seconds=0.01) as place:
        (area / "source/only/large").write_bytes(b"large" * (2 << 20))
        place.known()
        caller = place.call("os.chmod(p + '/only/large', 0o604)")
        deadline = time.monotonic() + patient(20)
        while not os.listdir(area / "work/work"):
            assert time.monotonic() < deadline, "nothing is copied"
        place.server.stop()
        place.waits(caller)
        others_go_on(place.top)
        caller.kill()
        caller.wait(patient(20))
        others_go_on(place.top)
        place.server.go_on()
        while os.listdir(area / "work/work"):
            assert time.monotonic() < deadline + patient(20), "the copy is left"
            time.sleep(0.01)
        assert not (area / "upper/only/large").exists()
        assert (place.top / "only/large").read_bytes() == b"large" * (2 << 20)
        (place.top / "only/large").chmod(0o604)
        assert (area / "upper/only/large").read_bytes() == b"large" * (2 << 20)


def test_more_large_copy_ups_than_may_hang(root: None, area: Path, session: str) -> None:
    """One of them is killed before it begins: like the others, its file can be copied up later."""
    if session == "pyfuse3":
        pytest.skip("with this session a copy-up of a large file ends with its thread")
    with standing(area, session) as place:
        names = [f"large{number}" for number in range(18)]
        for name in names:
            (area / "source/only" / name).write_bytes(name.encode() * 70_000)
        place.known()
        place.kept += [os.open(place.top / "only" / name, os.O_PATH) for name in names]
        place.kept += [os.open(place.top / "only" / name, os.O_RDONLY) for name in names]
        place.server.stop()
        callers = [place.call(f"os.chmod(p + '/only/{name}', 0o604)") for name in names]
        for caller in callers:
            place.waits(caller)
        others_go_on(place.top)
        for caller in callers:
            caller.kill()
            caller.wait(patient(20))
        others_go_on(place.top)
        place.server.go_on()
        for name in names:
            (place.top / "only" / name).chmod(0o604)
            assert (area / "upper/only" / name).read_bytes() == name.encode() * 70_000


def test_a_copy_up_reads_the_data_once(root: None, area: Path, session: str) -> None:
    """Also if the directories of the file are still to be copied up."""
    size = 3 << 20
    deep = "only/a/b/c"
    with standing(area, session) as place:
        (area / "source" / deep).mkdir(parents=True)
        (area / "source" / deep / "large").write_bytes(os.urandom(size))
        before = int(os.getxattr(area / "served", "user.bytes_read"))
        (place.top / deep / "large").chmod(0o604)
        assert int(os.getxattr(area / "served", "user.bytes_read")) - before == size
        natively = (area / "source" / deep / "large").read_bytes()
        assert (area / "upper" / deep / "large").read_bytes() == natively


def test_a_file_is_read_in_order(root: None, area: Path, session: str) -> None:
    """By a program that reads it so. Several programs that read anywhere in the same files get their data."""
    size = 8 << 20
    with standing(area, session, seconds=0.002) as place:
        data = {name: os.urandom(size) for name in ("large", "another")}
        for name, content in data.items():
            (area / "source/only" / name).write_bytes(content)
        assert (place.top / "only/large").read_bytes() == data["large"]
        # Of 64 or more. The server's own tasks may begin in another order when several requests wait, as
        # under load; when they came in any order, more than half were backwards.
        assert int(os.getxattr(area / "served", "user.reads_backwards")) <= 24
        body = """
import random
chance = random.Random(7)
for name in ('large', 'another'):
    fd = os.open(p + '/only/' + name, os.O_RDONLY)
    natively = os.open(sys.argv[1] + '/../source/only/' + name, os.O_RDONLY)
    for _ in range(40):
        where = chance.randrange(8 << 20)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 300_000, where) == os.pread(natively, 300_000, where)
"""
        callers = [place.call(body) for _ in range(3)]
        for caller in callers:
            assert caller.wait(patient(60)) == 0, caller.stderr and caller.stderr.read().decode()


def test_a_snapshot_while_requests_wait(root: None, area: Path, session: str) -> None:
    """They have their results over the new layers."""
    if session == "pyfuse3":
        pytest.skip("no snapshots with this session")
    with standing(area, session) as place:
        stopped(place)
        missing = place.call("os.stat(p + '/only/missing')")
        changing = place.call("os.chmod(p + '/only/chmod', 0o604)")
        for caller in (missing, changing):
            place.waits(caller)
        done = unionfs("snapshot", "create", place.top, "first")
        assert done.returncode == 0, done.stderr
        others_go_on(place.top)
        place.server.go_on()
        assert missing.wait(patient(20)) == 1
        assert changing.wait(patient(20)) == 0
        assert stat.S_IMODE((place.top / "only/chmod").stat().st_mode) == 0o604
        assert stat.S_IMODE((area / "upper/only/chmod").stat().st_mode) == 0o604


@pytest.mark.slow_on("pyfuse3", "direct-cached", "direct-passthrough")
def test_a_refresh(place: Place) -> None:
    """It is refused, while everything else goes on; later it shows the changes."""
    area = place.area
    stopped(place)
    (area / "source/only/read").rename(area / "source/only/moved")
    (area / "lower/both/new").write_text("new")
    assert not (place.top / "own/new").exists()
    refreshing = subprocess.Popen([*command(), "refresh", place.top], stderr=subprocess.PIPE, text=True)
    others_go_on(place.top)
    if place.mount.session != "pyfuse3":
        done = unionfs("snapshot", "create", place.top, "meanwhile")
        assert done.returncode == 0, done.stderr
    _, said = refreshing.communicate(timeout=patient(20))
    assert refreshing.returncode == 1
    assert f"the lower {area}/served has not answered for 5 seconds; try again when it does" in said
    others_go_on(place.top)
    place.server.go_on()
    done = unionfs("refresh", place.top)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(place.top / "only")) == sorted(os.listdir(area / "source/only"))
    assert (place.top / "only/moved").read_bytes() == b"read" * 20_000
    assert not (place.top / "only/read").exists()
    assert (place.top / "both/new").read_text() == "new"


def test_a_refresh_of_many(root: None, area: Path, session: str) -> None:
    """What was changed in a slow lower shows: names, content, attributes, directories that are merged now."""
    with standing(area, session, seconds=0.001) as place:
        top = area / "source/only"
        (area / "lower/only/later").mkdir(parents=True)
        (area / "lower/only/later/below").write_text("below")
        assert unionfs("refresh", place.top).returncode == 0
        for number in range(40):
            (top / f"file{number}").write_text(f"{number}")
        assert unionfs("refresh", place.top).returncode == 0
        known = [os.open(place.top / "only" / name, os.O_PATH) for name in os.listdir(place.top / "only")]
        assert os.listdir(place.top / "only/later") == ["below"]
        for number in range(0, 40, 4):
            (top / f"file{number}").unlink()
            (top / f"file{number + 1}").write_text("changed")
            (top / f"file{number + 2}").chmod(0o600)
            (top / f"file{number + 3}").rename(top / f"moved{number}")
        (top / "later").mkdir()
        (top / "later/above").write_text("above")
        done = unionfs("refresh", place.top)
        assert done.returncode == 0, done.stderr
        for fd in known:
            os.close(fd)
        natively = _shown(top)
        natively[b"later/below"] = _shown(area / "lower/only/later")[b"below"]
        assert _shown(place.top / "only") == natively


@pytest.mark.slow_on("pyfuse3", "direct-cached", "direct-passthrough")
def test_a_snapshot_that_is_restored(root: None, area: Path, session: str) -> None:
    """That is refused while a lower does not answer, and nothing waits for it."""
    if session == "pyfuse3":
        pytest.skip("no snapshots with this session")
    with standing(area, session) as place:
        done = unionfs("snapshot", "create", place.top, "first")
        assert done.returncode == 0, done.stderr
        (place.top / "own/later").write_text("later")
        stopped(place)
        restoring = subprocess.Popen(
            [*command(), "snapshot", "restore", place.top, "first"], stderr=subprocess.PIPE, text=True
        )
        for _ in range(5):
            assert (place.top / "own/later").read_text() == "later"
        _, said = restoring.communicate(timeout=patient(20))
        assert restoring.returncode == 1
        assert f"the lower {area}/served has not answered for 5 seconds; try again when it does" in said
        assert (place.top / "own/later").read_text() == "later"
        place.server.go_on()
        done = unionfs("snapshot", "restore", place.top, "first")
        assert done.returncode == 0, done.stderr
        assert not (place.top / "own/later").exists()
        assert (place.top / "only/read").read_bytes() == b"read" * 20_000


@pytest.mark.slow_on("pyfuse3", "direct-cached", "direct-passthrough")
def test_a_large_copy_up_is_shown(root: None, area: Path, session: str) -> None:
    """How far it is: in `inspect`, `stats` and `top`."""
    with standing(area, session, seconds=0.01) as place:
        size = 10 << 20
        (area / "source/only/large").write_bytes(b"x" * size)
        place.known()
        assert place.mount.inspect()["figures"]["copying_up"] == []
        caller = place.call("os.chmod(p + '/only/large', 0o604)")
        deadline = time.monotonic() + patient(20)
        while not (found := place.mount.inspect()["figures"]["copying_up"]) or not found[0]["copied"]:
            assert time.monotonic() < deadline, "nothing is copied"
        place.server.stop()
        place.waits(caller)
        [one] = place.mount.inspect()["figures"]["copying_up"]
        assert (one["path"], one["size"]) == ("/only/large", size)
        assert 0 < one["copied"] < size
        assert one["seconds"] > 0
        is_named(place)
        line = r"/only/large: \S+ MiB of 10.0 MiB, \S+ [KM]iB/s, [\d:]+ left\n"
        for words in (["inspect", place.top], ["stats", "--seconds", "0", place.top]):
            assert re.search(rf"copying up +{line}", unionfs(*words).stdout)
        assert re.search(rf"{place.top}: copying up {line}", unionfs("top", "--once").stdout)
        [listed] = [
            mount
            for mount in json.loads(unionfs("top", "--json").stdout)
            if mount["mountpoint"] == str(place.top)
        ]
        assert [one["path"] for one in listed["copying_up"]] == ["/only/large"]
        place.server.go_on()
        assert caller.wait(patient(20)) == 0
        assert place.mount.inspect()["figures"]["copying_up"] == []


def test_commands_answer(place: Place) -> None:
    """`ls`, `inspect` and `stats` answer, and `inspect` names the layer."""
    stopped(place)
    place.waits(place.call(CALLS["look a name up"]))
    deadline = time.monotonic() + patient(20)
    while not (hung := place.mount.inspect()["figures"]["hung_layers"]):
        assert time.monotonic() < deadline, "no layer is named"
    assert list(hung) == [str(place.area / "served")]
    assert place.mount.inspect()["figures"]["requests_aside"] == 1
    for words in (["ls", "--json"], ["inspect"], ["stats"], ["stats", "--json"]):
        done = unionfs(*words, *([] if words[0] == "ls" else [place.top]))
        assert done.returncode == 0, done.stderr
        assert str(place.top) in done.stdout or words[0] == "stats"
    listed = json.loads(unionfs("ls", "--json").stdout)
    assert str(place.top) in [one["mountpoint"] for one in listed]


@pytest.mark.parametrize("how", ["--force", "--lazy"])
def test_umount_with_callers(place: Place, how: str) -> None:
    ends_while_it_hangs(place, how)


def test_umount(place: Place) -> None:
    stopped(place)
    place.let_go()
    done = unionfs("umount", place.top)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(place.top)
    usable_again(place)


def test_stopped_at_any_moment(place: Place) -> None:
    """Under load of all kinds on the served lower: the others never wait for it."""
    chance = random.Random(18)
    body = """
import random
chance = random.Random(os.getpid())
names = ['read', 'chmod', 'write', 'link', 'missing', *map(str, range(9))]
calls = [
    os.stat,
    os.listxattr,
    lambda name: open(name, 'rb').read(99),
    lambda name: os.listdir(p + '/only'),
    lambda name: os.chmod(name, 0o640),
    lambda name: open(name, 'ab').write(b'x'),
    os.unlink,
]
while True:
    try:
        chance.choice(calls)(p + '/only/' + chance.choice(names))
    except OSError:
        pass
"""
    place.known()
    load = [place.call(body) for _ in range(3)]
    for _ in range(25):
        time.sleep(chance.random() / 10)
        place.server.stop()
        for _ in range(3):
            others_go_on(place.top)
        place.server.go_on()
    for caller in load:
        assert caller.poll() is None, caller.stderr and caller.stderr.read()
        caller.kill()
        caller.wait(patient(20))
    assert sorted(os.listdir(place.top / "both")) == ["mine", "other", "slow"]


def test_without_an_upper(root: None, area: Path, session: str) -> None:
    """The topmost layer hangs, which also answers statfs(2)."""
    for name in ("served", "lower/both"):
        (area / name).mkdir(parents=True)
    tree(area / "source")
    (area / "lower/both/other").write_text("of the other lower")
    server = Server(area / "source", area / "served")
    try:
        with mounted(area, lowers=[area / "served", area / "lower"], session=session) as mount:
            place = Place(area, server, mount)
            try:
                natively = os.statvfs(area / "served")
                assert os.statvfs(place.top).f_blocks == natively.f_blocks
                assert (place.top / "both/other").read_text() == "of the other lower"
                server.stop()
                caller = place.call("os.statvfs(p)")
                place.waits(caller)
                assert (place.top / "both/other").read_text() == "of the other lower"
                with (place.top / "both/other").open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    assert file.read() == b"of the other lower"
                caller.kill()
                caller.wait(patient(20))
            finally:
                place.end()
    finally:
        server.go_on()
        server.end()


def test_a_slow_server_and_many_changes(root: None, area: Path, session: str) -> None:
    """Programs that change the same files and directories of a slow lower at once: all as on a directory."""
    with standing(area, session, seconds=0.002) as place:
        natively = area / "natively"
        shutil.copytree(area / "source", natively, symlinks=True)
        body = """
import random
chance = random.Random(7)
names = ['read', 'chmod', 'write', 'xattr', 'statfs']
for turn in range(4):
    for name in names:
        path = p + '/only/' + name
        os.chmod(path, 0o600 + turn)
        os.utime(path, ns=(turn, turn))
        with open(path, 'r+b') as file:
            file.write(b'%d' % turn)
        os.makedirs(p + '/only/sub%d/deep' % turn, exist_ok=True)
        assert os.stat(path).st_size == len(name) * 20_000
        os.listdir(p + '/only')
"""
        callers = [place.call(body) for _ in range(6)]
        for caller in callers:
            assert caller.wait(patient(60)) == 0, caller.stderr and caller.stderr.read().decode()
        subprocess.run(
            [sys.executable, "-c", f"import os, sys\np = sys.argv[1]\n{body}", natively], check=True
        )
        assert _shown(place.top / "only") == _shown(natively / "only")
