"""A union over a lower whose server can be stopped, and an ordinary one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.mount.cli_calls import unionfs
from tests.support.mounting import Mount, is_mounted, mounted
from tests.support.patience import patient
from tests.support.worker import REPOSITORY

#: What needs the layer, as the body of a program; `p` is the mount point.
CALLS = {
    "look a name up": "os.stat(p + '/no such name')",
    "list": "os.listdir(p + '/only')",
    "read": "open(p + '/only/read', 'rb').read()",
    "chmod": "os.chmod(p + '/only/chmod', 0o600)",
    "write": "open(p + '/only/write', 'ab').write(b'more')",
    "remove": "os.unlink(p + '/only/remove')",
    "make": "open(p + '/only/new', 'xb').close()",
    "rename": "os.rename(p + '/only/rename', p + '/only/renamed')",
    "read a link": "os.readlink(p + '/only/link')",
    "read an xattr": "os.getxattr(p + '/only/xattr', 'user.any')",
    "count": "os.statvfs(p + '/only/statfs')",
}


#: Who does one of these holds a lock of the directory in the kernel, for which the others wait.
_KILLED = ("list", "read", "write", "remove", "rename")


class Remote(Protocol):
    """A filesystem whose server can be stopped."""

    def stop(self) -> None:
        """From now on calls into it wait."""

    def go_on(self) -> None:
        """They end again."""

    def end(self) -> None:
        """Unmount it."""


class Server:
    """The process of a FUSE filesystem that shows a directory."""

    def __init__(self, source: Path, target: Path, seconds: float = 0.0) -> None:
        self.target = target
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.served", source, target, str(seconds)], cwd=REPOSITORY
        )
        deadline = time.monotonic() + patient(20)
        while not is_mounted(target):
            assert self.process.poll() is None
            assert time.monotonic() < deadline, "it is not mounted"
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        subprocess.run(["umount", "-l", self.target], check=False)
        self.process.kill()
        self.process.wait()


class Place:
    """A union over a served lower and an ordinary one."""

    def __init__(self, area: Path, server: Remote, mount: Mount) -> None:
        self.area, self.server, self.mount, self.top = area, server, mount, mount.mountpoint
        self.callers: list[subprocess.Popen[bytes]] = []
        self.kept: list[int] = []

    def known(self) -> None:
        """Look up what a mount in use knows, and keep the kernel from forgetting it: other tests may make it
        free memory."""
        for name in ("both/other", "both/mine", "own/file", "only", "late/file"):
            self.kept.append(os.open(self.top / name, os.O_PATH))

    def call(self, body: str) -> subprocess.Popen[bytes]:
        """A process that does something on the mount."""
        script = f"import os, sys\np = sys.argv[1]\n{body}"
        caller = subprocess.Popen([sys.executable, "-c", script, self.top], stderr=subprocess.PIPE, cwd="/")
        self.callers.append(caller)
        return caller

    def waits(self, caller: subprocess.Popen[bytes]) -> None:
        """Wait until a process waits for the mount."""
        deadline = time.monotonic() + patient(20)
        while time.monotonic() < deadline:
            assert caller.poll() is None, caller.stderr and caller.stderr.read()
            where = Path(f"/proc/{caller.pid}/wchan").read_text()
            state = Path(f"/proc/{caller.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if "request_wait_answer" in where or state == "D":
                return  # for an answer, or for a lock that is held by one that waits
            time.sleep(0.01)
        raise AssertionError(f"it waits for {where!r}")

    def let_go(self) -> None:
        """End the use of the mount by this process."""
        while self.kept:
            os.close(self.kept.pop())

    def end(self) -> None:
        for caller in self.callers:
            caller.kill()
        self.server.go_on()
        for caller in self.callers:
            caller.wait(patient(20))
            if caller.stderr:
                caller.stderr.close()
        self.let_go()


def tree(top: Path, *, bare: bool = False) -> None:
    """What the served lower has; ``bare``: see :func:`standing`."""
    (top / "only").mkdir(parents=True)
    (top / "both").mkdir()
    for name in ("read", "chmod", "write", "remove", "rename", "xattr", "statfs"):
        (top / "only" / name).write_bytes(name.encode() * 20_000)
    (top / "both/slow").write_text("slow")
    if not bare:
        (top / "only/link").symlink_to("read")
        os.setxattr(top / "only/xattr", "user.any", b"value")


def wait_until(condition: Callable[[], object], complaint: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + patient(30)
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def prepare(area: Path, *, bare: bool = False) -> None:
    """Make the layers, and the directory at which one is served."""
    for name in ("served", "lower/both", "upper/own", "work"):
        (area / name).mkdir(parents=True, exist_ok=True)
    tree(area / "source", bare=bare)
    (area / "lower/both/other").write_text("of the other lower")
    (area / "lower/late").mkdir()
    (area / "lower/late/file").write_bytes(bytes(1 << 20))
    (area / "source/late").mkdir(mode=0o751)
    (area / "upper/both").mkdir()
    (area / "upper/both/mine").write_text("of the upper")
    (area / "upper/own/file").write_text("of the upper")


Start = Callable[[Path, Path], Remote]


@contextmanager
def standing(
    area: Path, session: str, seconds: float = 0.0, *, start: Start | None = None, bare: bool = False
) -> Iterator[Place]:
    """``start``: serves a directory at another one; without it a :class:`Server` with ``seconds``. ``bare``:
    without symlinks and xattrs, which not all filesystems show."""
    prepare(area, bare=bare)
    server: Remote
    if start is None:
        server = Server(area / "source", area / "served", seconds)
    else:
        server = start(area / "source", area / "served")
    try:
        with mounted(
            area, lowers=[area / "served", area / "lower"], upper=area / "upper", work=area / "work",
            session=session,
        ) as mount:  # fmt: skip
            place = Place(area, server, mount)
            try:
                yield place
            finally:
                place.end()
    finally:
        server.go_on()
        server.end()


def others_go_on(top: Path) -> None:
    """What needs no call into the served lower."""
    assert (top / "both/mine").read_text() == "of the upper"
    assert (top / "both/mine").stat().st_size == len("of the upper")
    (top / "both/mine").write_text("changed")
    assert (top / "both/mine").read_text() == "changed"
    (top / "both/mine").write_text("of the upper")
    (top / "own/new").mkdir()
    (top / "own/new/file").write_text("new")
    (top / "own/new/file").rename(top / "own/moved")
    assert sorted(os.listdir(top / "own")) == ["file", "moved", "new"]
    (top / "own/moved").unlink()
    (top / "own/new").rmdir()


def stopped(place: Place) -> None:
    """Stop the server of a mount in use."""
    place.known()
    place.server.stop()


def is_named(place: Place) -> None:
    """Wait until `inspect` says that the layer hangs."""
    wait_until(lambda: place.mount.inspect()["figures"]["hung_layers"], "no layer is named")
    assert list(place.mount.inspect()["figures"]["hung_layers"]) == [str(place.area / "served")]


def hangs_and_goes_on(place: Place) -> None:
    """The others go on, who waits can be killed, commands answer; later everything goes on."""
    stopped(place)
    killed = [place.call(CALLS[call]) for call in _KILLED]
    missing = place.call(CALLS["look a name up"])
    for caller in (*killed, missing):
        place.waits(caller)
    copying = place.call("os.chmod(p + '/late/file', 0o604)")
    for _ in range(20):
        others_go_on(place.top)
    is_named(place)
    for words in (["ls", "--json"], ["inspect", place.top], ["stats", place.top]):
        done = unionfs(*words)
        assert done.returncode == 0, done.stderr
    listed = json.loads(unionfs("ls", "--json").stdout)
    assert str(place.top) in [one["mountpoint"] for one in listed]
    for caller in killed:
        caller.kill()
    for caller in killed:
        caller.wait(patient(20))
    others_go_on(place.top)
    place.server.go_on()
    assert missing.wait(patient(60)) == 1
    assert copying.wait(patient(60)) == 0
    assert (place.area / "upper/late/file").read_bytes() == bytes(1 << 20)
    assert {"chmod", "read", "statfs", "xattr"} <= {*os.listdir(place.top / "only")}
    assert (place.top / "only/read").read_bytes() == b"read" * 20_000
    wait_until(lambda: not place.mount.inspect()["figures"]["hung_layers"], "a layer is still named")


def ends_while_it_hangs(place: Place, how: str = "--force") -> None:
    """`umount --force` (or ``how``) with callers; then the upper can be mounted again."""
    stopped(place)
    callers = [place.call(CALLS[call]) for call in ("look a name up", "read", "chmod")]
    for caller in callers:
        place.waits(caller)
    place.let_go()
    done = unionfs("umount", how, place.top)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(place.top)
    if how == "--lazy":  # it ends with its users
        for caller in callers:
            caller.kill()
    for caller in callers:
        assert caller.wait(patient(20)) != 0
    usable_again(place)


def usable_again(place: Place) -> None:
    """Nobody has the upper any more, whatever the layer does."""
    area = place.area
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work",
        session=place.mount.session, name="again",
    ) as mount:  # fmt: skip
        others_go_on(mount.mountpoint)
    place.server.go_on()
