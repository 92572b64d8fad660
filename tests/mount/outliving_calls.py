"""Mounts that outlive their daemons, and a load on them; see `test_outliving`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, gone, stopped, succeed, unionfs, wait_for
from tests.support.patience import patient
from unionfs.daemon import live
from unionfs.sys.process import children_of

MODES = ["hybrid", "passthrough", "cached"]
KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
RESENDS = pytest.mark.skipif(KERNEL < (6, 9), reason="FUSE_NOTIFY_RESEND needs Linux 6.9")


class Outliving:
    """A mount with a holder."""

    def __init__(
        self, place: Place, *options: str, layers: Sequence[str | Path] = (), deaths: int | None = 0
    ) -> None:
        """``deaths``: how many within a minute are too many; 0: none are, None: as many as by default."""
        self.place = place
        self.top = place.merged
        environment = {} if deaths is None else {"UNIONFS_DEATHS": str(deaths)}
        self.layers = layers or place.layers
        words = [*self.layers, "-o", "outlive", *options, place.merged]
        done = unionfs("mount", *words, env=environment)
        assert succeed(done) == ""
        self.last = self.entry()

    def entry(self) -> live.LiveMount:
        """The registry's entry of a daemon that serves it, when there is one."""
        found: list[live.LiveMount] = []

        def is_served() -> bool:
            found[:] = [
                one for one in live.live_mounts()
                if one.settings.mountpoint == str(self.top) and one.holder is not None
            ]  # fmt: skip
            return bool(found)

        assert wait_for(is_served, 60), "no daemon took over"
        return found[0]

    def kill(self) -> live.LiveMount:
        """Kill the daemon; returns the entry of the next one, which serves."""
        before = self.entry()
        os.kill(before.pid, signal.SIGKILL)
        assert wait_for(lambda: gone(before.pid))
        self.last = self.entry()
        assert self.last.pid != before.pid
        return self.last

    @contextmanager
    def without_daemon(self) -> Iterator[int]:
        """Kill the daemon; its holder starts no other one within the block. Yields the holder's pid."""
        pid, holder = self.processes()
        with stopped(holder):
            os.kill(pid, signal.SIGKILL)
            assert wait_for(lambda: gone(pid))
            yield holder

    def log(self) -> str:
        """The last lines of the daemons' log."""
        path = json.loads(succeed(unionfs("inspect", "--json", self.top)))["log"]
        lines = Path(path).read_text().splitlines() if os.path.exists(path) else [f"the log is {path}"]
        return "\n".join(lines[-40:])

    def processes(self) -> list[int]:
        assert self.last.holder is not None
        return [self.last.pid, self.last.holder[0]]

    def end(self) -> None:
        """Unmount it, and wait for its processes."""
        self.last = self.entry()
        succeed(unionfs("umount", "--lazy", self.top))  # another test's mount namespace may have a copy
        assert all(wait_for(lambda pid=pid: gone(pid)) for pid in self.processes())


@contextmanager
def load(place: Place, count: int, seed: int) -> Iterator[list[dict[str, object]]]:
    """Random operations on the mount, each compared with a native directory; yields a list that has their
    results at the end."""
    stop, native = place.root / "stop", place.root / "native"
    programs = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.support.twins", str(place.merged / f"w{number}"),
                str(native / f"w{number}"), str(seed * 100 + number), str(stop),
            ],
            stdout=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    results: list[dict[str, object]] = []
    try:
        yield results
        stop.touch()
        for program in programs:
            results.append(json.loads(program.communicate(timeout=patient(60))[0]))
    finally:
        for program in programs:
            program.kill()
            program.communicate()
        stop.unlink(missing_ok=True)


def fill(place: Place, count: int, io: str, lower: Path | None = None) -> None:
    """The same files in a lower and in the native directory. With passthrough in the upper: with a
    lower's file open, a copy-up would show, as docs/compliance.md says."""
    for root in (place.upper if io == "passthrough" else lower or place.lower, place.root / "native"):
        for number in range(count):
            deep = root / f"w{number}/a/b"
            deep.mkdir(parents=True)
            for name in "cdef":
                (deep.parents[1] / name).write_bytes(name.encode() * 3000)
                (deep.parent / name).write_bytes(b"x" * 200_000)
                (deep / name).write_bytes(b"y" * 10)


def storm(mount: Outliving, kills: int, seed: int) -> None:
    """Kill daemons at random moments, and sometimes those that are just taking over."""
    chosen = random.Random(seed)
    for _ in range(kills):
        entry = mount.entry()
        time.sleep(chosen.random() * 0.2)
        os.kill(entry.pid, signal.SIGKILL)
        kill_next(entry, chosen)
    mount.last = mount.entry()


def kill_next(entry: live.LiveMount, chosen: random.Random) -> None:
    """Wait for the end of a daemon that was killed; sometimes, kill the one that is just taking over, too."""
    assert wait_for(lambda: gone(entry.pid))
    if chosen.random() < 0.3 and entry.holder is not None:
        time.sleep(chosen.random() * 0.4)
        for pid in children_of(entry.holder[0]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def tree(root: Path) -> dict[str, object]:
    """Names, types and contents."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        what: object = path.lstat().st_mode
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_file():
            what = path.lstat().st_mode, path.lstat().st_nlink, path.read_bytes()
        found[str(path.relative_to(root))] = what
    return found
