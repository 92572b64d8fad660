"""Mounts that outlive their daemons, with a lower on a FUSE filesystem whose server stops and goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount import hung_calls
from tests.mount.cli_calls import Place, succeed, unionfs
from tests.mount.hung_calls import CALLS, Server, is_named, others_go_on
from tests.mount.outliving_calls import MODES, RESENDS, Outliving, fill, kill_next, load, tree
from tests.support import areas
from tests.support.mounting import Mount
from tests.support.patience import patient

pytestmark = [pytest.mark.watchdog(600), pytest.mark.timeout(1200), RESENDS]


@contextmanager
def served(place: Place, io: str, count: int, seconds: float) -> Iterator[tuple[Server, Outliving]]:
    """A mount of a served lower, with ``count`` directories for a load. The server takes so long per call."""
    source, shown = place.root / "source", place.root / "served"
    source.mkdir()
    shown.mkdir()
    fill(place, count, io, source)
    server = Server(source, shown, seconds)
    try:
        layers = ("-l", shown, "-l", place.lower, "-u", place.upper, "-w", place.work)
        yield server, Outliving(place, "--session", "direct", "--io", io, layers=layers)
    finally:
        server.go_on()
        areas.detach(place.merged)
        server.end()


def storm(mount: Outliving, server: Server, kills: int, seed: int) -> None:
    """Kill daemons at random moments, also while the server is stopped, and those that take over."""
    chosen = random.Random(seed)
    for _ in range(kills):
        entry = mount.entry()
        time.sleep(chosen.random() * 0.2)
        stops = chosen.random() < 0.5
        if stops:
            server.stop()
            time.sleep(chosen.random() * 0.1)
        os.kill(entry.pid, signal.SIGKILL)
        if stops:
            time.sleep(chosen.random() * 0.2)
            server.go_on()
        kill_next(entry, chosen)
    mount.last = mount.entry()


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("seconds", [0, 0.001], ids=["quick", "slow"])
def test_killed_under_load(place: Place, io: str, seconds: float) -> None:
    """No operation fails that succeeds on a native filesystem, and none is done twice."""
    with served(place, io, 2, seconds) as (server, mount):
        for turn in range(int(os.environ.get("TURNS", 1))):
            with load(place, 2, turn) as results:
                storm(mount, server, int(os.environ.get("KILLS", 5)), turn)
            print(io, turn, [(one["count"], one["longest"]) for one in results])
            assert [one["differences"] for one in results] == [[], []], mount.log()
            for number in range(2):
                assert tree(mount.top / f"w{number}") == tree(place.root / f"native/w{number}"), turn
        mount.end()
        assert os.listdir(place.work / "work") == []
        succeed(unionfs("check", *mount.layers))


@contextmanager
def hanging(place: Place, io: str, seconds: float = 0.0) -> Iterator[tuple[hung_calls.Place, Outliving]]:
    """A mount in use of a served lower and an ordinary one, as in `test_hung_layers`."""
    area = place.root
    hung_calls.prepare(area)
    server = Server(area / "source", area / "served", seconds)
    upper, work = area / "upper", area / "work"
    layers = ("-l", area / "served", "-l", area / "lower", "-u", upper, "-w", work)
    try:
        mount = Outliving(place, "--session", "direct", "--io", io, layers=layers)
        shown = Mount(place.merged, 0, [area / "served", area / "lower"], upper, work, "direct")
        here = hung_calls.Place(area, server, shown)
        try:
            here.known()
            yield here, mount
        finally:
            here.end()
            areas.detach(place.merged)
    finally:
        server.go_on()
        server.end()


def next_daemon(mount: Outliving) -> None:
    """Kill the daemon, and wait for one that serves, whether or not that one's threads have returned."""
    before = mount.entry().pid
    os.kill(before, signal.SIGKILL)
    hung_calls.wait_until(lambda: mount.entry().pid != before, "no daemon took over")


@pytest.mark.parametrize("io", MODES)
def test_killed_while_a_lower_hangs(place: Place, io: str) -> None:
    """Another daemon serves at once what needs no call into the lower, also by open files; who waits for the
    lower can be killed, and gets a result when it answers again."""
    with hanging(place, io) as (here, mount):
        top = here.top
        with (
            (top / "only/read").open("rb", buffering=0) as of_served,
            (top / "both/other").open("rb", buffering=0) as of_lower,
            (top / "both/mine").open("r+b", buffering=0) as of_upper,
            (top / "own/gone").open("w+b", buffering=0) as unlinked,
        ):
            assert of_served.read(4) == b"read"
            unlinked.write(b"unlinked")
            (top / "own/gone").unlink()
            here.server.stop()
            waiting = [here.call(CALLS[name]) for name in ("look a name up", "chmod", "read")]
            for caller in waiting:
                here.waits(caller)
            for _ in range(3):
                next_daemon(mount)
                others_go_on(top)
                of_upper.seek(0)
                assert of_upper.read() == b"of the upper"
                of_lower.seek(0)
                os.posix_fadvise(of_lower.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert of_lower.read() == b"of the other lower"
                assert os.pread(unlinked.fileno(), 9, 0) == b"unlinked"
                assert sorted(os.listdir(top / "own")) == ["file"]
            is_named(here)
            succeed(unionfs("ls", "--json"))
            waiting[2].kill()
            waiting[2].wait(patient(20))
            os.pwrite(of_upper.fileno(), b"by", 0)
            assert (top / "both/mine").read_text() == "by the upper"
            here.server.go_on()
            assert waiting[0].wait(patient(60)) == 1
            assert waiting[1].wait(patient(60)) == 0
            assert of_served.read() == (b"read" * 20_000)[4:]
            assert sorted(os.listdir(top / "both")) == ["mine", "other", "slow"]
        here.let_go()
        mount.end()
        assert os.listdir(place.work / "work") == []
        succeed(unionfs("check", *mount.layers))


def test_killed_in_the_middle_of_a_call(place: Place) -> None:
    """The server has the request of a thread, which so does not end with the daemon."""
    with hanging(place, "hybrid", 0.1) as (here, mount):
        waiting = here.call(CALLS["look a name up"])
        here.waits(waiting)
        time.sleep(0.03)
        here.server.stop()
        for _ in range(2):
            next_daemon(mount)
            others_go_on(here.top)
        here.server.go_on()
        assert waiting.wait(patient(60)) == 1
        here.let_go()
        mount.end()


def test_unmounted_after_a_takeover(place: Place) -> None:
    """While the lower hangs, the upper is free afterwards."""
    with hanging(place, "hybrid") as (here, mount):
        here.server.stop()
        next_daemon(mount)
        others_go_on(here.top)
        here.let_go()
        mount.end()
        layers: tuple[str | Path, ...] = ("-l", place.root / "lower", *mount.layers[4:])
        succeed(unionfs("mount", *layers, place.merged))
        others_go_on(here.top)
        succeed(unionfs("umount", place.merged))
