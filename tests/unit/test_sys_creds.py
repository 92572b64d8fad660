"""Creating files as another user: ids and capabilities of the thread, as the kernel shows them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from unionfs.core.creds import Creator
from unionfs.sys.capabilities import CAP_SYS_ADMIN, NUMBERS, capability_sets, set_capabilities
from unionfs.sys.creds import Identity

MKNOD, SETUID = 1 << NUMBERS["MKNOD"], 1 << NUMBERS["SETUID"]


def shown() -> tuple[str, str, int]:
    """The filesystem ids of this thread, and its effective capabilities."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return status["Uid"].split()[3], status["Gid"].split()[3], int(status["CapEff"], 16)


def in_a_thread(act: Callable[[], None]) -> None:
    """Run it in a thread, whose credentials are its own."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_switched_and_back(root: None, tmp_path: Path) -> None:
    """The thread keeps its capabilities while it acts as the user, who owns the file that it makes."""

    def act() -> None:
        before = shown()
        with Identity().acting_as(1234, 2345):
            assert shown() == ("1234", "2345", before[2])
            (tmp_path / "f").touch()
        assert shown() == before
        st = (tmp_path / "f").stat()
        assert (st.st_uid, st.st_gid) == (1234, 2345)

    in_a_thread(act)
    assert shown()[:2] == ("0", "0")


def test_a_capability_that_is_not_effective_stays_so(root: None) -> None:
    """Back at uid 0 the kernel makes all those of files effective that are permitted."""

    def act() -> None:
        sets = capability_sets()
        sets[0].effective &= ~MKNOD
        assert sets[0].permitted & MKNOD
        creator = Creator(0, 0, bytes(sets), can_switch=True)
        for switch in (lambda: creator.switch(1234, 2345), creator.switch_back):
            switch()
            found = shown()[2]
            assert not found & MKNOD
            assert found & 1 << CAP_SYS_ADMIN
        assert shown()[:2] == ("0", "0")

    in_a_thread(act)


def test_without_a_capability_it_acts_as_itself_alone(tmp_path: Path) -> None:
    def act() -> None:
        sets = capability_sets()
        sets[0].effective &= ~SETUID
        assert set_capabilities(sets)
        identity = Identity()
        with identity.acting_as(os.geteuid(), os.getegid()):
            (tmp_path / "mine").touch()
        with pytest.raises(PermissionError), identity.acting_as(os.geteuid() + 1, os.getegid()):
            pass

    in_a_thread(act)
    assert (tmp_path / "mine").stat().st_uid == os.geteuid()
    with pytest.raises(ValueError, match="two structures"):
        Creator(0, 0, bytes(capability_sets())[:-1], can_switch=False)
