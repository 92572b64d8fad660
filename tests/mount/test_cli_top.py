"""`unionfs top`: one table, JSON, and the live screen with its keys."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Place, succeed, unionfs
from tests.support import mounting
from tests.support.patience import patient


class Screen:
    """`unionfs top` on a terminal of 24 lines."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
        self.process = subprocess.Popen(
            [*mounting.command(), "top", "--seconds", "0.2", "--sort", "mountpoint"],
            stdin=slave, stdout=slave, stderr=slave, cwd="/", start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY), "TERM": "xterm", "COLUMNS": "160"},
        )  # fmt: skip
        os.close(slave)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the text of the screen has the pattern; returns what matched."""
        text, deadline = "", time.monotonic() + patient(20)
        while time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                text += os.read(self.master, 65536).decode(errors="replace")
                plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
                if found := re.search(pattern, plain, re.DOTALL):
                    return found[0]
        raise AssertionError((pattern, text))


@contextmanager
def _screen() -> Iterator[Screen]:
    screen = Screen()
    try:
        yield screen
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.master)


def _mine(place: Place, *words: str) -> dict[str, object]:
    found = json.loads(succeed(unionfs("top", "--json", "--seconds", "0.3", *words)))
    (mine,) = [one for one in found if one["mountpoint"] == str(place.merged)]
    return dict(mine)


def test_figures(place: Place, session: str) -> None:
    pid = place.mount(*cli_calls.session_words(session))
    (place.merged / "base").write_text("changed")
    quiet = _mine(place)
    assert (quiet["pid"], quiet["copy_ups"]) == (pid, 1)
    assert isinstance(quiet["memory"], int)
    space = os.statvfs(place.upper)
    assert isinstance(quiet["upper_free"], int)
    assert abs(quiet["upper_free"] - space.f_bavail * space.f_frsize) < 1 << 30
    with subprocess.Popen(
        ["sh", "-c", "while :; do mkdir d; rmdir d; done"], cwd=place.merged, stderr=subprocess.DEVNULL
    ) as busy:
        try:
            used = _mine(place)
        finally:
            busy.kill()
    assert isinstance(used["requests"], float)
    assert used["requests"] > 1
    assert isinstance(used["p99"], float)
    assert isinstance(used["p50"], float)
    assert 0 < used["p50"] <= used["p99"] < 10


def test_without_a_terminal(place: Place) -> None:
    place.mount()
    lines = succeed(unionfs("top", "--seconds", "0.1")).splitlines()
    assert lines[0].split()[:4] == ["MOUNTPOINT", "REQ/S", "P50", "P99"]
    assert any(line.split()[0] == str(place.merged) for line in lines[1:])


def test_a_daemon_that_does_not_answer(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, 19)
    try:
        mine = _mine(place)
        assert mine["requests"] is None
        assert mine["memory"] is None
    finally:
        os.kill(pid, 18)


def test_the_live_screen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mount()
    name = re.escape(str(place.merged)[-20:])
    with _screen() as screen:
        screen.wait_for(rf"sorted by mountpoint.*{name}")
        screen.press("f")
        screen.wait_for("sorted by upper free")
        screen.press("n")
        screen.wait_for("sorted by mountpoint")
        # Into each mount, one after the other, until it is this one.
        for _ in range(50):
            screen.press("\x1b[B\r")
            if re.search(name, screen.wait_for(r"REQUEST .*mountpoint *\S+")):
                break
            screen.press("\x1b")
            screen.wait_for("sorted by mountpoint")
        else:
            raise AssertionError("the mount was not found")
        screen.press("\x1b")
        screen.wait_for("sorted by mountpoint")
        screen.press("q")
        assert screen.process.wait(patient(10)) == 0
