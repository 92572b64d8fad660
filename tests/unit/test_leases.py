"""The lease of an upper, without a mount: on an ordinary directory, which any filesystem is to it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.patience import patient
from tests.support.world import errno_of
from unionfs.errors import LayerError
from unionfs.sys.fds import Owned
from unionfs.union import leases
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
    lease.renew()
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


def test_it_is_listed_by_another_number(upper: Path) -> None:
    """More answers were lost: it is still its owner's, since nobody else makes names with the token."""
    lease = made(upper)
    os.rename(lease.owner.name(1), lease.owner.name(7), src_dir_fd=lease.fd, dst_dir_fd=lease.fd)
    lease.renew()
    assert not lease.lost
    assert names(upper) == [os.fsdecode(lease.owner.name(8))]
    lease.end()


def test_one_that_is_renewed_is_refused(upper: Path) -> None:
    lease = made(upper)
    keeper = Keeper(lease)
    keeper.begin()
    try:
        with pytest.raises(LayerError, match=f"in use by process {os.getpid()} of this host"):
            made(upper)
        assert keeper.passes
    finally:
        keeper.end()
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


def test_a_directory_of_somebody_else(upper: Path, root: None) -> None:
    os.mkdir(f"{upper}.lease")
    os.chown(f"{upper}.lease", 12345, 12345)
    with pytest.raises(LayerError, match="belongs to uid 12345"):
        made(upper)
    os.rmdir(f"{upper}.lease")
    os.symlink(upper, f"{upper}.lease")
    with pytest.raises(LayerError, match="cannot be made"):
        made(upper)
    assert os.listdir(upper) == []


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
    keeper.begin()
    try:
        failing.set()
        assert _soon(lambda: not keeper.passes)
        assert keeper.figures()["waits"]
        assert not keeper.lost
        failing.clear()
        assert keeper.is_sure()
    finally:
        keeper.end()
    assert errno_of(os.stat, f"{upper}.lease") == 2


def _soon(condition: object) -> bool:
    deadline = time.monotonic() + patient(10)
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
