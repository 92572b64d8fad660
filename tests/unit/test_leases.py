"""The lease of an upper, without a mount: on an ordinary directory, which any filesystem is to it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.patience import patient
from tests.support.world import errno_of
from unionfs.errors import LayerError
from unionfs.sys.fds import Owned
from unionfs.union import leasekeeper, leases
from unionfs.union.leasekeeper import Keeper
from unionfs.union.leases import Lease, Owner, claim, parsed

SECONDS = patient(0.6)


@pytest.fixture(autouse=True)
def upper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIONFS_LEASE_SECONDS", str(SECONDS))
    path = tmp_path / "upper"
    path.mkdir()
    return path


def made(upper: Path, *, alone: bool = False) -> Lease:
    """Claim a lease; its fds stay open."""
    flags = os.O_PATH | os.O_DIRECTORY
    parent = os.open(upper.parent, flags)
    with Owned(os.open(upper, flags)) as fd:
        return claim(fd, str(upper), parent, alone=alone)


@contextmanager
def renewed(keeper: Keeper) -> Iterator[None]:
    """Keep the lease within the context."""
    keeper.begin()
    try:
        yield
    finally:
        keeper.end()


def names(upper: Path) -> list[str]:
    return os.listdir(f"{upper}.lease")


@pytest.mark.parametrize("host", ["plain", "with.dots.example.org", "\udcff", "x" * 48])
def test_names(host: str) -> None:
    owner = Owner("0123456789abcdef", 0.5, 4_194_303, 2**32, "f" * 32, host)
    name = owner.name(10**6)
    assert parsed(name) == (10**6, owner)
    assert len(name) <= 143
    for other in (b"", b"1", b"2" + name[1:], b"1.x" + name[1:], b".nfs0001", b"1.1.a.b.c.d.e.f"):
        assert parsed(other) is None
    for runs in (b"inf", b"nan", b"0", b"-1", b"601", b"1e9"):
        assert parsed(name.replace(b".0,5.", b".%b." % runs)) is None
    assert parsed(name.replace(b".0,5.", b".600.")) is not None


def test_its_life(upper: Path) -> None:
    before = leases.clock()
    lease = made(upper)
    assert before + SECONDS * 0.6 < lease.until < leases.clock() + SECONDS * 0.7
    first = names(upper)
    before = leases.clock()
    lease.renew()
    assert before + SECONDS * 0.6 < lease.until < leases.clock() + SECONDS * 0.7
    assert names(upper) != first
    assert [parsed(os.fsencode(name)) for name in names(upper)] == [(2, lease.owner)]
    assert lease.owner.host.encode() == os.uname().nodename.encode()[:48]
    lease.end()
    assert sorted(os.listdir(upper.parent)) == ["upper"]


def test_an_answer_that_was_lost(upper: Path) -> None:
    """The server has renamed the file, and the client repeats that: ENOENT."""
    lease = made(upper)
    os.rename(lease.owner.name(1), lease.owner.name(2), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    lease.renew()
    assert not lease.lost
    assert names(upper) == [os.fsdecode(lease.owner.name(3))]
    os.rename(lease.owner.name(3), lease.owner.name(4), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    lease.end()
    assert sorted(os.listdir(upper.parent)) == ["upper"]


def test_it_is_listed_by_another_number(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More answers were lost: it is still its owner's, since nobody else makes names with the token. It is
    not lost because a server cannot list it."""
    lease = made(upper)
    os.rename(lease.owner.name(1), lease.owner.name(7), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)

    def failing(fd: int) -> list[bytes]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(leases, "_names", failing)
        assert errno_of(lease.renew) == errno.EIO
        with pytest.raises(LayerError, match="cannot be made: "):
            made(upper)
    assert not lease.lost
    lease.renew()
    assert not lease.lost
    assert names(upper) == [os.fsdecode(lease.owner.name(8))]
    lease.end()


def test_one_that_is_renewed_is_refused(upper: Path) -> None:
    lease = made(upper)
    keeper = Keeper(lease)
    with renewed(keeper):
        with pytest.raises(LayerError, match=f"in use by process {os.getpid()} of this host"):
            made(upper)
        assert keeper.passes
    assert not os.path.exists(f"{upper}.lease")
    made(upper).end()


def test_one_that_has_run_out(upper: Path) -> None:
    old = made(upper)
    began = time.monotonic()
    new = made(upper)
    assert time.monotonic() - began >= SECONDS
    assert leases.clock() > old.until
    assert [parsed(os.fsencode(name)) for name in names(upper)] == [(1, new.owner)]
    old.renew()
    assert f"process {os.getpid()} of this host" in old.lost
    old.end()
    assert len(names(upper)) == 1
    new.renew()
    assert not new.lost
    new.end()


def test_one_of_this_kernel_that_nobody_can_have(upper: Path) -> None:
    """The flock shows that its process has ended: no time has to pass."""
    made(upper)
    began = time.monotonic()
    made(upper, alone=True).end()
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("other", [{"boot": "f" * 32}, {"device": 1}])
def test_one_whose_owner_has_no_flock_here(upper: Path, other: dict[str, str]) -> None:
    """It belongs to another kernel, or to another mount of the filesystem: it has to run out."""
    lease = made(upper)
    elsewhere = replace(lease.owner, **other)  # type: ignore[arg-type]
    os.rename(lease.owner.name(1), elsewhere.name(1), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    began = time.monotonic()
    made(upper, alone=True).end()
    assert time.monotonic() - began >= SECONDS


def test_several_that_have_run_out(upper: Path) -> None:
    """Hosts died while they found out which one has it. Nothing of them is left."""
    made(upper)
    (upper.parent / "upper.lease/2.any").touch()
    lease = made(upper)
    assert names(upper) == [os.fsdecode(lease.owner.name(1))]
    lease.end()
    assert sorted(os.listdir(upper.parent)) == ["upper"]


def test_the_longest_of_several_counts(upper: Path) -> None:
    """This host's leases may run shorter than the other's."""
    lease = made(upper)
    long = replace(lease.owner, seconds=2 * SECONDS)
    os.rename(lease.owner.name(1), long.name(1), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    began = time.monotonic()
    made(upper).end()
    assert time.monotonic() - began >= 2 * SECONDS


def test_a_server_that_hangs_keeps_the_owner_from_renewing(
    upper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the time of a call that did not return does not count."""
    lease = made(upper)
    real, calls = leases._names, iter(range(10**6))

    def listed(fd: int) -> list[bytes]:
        if next(calls) == 1:
            time.sleep(1.5 * SECONDS)
            threading.Timer(SECONDS / 2, lease.renew).start()
        return real(fd)

    monkeypatch.setattr(leases, "_names", listed)
    with pytest.raises(LayerError, match="is in use by process"):
        made(upper)
    lease.end()


def test_another_one_came_first(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that took the new directory for one that has run out: the later one gives way, and waits."""
    real, flags = os.open, os.O_CREAT | os.O_EXCL

    def opened(path: str | bytes, how: int, *words: int, **named: int) -> int:
        fd = real(path, how, *words, **named)
        if how & flags == flags:
            monkeypatch.setattr(os, "open", real)
            (upper.parent / "upper.lease/2.other").touch()
            names = (f"{upper}.lease/2.other", f"{upper}.lease/2.next")
            threading.Timer(SECONDS / 2, os.rename, names).start()
        return fd

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(LayerError, match=r"the unknown owner of 2\.next"):
        made(upper)
    assert names(upper) == ["2.next"]


def test_long_names_of_hosts(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a/" + "x" * 64)
    lease = made(upper)
    assert lease.owner.host == "a_" + "x" * 46
    lease.end()
    assert sorted(os.listdir(upper.parent)) == ["upper"]


def forgetful(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A server that was restarted knows a directory's handle no more: so many renames fail."""
    real, left = os.rename, [None] * times

    def rename(old: bytes, new: bytes, **named: int) -> None:
        if left:
            left.pop()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        real(old, new, **named)

    monkeypatch.setattr(os, "rename", rename)


def test_a_directory_that_the_server_has_forgotten(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened again by its name, once."""
    lease = made(upper)
    os.rename(f"{upper}.lease", f"{upper}.old")
    shutil.copytree(f"{upper}.old", f"{upper}.lease")
    forgetful(monkeypatch, 1)
    lease.renew()
    assert not lease.lost
    assert names(upper) == [os.fsdecode(lease.owner.name(2))]
    forgetful(monkeypatch, 2)
    assert errno_of(lease.renew) == errno.ESTALE
    lease.leave()  # its fds may be those of other files
    forgetful(monkeypatch, 1)
    assert errno_of(lease.renew) == errno.ESTALE
    shutil.rmtree(f"{upper}.lease")
    forgetful(monkeypatch, 1)
    lease.renew()
    assert lease.lost == "its lease was removed"


def test_a_keeper_of_a_lost_lease(upper: Path) -> None:
    """It does not begin, but goes on to answer."""
    lease = made(upper)
    shutil.rmtree(f"{upper}.lease")
    keeper = Keeper(lease)
    with pytest.raises(LayerError, match="its lease was removed while it was being mounted"):
        keeper.begin()
    assert not keeper.passes
    assert not keeper.is_sure()
    found = keeper.figures()
    assert (found["waits"], found["lost_because"]) == (False, "its lease was removed")


def test_a_renewal_that_returns_after_the_end(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the lease's fd may be that of another file by then, so nothing is opened in its place."""
    monkeypatch.setattr(leasekeeper, "_END_SECONDS", 0.05)
    lease = made(upper)
    keeper = Keeper(lease)
    asked, answers = threading.Event(), threading.Event()

    def rename(*_: object, **__: object) -> None:
        asked.set()
        answers.wait(patient(10))
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    before = os.fstat(lease.fd).st_ino
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        keeper.go_on()
        keeper.hurry()
        assert asked.wait(patient(10))
        keeper.end()
        shutil.rmtree(f"{upper}.lease")
        os.mkdir(f"{upper}.lease")
        answers.set()
        assert keeper._thread is not None
        keeper._thread.join()
    assert os.fstat(lease.fd).st_ino == before
    assert not lease.lost


def test_how_often_it_is_renewed(upper: Path) -> None:
    """Not more often than needed: each is a request to the server."""
    lease = made(upper)
    keeper = Keeper(lease)
    began = time.monotonic()
    with renewed(keeper):
        time.sleep(SECONDS / 2)
        assert 2 <= lease.sequence <= 3 + (time.monotonic() - began) * 6 / SECONDS


def test_a_renewal_that_is_needed_now(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the next one is due."""
    monkeypatch.setenv("UNIONFS_LEASE_SECONDS", "600")
    lease = made(upper)
    keeper = Keeper(lease)
    with renewed(keeper):
        lease.until = 0.0
        assert keeper.is_sure()


def test_figures(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIONFS_LEASE_SECONDS", "300")
    lease = made(upper)
    keeper = Keeper(lease)
    lease.until = leases.clock() + 200 - 7
    assert 7 <= keeper.figures()["renewed_seconds_ago"] < 7 + patient(10)
    assert (keeper.figures()["seconds"], keeper.figures()["waits"]) == (300, False)
    lease.until = leases.clock()
    assert not keeper.passes
    assert keeper.figures()["waits"]
    assert keeper.is_sure()  # without a thread it is renewed at once
    assert keeper.figures()["renewed_seconds_ago"] < patient(10)
    lease.until = 0.0  # of a former daemon, not yet renewed
    assert keeper.figures()["renewed_seconds_ago"] is None
    keeper.end()
    assert sorted(os.listdir(upper.parent)) == ["upper"]


def test_it_was_removed(upper: Path) -> None:
    """Another owner may have come and gone meanwhile."""
    lease = made(upper)
    os.unlink(f"{upper}.lease/{names(upper)[0]}")
    os.rmdir(f"{upper}.lease")
    lease.renew()
    assert lease.lost == "its lease was removed"
    made(upper).end()


def test_an_empty_directory_runs_out(upper: Path) -> None:
    """A host died just there."""
    os.mkdir(f"{upper}.lease")
    began = time.monotonic()
    lease = made(upper, alone=True)
    assert time.monotonic() - began >= SECONDS
    lease.end()


@pytest.mark.parametrize("begins", [False, True])
def test_what_changes_while_another_one_waits(upper: Path, begins: bool) -> None:
    """An owner that ends is no reason to refuse, nor is one that only begins and ends."""
    directory = upper.parent / "upper.lease"
    directory.mkdir()
    if not begins:
        (directory / "2.any").touch()

    def change() -> None:
        if begins:
            time.sleep(SECONDS / 4)
            (directory / "2.any").touch()
        time.sleep(SECONDS / 4)
        (directory / "2.any").unlink()
        time.sleep(SECONDS / 4)
        directory.rmdir()

    thread = threading.Thread(target=change)
    thread.start()
    began = time.monotonic()
    made(upper).end()
    assert time.monotonic() - began < patient(10)
    thread.join()
    assert sorted(os.listdir(upper.parent)) == ["upper"]


def test_a_wait_is_told_once(
    upper: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "_TELL_SECONDS", SECONDS / 3)
    made(upper)
    made(upper).end()
    assert [record.levelname for record in caplog.records if "waiting" in record.message] == ["WARNING"]


def test_another_version(upper: Path) -> None:
    """It is respected, and runs out."""
    os.mkdir(f"{upper}.lease")
    (upper.parent / "upper.lease/2.any").touch()

    def renew() -> None:
        time.sleep(SECONDS / 2)
        os.rename(f"{upper}.lease/2.any", f"{upper}.lease/2.next")

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(LayerError, match=r"the unknown owner of 2\.next"):
        made(upper)
    thread.join()
    made(upper).end()


def test_a_look_changes_nothing(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What works on an upper that is not mounted looks whether another host has it."""
    leases.refuse_if_led(str(upper), alone=False)  # no other host sees this filesystem
    monkeypatch.setattr(leases, "filesystem", lambda fd: "NFS")
    for path in (upper, upper.parent / "missing"):
        leases.refuse_if_led(str(path), alone=False)
    assert os.listdir(upper.parent) == ["upper"]
    lease = made(upper)
    threading.Timer(SECONDS / 2, lease.renew).start()
    with pytest.raises(LayerError, match="is in use by process"):
        leases.refuse_if_led(str(upper), alone=False)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
        leases.refuse_if_led(str(upper), alone=True)
    began = time.monotonic()
    leases.refuse_if_led(str(upper), alone=False)
    assert time.monotonic() - began >= SECONDS
    assert names(upper) == [os.fsdecode(lease.owner.name(2))]


def test_a_directory_of_somebody_else(upper: Path, root: None) -> None:
    os.mkdir(f"{upper}.lease")
    os.chown(f"{upper}.lease", 12345, 12345)
    with pytest.raises(LayerError, match="belongs to uid 12345"):
        made(upper)
    os.rmdir(f"{upper}.lease")
    (upper / "precious").touch()
    os.symlink(upper, f"{upper}.lease")
    with pytest.raises(LayerError, match="cannot be made"):
        made(upper)
    assert os.listdir(upper) == ["precious"]


def test_a_later_daemon_goes_on(upper: Path) -> None:
    lease = made(upper)
    lease.renew()
    next_one = Lease.resume(str(upper), lease.parent, lease.fd, lease.owner.token)
    assert next_one.until < leases.clock()
    next_one.renew()
    assert next_one.until > leases.clock()
    assert names(upper) == [os.fsdecode(lease.owner.name(3))]
    assert Lease.resume(str(upper), lease.parent, lease.fd, "another").lost
    next_one.end()


def test_a_later_daemon_is_named(upper: Path) -> None:
    """Not the dead one, from the first renewal on; also if the answer to that was lost."""
    lease = made(upper)
    dead = replace(lease.owner, pid=1)
    os.rename(lease.owner.name(1), dead.name(1), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    next_one = Lease.resume(str(upper), lease.parent, lease.fd, dead.token)
    assert next_one.owner == dead
    os.rename(dead.name(1), lease.owner.name(2), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    next_one.renew()
    assert not next_one.lost
    assert names(upper) == [os.fsdecode(lease.owner.name(3))]
    os.rename(lease.owner.name(3), dead.name(3), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    next_one = Lease.resume(str(upper), lease.parent, lease.fd, dead.token)
    next_one.renew()
    assert names(upper) == [os.fsdecode(lease.owner.name(4))]
    next_one.end()
    assert sorted(os.listdir(upper.parent)) == ["upper"]
    assert Lease.resume(str(upper), lease.parent, lease.fd, dead.token).lost == "its lease was removed"


CONTENDER = """
import os, random, sys, time
from unionfs.errors import LayerError
from unionfs.union import leases
upper, number = sys.argv[1], int(sys.argv[2])
chosen = random.Random(number)
parent = os.open(os.path.dirname(upper), os.O_PATH)
fd = os.open(upper, os.O_PATH)
deadline = time.monotonic() + float(sys.argv[3])
while time.monotonic() < deadline:
    try:
        lease = leases.claim(fd, upper, parent, alone=False)
    except LayerError:
        continue
    print("had it", flush=True)
    for _ in range(chosen.randrange(1, 3)):
        while leases.clock() < lease.until and not lease.lost and chosen.random() < 0.9:
            mine = os.open(upper + "/held", os.O_CREAT | os.O_EXCL)  # fails if another one has it, too
            os.close(mine)
            os.unlink(upper + "/held")
        time.sleep(chosen.random() * leases.seconds())
        lease.renew()
    if chosen.random() < 0.7:
        lease.end()  # else it dies
    os.close(lease.fd)
    time.sleep(leases.seconds() / 2)  # the next one is another's
"""


@pytest.mark.slow
def test_one_at_a_time(upper: Path) -> None:
    """Processes that take it, keep it, come back too late, end and die at random never have it together."""
    words = [sys.executable, "-c", CONTENDER, str(upper)]
    environment = {**os.environ, "UNIONFS_LEASE_SECONDS": str(patient(1.5))}
    processes = [
        subprocess.Popen(
            [*words, str(number), str(patient(12.0))], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(4)
    ]  # fmt: skip
    results = [process.communicate(timeout=patient(60)) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, [error for _, error in results]
    assert sum(bool(said) for said, _ in results) >= 2, "they had it in turn"


def test_a_server_that_fails(upper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors other than that it is gone leave it in doubt: it is not valid any more, and comes back."""
    lease = made(upper)
    keeper = Keeper(lease)
    real = os.rename
    failing = threading.Event()

    def rename(*words: object, **named: object) -> None:
        if failing.is_set():
            raise OSError(5, "Input/output error")
        real(*words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    with renewed(keeper):
        failing.set()
        assert _soon(lambda: not keeper.passes)
        assert keeper.figures()["waits"]
        assert not keeper.lost
        failing.clear()
        assert keeper.is_sure()
    assert errno_of(os.stat, f"{upper}.lease") == 2


def _soon(condition: object) -> bool:
    deadline = time.monotonic() + patient(10)
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
