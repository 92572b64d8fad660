"""A mount as a service of systemd: what sd_notify(3), sd_watchdog_enabled(3) and sd-daemon(3) say of it.

The manager is a real datagram socket, the journal a real stream socket.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import UNIONFS, Place
from tests.support.patience import patient

pytestmark = pytest.mark.usefixtures("root")
WATCHDOG_USEC = 200_000


class Service:
    """A mount in the foreground, and what it tells."""

    def __init__(
        self, place: Place, manager: socket.socket, stderr: int | None, *options: str, **more: str
    ) -> None:
        told = {"NOTIFY_SOCKET": str(place.root / "notify"), **more}
        environment = {"PYTHONPATH": str(cli_calls.REPOSITORY), **told}
        self.manager = manager
        self.process = subprocess.Popen(
            [*UNIONFS, "mount", "-f", *options, *map(str, place.layers), str(place.merged)],
            stderr=subprocess.DEVNULL if stderr is None else stderr, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )  # fmt: skip

    def told(self) -> list[str]:
        """The states of the next message, which must come from the daemon itself."""
        message, ancillary, _, _ = self.manager.recvmsg(1000, 100)
        assert struct.unpack("3i", ancillary[0][2])[0] == self.process.pid
        return message.decode().split("\n")

    def until(self, state: str) -> list[list[str]]:
        """The messages up to the one with a state that begins so."""
        messages = [self.told()]
        while not any(one.startswith(state) for one in messages[-1]):
            messages.append(self.told())
        return messages


@contextmanager
def service(place: Place, *options: str, stderr: int | None = None, **more: str) -> Iterator[Service]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        manager.settimeout(patient(20))
        (place.root / "notify").unlink(missing_ok=True)
        manager.bind(str(place.root / "notify"))
        made = Service(place, manager, stderr, *options, **more)
        try:
            yield made
        finally:
            made.process.kill()
            made.process.wait()
            subprocess.run(["umount", "-l", place.merged], check=False, capture_output=True)


def test_it_learns_when_the_mount_is_usable_and_when_it_ends(place: Place) -> None:
    with service(place) as mount:
        assert mount.told() == ["READY=1", f"STATUS=Mounted at {place.merged}"]
        assert (place.merged / "base").read_text() == "base\n"
        mount.process.terminate()
        assert mount.told() == ["STOPPING=1", f"STATUS=Unmounting {place.merged}"]
        last = mount.told()
        assert last[0] == "STOPPING=1"
        assert last[1].startswith("EXTEND_TIMEOUT_USEC=")
        assert last[2:] == [f"STATUS=Writing the upper of {place.merged} to disk"]
        assert mount.process.wait(patient(10)) == 0


def test_it_learns_what_the_end_waits_for(place: Place) -> None:
    with service(place) as mount:
        mount.until("READY=1")
        with (place.merged / "base").open():
            mount.process.terminate()
            (status,) = mount.until("STATUS=Unmounted")[-1]
            assert status == "STATUS=Unmounted, but in use: served for at most 60 seconds"
        assert mount.told()[0] == "STOPPING=1"
        assert mount.process.wait(patient(10)) == 0


def test_an_unmount_from_outside_is_told_too(place: Place) -> None:
    with service(place) as mount:
        mount.until("READY=1")
        subprocess.run(["umount", place.merged], check=True)
        assert mount.told()[0] == "STOPPING=1"
        assert mount.process.wait(patient(10)) == 0


def test_the_watchdog_hears_of_the_event_loop(place: Place) -> None:
    with service(place, WATCHDOG_USEC=str(WATCHDOG_USEC)) as mount:
        mount.until("READY=1")
        mount.until("WATCHDOG=1")
        assert [mount.told() for _ in range(3)] == [["WATCHDOG=1"]] * 3
        # A load does not silence it.
        for number in range(2000):
            (place.merged / f"new{number}").write_bytes(b"x")
        mount.until("WATCHDOG=1")


def test_a_daemon_that_hangs_is_silent_and_says_where_it_hung(place: Place) -> None:
    """As systemd would, it is ended by SIGABRT when nothing comes for the time of the watchdog."""
    reader, writer = os.pipe()
    with (
        os.fdopen(reader) as printed,
        service(place, stderr=writer, WATCHDOG_USEC=str(WATCHDOG_USEC)) as mount,
    ):
        os.close(writer)
        mount.until("READY=1")
        mount.until("WATCHDOG=1")
        mount.process.send_signal(signal.SIGSTOP)
        mount.manager.settimeout(10 * WATCHDOG_USEC / 1e6)
        with suppress(TimeoutError):
            mount.until("nothing")
        mount.process.send_signal(signal.SIGABRT)
        mount.process.send_signal(signal.SIGCONT)
        assert mount.process.wait(patient(20)) == -signal.SIGABRT
        text = printed.read()
        assert "Fatal Python error: Aborted" in text
        assert "in _read_requests" in text or "in run" in text


def test_a_watchdog_of_another_process_is_none(place: Place) -> None:
    with service(place, WATCHDOG_USEC=str(WATCHDOG_USEC), WATCHDOG_PID=str(os.getpid())) as mount:
        mount.until("READY=1")
        mount.process.terminate()
        assert [states for states in mount.until("STATUS=Writing") if states == ["WATCHDOG=1"]] == []


@pytest.mark.parametrize("value", ["", "0", "-5", "many", "1e6"])
def test_no_watchdog_by_a_value_that_is_none(place: Place, value: str) -> None:
    with service(place, WATCHDOG_USEC=value) as mount:
        assert mount.told()[0] == "READY=1"
        mount.process.terminate()
        assert mount.told()[0] == "STOPPING=1"


def test_a_manager_that_is_gone_ends_no_mount(place: Place) -> None:
    with service(place, WATCHDOG_USEC=str(WATCHDOG_USEC)) as mount:
        mount.until("READY=1")
        mount.manager.close()
        (place.merged / "new").write_bytes(b"x")
        mount.process.terminate()
        assert mount.process.wait(patient(20)) == 0


def _journal_of(place: Place, *options: str, right: bool = True) -> list[str]:
    """The lines of a mount that is terminated, whose stderr is a stream socket, as the journal's."""
    ours, its = socket.socketpair()
    status = os.fstat(its.fileno())
    number = status.st_ino if right else status.st_ino + 1
    with ours, service(
        place, *options, stderr=its.fileno(), JOURNAL_STREAM=f"{status.st_dev}:{number}"
    ) as mount:
        its.close()
        if "--bad" not in options:
            mount.until("READY=1")
            mount.process.terminate()
        mount.process.wait(patient(20))
        with ours.makefile() as lines:
            return lines.read().splitlines()


def test_the_journal_gets_priorities_and_no_times(place: Place) -> None:
    lines = _journal_of(place, "--log-level", "debug")
    assert f"<6>mounted at {place.merged}" in lines
    assert any(line.startswith("<7>setting ") for line in lines)
    assert all(re.match(r"<[0-7]>\S", line) for line in lines)


def test_the_journal_gets_errors_as_such(place: Place) -> None:
    lines = _journal_of(place, "--bad")
    assert lines
    assert all(line.startswith("<3>unionfs: ") for line in lines)


def test_any_other_stream_gets_times(place: Place) -> None:
    lines = _journal_of(place, "--log-level", "info", right=False)
    assert any(re.match(r"\d{4}-\d\d-\d\d .* unionfs INFO mounted at ", line) for line in lines)
    assert not any(line.startswith("<") for line in lines)
