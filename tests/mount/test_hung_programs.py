"""A lower on sshfs, rclone or glusterfs whose server stops: only those who need it wait."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.mount.hung_calls import (
    CALLS,
    Start,
    ends_while_it_hangs,
    hangs_and_goes_on,
    is_named,
    others_go_on,
    standing,
    stopped,
    wait_until,
)  # fmt: skip
from tests.mount.hung_programs import Glusterfs, Rclone, Sshfs
from tests.support.patience import patient
from tests.support.world import errno_of

pytestmark = pytest.mark.slow_on("direct-passthrough", "direct-cached", "pyfuse3")

REMOTES: dict[str, Start] = {
    "sshfs": partial(Sshfs, itself=True),
    "sshd": Sshfs,
    "rclone": partial(Rclone, itself=True),
    "webdav": Rclone,
    "glusterfs": Glusterfs,
}
@pytest.mark.parametrize("start", REMOTES.values(), ids=REMOTES)
def test_stopped(root: None, area: Path, session: str, start: Start) -> None:
    """The others go on, who waits can be killed, commands answer; later everything goes on."""
    with standing(area, session, start=start, bare=True) as place:
        hangs_and_goes_on(place)


@pytest.mark.parametrize("start", REMOTES.values(), ids=REMOTES)
def test_umount(root: None, area: Path, session: str, start: Start) -> None:
    """With callers: the mount ends, and its upper can be mounted again, whatever the layer does."""
    with standing(area, session, start=start, bare=True) as place:
        ends_while_it_hangs(place)


def _fails(function: Callable[..., object], path: Path) -> bool:
    return errno_of(function, path) != 0


def test_an_ssh_server_that_is_killed(root: None, area: Path, session: str) -> None:
    """Calls fail until there is another one, to which sshfs connects anew."""
    with standing(area, session, start=Sshfs, bare=True) as place:
        server = place.server
        assert isinstance(server, Sshfs)
        place.known()
        server.kill()
        natively = errno_of(os.stat, area / "served/only/missing")
        assert natively == errno_of(os.stat, place.top / "only/missing") != errno.ENOENT
        for _ in range(20):
            others_go_on(place.top)
        server.begin()
        wait_until(lambda: not _fails(os.stat, area / "served/only/read"), "sshfs does not connect anew")
        assert (place.top / "only/read").read_bytes() == b"read" * 20_000
        assert errno_of(os.stat, place.top / "only/missing") == errno.ENOENT


@pytest.mark.slow
def test_one_brick_of_two(root: None, area: Path, session: str) -> None:
    """Calls wait until glusterfs goes on with the other brick; the others do not wait."""
    start = partial(Glusterfs, patience=3, count=1)
    with standing(area, session, start=start, bare=True) as place:
        stopped(place)
        caller = place.call(CALLS["read"])
        place.waits(caller)
        others_go_on(place.top)
        is_named(place)
        assert caller.wait(patient(60)) == 0
        (place.top / "only/chmod").chmod(0o604)
        assert (area / "upper/only/chmod").read_bytes() == b"chmod" * 20_000


@pytest.mark.slow
def test_both_bricks(root: None, area: Path, session: str) -> None:
    """Calls wait until glusterfs reports that it has no connection, as natively, and succeed later."""
    start = partial(Glusterfs, patience=3)
    with standing(area, session, start=start, bare=True) as place:
        stopped(place)
        caller = place.call(CALLS["read"])
        place.waits(caller)
        others_go_on(place.top)
        assert caller.wait(patient(60)) == 1
        assert caller.stderr is not None
        assert b"OSError: [Errno 107]" in caller.stderr.read()
        assert errno_of(os.stat, area / "served/only/read") == errno.ENOTCONN
        place.server.go_on()
        wait_until(lambda: not _fails(os.stat, area / "served/only/read"), "glusterfs does not connect anew")
        assert (place.top / "only/read").read_bytes() == b"read" * 20_000
